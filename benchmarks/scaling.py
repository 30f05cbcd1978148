"""What pre-training on many devices takes: memory, traffic, time and disk, worked out from a model's shapes.

    python benchmarks/run.py training --sections step_mlm_384       measures a step on this machine's CPU,
    python benchmarks/run.py gpu --sections masked_lm               or on its GPU; then
    python benchmarks/scaling.py --measured outputs/benchmarks/training-step_mlm_384.json

    python benchmarks/scaling.py --tokens_per_second 10000          without a measurement

The speed of one device is all that is measured, and this script only reads it. Parameters are counted on the model
itself (masked language modelling), bytes follow from shapes and dtypes: float32 weights, gradients and AdamW moments,
bfloat16 autocast. A star marks each number that rests on an assumption. `docs/scaling.md` explains the figures.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from report import Assumed, Table
from training import MASKED_LM, Shape, model_config

from modeling_snn_bert import SNNBertConfig, SNNBertForMaskedLM

GB = 10**9
FLOAT32, BFLOAT16 = 4, 2
# Weights, gradients, and AdamW's two moments.
STATE_BYTES = 4 * FLOAT32
# What a checkpoint holds: weights and moments.
CHECKPOINT_BYTES = 3 * FLOAT32
SUBJECT = "snn_bert"
BATCH_SIZE, LENGTH = 64, 128


@dataclass(frozen=True)
class Speed:
    """What one device does; `measured` says how that is known, and is empty where it is assumed."""

    batch_size: int
    length: int
    tokens_per_second: float
    measured: str = ""


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


def measured_speeds(path: Path) -> list[tuple[SNNBertConfig, Speed]]:
    """Every model whose step of masked language modelling was measured in a file of `run.py`, with its speed.

    Raises:
        ValueError: if the file is none of `run.py`, or holds no such step.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        tables, quick, machine = result["tables"], result["settings"]["quick"], result["environment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file that `benchmarks/run.py` wrote: {error!r}") from error
    if quick:
        raise ValueError(f"{path} comes from `--quick`, which measures nothing")
    device = "" if result["benchmark"] == "gpu" else f" on {machine['cpu']}, {machine['threads']} threads"
    speeds = []
    for table in tables:
        for row in table["rows"]:
            if row.get("subject") == SUBJECT and row.get("variant") == MASKED_LM and "milliseconds" in row:
                shape = Shape(**row["shape"])
                tokens = shape.batch_size * shape.length / (row["milliseconds"]["median"] / 1e3)
                speed = Speed(shape.batch_size, shape.length, tokens, f"{table['title']}{device}")
                speeds.append((model_config(SUBJECT, shape), speed))
    if not speeds:
        raise ValueError(
            f"{path} holds no step of {SUBJECT} in masked language modelling: run `benchmarks/run.py training "
            "--sections step_mlm_384`, or `gpu --sections masked_lm` on a GPU"
        )
    return speeds


