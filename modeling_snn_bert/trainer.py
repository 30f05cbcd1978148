"""transformers' Trainer for an SNN-BERT: the neurons' own learning rate, and a BERT as the teacher."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import ModelOutput

from .atomic_writes import write_json
from .batches import Batch, Batches, Collate, Row
from .distillation import (
    attention_loss,
    embedding_loss,
    hidden_state_loss,
    label_and_logit_loss,
    logit_loss,
    parameter_groups,
    relation_loss,
)
from .muon import MuonAdamW
from .seeds import checkpoint_of, environment
from .sparsity import add_penalty
from .teacher_inputs import FOR_TEACHER, PLACES

# Losses on more than logits, each with its weight among the arguments.
WEIGHTS = ("hidden_weight", "attention_weight", "embedding_weight", "relation_weight")
# All arguments that do nothing without a teacher.
OF_TEACHER = ("logit_weight", "temperature", *WEIGHTS)

# What moves the parameters that are no matrices beside Muon.
ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass
class SNNBertTrainingArguments(TrainingArguments):
    """TrainingArguments with the learning rates of neurons and of Muon, and defaults that suit an SNN-BERT.

    A script trains and evaluates by default; `--no_do_train` evaluates the model as it is.
    """

    do_train: bool = HfArg(default=True, help="train")
    do_eval: bool = HfArg(default=True, help="evaluate at the end")
    learning_rate: float = HfArg(default=1e-4, help="of all but the neurons")
    neuron_learning_rate: float | None = HfArg(default=None, help="of neurons (default: 10 times --learning_rate)")
    muon_learning_rate: float | None = HfArg(
        default=None, help="share of their size by which Muon moves the weights that take spikes (default: AdamW does)"
    )
    weight_decay: float = HfArg(default=0.01, help="of the weights of Linears and embeddings")
    per_device_train_batch_size: int = HfArg(default=32, help="rows of a batch")
    per_device_eval_batch_size: int = HfArg(default=32, help="rows of a batch in evaluation")
    logging_steps: float = HfArg(default=10, help="log every so many steps")
    seed: int = HfArg(default=0, help="of everything that is random")
    include_num_input_tokens_seen: str = HfArg(default="non_padding", help="tokens to count: non_padding, all or no")
    logging_nan_inf_filter: bool = HfArg(default=False, help="leave out of the log what is not finite")
    freeze_embeddings: bool = HfArg(default=False, help="keep the embeddings as they are: less to learn, and to share")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.muon_learning_rate is not None:
            if not self.muon_learning_rate > 0:
                raise ValueError(f"`muon_learning_rate` must be positive, got {self.muon_learning_rate}")
            if self.optim not in ADAMW:
                raise ValueError(
                    f"beside `muon_learning_rate` `optim` must be one of {', '.join(ADAMW)}, got {self.optim}"
                )


@dataclass
class DistillationTrainingArguments(SNNBertTrainingArguments):
    """SNNBertTrainingArguments with the weights of the losses on what a teacher does."""

    logit_weight: float = HfArg(default=0.5, help="share of the teacher's logits in the loss; labels have the rest")
    temperature: float = HfArg(default=2.0, help="temperature of the logits' loss")
    hidden_weight: float = HfArg(default=0.0, help="weight of the loss on the teacher's hidden states")
    attention_weight: float = HfArg(default=0.0, help="weight of the loss on the teacher's attention weights")
    embedding_weight: float = HfArg(default=0.0, help="weight of the loss on the teacher's mean embeddings")
    relation_weight: float = HfArg(default=0.0, help="weight of the loss on relations between the teacher's tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in WEIGHTS:
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.logit_weight <= 1:
            raise ValueError(f"`logit_weight` must lie in [0, 1], got {self.logit_weight}")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}")

    @property
    def compares_states(self) -> bool:
        """Whether a loss compares states one by one, of a student and a teacher of the same shape and vocabulary."""
        return bool(self.hidden_weight or self.attention_weight or self.embedding_weight)


class DistillationTrainer(Trainer):
    """Trainer that teaches a model what a fine-tuned BERT does, beside its labels or in place of them.

    The loss is the sum of

    - the labels' loss and the loss on the teacher's logits, mixed by `logit_weight`; without labels in a batch, or
      without a head that takes them, it is the part that there is;
    - the losses on hidden states, attention weights and mean embeddings, and on the relations between the tokens of the
      last layer, each with its weight;
    - the penalty of `firing_rate_target`, if the student's configuration has one.

    The means of the parts since the last log are logged beside the loss. Without a teacher it is Trainer with
    `parameter_groups`, whose weights that take spikes `muon.MuonAdamW` moves if they have a learning rate of their own.

    Args:
        model: the student.
        args: the arguments; with a teacher, a `DistillationTrainingArguments`.
        teacher: a model that reads the student's inputs, or those inputs of a batch whose names begin with `teacher_`
            (see `teacher_inputs`). It has the student's shape if states or attention weights are taught; for the
            latter both are loaded with `attn_implementation="eager"`. It goes to the student's device, and stays as it
            is.
        figures_of: evaluates in place of Trainer: the figures of the model, which is in evaluation mode, by name.
        kwargs: those of Trainer. `train_dataset` may be a `batches.Batches`, which is gone through in its order; the
            arguments need `max_steps` then.

    Raises:
        ValueError: if a weight asks for a teacher and there is none, or Muon for matrices that are in pieces.
    """

    args: DistillationTrainingArguments
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        args: SNNBertTrainingArguments,
        *,
        teacher: PreTrainedModel | None = None,
        figures_of: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in WEIGHTS:
            if teacher is None and getattr(args, name, False):
                raise ValueError(f"`{name}` needs a teacher")
        if args.freeze_embeddings:
            model.base_model.embeddings.requires_grad_(False)
        if figures_of is not None:
            kwargs.setdefault("eval_dataset", [])  # Trainer asks for one
        super().__init__(model, args, **kwargs)
        self.teacher, self.figures_of = teacher, figures_of
        if teacher is not None:
            teacher.to(args.device).eval().requires_grad_(False)
        if args.muon_learning_rate is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "`muon_learning_rate` needs whole matrices in each process: FSDP and DeepSpeed cut them up"
            )
        # Each loss is a mean over its batch, which Trainer is to divide by the accumulated batches; a BERT's classifier
        # says otherwise of itself.
        self.model_accepts_loss_kwargs = False
        self._parts: dict[str, list[torch.Tensor]] = {}

    def get_train_dataloader(self) -> DataLoader:
        """As they are, the batches of a `Batches`; else Trainer's."""
        if not isinstance(self.train_dataset, Batches):
            return super().get_train_dataloader()
        # Each process has batches of its own already, so that there is nothing to share out.
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            collate_fn=_the_one,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimiser of the arguments, with `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(
                self.model,
                self.args.learning_rate,
                neuron_learning_rate=self.args.neuron_learning_rate,
                weight_decay=self.args.weight_decay,
                muon_learning_rate=self.args.muon_learning_rate,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if self.args.muon_learning_rate is not None:
                optimizer_class = MuonAdamW
            self.optimizer = optimizer_class(groups, **{k: v for k, v in options.items() if k != "lr"})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """The losses of a training batch; an evaluation has the labels' loss."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        extras = {
            "output_hidden_states": any(getattr(self.args, name) for name in WEIGHTS if name != "attention_weight"),
            "output_attentions": self.args.attention_weight > 0,
        }
        with torch.no_grad():
            wanted = self.ask_teacher(inputs, **extras)
        outputs = model(**{name: x for name, x in inputs.items() if not name.startswith(FOR_TEACHER)}, **extras)
        loss = self.add_losses(outputs, wanted, inputs)
        return (loss, outputs) if return_outputs else loss

    def ask_teacher(self, inputs: Batch, **extras: bool) -> ModelOutput:
        """What the teacher makes of a batch: of what is there for it, `FOR_TEACHER`, or else of all but the labels."""
        assert self.teacher is not None
        own = {name.removeprefix(FOR_TEACHER): x for name, x in inputs.items() if name.startswith(FOR_TEACHER)}
        own.pop(PLACES, None)
        inputs = own or {name: x for name, x in inputs.items() if name != "labels"}
        # Trainer puts its model alone in autocast.
        with self.accelerator.autocast():
            return self.teacher(**inputs, **extras)

    def head_loss(self, outputs: ModelOutput, wanted: ModelOutput, inputs: Batch) -> torch.Tensor:
        """The loss on labels and logits, with the penalty on firing rates."""
        weight = self.firing_rate_weight
        if "labels" in inputs:
            return label_and_logit_loss(
                outputs,
                wanted.logits,
                self.args.logit_weight,
                firing_rate_weight=weight,
                temperature=self.args.temperature,
            )
        return add_penalty(logit_loss(outputs.logits, wanted.logits, self.args.temperature), outputs, weight)

    @property
    def firing_rate_weight(self) -> float:
        """That of the student's configuration; a BERT has no firing rates."""
        return getattr(self.model.config, "firing_rate_weight", 0.0)

    @property
    def relation_heads(self) -> int:
        """Parts of the states whose relations are compared: the most that divide the heads of both models."""
        assert self.teacher is not None
        return math.gcd(self.model.config.num_attention_heads, self.teacher.config.num_attention_heads)

    def add_losses(self, outputs: ModelOutput, wanted: ModelOutput, inputs: Batch) -> torch.Tensor:
        """The sum of all losses; their parts are kept for the log."""
        mask = inputs.get("attention_mask")
        if "logits" in outputs:
            loss = self.add_part("head_loss", self.head_loss(outputs, wanted, inputs))
        else:
            loss = add_penalty(torch.zeros((), device=self.args.device), outputs, self.firing_rate_weight)
        if self.args.hidden_weight:
            part = hidden_state_loss(outputs.hidden_states, wanted.hidden_states, mask)
            loss = loss + self.args.hidden_weight * self.add_part("hidden_state_loss", part)
        if self.args.attention_weight:
            part = attention_loss(outputs.attentions, wanted.attentions, mask)
            loss = loss + self.args.attention_weight * self.add_part("attention_loss", part)
        # One sentence has no variance, by which the loss is divided.
        if self.args.embedding_weight and len(inputs["input_ids"]) > 1:
            if mask is None:
                mask = torch.ones_like(inputs["input_ids"])
            part = embedding_loss(outputs.hidden_states[-1], wanted.hidden_states[-1], mask)
            loss = loss + self.args.embedding_weight * self.add_part("embedding_loss", part)
        if self.args.relation_weight:
            taught = _at_places(wanted.hidden_states[-1], inputs)
            part = relation_loss(outputs.hidden_states[-1], taught, mask, relation_heads=self.relation_heads)
            loss = loss + self.args.relation_weight * self.add_part("relation_loss", part)
        if getattr(outputs, "firing_rate_penalty", None) is not None:
            self.add_part("firing_rate_penalty", outputs.firing_rate_penalty)
        return loss

    def add_part(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Keep a part of the loss for the log, and return it."""
        self._parts.setdefault(name, []).append(value.detach().float())
        return value

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Trainer's figures, or those of `figures_of`, with the prefix in front of their names."""
        if self.figures_of is None:
            return super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            figures = self.figures_of(self.model)
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def answers(self, rows: Sequence[Row], collate: Collate, answer: Callable[[Batch], Iterable[Any]]) -> list[Any]:
        """What `answer` says of every row, in the order of the rows, from all processes.

        Args:
            rows: rows with `input_ids`; those of like length go together, so that there is little to pad.
            collate: makes a batch of a list of rows.
            answer: gives something for each row of a batch.
        """
        # As Trainer itself: the module can be imported without.
        from accelerate.utils import gather_object

        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        size = self.args.per_device_eval_batch_size
        mine: list[tuple[int, Any]] = []
        for start in range(0, len(rows), size)[self.args.process_index :: self.args.world_size]:
            indices = order[start : start + size]
            batch = {name: x.to(self.args.device) for name, x in collate([rows[i] for i in indices]).items()}
            mine += zip(indices, answer(batch), strict=True)
        return [found for _, found in sorted(gather_object(mine), key=lambda pair: pair[0])]

    def train_as_told(self, *, only_own_checkpoints: bool = False) -> float:
        """Train, unless the arguments say otherwise, and return the seconds that it took.

        It goes on from the checkpoint that they name, if any. With `only_own_checkpoints` it starts anew where that is
        another run's.
        """
        if not self.args.do_train:
            return 0.0
        wanted = self.args.resume_from_checkpoint
        checkpoint = checkpoint_of(self.args.output_dir, wanted, only_own=only_own_checkpoints)
        return self.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]

    def run_of_seed(self, seconds: float, metrics: dict[str, float]) -> dict[str, Any]:
        """What the results say of a run that is one of several, after training for `seconds`."""
        return {
            "seed": self.args.seed,
            "last_step": self.state.global_step,
            "seconds": round(seconds, 1),
            "training_tokens": self.state.num_input_tokens_seen,
            "metrics": metrics,
            "log": self.state.log_history,
        }

    def save_run(self, file: str, results: dict[str, Any]) -> None:
        """Save the model with its results as JSON in `file` beside it, and send both to the Hub if that is wanted."""
        self.save_model()
        if self.is_world_process_zero():
            write_json(Path(self.args.output_dir) / file, results)
        if self.args.push_to_hub:
            self.push_to_hub()

    def results(self) -> dict[str, Any]:
        """What a file of results says of every run: figures at the last step, log, flags, versions and machine.

        All processes must call it: it evaluates, unless that was done at the last step.
        """
        done = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
        last = done[-1] if done and done[-1]["step"] == self.state.global_step else self.evaluate()
        flags = self.args.to_sanitized_dict()
        return {
            "parameters": self.model.num_parameters(),
            "steps": self.state.global_step,
            "training_tokens": self.state.num_input_tokens_seen,
            "evaluation": {name: x for name, x in last.items() if name.startswith("eval_")},
            "training_arguments": {name: flags[name] for name in sorted(flags)},
            "environment": environment(self.args.device),
            "log": self.state.log_history,
        }

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the means of the loss's parts since the last log where the loss is logged.

        Raises:
            RuntimeError: if the loss is no longer finite.
        """
        if "loss" in logs and self._parts:
            means = {name: torch.stack(values).mean() for name, values in self._parts.items()}
            logs |= {name: self.accelerator.reduce(x, reduction="mean").item() for name, x in means.items()}
            self._parts = {}
        if not math.isfinite(logs.get("loss", 0.0)):
            raise RuntimeError(
                f"training has diverged at step {self.state.global_step}: {logs}; try a lower learning rate"
            )
        super().log(logs, *args, **kwargs)


def _at_places(states: torch.Tensor, inputs: Batch) -> torch.Tensor:
    """The teacher's states at the student's tokens."""
    places = inputs.get(FOR_TEACHER + PLACES)
    if places is None:
        return states
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


def _the_one(batches: list[Batch]) -> Batch:
    [batch] = batches
    return batch
