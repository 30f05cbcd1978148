"""What the two GLUE scripts share: their flags, the model that is fine-tuned, its teacher, and what is written."""

import argparse
import dataclasses
import statistics
from typing import Any, Literal, cast

import torch
from datasets import Dataset, DatasetDict
from glue_tasks import Task, load_task
from seeds import check_seeds
from several_tasks import heads_of, keep_head, load_for_task
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg
from unlabelled_data import WordReplacement

from modeling_snn_bert import SNNBertConfig, SNNBertForSequenceClassification
from modeling_snn_bert.conversion import convert_bert
from modeling_snn_bert.distillation import attention_loss, hidden_state_loss, label_and_logit_loss, logit_loss
from modeling_snn_bert.energy import energy_report

SETTINGS = "neuron_type coding num_timesteps psn_length spike_type attention_type".split()
CALIBRATION_TOKENS = 10_000


@dataclasses.dataclass
class ModelArguments:
    """The model, and the teacher if there is one."""

    model_name_or_path: str = dataclasses.field(metadata={"help": "an SNN-BERT or a BERT: folder or Hub id"})
    tokenizer_name: str | None = dataclasses.field(default=None, metadata={"help": "default: the model's"})
    revision: str = dataclasses.field(default="main", metadata={"help": "revision of the model on the Hub"})
    convert: bool = dataclasses.field(
        default=False, metadata={"help": "convert the BERT to an SNN-BERT by calibration on the training sentences"}
    )
    firing_rate: float = dataclasses.field(default=0.2, metadata={"help": "firing rate at calibration"})
    threshold_per: Literal["channel", "layer"] = dataclasses.field(
        default="channel", metadata={"help": "at calibration, a threshold for each channel, or one for a neuron layer"}
    )
    neuron_type: Literal["bpsn", "lif", "psn"] | None = None
    coding: Literal["individual", "repeat"] | None = None
    num_timesteps: int | None = dataclasses.field(default=None, metadata={"help": "of --coding repeat"})
    psn_length: int | None = dataclasses.field(default=None, metadata={"help": "of --neuron_type psn"})
    spike_type: Literal["binary", "ternary"] | None = None
    attention_type: Literal["softmax", "spiking"] | None = None
    freeze_embeddings: bool = dataclasses.field(
        default=False, metadata={"help": "keep the embeddings as they are: less to learn, and to share"}
    )
    config_overrides: str | None = dataclasses.field(
        default=None, metadata={"help": "further settings of SNNBertConfig: decay=0.1,reset_iterations=0"}
    )
    teacher_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "a BERT fine-tuned on the task, whose logits are taught beside the labels"}
    )
    logit_weight: float = dataclasses.field(default=0.5, metadata={"help": "share of the teacher's logits in the loss"})
    hidden_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "weight of the loss on the teacher's hidden states, added to the others"}
    )
    attention_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "weight of the loss on the teacher's attention weights, added to the others"}
    )
    temperature: float = dataclasses.field(default=2.0, metadata={"help": "temperature of the logits' loss"})
    augment_probability: float = dataclasses.field(
        default=0.0,
        metadata={"help": "share of the batches whose words are replaced by like ones, for the teacher alone to label"},
    )

    def settings(self) -> dict[str, Any]:
        """The settings of `SNNBertConfig` that the flags change.

        Raises:
            ValueError: for an override of no setting.
        """
        settings = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        return {**settings, **parse_overrides(self.config_overrides)}


@dataclasses.dataclass
class DataArguments:
    """The task and its data."""

    task_name: str | None = dataclasses.field(default=None, metadata={"help": "cola, sst2, mrpc, stsb, qqp, mnli, ..."})
    data_dir: str | None = dataclasses.field(default=None, metadata={"help": "GLUE's folder in its standard layout"})
    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "a dataset on the Hub"})
    dataset_config_name: str | None = None
    train_file: str | None = dataclasses.field(default=None, metadata={"help": ".csv, .tsv, .json or .jsonl"})
    validation_file: str | None = None
    text_column: str | None = dataclasses.field(default=None, metadata={"help": "column of the (first) text"})
    text_pair_column: str | None = dataclasses.field(default=None, metadata={"help": "column of the second text"})
    label_column: str = "label"
    max_seq_length: int = HfArg(default=128, aliases=["--max_length"], help="longer inputs are truncated")
    pad_to_max_length: bool = dataclasses.field(default=False, metadata={"help": "pad all inputs to that length"})
    max_train_samples: int | None = dataclasses.field(default=None, metadata={"help": "the same rows for every seed"})
    max_eval_samples: int | None = None
    seeds: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "a run for each seed, and mean and spread of their figures (default: --seed)"}
    )
    energy_samples: int = dataclasses.field(
        default=256, metadata={"help": "dev rows on which firing rates and energy are measured; 0 measures nothing"}
    )


