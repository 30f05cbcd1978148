"""Fine-tune one BERT, or SNN-BERT, on several GLUE tasks together, with Trainer: one encoder, a head for each task.

    python examples/run_multitask.py --model_name_or_path minilm_folder --data_dir glue_data \\
        --tasks cola sst2 mrpc stsb rte --max_steps 3000 --output_dir outputs/teacher
    python examples/run_multitask.py --model_name_or_path outputs/distilled --data_dir glue_data \\
        --teacher_name_or_path outputs/teacher --unlabelled_file reviews.txt.xz news.txt.xz --learning_rate 1e-3 \\
        --max_steps 20000 --output_dir outputs/student

Without a teacher it learns from labels: the rows of a batch are of all tasks, and a task is drawn by the square root of
the number of its rows. With a teacher that has the same heads it learns that one's hidden states and the logits of all
its heads, on unlabelled sentences and pairs made of the tasks' texts and of the files. A teacher of another kind than
what the student was made of, or of another size, teaches its logits, and if you wish how its tokens relate to each
other (`--hidden_weight 0 --relation_weight 0.3`). `run_glue.py` takes what this writes as model or teacher of any of
the tasks.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean

import torch
from datasets import Dataset
from glue_tasks import (
    TASKS,
    Task,
    TaskArguments,
    attention_implementation,
    fitting_length,
    load_teacher,
    load_teacher_tokenizer,
    score,
    several_heads,
    tokenize,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)
from transformers.hf_argparser import HfArg

from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.batches import Batch, Batches, Collate, DrawnBatches, Row
from modeling_snn_bert.distillation import check_same_shape
from modeling_snn_bert.multitask import (
    MultitaskTrainer,
    heads_settings,
    renew_heads,
    rows_of_all,
    take_over,
)
from modeling_snn_bert.seeds import RESULTS_FILE
from modeling_snn_bert.settings import refuse_given
from modeling_snn_bert.teacher_inputs import CollateForTeacher, collate_for_teacher
from modeling_snn_bert.trainer import OF_TEACHER, DistillationTrainingArguments
from modeling_snn_bert.unlabelled_data import UnlabelledArguments

FIVE_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
ONE_FILE_TASKS = [name for name, task in TASKS.items() if len(task.validation_files) == 1]


@dataclass
class RunArguments:
    """Model and tasks."""

    model_name_or_path: str = HfArg(help="a BERT, SNN-BERT, MPNet, ...: folder or Hub id")
    tasks: list[str] = HfArg(default_factory=lambda: list(FIVE_TASKS), help=f"of {', '.join(ONE_FILE_TASKS)}")
    data_dir: str | None = HfArg(default=None, help="GLUE's folder in its layout (default: the Hub's)")
    max_seq_length: int = HfArg(default=128, help="longer inputs are truncated")
    single_share: float = HfArg(default=0.35, help="of single sentences in the rows without labels; 1 for no pairs")

    def __post_init__(self) -> None:
        if self.max_seq_length < 5:
            raise ValueError(f"--max_seq_length must be >= 5, got {self.max_seq_length}")
        if not 0 <= self.single_share <= 1:
            raise ValueError(f"--single_share must lie in [0, 1], got {self.single_share}")
        if len(set(self.tasks)) != len(self.tasks) or not set(self.tasks) <= set(ONE_FILE_TASKS):
            raise ValueError(f"--tasks must differ from each other and be among {ONE_FILE_TASKS}, got {self.tasks}")


@dataclass
class Arguments(DistillationTrainingArguments):
    """DistillationTrainingArguments for a run of so many steps, which teaches hidden states if there is a teacher."""

    max_steps: int = HfArg(default=3000, help="steps of the run")
    hidden_weight: float = HfArg(default=1.0, help="weight of the loss on hidden states")
    # Labels and logits are never mixed, so that there is no flag of their shares.
    logit_weight: float = field(default=0.0, init=False)


def main() -> None:
    parser = HfArgumentParser([RunArguments, UnlabelledArguments, Arguments], description=__doc__)
    run_args, text_args, args = parser.parse_args_into_dataclasses()
    path, teacher_path = run_args.model_name_or_path, text_args.teacher_name_or_path
    if teacher_path is None:
        refuse_given(parser, [*OF_TEACHER, "unlabelled_sentences", "single_share"], "needs --teacher_name_or_path")
        args.hidden_weight = 0.0
    set_seed(args.seed)
    tasks = [TASKS[name] for name in run_args.tasks]
    tokenizer = AutoTokenizer.from_pretrained(path)
    teacher_tokenizer = load_teacher_tokenizer(teacher_path, args, tokenizer)
    length = fitting_length(run_args.max_seq_length, tokenizer, path, teacher_tokenizer)
    teacher = None
    if teacher_path is not None:
        config = AutoConfig.from_pretrained(teacher_path)
        for task in tasks:
            task.head.check(config, teacher_path)
        teacher = load_teacher(teacher_path, args.attention_weight > 0)
    model = load_model(path, args, tasks, teacher)
    data = [TaskArguments(task_name=name, data_dir=run_args.data_dir).load()[1] for name in run_args.tasks]
    collate = DataCollatorWithPadding(tokenizer)
    drawn_collate: Collate = collate
    if teacher_tokenizer is not None:
        aligned = args.compares_states or args.relation_weight > 0
        drawn_collate = collate_for_teacher(collate, tokenizer, teacher_tokenizer, length, aligned=aligned)

    def tokenized(split: str) -> list[Dataset]:
        return [tokenize(part[split], task, tokenizer, length) for part, task in zip(data, tasks, strict=True)]

    with args.main_process_first(desc="tokenize"):
        draw: Callable[[random.Random], Row]
        if teacher is None:
            draw = rows_of_all([list(rows) for rows in tokenized("train")])
        else:
            texts = [[part["train"][x] for x in task.columns] for task, part in zip(tasks, data, strict=True)]
            options = {
                "single_share": run_args.single_share,
                "with_texts": isinstance(drawn_collate, CollateForTeacher),
            }
            draw = text_args.rows(texts, tokenizer, length, **options)
        validation = tokenized("validation")

    def figures_of(model: PreTrainedModel) -> dict[str, float]:
        def answer(batch: Batch) -> Iterable[tuple[list[float], float]]:
            labels = batch.pop("labels").tolist()
            return zip(model(**batch).logits.float().tolist(), labels, strict=True)

        figures: dict[str, float] = {}
        for task, rows in zip(tasks, validation, strict=True):
            own = task.head.logits_of(model.config)
            logits, labels = zip(*trainer.answers(rows, collate, answer), strict=True)
            found = score(task, [row[own] for row in logits], labels)
            figures |= {f"{task.name}_{name}": value for name, value in found.items()}
        return {"average": fmean(figures[f"{task.name}_{task.metrics[0]}"] for task in tasks), **figures}

    drawn = DrawnBatches(draw, drawn_collate, args.per_device_train_batch_size, args.seed, args.process_index)
    trainer = MultitaskTrainer(
        model,
        args,
        heads=[task.head for task in tasks],
        teacher=teacher,
        train_dataset=Batches.of_run(drawn, args),
        processing_class=tokenizer,
        figures_of=figures_of,
    )
    trainer.train_as_told()
    flags = {**asdict(run_args), **asdict(text_args)}
    trainer.save_run(RESULTS_FILE, {**trainer.results(), "tasks": run_args.tasks, "arguments": flags})


def load_model(path: str, args: Arguments, tasks: list[Task], teacher: PreTrainedModel | None) -> PreTrainedModel:
    """The model with a head for each task.

    Its heads are those of the checkpoint if that has the same ones. Otherwise they are new, or if hidden states are
    taught those of the teacher, together with its embeddings and pooler.

    Raises:
        ValueError: if it has heads of other tasks, or is to learn from a teacher and is of a type that cannot, or of
            another shape than the teacher whose hidden states it is to learn.
    """
    config = AutoConfig.from_pretrained(path)
    if teacher is not None and config.model_type not in ("bert", SNNBertConfig.model_type):
        raise ValueError(f"a BERT or an SNN-BERT learns from a teacher, {path} is of the type {config.model_type!r}")
    heads, has_heads = [task.head for task in tasks], bool(several_heads(config))
    settings = heads_settings(heads)
    if has_heads and config.id2label != settings["id2label"]:
        raise ValueError(f"{path} has heads for {several_heads(config)}: give these --tasks in this order")
    # Dropout would only blur what a teacher says, and labels of several tasks hold each other in check.
    settings |= {name: 0.0 for name, x in config.to_dict().items() if "dropout" in name and isinstance(x, float)}
    settings |= {"attn_implementation": attention_implementation(args.attention_weight > 0, args.device, dropout=0.0)}
    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, ignore_mismatched_sizes=not has_heads, **settings
    )
    if not has_heads:
        renew_heads(model)
    if teacher is not None and args.compares_states:
        check_same_shape(model.config, teacher.config)
        if not has_heads:
            take_over(model, teacher, heads)
    return model


if __name__ == "__main__":
    main()
