"""What pre-training on many devices takes: memory, traffic, time and disk, worked out from a model's shapes.

    python benchmarks/scaling.py --tokens_per_second 10000
    python benchmarks/scaling.py --model_name_or_path hub_configs/snn-bert-small --tokens_per_second 10000

Nothing is measured here. The speed of one device has to be given: it is batch x length / seconds of a step, from
`benchmarks/run.py gpu` on a GPU and `benchmarks/run.py training` on a CPU. Parameters are counted on the model itself
(masked language modelling), bytes follow from shapes and dtypes: float32 weights, gradients and AdamW moments, bfloat16
autocast. `docs/scaling.md` explains the figures.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from report import Table

from modeling_snn_bert import SNNBertConfig, SNNBertForMaskedLM

GB = 10**9
FLOAT32, BFLOAT16 = 4, 2
# Weights, gradients, and AdamW's two moments.
STATE_BYTES = 4 * FLOAT32
# What a checkpoint holds: weights and moments.
CHECKPOINT_BYTES = 3 * FLOAT32


@dataclass(frozen=True)
class Sizes:
    """Counts of a model: all parameters, those of its largest unit of FSDP, and bytes that a token leaves behind."""

    parameters: int
    largest_unit: int
    activation_bytes: int
    logit_bytes: int


def sizes_of(config: SNNBertConfig) -> Sizes:
    """Count on a model without memory, built from `config`."""
    with torch.device("meta"):
        model = SNNBertForMaskedLM(config)
    units = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    return Sizes(
        sum(p.numel() for p in model.parameters()),
        max(sum(p.numel() for p in unit.parameters()) for unit in units),
        config.num_hidden_layers * layer_activation_bytes(config),
        # Logits in bfloat16, and in float32 for the loss, with its gradient.
        config.vocab_size * (BFLOAT16 + 2 * FLOAT32),
    )


def layer_activation_bytes(config: SNNBertConfig) -> int:
    """What one token leaves for the backward pass of a layer, under bfloat16 autocast and with fused attention."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    signs = 2 if config.spike_type == "ternary" else 1
    # A neuron keeps its current: two of them a LayerNorm's result, five what a product or the attention gives.
    currents = 2 * hidden * FLOAT32 + (4 * hidden + intermediate) * BFLOAT16
    # Of all spikes one bit each.
    spikes = signs * math.ceil((6 * hidden + intermediate) / 8)
    # What the norms take in, with mean and deviation; the masks of the dropout in front of them.
    norms = 2 * (hidden + 2) * FLOAT32 + 2 * hidden
    # The attention's result, and a number per head.
    attention = hidden * BFLOAT16 + config.num_attention_heads * FLOAT32
    return config.num_timesteps * (currents + spikes + norms + attention)


def scaling_table(config: SNNBertConfig, args: argparse.Namespace) -> Table:
    """One row per number of devices."""
    sizes = sizes_of(config)
    tokens = args.text_gigabytes * GB / args.bytes_per_token * args.epochs
    per_step = args.batch_size * args.length
    # With 15% of the tokens masked, the logits of the others could be left out; the model computes all.
    activations = per_step * (sizes.activation_bytes + sizes.logit_bytes)
    state = STATE_BYTES * sizes.parameters
    table = Table(
        "scaling",
        f"{sizes.parameters / 1e6:.1f} M parameters, {args.batch_size} x {args.length} tokens a device and step, "
        f"{tokens / 1e9:.1f} G tokens, {args.tokens_per_second:g} tokens/s a device",
        {
            "devices": "devices",
            "tokens_per_second": "tokens / s",
            "hours": "hours",
            "ddp_gigabytes": "DDP, GB a device",
            "zero2_gigabytes": "ZeRO-2, GB a device",
            "fsdp_gigabytes": "FSDP, GB a device",
            "traffic_gigabytes": "DDP traffic, GB a device and step",
            "fsdp_traffic_gigabytes": "FSDP traffic",
            "link_gigabytes_per_second": "GB / s that hides DDP's traffic",
            "read_megabytes_per_second": "tokens read, MB / s in all",
        },
        notes=[
            f"Activations {activations / GB:.2f} GB a device, of which logits {per_step * sizes.logit_bytes / GB:.2f}. "
            f"A checkpoint: weights {FLOAT32 * sizes.parameters / GB:.2f} GB, with the optimiser's state "
            f"{CHECKPOINT_BYTES * sizes.parameters / GB:.2f} GB. Tokens on disk, two bytes each: "
            f"{2 * tokens / args.epochs / GB:.1f} GB. Efficiency {args.efficiency:g} from one device to many.",
        ],
    )
    for devices in args.devices:
        efficiency = args.efficiency if devices > 1 else 1.0
        speed = devices * args.tokens_per_second * efficiency
        # In a ring each device sends, and receives, this share of what is reduced or gathered.
        share = (devices - 1) / devices
        # The backward pass takes about two thirds of a step, and the gradients travel during it.
        backward_seconds = 2 / 3 * per_step / args.tokens_per_second
        traffic = 2 * share * FLOAT32 * sizes.parameters
        table.rows.append(
            {
                "devices": devices,
                "tokens_per_second": speed,
                "hours": tokens / speed / 3600,
                "ddp_gigabytes": (state + activations) / GB,
                # Whole weights in bfloat16; of the rest, float32 weights among it, a share.
                "zero2_gigabytes": (BFLOAT16 * sizes.parameters + state / devices + activations) / GB,
                # A share of all, and two units whole: the one at work and the next.
                "fsdp_gigabytes": (state / devices + 2 * BFLOAT16 * sizes.largest_unit + activations) / GB,
                "traffic_gigabytes": traffic / GB,
                # The weights are gathered in bfloat16, forward and backward; the gradients are reduced in bfloat16.
                "fsdp_traffic_gigabytes": 3 * share * BFLOAT16 * sizes.parameters / GB,
                "link_gigabytes_per_second": traffic / backward_seconds / GB,
                "read_megabytes_per_second": 2 * speed / 10**6,
            }
        )
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens_per_second", type=float, required=True, help="of one device, measured (see above)")
    parser.add_argument("--model_name_or_path", help="configuration: folder or Hub id (default: 12 x 768)")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--text_gigabytes", type=float, default=100.0)
    parser.add_argument("--bytes_per_token", type=float, default=4.5, help="of your text under your tokenizer")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=64, help="sequences a device and step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--efficiency", type=float, default=0.9, help="share of the speed that is left on many devices")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name != "model_name_or_path" and not all(x > 0 for x in (value if isinstance(value, list) else [value])):
            parser.error(f"--{name} must be positive, got {value}")
    if args.efficiency > 1:
        parser.error(f"--efficiency must be at most 1, got {args.efficiency}")
    return args


def main() -> None:
    args = parse_args()
    name = args.model_name_or_path
    config = SNNBertConfig() if name is None else SNNBertConfig.from_pretrained(name)
    print(scaling_table(config, args).markdown())


if __name__ == "__main__":
    main()