def scaling_table(config: SNNBertConfig, speed: Speed, args: argparse.Namespace) -> Table:
    """One row per number of devices. What rests on `args`, or on a speed that was not measured, is `Assumed`."""
    sizes = sizes_of(config)
    tokens = args.text_gigabytes * GB / args.bytes_per_token * args.epochs
    per_step = speed.batch_size * speed.length
    # With 15% of the tokens masked, the logits of the others could be left out; the model computes all.
    activations = per_step * (sizes.activation_bytes + sizes.logit_bytes)
    state = STATE_BYTES * sizes.parameters
    table = Table(
        f"{sizes.parameters / 1e6:.1f} M parameters, {speed.batch_size} x {speed.length} tokens a device and step, "
        f"{speed.tokens_per_second:,.0f} tokens/s a device ({'measured' if speed.measured else 'assumed*'})",
        {
            "devices": "devices",
            "tokens_per_second": "tokens / s",
            "hours": "hours",
            "ddp_gigabytes": "DDP, GB a device",
            "zero2_gigabytes": "ZeRO-2, GB a device",
            "fsdp_gigabytes": "FSDP, GB a device",
            "traffic_gigabytes": "DDP sends, GB a step",
            "fsdp_traffic_gigabytes": "FSDP sends",
            "link_gigabytes_per_second": "GB / s that hides DDP's",
            "read_megabytes_per_second": "tokens read, MB / s in all",
        },
        notes=[
            f"* rests on an assumption: {args.bytes_per_token:g} bytes a token, so {tokens / 1e9:.1f} G tokens "
            f"of {args.text_gigabytes:g} GB; {args.efficiency:g} of the speed left on many devices; a backward pass of "
            "two thirds of a step" + ("." if speed.measured else "; and the tokens/s of one device."),
            f"Under bfloat16 autocast activations take {activations / GB:.2f} GB a device, of which logits "
            f"{per_step * sizes.logit_bytes / GB:.2f}. A checkpoint: weights {FLOAT32 * sizes.parameters / GB:.2f} GB, "
            f"with the optimiser's state {CHECKPOINT_BYTES * sizes.parameters / GB:.2f} GB. Tokens on disk, two bytes "
            f"each: {2 * tokens / args.epochs / GB:.1f} GB*.",
        ],
    )
    if speed.measured:
        table.notes.insert(0, f"Measured: {speed.measured}.")
    for devices in args.devices:
        efficiency = args.efficiency if devices > 1 else 1.0
        total = devices * speed.tokens_per_second * efficiency
        known = float if devices == 1 and speed.measured else Assumed
        # In a ring each device sends, and receives, this share of what is reduced or gathered.
        share = (devices - 1) / devices
        # The backward pass takes about two thirds of a step, and the gradients travel during it.
        backward_seconds = 2 / 3 * per_step / speed.tokens_per_second
        traffic = 2 * share * FLOAT32 * sizes.parameters
        table.rows.append(
            {
                "devices": devices,
                "tokens_per_second": known(total),
                "hours": Assumed(tokens / total / 3600),
                "ddp_gigabytes": (state + activations) / GB,
                # Whole weights in bfloat16; of the rest, float32 weights among it, a share.
                "zero2_gigabytes": (BFLOAT16 * sizes.parameters + state / devices + activations) / GB,
                # A share of all, and two units whole: the one at work and the next.
                "fsdp_gigabytes": (state / devices + 2 * BFLOAT16 * sizes.largest_unit + activations) / GB,
                "traffic_gigabytes": traffic / GB,
                # The weights are gathered in bfloat16, forward and backward; the gradients are reduced in bfloat16.
                "fsdp_traffic_gigabytes": 3 * share * BFLOAT16 * sizes.parameters / GB,
                "link_gigabytes_per_second": Assumed(traffic / backward_seconds / GB) if devices > 1 else 0.0,
                "read_megabytes_per_second": known(2 * total / 10**6),
            }
        )
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speed = parser.add_mutually_exclusive_group(required=True)
    speed.add_argument("--measured", type=Path, help="JSON of benchmarks/run.py: takes model, batch and speed from it")
    speed.add_argument("--tokens_per_second", type=float, help="of one device; counts as assumed")
    parser.add_argument("--model_name_or_path", help="configuration: folder or Hub id (default: 12 x 768)")
    parser.add_argument("--batch_size", type=int, help=f"sequences a device and step (default: {BATCH_SIZE})")
    parser.add_argument("--length", type=int, help=f"tokens of a sequence (default: {LENGTH})")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--text_gigabytes", type=float, default=100.0)
    parser.add_argument("--bytes_per_token", type=float, default=4.5, help="of your text under your tokenizer")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--efficiency", type=float, default=0.9, help="share of the speed that is left on many devices")
    args = parser.parse_args()
    for name in ("tokens_per_second", "batch_size", "length", "text_gigabytes", "bytes_per_token", "epochs"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be positive, got {value}")
    if not all(devices > 0 for devices in args.devices):
        parser.error(f"--devices must be positive, got {args.devices}")
    if not 0 < args.efficiency <= 1:
        parser.error(f"--efficiency must lie in (0, 1], got {args.efficiency}")
    if args.measured is not None:
        for name in ("model_name_or_path", "batch_size", "length"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} comes from the file of --measured: leave it out")
    return args


def main() -> None:
    args = parse_args()
    if args.measured is not None:
        try:
            speeds = measured_speeds(args.measured)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    else:
        name = args.model_name_or_path
        config = SNNBertConfig() if name is None else SNNBertConfig.from_pretrained(name)
        speeds = [(config, Speed(args.batch_size or BATCH_SIZE, args.length or LENGTH, args.tokens_per_second))]
    for config, speed in speeds:
        print(scaling_table(config, speed, args).markdown())


if __name__ == "__main__":
    main()