def check_arguments(parser: HfArgumentParser, model_args: ModelArguments, data_args: DataArguments) -> None:
    """End the program with a clear message if flags are outside their range or exclude each other."""
    try:
        settings = model_args.settings()
    except ValueError as error:
        parser.error(str(error))
    if not 0 < model_args.firing_rate < 1:
        parser.error(f"--firing_rate must lie in (0, 1), got {model_args.firing_rate}")
    if not 0 <= model_args.logit_weight <= 1:
        parser.error(f"--logit_weight must lie in [0, 1], got {model_args.logit_weight}")
    for name in ("hidden_weight", "attention_weight"):
        if getattr(model_args, name) < 0:
            parser.error(f"--{name} must be >= 0, got {getattr(model_args, name)}")
        if getattr(model_args, name) and not model_args.teacher_name_or_path:
            parser.error(f"--{name} needs --teacher_name_or_path")
    if not 0 <= model_args.augment_probability <= 1:
        parser.error(f"--augment_probability must lie in [0, 1], got {model_args.augment_probability}")
    if model_args.augment_probability and not model_args.teacher_name_or_path:
        parser.error("--augment_probability needs --teacher_name_or_path")
    if not model_args.temperature > 0:
        parser.error(f"--temperature must be positive, got {model_args.temperature}")
    if settings.get("psn_length") not in (None, data_args.max_seq_length):
        parser.error("--psn_length must be --max_seq_length")
    if settings.get("psn_length") is not None and not data_args.pad_to_max_length:
        parser.error("--neuron_type psn takes one length only: give --pad_to_max_length")
    for name in ("max_train_samples", "max_eval_samples"):
        if getattr(data_args, name) is not None and getattr(data_args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(data_args, name)}")
    if data_args.max_seq_length < 4:
        parser.error(f"--max_seq_length must be >= 4, got {data_args.max_seq_length}")
    if data_args.energy_samples < 0:
        parser.error(f"--energy_samples must be >= 0, got {data_args.energy_samples}")
    check_seeds(parser, data_args.seeds)
    if data_args.text_pair_column and not data_args.text_column:
        parser.error("--text_pair_column needs --text_column")


def attention_implementation(weights: bool, device: torch.device, dropout: float) -> str | None:
    """The attention to train with, or `None` for the default.

    Only the eager attention returns its weights. Without dropout it is also the faster one on a CPU, where the backward
    pass of sdpa takes one and a half times as long in float32 and seven times in bfloat16.
    """
    return "eager" if weights or (device.type == "cpu" and not dropout) else None


def add_student_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of an SNN-BERT that a script makes, by calibration or from scratch."""
    parser.add_argument("--firing_rate", type=float, default=0.2, help="firing rate at calibration (default: 0.2)")
    parser.add_argument(
        "--threshold_per",
        choices=["channel", "layer"],
        default="channel",
        help="at calibration, a threshold for each channel, or one for a neuron layer (default: channel)",
    )
    parser.add_argument("--config_overrides", help="settings of SNNBertConfig: spike_type=ternary,decay=0.1")


def check_student_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a clear message if one of them is wrong."""
    if not 0 < args.firing_rate < 1:
        parser.error(f"--firing_rate must lie in (0, 1), got {args.firing_rate}")
    try:
        parse_overrides(args.config_overrides)
    except ValueError as error:
        parser.error(str(error))


def parse_overrides(text: str | None) -> dict[str, Any]:
    """The settings in `name=value,name=value`, with the types that `SNNBertConfig` gives them.

    Raises:
        ValueError: if a name is none of its settings or a value is not of its type.
    """
    if not text:
        return {}
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    known = {field.name for field in dataclasses.fields(SNNBertConfig)}
    for name, value in pairs:
        if name not in known or not value:
            raise ValueError(f"--config_overrides must be name=value,... of settings of SNNBertConfig, got {text!r}")
    config = SNNBertConfig()
    # update_from_string takes the type from the default; a setting that is None by default is a number.
    typed = [f"{name}={value}" for name, value in pairs if getattr(config, name) is not None]
    try:
        if typed:
            config.update_from_string(",".join(typed))
        numbers = {name: float(value) for name, value in pairs if getattr(config, name) is None}
    except (TypeError, ValueError) as error:
        raise ValueError(f"--config_overrides: {error}") from error
    numbers = {name: int(x) if x.is_integer() else x for name, x in numbers.items()}
    return {name: numbers.get(name, getattr(config, name)) for name, _ in pairs}


