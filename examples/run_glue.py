"""Fine-tune an SNN-BERT, or a BERT, on a GLUE task or on your own sentences, with transformers' Trainer.

    python examples/run_glue.py --model_name_or_path outputs/distilled --task_name sst2 --data_dir glue_data \\
        --do_train --do_eval --num_train_epochs 3 --seeds 0 1 2 --output_dir outputs/sst2

Takes all flags of TrainingArguments. `--model_name_or_path` is an SNN-BERT, a BERT, or with `--convert` a BERT that
becomes an SNN-BERT first. Writes a model for each seed and results.json: figures at the last step for each seed, mean
and spread, firing rates and energy, flags and versions. `run_glue_no_trainer.py` does the same with Accelerate alone.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from glue_models import (
    DataArguments,
    ModelArguments,
    Teacher,
    check_arguments,
    load_data,
    load_model,
    load_tokenizer,
    measure_energy,
    tokenize,
)
from glue_tasks import Task, score
from seeds import seed_folder, write_results
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_snn_bert.distillation import parameter_groups


@dataclasses.dataclass
class GlueTrainingArguments(TrainingArguments):
    """TrainingArguments, and the neurons' learning rate."""

    neuron_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "of thresholds, decays and resets (default: 10 times --learning_rate)"}
    )


class GlueTrainer(Trainer):
    """Trainer with the neurons' own learning rate and, with a teacher, its logits in the loss."""

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args, teacher: Teacher | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        if self.optimizer is None:
            arguments = self.args
            groups = parameter_groups(
                self.model,
                arguments.learning_rate,
                neuron_learning_rate=arguments.neuron_learning_rate,
                weight_decay=arguments.weight_decay,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(arguments, self.model)
            self.optimizer = optimizer_class(groups, **{k: v for k, v in options.items() if k != "lr"})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, outputs = self.teacher.loss(model, inputs)
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    parser = HfArgumentParser([ModelArguments, DataArguments, GlueTrainingArguments], description=__doc__)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    check_arguments(parser, model_args, data_args)
    if training_args.output_dir is None:
        parser.error("--output_dir must be given")
    if not (training_args.do_train or training_args.do_eval):
        parser.error("give --do_train, --do_eval or both")
    try:
        task, rows = load_data(data_args)
        tokenizer = load_tokenizer(model_args)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    with training_args.main_process_first(desc="tokenize"):
        data = tokenize(rows, task, tokenizer, data_args)
    runs = []
    for seed in data_args.seeds if data_args.seeds is not None else [training_args.seed]:
        run_args = dataclasses.replace(
            training_args, seed=seed, output_dir=str(seed_folder(training_args.output_dir, seed))
        )
        runs.append(train_one(model_args, data_args, run_args, task, data, tokenizer))
    if training_args.do_eval and training_args.process_index == 0:
        arguments = training_args.to_sanitized_dict()
        flags = {**vars(model_args), **vars(data_args), **{k: arguments[k] for k in sorted(arguments)}}
        write_results(Path(training_args.output_dir), task, runs, data, flags, training_args.device)


def train_one(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: GlueTrainingArguments,
    task: Task,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Train and evaluate with one seed; what the results say of it."""
    set_seed(args.seed)
    try:
        model = load_model(model_args, task, data["train"], tokenizer, args.device)
        teacher = None
        if model_args.teacher_name_or_path:
            teacher = Teacher(model_args, task, tokenizer, args.device)
    except ValueError as error:
        raise SystemExit(str(error)) from error

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return score(task, logits.tolist(), prediction.label_ids.tolist())

    validation = {split: part for split, part in data.items() if split != "train"}
    trainer = GlueTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=next(iter(validation.values())),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        teacher=teacher,
    )
    run: dict[str, Any] = {"seed": args.seed}
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint_of(args))
        run |= {"last_step": trainer.state.global_step, "seconds": round(result.metrics["train_runtime"], 1)}
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        run["metrics"] = {}
        for split, part in validation.items():
            prefix = split.removeprefix("validation").lstrip("_")
            figures = trainer.evaluate(part, metric_key_prefix=f"eval_{prefix}".rstrip("_"))
            wanted = {
                f"{prefix}_{name}".lstrip("_"): f"eval_{prefix}".rstrip("_") + f"_{name}" for name in task.metrics
            }
            run["metrics"] |= {name: figures[key] for name, key in wanted.items()}
        part = next(iter(validation.values()))
        run["energy"] = measure_energy(
            trainer.model.eval(), part, tokenizer, data_args.energy_samples, args.per_device_eval_batch_size
        )
    if args.push_to_hub:
        trainer.push_to_hub()
    return run


def checkpoint_of(args: GlueTrainingArguments) -> str | None:
    """The checkpoint that this seed resumes from: the one named, if it is this seed's, or its last one for "true"."""
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted.lower() == "true":
        folder = args.output_dir
        return get_last_checkpoint(folder) if Path(folder).is_dir() else None
    return wanted if Path(wanted).resolve().parent == Path(args.output_dir).resolve() else None


if __name__ == "__main__":
    main()
