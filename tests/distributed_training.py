r"""A short training run in several processes on the CPU, for test_distributed.py.

    ACCELERATE_USE_CPU=true accelerate launch --config_file examples/accelerate_configs/cpu.yaml \
        tests/distributed_training.py ENGINE FOLDER [resume]

ENGINE is `ddp` (Accelerate) or `fsdp` (FSDP2 itself: Accelerate has it for GPUs only). Without `resume` three runs
follow each other: `plain`, whose loss can be compared with one process; `unbroken`, with dropout and a firing rate
target; and the same again, from which one process kills itself in the middle of a step. With `resume` that run is taken
up again from its last checkpoint. FOLDER gets the losses (`RUN.json`) and weights (`RUN.safetensors`) of each.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from modeling_snn_bert import SNNBertConfig, SNNBertForSequenceClassification

STEPS, STEPS_PER_EPOCH, GLOBAL_BATCH = 6, 4, 8
CHECKPOINT_AT, KILLED_IN = 3, 5


def build_model(dropout: bool) -> SNNBertForSequenceClassification:
    """The same model in every process; with or without dropout and a firing rate target."""
    torch.manual_seed(0)
    config = SNNBertConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.1,
        hidden_dropout_prob=0.1 if dropout else 0.0,
        attention_probs_dropout_prob=0.1 if dropout else 0.0,
        firing_rate_target=0.1 if dropout else None,
    )
    return SNNBertForSequenceClassification(config).train()


def build_data() -> list[dict]:
    """Random sentences of different lengths, padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 120, (STEPS_PER_EPOCH * GLOBAL_BATCH, 16), generator=generator)
    mask = (torch.arange(16) < torch.randint(4, 17, (len(ids), 1), generator=generator)).long()
    return [{"input_ids": i, "attention_mask": m, "labels": i[1] % 2} for i, m in zip(ids, mask, strict=True)]


def die_in_the_middle(step: int) -> None:
    """End the last process as the failure of its machine would."""
    if step == KILLED_IN and dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)


def shard(model: torch.nn.Module) -> None:
    """Spread the parameters over the processes, in the units that the model names."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def sharded_state(model, optimizer, schedule) -> dict:
    """What a checkpoint of a sharded run holds; the random numbers of each process under its rank."""
    weights, moments = get_state_dict(model, optimizer)
    rank = f"random_state_{dist.get_rank()}"
    return {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), rank: torch.get_rng_state()}


def train(
    engine: str, dropout: bool = False, checkpoint: Path | None = None, kill: bool = False, resume: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step over the global batch, and the weights after the last one."""
    configuration = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    model = build_model(dropout)
    # A generator of its own: each start of an epoch draws from it, and a resumed run starts one epoch more.
    loader = DataLoader(build_data(), batch_size=GLOBAL_BATCH, shuffle=True, generator=torch.Generator())
    loader = accelerator.prepare(loader)
    if engine == "fsdp":
        shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, STEPS)
    if engine == "ddp":
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    set_seed(1, device_specific=True)
    step = 0
    if resume:
        step = CHECKPOINT_AT
        if engine == "ddp":
            accelerator.load_state(checkpoint)
        else:
            state = sharded_state(model, optimizer, schedule)
            dcp.load(state, checkpoint_id=checkpoint)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            torch.set_rng_state(state[f"random_state_{dist.get_rank()}"])
    losses = []
    while step < STEPS:
        epoch, done = divmod(step, STEPS_PER_EPOCH)
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done) if done else loader:
            loss = model(**batch).loss
            if kill:
                die_in_the_middle(step)
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            step += 1
            if step == CHECKPOINT_AT and checkpoint is not None and not resume:
                if engine == "ddp":
                    accelerator.save_state(checkpoint)
                else:
                    dcp.save(sharded_state(model, optimizer, schedule), checkpoint_id=checkpoint)
            if step == STEPS:
                break
    weights = {name: x.detach() for name, x in accelerator.unwrap_model(model).named_parameters()}
    return losses, {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}


def main() -> None:
    engine, folder, resume = sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["resume"]
    checkpoint = folder / "checkpoint"
    runs = {
        "plain": {},
        "unbroken": {"dropout": True},
        "killed": {"dropout": True, "checkpoint": checkpoint, "kill": True},
    }
    if resume:
        runs = {"resumed": {"dropout": True, "checkpoint": checkpoint, "resume": True}}
    for name, settings in runs.items():
        losses, weights = train(engine, **settings)
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(losses))
            save_file({key: x.contiguous() for key, x in weights.items()}, folder / f"{name}.safetensors")
    # None takes its connections down while another is still at work.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