def load_data(args: DataArguments) -> tuple[Task, DatasetDict]:
    """The task and its rows, cut to the wanted number; training rows are drawn once, whatever the seed.

    Raises:
        ValueError, FileNotFoundError: as `load_task`.
    """
    columns = None
    if args.text_column:
        columns = (args.text_column, args.text_pair_column) if args.text_pair_column else (args.text_column,)
    task, data = load_task(
        task_name=args.task_name,
        data_dir=args.data_dir,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_file=args.train_file,
        validation_file=args.validation_file,
        text_columns=columns,
        label_column=args.label_column,
    )
    for split, rows in data.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(rows):
            data[split] = rows.shuffle(seed=0).select(range(limit)) if split == "train" else rows.select(range(limit))
    return task, data


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: if the teacher's gives other token ids.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path, revision=args.revision)
    if args.teacher_name_or_path:
        check_vocabulary(args.teacher_name_or_path, tokenizer)
    return tokenizer


def check_vocabulary(teacher_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if the teacher's tokenizer gives other token ids than `tokenizer`."""
    if AutoTokenizer.from_pretrained(teacher_path).get_vocab() != tokenizer.get_vocab():
        raise ValueError("the teacher must have the vocabulary of the model, their tokenizers differ")


def tokenize(data: DatasetDict, task: Task, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> DatasetDict:
    """Token ids and `labels`, nothing else."""
    padding = "max_length" if args.pad_to_max_length else False

    def encode(rows: dict) -> dict:
        texts = [rows[column] for column in task.columns]
        inputs = tokenizer(*texts, truncation=True, max_length=args.max_seq_length, padding=padding)
        return {**inputs, "labels": rows["label"]}

    return data.map(encode, batched=True, remove_columns=data["train"].column_names, load_from_cache_file=False)


def load_model(
    args: ModelArguments, task: Task, train: Dataset, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """The model that is fine-tuned: an SNN-BERT, a BERT, or a BERT that is converted on `train`.

    The head is new unless the checkpoint has one, alone or among those of other tasks; seed the random numbers first.

    Raises:
        ValueError: if the checkpoint is of another kind, or the settings do not fit it.
    """
    config = AutoConfig.from_pretrained(args.model_name_or_path, revision=args.revision)
    settings = args.settings()
    dropout = settings.get("attention_probs_dropout_prob", getattr(config, "attention_probs_dropout_prob", 0))
    if args.attention_weight and dropout:
        raise ValueError(
            f"--attention_weight compares attention weights, to which a dropout of {dropout} would be applied: give "
            "--config_overrides attention_probs_dropout_prob=0"
        )
    options = {
        "revision": args.revision,
        "attn_implementation": attention_implementation(args.attention_weight > 0, device, dropout),
        "dtype": torch.float32,  # a checkpoint in half precision is trained in full
    }
    if config.model_type == SNNBertConfig.model_type:
        if args.convert:
            raise ValueError(f"--convert is for a BERT, {args.model_name_or_path} is an SNN-BERT already")
        model = load_for_task(
            SNNBertForSequenceClassification, args.model_name_or_path, task, **options, **settings
        ).to(device)
    elif config.model_type != "bert":
        raise ValueError(
            f"--model_name_or_path must be an SNN-BERT or a BERT, {args.model_name_or_path} is of the type "
            f"{config.model_type!r}"
        )
    elif settings and not args.convert:
        raise ValueError(f"{sorted(settings)} are settings of an SNN-BERT: give --convert to make one of the BERT")
    else:
        model = load_for_task(BertForSequenceClassification, args.model_name_or_path, task, **options).to(device)
        if args.convert:
            batches = calibration_batches(train, tokenizer)
            model = convert_bert(model, batches, args.firing_rate, threshold_per=args.threshold_per, **settings).train()
    model.base_model.embeddings.requires_grad_(not args.freeze_embeddings)
    return model


def calibration_batches(train: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, torch.Tensor]]:
    """Batches of some 10,000 tokens from the first rows of `train`, without labels."""
    collate = DataCollatorWithPadding(tokenizer)
    batches, tokens = [], 0
    for start in range(0, len(train), 32):
        rows = train.select(range(start, min(start + 32, len(train)))).remove_columns("labels")
        batches.append(dict(collate(list(rows))))
        tokens += int(batches[-1]["attention_mask"].sum())
        if tokens >= CALIBRATION_TOKENS:
            break
    return batches


class Teacher:
    """A fine-tuned BERT whose logits, and hidden states and attention weights if wanted, enter the loss.

    Args:
        args: the flags.
        task: the task that it must have been fine-tuned on, alone or with others.
        tokenizer: what the batches are made with.
        device: where it runs.

    Raises:
        ValueError: if it has another number of labels than the task.
    """

    def __init__(
        self, args: ModelArguments, task: Task, tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> None:
        assert args.teacher_name_or_path is not None
        model = BertForSequenceClassification.from_pretrained(
            args.teacher_name_or_path,
            attn_implementation="eager" if args.attention_weight else None,
            dtype=torch.float32,
        )
        if task.name in heads_of(model.config):
            keep_head(model, task)
        if model.config.num_labels != (len(task.labels) or 1):
            raise ValueError(
                f"--teacher_name_or_path must have been fine-tuned on {task.name}, with {len(task.labels) or 1} "
                f"labels; it has {model.config.num_labels}"
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.logit_weight, self.hidden_weight = args.logit_weight, args.hidden_weight
        self.attention_weight = args.attention_weight
        self.temperature = args.temperature
        self.augment_probability = args.augment_probability
        words = self.model.get_input_embeddings().weight
        self.replace_words = WordReplacement(words, tokenizer) if args.augment_probability else None

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """The mixed loss of `model` on a batch, and its outputs; without labels it is the teacher's part alone.

        With the share `augment_probability` it is that on a variant of the batch, whose labels nobody knows.
        """
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        if self.replace_words is not None and torch.rand(()) < self.augment_probability:
            inputs["input_ids"] = self.replace_words(inputs["input_ids"])
            batch = inputs
        mask = batch.get("attention_mask")
        extras = {"output_hidden_states": self.hidden_weight > 0, "output_attentions": self.attention_weight > 0}
        outputs = model(**batch, **extras)
        with torch.no_grad():
            wanted = self.model(**inputs, **extras)
        # In several processes the model is wrapped. A BERT has no firing rates.
        config = cast(PreTrainedConfig, getattr(model, "module", model).config)
        firing_rate_weight = getattr(config, "firing_rate_weight", 0.0)
        if "labels" in batch:
            loss = label_and_logit_loss(
                outputs,
                wanted.logits,
                self.logit_weight,
                firing_rate_weight=firing_rate_weight,
                temperature=self.temperature,
            )
        else:
            loss = logit_loss(outputs.logits, wanted.logits, self.temperature)
            penalty = getattr(outputs, "firing_rate_penalty", None)
            loss = loss if penalty is None else loss + firing_rate_weight * penalty
        if self.hidden_weight:
            states = hidden_state_loss(outputs.hidden_states, wanted.hidden_states, mask)
            loss = loss + self.hidden_weight * states
        if self.attention_weight:
            loss = loss + self.attention_weight * attention_loss(outputs.attentions, wanted.attentions, mask)
        return loss, outputs


def measure_energy(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, samples: int, batch_size: int
) -> dict[str, Any] | None:
    """Firing rates and energy of an SNN-BERT on the first rows; `None` for a BERT, or if `samples` is 0.

    Energy is that of a mean sequence in picojoules, by the conventions of `modeling_snn_bert.energy`.
    """
    if samples == 0 or model.config.model_type != SNNBertConfig.model_type:
        return None
    rows = rows.select(range(min(samples, len(rows))))
    rows = rows.remove_columns([name for name in rows.column_names if name == "labels"])
    collate = DataCollatorWithPadding(tokenizer)
    batches = [
        dict(collate(list(rows.select(range(start, min(start + batch_size, len(rows)))))))
        for start in range(0, len(rows), batch_size)
    ]
    report = energy_report(model, batches, run_lengths=False)
    rates = report.firing_rates()
    return {
        "sequences": len(rows),
        "tokens_per_sequence": report.statistics.lengths.float().mean().item(),
        "mean_firing_rate": statistics.fmean(rates.values()),
        "firing_rates": rates,
        "picojoules": {
            cost.name: {"matrix_products": cost.matrix_product_picojoules, "all_arithmetic": cost.picojoules}
            for cost in report.costs
        },
    }
