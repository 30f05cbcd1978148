"""Fine-tune an SNN-BERT, or a BERT, on a GLUE task or on your own sentences, in a loop with Accelerate and no Trainer.

    python examples/run_glue_no_trainer.py --model_name_or_path outputs/distilled --task_name sst2 \\
        --data_dir glue_data --num_train_epochs 3 --output_dir outputs/sst2

Only the neurons' learning rate differs from a BERT's loop. `run_glue.py` does the same with Trainer, and has teachers,
text without labels and several seeds.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from glue_tasks import ClassifierArguments, Task, TaskArguments, fitting_length, measure_energy, score, tokenize
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, SchedulerType, get_scheduler
from transformers.hf_argparser import HfArg

from modeling_snn_bert.atomic_writes import write_json
from modeling_snn_bert.batches import RowBatches
from modeling_snn_bert.distillation import parameter_groups
from modeling_snn_bert.settings import refuse_given


@dataclass
class LoopArguments:
    """The loop."""

    output_dir: str = HfArg(help="folder for the model, checkpoints and results")
    learning_rate: float = 1e-4
    neuron_learning_rate: float | None = HfArg(default=None, help="of neurons (default: 10 times --learning_rate)")
    weight_decay: float = 0.01
    freeze_embeddings: bool = HfArg(default=False, help="keep the embeddings as they are")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped at this norm")
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_train_steps: int | None = HfArg(default=None, help="in place of epochs; 0 evaluates only")
    lr_scheduler_type: SchedulerType = SchedulerType.LINEAR
    num_warmup_steps: int = 0
    mixed_precision: str | None = HfArg(default=None, help="no, fp16 or bf16")
    seed: int = 0
    checkpointing_steps: int | None = HfArg(default=None, help="save a checkpoint every so many steps")
    resume_from_checkpoint: str | None = HfArg(default=None, help="a folder step_N of a run like this")
    energy_samples: int = HfArg(default=256, help="dev rows that energy is measured on; 0 for none")


def main() -> None:
    parser = HfArgumentParser([ClassifierArguments, TaskArguments, LoopArguments], description=__doc__)
    model_args, task_args, args = parser.parse_args_into_dataclasses()
    if not model_args.convert:
        refuse_given(parser, ["firing_rate"], "needs --convert")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    model_args.check()
    set_seed(args.seed)
    task, rows = task_args.load()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    collate = DataCollatorWithPadding(tokenizer)
    with accelerator.main_process_first():
        length = fitting_length(task_args.max_seq_length, tokenizer, model_args.model_name_or_path)
        data = {split: tokenize(part, task, tokenizer, length) for split, part in rows.items()}
    model = model_args.load(task, data["train"], collate, accelerator.device).train()

    model.base_model.embeddings.requires_grad_(not args.freeze_embeddings)
    process, processes = accelerator.process_index, accelerator.num_processes
    batch_of = RowBatches(
        data["train"], collate, args.per_device_train_batch_size, args.seed, part=process, parts=processes
    )
    steps = args.max_train_steps
    if steps is None:
        steps = max(1, math.ceil(args.num_train_epochs * batch_of.per_epoch / args.gradient_accumulation_steps))
    groups = parameter_groups(
        model, args.learning_rate, neuron_learning_rate=args.neuron_learning_rate, weight_decay=args.weight_decay
    )
    optimizer = torch.optim.AdamW(groups, fused=accelerator.device.type in ("cpu", "cuda"))
    # A prepared schedule takes a step for each process.
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.num_warmup_steps * processes,
        num_training_steps=max(1, steps * processes),
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    done = 0
    if args.resume_from_checkpoint:
        # What batch comes next follows from the step alone; the rest is in the checkpoint.
        done = int(Path(args.resume_from_checkpoint).name.removeprefix("step_"))
        accelerator.load_state(args.resume_from_checkpoint)
    progress = tqdm(total=steps, initial=done, unit="step", disable=not accelerator.is_local_main_process)
    for number in range(done * args.gradient_accumulation_steps, steps * args.gradient_accumulation_steps):
        batch = {name: x.to(accelerator.device) for name, x in batch_of(number).items()}
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.4f}")
            if args.checkpointing_steps and done % args.checkpointing_steps == 0:
                accelerator.save_state(str(Path(args.output_dir) / f"step_{done}"))
    progress.close()

    validation = {split: part for split, part in data.items() if split != "train"}
    metrics: dict[str, float] = {}
    for split, part in validation.items():
        loader = DataLoader(part, batch_size=args.per_device_eval_batch_size, collate_fn=collate)
        figures = evaluate(accelerator, model, loader, task)
        metrics |= {f"{split}_{name}": value for name, value in figures.items()}
    model = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        first = next(iter(validation.values()))
        energy = measure_energy(model, first, collate, args.energy_samples, args.per_device_eval_batch_size)
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        flags = {**asdict(model_args), **asdict(task_args), **asdict(args)}
        results = {"task": task.name, "steps": done, "metrics": metrics, "energy": energy, "arguments": flags}
        write_json(Path(args.output_dir) / "all_results.json", results)
        print(f"{task.name}, step {done}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, rows: DataLoader, task: Task) -> dict[str, float]:
    """The task's figures on `rows`, from all processes."""
    model.eval()
    logits, labels = [], []
    for batch in accelerator.prepare(rows):
        # Gathered in float32, because not every backend gathers bfloat16.
        found = accelerator.gather_for_metrics((model(**batch).logits.float(), batch["labels"]))
        logits += found[0].tolist()
        labels += found[1].tolist()
    return score(task, logits, labels)


if __name__ == "__main__":
    main()
