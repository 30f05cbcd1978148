"""The training loop that the Accelerate scripts share: optimiser, schedule, checkpoints, logs and results.

A run that is resumed from a checkpoint goes on exactly where it stopped: weights, optimiser, schedule and random states
are Accelerate's, and the data follow from the seed and the step alone.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import accelerate
import datasets
import huggingface_hub
import torch
import transformers
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    get_scheduler,
    get_wsd_schedule,
)

import modeling_snn_bert
from modeling_snn_bert.distillation import parameter_groups

Batch = dict[str, torch.Tensor]
STATE_FILE = "loop_state.json"


def add_loop_arguments(parser: argparse.ArgumentParser, *, learning_rate: float, max_train_steps: int | None) -> None:
    """The flags of optimiser, schedule, checkpoints, logs, and of the Hub."""
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, required=True, help="folder for the model, checkpoints and results")
    group.add_argument("--learning_rate", type=float, default=learning_rate, help=f"default: {learning_rate:g}")
    group.add_argument("--neuron_learning_rate", type=float, help="of thresholds, decays, resets (default: 10 times)")
    group.add_argument("--weight_decay", type=float, default=0.01)
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped at this norm")
    group.add_argument("--per_device_train_batch_size", type=int, default=32)
    group.add_argument("--per_device_eval_batch_size", type=int, default=32)
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--max_train_steps", type=int, default=max_train_steps, help="0 evaluates the model as it is")
    group.add_argument(
        "--lr_scheduler_type",
        type=SchedulerType,
        default=SchedulerType.LINEAR,
        help="linear, cosine, constant_with_warmup, ...; warmup_stable_decay holds the rate until the last "
        "--num_decay_steps, so that a run can be resumed with another --max_train_steps before the decay begins",
    )
    group.add_argument("--num_warmup_steps", type=int, default=0)
    group.add_argument("--num_decay_steps", type=int, help="of warmup_stable_decay (default: a fifth of all steps)")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as `accelerate config` says")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory for more time")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--checkpointing_steps", type=int, help="save a checkpoint every so many steps")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep only so many of the newest checkpoints")
    group.add_argument("--resume_from_checkpoint", type=Path, help="a folder step_N of --output_dir")
    group.add_argument("--logging_steps", type=int, default=10)
    group.add_argument("--eval_steps", type=int, help="evaluate every so many steps (default: at the end)")
    group.add_argument("--with_tracking", action="store_true", help="log to an experiment tracker too")
    group.add_argument("--report_to", default="all", help="tensorboard, wandb, trackio, ... with --with_tracking")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id", help="repository on the Hub (default: name of --output_dir)")
    group.add_argument("--hub_token", help="token of the Hub (default: that of `hf auth login`)")


def check_loop_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a clear message if a number is outside its range or a checkpoint is none."""
    at_least_one = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    at_least_one += "checkpointing_steps checkpoints_total_limit logging_steps eval_steps num_decay_steps"
    for name in at_least_one.split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    for name in ("learning_rate", "neuron_learning_rate", "max_grad_norm"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    for name in ("max_train_steps", "num_warmup_steps", "weight_decay"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name} must be >= 0, got {getattr(args, name)}")
    if args.num_decay_steps is not None and args.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
        parser.error("--num_decay_steps is a flag of --lr_scheduler_type warmup_stable_decay")
    if args.resume_from_checkpoint is not None and not (args.resume_from_checkpoint / STATE_FILE).is_file():
        parser.error(f"--resume_from_checkpoint: {args.resume_from_checkpoint} is not a checkpoint of these scripts")
    if args.push_to_hub and args.hub_token is None and huggingface_hub.get_token() is None:
        parser.error("--push_to_hub needs --hub_token, or a login by `hf auth login`")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator that the flags ask for."""
    return Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=str(args.output_dir),
    )


class TrainingLoop:
    """AdamW with the flags' schedule, gradients clipped, and everything that a run writes.

    Args:
        accelerator: from `make_accelerator`.
        model: what is trained.
        args: the flags of `add_loop_arguments`; `max_train_steps` must be set.
        loss_of: the loss of a batch, and figures to log with it.
        evaluate: the dev figures of the (unwrapped) model.
        tracker_name: name of the project in the trackers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        args: argparse.Namespace,
        loss_of: Callable[[PreTrainedModel, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
        evaluate: Callable[[PreTrainedModel], dict[str, float]],
        tracker_name: str,
    ) -> None:
        self.accelerator, self.args, self.loss_of, self.evaluate = accelerator, args, loss_of, evaluate
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        groups = parameter_groups(
            model,
            args.learning_rate,
            neuron_learning_rate=args.neuron_learning_rate,
            weight_decay=args.weight_decay,
        )
        optimizer = torch.optim.AdamW(groups, fused=accelerator.device.type in ("cpu", "cuda"))
        # An AcceleratedScheduler steps once per process, to make up for the batches that the processes share out.
        scheduler = make_scheduler(args, optimizer, accelerator.num_processes)
        self.model, self.optimizer, self.scheduler = accelerator.prepare(model, optimizer, scheduler)
        self.step, self.seconds = 0, 0.0
        # Counted on the device: reading the number after each batch would make the processor wait for the GPU.
        self._tokens = torch.zeros((), dtype=torch.long, device=accelerator.device)
        self.log: list[dict] = []
        if args.with_tracking:
            # Trackers take numbers and strings only.
            flags = {k: v if isinstance(v, int | float) else str(v) for k, v in flags_of(args).items()}
            accelerator.init_trackers(tracker_name, flags)
        if args.resume_from_checkpoint is not None:
            self._load(args.resume_from_checkpoint)

    def run(self, batch_of: Callable[[int], Batch], description: str) -> None:
        """Train until `max_train_steps`; `batch_of(n)` is this process' batch number `n`, counted over the whole run.

        Raises:
            ValueError: if the checkpoint that was resumed from is beyond `max_train_steps`.
            RuntimeError: if the loss is no longer finite.
        """
        args, accelerator = self.args, self.accelerator
        if self.step > args.max_train_steps:
            raise ValueError(f"the checkpoint is at step {self.step}, beyond --max_train_steps {args.max_train_steps}")
        accumulate = args.gradient_accumulation_steps
        started = time.perf_counter() - self.seconds
        progress = tqdm(
            total=args.max_train_steps,
            initial=self.step,
            desc=description,
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        sums: dict[str, torch.Tensor] = {}
        since = 0
        while self.step < args.max_train_steps:
            for number in range(self.step * accumulate, (self.step + 1) * accumulate):
                batch = {name: x.to(accelerator.device) for name, x in batch_of(number).items()}
                valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                self._tokens += accelerator.reduce(valid.sum(), reduction="sum")
                with accelerator.accumulate(self.model):
                    with accelerator.autocast():
                        loss, figures = self.loss_of(self.model, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                for name, value in {"loss": loss, **figures}.items():
                    sums[name] = sums.get(name, 0) + value.detach().float()
                since += 1
            self.step += 1
            progress.update()
            self.seconds = time.perf_counter() - started
            if self.step % args.logging_steps == 0 or self.step == args.max_train_steps:
                means = {name: self._mean(total / since) for name, total in sums.items()}
                if not all(map(torch.isfinite, map(torch.tensor, means.values()))):
                    raise RuntimeError(f"training has diverged at step {self.step}: {means}; try a lower learning rate")
                progress.set_postfix(loss=f"{means['loss']:.4f}")
                self._record({**means, "learning_rate": self.scheduler.get_last_lr()[0]})
                sums, since = {}, 0
            if args.eval_steps and self.step % args.eval_steps == 0:
                self._record_evaluation()
            if args.checkpointing_steps and self.step % args.checkpointing_steps == 0:
                self.seconds = time.perf_counter() - started
                self._save()
        if not self.last_evaluation():
            self._record_evaluation()
        progress.close()
        self.seconds = time.perf_counter() - started

    @property
    def tokens(self) -> int:
        """Valid tokens that all processes have trained on."""
        return int(self._tokens)

    def evaluate_now(self) -> dict[str, float]:
        """The dev figures, with the model's mode left as it was."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                return self.evaluate(model)
        finally:
            model.train(was_training)

    def last_evaluation(self) -> dict[str, float]:
        """The dev figures at the present step, by their names with `eval_`; empty if there are none."""
        last = self.log[-1] if self.log and self.log[-1]["step"] == self.step else {}
        return {name: value for name, value in last.items() if name.startswith("eval_")}

    def finish(self) -> PreTrainedModel:
        """End the trackers and return the trained model."""
        if self.args.with_tracking:
            self.accelerator.end_training()
        return self.accelerator.unwrap_model(self.model)

    def publish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, results_file: str, results: dict[str, object]
    ) -> None:
        """Write model, tokenizer and results to `output_dir`, and send them to the Hub if the flags ask for it.

        To `results` comes what every run has: parameters, steps, tokens, dev figures, flags, environment and log.
        """
        args = self.args
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        everything = {
            **results,
            "parameters": model.num_parameters(),
            "training_tokens": self.tokens,
            "steps": self.step,
            "evaluation": self.last_evaluation(),
            "arguments": flags_of(args),
            "environment": environment(self.accelerator.device),
            "log": self.log,
        }
        write_json(args.output_dir / results_file, everything)
        print(f"written to {args.output_dir}: model, tokenizer, {results_file}")
        if args.push_to_hub:
            push(args, model, tokenizer, args.output_dir.resolve().name)

    def _record_evaluation(self) -> None:
        figures = self.evaluate_now()
        self.accelerator.print(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        self._record({f"eval_{name}": value for name, value in figures.items()})

    def _mean(self, value: torch.Tensor) -> float:
        return self.accelerator.reduce(value, reduction="mean").item()

    def _record(self, figures: dict[str, float]) -> None:
        entry = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1), **figures}
        self.log.append(entry)
        if self.args.with_tracking:
            self.accelerator.log(figures, step=self.step)
        if self.accelerator.is_main_process:
            # A log to watch; what counts stands in the checkpoints and in the results.
            self.args.output_dir.mkdir(parents=True, exist_ok=True)
            with open(self.args.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _save(self) -> None:
        """Write `step_N`, whole or not at all."""
        folder = self.args.output_dir / f"step_{self.step}"
        partial = self.args.output_dir / f"partial_{self.step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "log": self.log}
        (partial / STATE_FILE).write_text(json.dumps(state))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        limit = self.args.checkpoints_total_limit
        if limit is not None:
            checkpoints = sorted(self.args.output_dir.glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
            for old in checkpoints[:-limit]:
                shutil.rmtree(old)

    def _load(self, folder: Path) -> None:
        state = json.loads((folder / STATE_FILE).read_text())
        self.step, self.seconds, self.log = (state[k] for k in ("step", "seconds", "log"))
        self._tokens.fill_(state["tokens"])
        self.accelerator.load_state(str(folder))


def make_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, num_processes: int):
    """The learning-rate schedule over the steps of one process, times `num_processes`."""
    warmup, total = args.num_warmup_steps * num_processes, args.max_train_steps * num_processes
    if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
        decay = args.num_decay_steps or max(1, args.max_train_steps // 5)
        return get_wsd_schedule(
            optimizer, warmup, min(decay, args.max_train_steps) * num_processes, total, decay_type="linear"
        )
    return get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total)


def push(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, default_id: str) -> None:
    """Send both to the repository of the flags, or to `default_id`."""
    for part in (model, tokenizer):
        part.push_to_hub(args.hub_model_id or default_id, token=args.hub_token)


def environment(device: torch.device) -> dict[str, object]:
    """Versions and machine, for the results."""
    return {
        "modeling_snn_bert": modeling_snn_bert.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def flags_of(args: argparse.Namespace) -> dict[str, object]:
    """The flags as JSON takes them, without secrets."""
    plain = (int, float, str, bool, list, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in vars(args).items() if k != "hub_token"}


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


class RowBatches:
    """Batches of tokenised rows in an order that follows from the seed and the step alone, anew in each epoch.

    Rows of like length go together, which saves padding; the last batch of an epoch may be smaller.

    Args:
        rows: a dataset with `input_ids`.
        collate: makes a batch of a list of rows.
        batch_size: rows that a process takes at a time.
        seed: seed of the order.
        part, parts: which of how many processes this is.
    """

    # Rows are sorted by length among so many batches.
    WINDOW = 20

    def __init__(self, rows, collate: Callable, batch_size: int, seed: int, part: int = 0, parts: int = 1) -> None:
        self.rows, self.collate, self.seed, self.part, self.parts = list(rows), collate, seed, part, parts
        self.global_batch_size = batch_size * parts
        self.per_epoch = math.ceil(len(self.rows) / self.global_batch_size)

    def batch(self, number: int) -> Batch:
        """This process' batch number `number`, counted from the first epoch on."""
        epoch, place = divmod(number, self.per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        indices = self._batches[place]
        # A last batch that the processes cannot share evenly is filled up with its own rows.
        indices = [indices[i % len(indices)] for i in range(math.ceil(len(indices) / self.parts) * self.parts)]
        return dict(self.collate([self.rows[i] for i in indices[self.part :: self.parts]]))

    def _order(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        size, window = self.global_batch_size, self.WINDOW * self.global_batch_size
        groups = [
            sorted(order[i : i + window], key=lambda row: len(self.rows[row]["input_ids"]))
            for i in range(0, len(order), window)
        ]
        batches = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class DrawnBatches:
    """Batches of rows that are drawn one by one and without end, which follow from the seed and the step alone.

    So many rows as fill `WINDOW` batches are drawn at a time, sorted by length and cut into batches, which saves
    padding; the batches come in a random order.

    Args:
        draw: draws a row with `input_ids`; all that is random in it comes from its argument.
        collate: makes a batch of a list of rows.
        batch_size: rows of a batch.
        seed: seed of the draws.
        part: number of this process; each draws rows of its own.
    """

    WINDOW = 16

    def __init__(
        self, draw: Callable[[random.Random], dict], collate: Callable, batch_size: int, seed: int, part: int = 0
    ) -> None:
        self.draw, self.collate, self.batch_size, self.seed, self.part = draw, collate, batch_size, seed, part

    def batch(self, number: int) -> Batch:
        """This process' batch number `number`, counted over the whole run."""
        window, place = divmod(number, self.WINDOW)
        if getattr(self, "_window", None) != window:
            self._window, self._batches = window, self._draw_window(window)
        return dict(self.collate(self._batches[place]))

    def _draw_window(self, window: int) -> list[list[dict]]:
        rng = random.Random(f"{self.seed}, {self.part}, {window}")
        rows = [self.draw(rng) for _ in range(self.WINDOW * self.batch_size)]
        rows.sort(key=lambda row: len(row["input_ids"]))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        rng.shuffle(batches)
        return batches
