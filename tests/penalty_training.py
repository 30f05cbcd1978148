r"""One step of Trainer with a firing rate target, for test_fine_tuning.py and test_distributed.py.

In several processes:

    ACCELERATE_USE_CPU=true accelerate launch --config_file examples/accelerate_configs/cpu.yaml \
        tests/penalty_training.py FOLDER

FOLDER gets a file for each head, `HEAD.safetensors`, with the step of each parameter. All rows have the same tokens, so
that the firing rates of every micro-batch are those of the whole batch; their labels differ, also in number.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from heads import HEADS
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from modeling_snn_bert import (
    SNNBertConfig,
)

NUM_ROWS, LENGTH = 8, 12


def build_model(head: str, firing_rate_target: float | None = 0.02) -> torch.nn.Module:
    """The same model in every process, whose firing rates are far above the target."""
    torch.manual_seed(0)
    config = SNNBertConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        firing_rate_target=firing_rate_target,
    )
    return HEADS[head](config).train()


def build_data(head: str) -> Dataset:
    """Rows of the same tokens and different labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 120, (2, LENGTH) if head == "choice" else (LENGTH,), generator=generator)
    ids = ids.expand(NUM_ROWS, *ids.shape)
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if head in ("masked_lm", "token"):
        labelled = torch.arange(LENGTH) < torch.randint(1, LENGTH, (NUM_ROWS, 1), generator=generator)
        columns["labels"] = torch.where(labelled, ids if head == "masked_lm" else ids % 2, -100)
    elif head == "question":
        columns["start_positions"], columns["end_positions"] = (
            torch.arange(NUM_ROWS) % 6,
            6 + torch.arange(NUM_ROWS) % 6,
        )
    else:
        columns["labels"] = torch.arange(NUM_ROWS) % 2
    return Dataset.from_dict({name: x.tolist() for name, x in columns.items()}).with_format("torch")


def one_step(
    head: str, folder: Path, batch: int, accumulation: int, firing_rate_target: float | None = 0.02
) -> dict[str, torch.Tensor]:
    """What a step of plain gradient descent at a rate of 1 adds to each parameter: its gradient, negative."""
    model = build_model(head, firing_rate_target)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=build_data(head)).train()
    return {name: x.detach() - before[name] for name, x in model.named_parameters()}


def main() -> None:
    folder = Path(sys.argv[1])
    for head in HEADS:
        # Two processes of two micro-batches of two rows see each row once.
        step = one_step(head, folder, NUM_ROWS // 4, 2)
        assert dist.get_world_size() == 2
        if dist.get_rank() == 0:
            save_file({name: x.contiguous() for name, x in step.items()}, folder / f"{head}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
