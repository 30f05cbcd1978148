"""From a BERT to a spiking text classifier, with a report, in minutes on a CPU.

    python examples/quickstart.py

Fine-tunes a small BERT, takes an SNN-BERT, distils this briefly on the training text, fine-tunes it for the same number
of steps with the BERT as its teacher, and compares the two. By default the BERT is all-MiniLM-L6-v2, the SNN-BERT is
the one that was distilled from it on plain text beforehand (see `distilled_checkpoint.py`), and the task is the
sentiment of film reviews (BERT and reviews are fetched from the Python package index, see `fetch_inputs.py`). Give your
own with `--model_name_or_path` and `--train_file` / `--validation_file` or `--dataset_name`: another BERT is converted
by calibration, if no `--student_name_or_path` is given.

Writes report.html (one page with everything on it), report.md, report.json, firing_rates.png, spikes.png and a
Hub-ready checkpoint to `--output_dir`.
"""

import argparse
import copy
import csv
import hashlib
import itertools
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict, load_dataset
from distilled_checkpoint import unpack
from fetch_inputs import film_reviews, minilm_folder
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_snn_bert import BPSN, SNNBertConfig, SNNBertForSequenceClassification, SNNBertModel
from modeling_snn_bert.conversion import convert_bert
from modeling_snn_bert.distillation import check_same_shape
from modeling_snn_bert.energy import energy_report
from modeling_snn_bert.energy.plots import plot_firing_rates, plot_spikes, raster_panels
from modeling_snn_bert.fine_tuning import (
    CALIBRATION_BATCHES,
    DISTILLATION_STEPS,
    NO_DROPOUT,
    accuracy,
    finetune,
    report_markdown,
    teach,
    timed,
    training_batches,
)
from modeling_snn_bert.html_report import html_page
from modeling_snn_bert.model_card import card_from_report

HERE = Path(__file__).resolve().parent
# Of the validation sentences, so many give the firing rates and the energy.
ENERGY_SENTENCES = 512
EXAMPLE_SENTENCES = [
    "A gripping, beautifully acted film that stays with you for days.",
    "Two hours of clumsy jokes and not one of them lands.",
    "The plot is thin, but the music and the two leads make it a pleasure.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a BERT: folder or Hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--student_name_or_path", help="an SNN-BERT of the BERT's shape and vocabulary to start from")
    parser.add_argument("--convert", action="store_true", help="convert the fine-tuned BERT, whichever it is")
    parser.add_argument("--dataset_name", help="a dataset on the Hub with train and validation splits")
    parser.add_argument("--dataset_config_name", help="its configuration")
    parser.add_argument("--train_file", help="csv, tsv or json file with training sentences and labels")
    parser.add_argument("--validation_file", help="the same for validation")
    parser.add_argument("--text_column", default="sentence", help="name of the column of sentences")
    parser.add_argument("--label_column", default="label", help="name of the column of labels")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--max_length", type=int, default=64, help="longer sentences are truncated")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--firing_rate", type=float, default=0.2, help="firing rate at calibration")
    parser.add_argument(
        "--distillation_steps",
        type=int,
        help="without labels, before the fine-tuning (default: 130 for a BERT that is converted, else 0)",
    )
    parser.add_argument("--num_train_epochs", type=float, default=1.0, help="of fine-tuning, of each of the two")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of the SNN-BERT")
    parser.add_argument("--bert_learning_rate", type=float, default=5e-5)
    parser.add_argument("--logit_weight", type=float, default=0.5, help="share of the BERT's logits in the loss")
    parser.add_argument("--max_train_samples", type=int, help="use only so many training sentences")
    parser.add_argument("--max_eval_samples", type=int, help="use only so many validation sentences")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.train_file is None) != (args.validation_file is None):
        parser.error("--train_file and --validation_file must be given together")
    if args.convert and args.student_name_or_path:
        parser.error("give either --convert or --student_name_or_path")
    if args.train_file and args.dataset_name:
        parser.error("give either --dataset_name or --train_file and --validation_file")
    choose_student(args)
    return args


def choose_student(args: argparse.Namespace) -> None:
    """Fill in what follows from the other flags: whether the BERT is converted, and how many steps it then needs."""
    # There is a distilled student for the default BERT only.
    args.convert = args.convert or (args.model_name_or_path is not None and args.student_name_or_path is None)
    if args.distillation_steps is None:
        args.distillation_steps = DISTILLATION_STEPS if args.convert else 0


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    started = time.perf_counter()
    accelerator = Accelerator()
    model_path = args.model_name_or_path or str(minilm_folder())
    data, label_names = load_data(args)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data = tokenize(data, tokenizer, args.max_length)
    collate = DataCollatorWithPadding(tokenizer)
    validation = DataLoader(data["validation"], batch_size=2 * args.batch_size, collate_fn=collate)
    # Scores do not depend on the order, and sentences of like length need no padding.
    lengths = [len(row) for row in data["validation"]["input_ids"]]
    in_order = data["validation"].select(sorted(range(len(lengths)), key=lengths.__getitem__))
    scored = DataLoader(in_order, batch_size=2 * args.batch_size, collate_fn=collate)
    bert = AutoModelForSequenceClassification.from_pretrained(
        model_path,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        dtype=torch.float32,
    )
    if type(bert) is not BertForSequenceClassification:
        raise SystemExit(f"--model_name_or_path must be a BERT, {model_path} is a {type(bert).__name__}")
    bert.to(accelerator.device)
    seconds: dict[str, float] = {}

    steps_per_epoch = math.ceil(len(data["train"]) / args.batch_size)
    steps = max(1, round(args.num_train_epochs * steps_per_epoch))
    with timed(seconds, "fine-tune the BERT"):
        batches = training_batches(data["train"], tokenizer, args.batch_size, args.seed)
        finetune(accelerator, bert, batches, steps, args.bert_learning_rate)
    batches = training_batches(data["train"], tokenizer, args.batch_size, args.seed)
    with timed(seconds, "make an SNN-BERT"):
        snn_bert = make_student(args, bert, batches)
    with timed(seconds, "distil and fine-tune the SNN-BERT"):
        stages = {"distillation_steps": args.distillation_steps, "finetuning_steps": steps}
        teach(accelerator, snn_bert, bert, batches, args.learning_rate, args.logit_weight, **stages)
    with timed(seconds, "evaluate both"):
        accuracies = {"SNN-BERT": accuracy(snn_bert, scored), "BERT": accuracy(bert, scored)}
        batches_of_report = math.ceil(ENERGY_SENTENCES / (2 * args.batch_size))
        energy = energy_report(snn_bert, itertools.islice(validation, batches_of_report), run_lengths=False)
    labels = torch.tensor(data["validation"]["labels"])
    accuracies["majority class"] = labels.bincount().max().item() / len(labels)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    with timed(seconds, "draw the pictures"):
        plot_firing_rates(energy.statistics.rates, energy.statistics.names, args.output_dir / "firing_rates.png")
        plot_example(snn_bert, tokenizer, args.output_dir / "spikes.png")
    with timed(seconds, "save, and load in a fresh process"):
        snn_bert.save_pretrained(args.output_dir / "model")
        tokenizer.save_pretrained(args.output_dir / "model")
        predictions = check_saved_model(snn_bert, tokenizer, args.output_dir)
    seconds["all"] = time.perf_counter() - started
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "base_model": base_model(args),
        "dataset": {"name": dataset_name(args), "split": "validation"},
        "accuracy": accuracies,
        "training_sentences": len(data["train"]),
        "validation_sentences": len(data["validation"]),
        "distillation_steps": args.distillation_steps,
        "finetuning_steps": steps,
        "parameters": {"SNN-BERT": snn_bert.num_parameters(), "BERT": bert.num_parameters()},
        "firing_rates": energy.firing_rates(),
        "energy": energy.to_dict(),
        "seconds": seconds,
        "seed": args.seed,
        "predictions": predictions,
    }
    (args.output_dir / "report.json").write_text(json.dumps(results, indent=2))
    card_from_report(snn_bert.config, results).save(args.output_dir / "model" / "README.md")
    report = report_markdown(results, energy)
    (args.output_dir / "report.md").write_text(report)
    pictures = {"Firing rates": [args.output_dir / "firing_rates.png", args.output_dir / "spikes.png"]}
    (args.output_dir / "report.html").write_text(html_page(report, pictures), encoding="utf-8")
    print(report)
    print(f"written to {args.output_dir}: report.html, report.md, report.json, firing_rates.png, spikes.png, model/")


def make_student(
    args: argparse.Namespace, bert: BertForSequenceClassification, batches: Iterator[dict]
) -> SNNBertForSequenceClassification:
    """The SNN-BERT that training starts from, with the head of `bert`."""
    if args.convert:
        return convert_bert(bert, [next(batches) for _ in range(CALIBRATION_BATCHES)], args.firing_rate, **NO_DROPOUT)
    if args.student_name_or_path:
        encoder = SNNBertModel.from_pretrained(args.student_name_or_path, dtype=torch.float32)
    else:
        encoder, _ = unpack()
    try:
        check_same_shape(encoder.config, bert.config)
    except ValueError as error:
        raise SystemExit(f"--student_name_or_path: {error}") from error
    labels = {name: getattr(bert.config, name) for name in ("id2label", "label2id")}
    student = SNNBertForSequenceClassification(SNNBertConfig(**{**encoder.config.to_dict(), **NO_DROPOUT, **labels}))
    head = {name: x for name, x in bert.state_dict().items() if name.startswith(("bert.pooler.", "classifier."))}
    student.load_state_dict({**{f"bert.{name}": x for name, x in encoder.state_dict().items()}, **head})
    return student.to(bert.device)


def base_model(args: argparse.Namespace) -> str | None:
    """The Hub id of the BERT; `None` for a folder, whose BERT nobody else can look up."""
    if args.model_name_or_path is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return None if Path(args.model_name_or_path).exists() else args.model_name_or_path


def dataset_name(args: argparse.Namespace) -> str:
    """What a reader of the results should know the data by."""
    if args.train_file:
        return f"{Path(args.train_file).name}, {Path(args.validation_file).name}"
    if args.dataset_name:
        return " ".join(filter(None, (args.dataset_name, args.dataset_config_name)))
    return "film reviews rated by Hutto and Gilbert (VADER, ICWSM 2014)"


def load_data(args: argparse.Namespace) -> tuple[DatasetDict, list[str]]:
    """The train and validation splits with columns `sentence` and `label` (an index), and the labels' names."""
    if args.train_file:
        kind = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}.get(Path(args.train_file).suffix)
        if kind is None or Path(args.validation_file).suffix != Path(args.train_file).suffix:
            raise SystemExit("--train_file and --validation_file must both be .csv, .tsv, .json or .jsonl")
        options = {}
        if Path(args.train_file).suffix == ".tsv":
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if kind == "csv":
            options["keep_default_na"] = False
        files = {"train": args.train_file, "validation": args.validation_file}
        data = load_dataset(kind, data_files=files, **options)
    elif args.dataset_name:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
        if "train" not in data or "validation" not in data:
            raise SystemExit(f"{args.dataset_name} must have the splits train and validation, it has {list(data)}")
    else:
        data = film_review_splits()
    for column in (args.text_column, args.label_column):
        if column not in data["train"].column_names:
            raise SystemExit(f"no column {column!r} in the data, only {data['train'].column_names}")
    splits = {}
    values = sorted(set(data["train"][args.label_column]))
    if not 2 <= len(values) <= 1000:
        raise SystemExit(f"the training data must have between 2 and 1,000 different labels, got {len(values)}")
    feature = data["train"].features[args.label_column]
    names = [feature.int2str(v) if hasattr(feature, "int2str") else str(v) for v in values]
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split, limit in limits.items():
        sentences, labels = data[split][args.text_column], data[split][args.label_column]
        unknown = set(labels) - set(values)
        if unknown:
            raise SystemExit(f"the {split} data has labels that the training data lacks: {sorted(unknown)[:5]}")
        rows = Dataset.from_dict({"sentence": list(sentences), "label": [values.index(v) for v in labels]})
        splits[split] = rows.shuffle(seed=args.seed).select(range(min(limit, len(rows)))) if limit else rows
    return DatasetDict(splits), names


def film_review_splits() -> DatasetDict:
    """The rated film reviews as a two-class task.

    A review is positive if its mean rating is above 0 and negative if it is below; the few at exactly 0 are left
    out. One in seven goes to validation, chosen by a hash of its text (lower case, single spaces), and a text that
    occurs twice is used once, so no sentence is in both.
    """
    rows: dict[str, dict[str, list]] = {name: {"sentence": [], "label": []} for name in ("train", "validation")}
    seen = set()
    for text, rating in film_reviews():
        key = " ".join(text.lower().split())
        if rating == 0 or key in seen:
            continue
        seen.add(key)
        is_validation = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 7 == 0
        split = rows["validation" if is_validation else "train"]
        split["sentence"].append(text)
        split["label"].append("positive" if rating > 0 else "negative")
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in rows.items()})


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Token ids and labels, nothing else."""

    def encode(rows: dict) -> dict:
        return {**tokenizer(rows["sentence"], truncation=True, max_length=max_length), "labels": rows["label"]}

    return data.map(encode, batched=True, remove_columns=["sentence", "label"])


@torch.no_grad()
def plot_example(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Draw the spikes of one sentence in a neuron layer near the input, in the middle, and near the output."""
    inputs = tokenizer(EXAMPLE_SENTENCES[2], return_tensors="pt").to(model.device)
    spikes = model.eval()(**inputs, output_spikes=True).spikes
    names = model.neuron_names()
    panels = raster_panels(names)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    plot_spikes([spikes[i][0] for i in panels], [names[i] for i in panels], tokens, path)


@torch.no_grad()
def check_saved_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> list[dict]:
    """Classify three sentences in a fresh process that cannot see the package; the logits must be the same.

    Where the package is not installed there are no compiled kernels. Their sums are rounded otherwise, and a potential
    that happens to lie at its threshold then makes a spike more or less; so the model in memory runs without them too.
    """
    file = output_dir / "predictions.json"
    command = [sys.executable, str(HERE / "classify.py"), "--without_package", "--output_file", str(file)]
    command += ["--model_name_or_path", str(output_dir / "model"), *EXAMPLE_SENTENCES]
    subprocess.run(command, check=True)
    predictions = json.loads(file.read_text())
    inputs = tokenizer(EXAMPLE_SENTENCES, padding=True, return_tensors="pt")
    without_kernels = copy.deepcopy(model).cpu().eval()
    for module in without_kernels.modules():
        if isinstance(module, BPSN):
            module.implementation = "chunked"
    difference = (without_kernels(**inputs).logits - torch.tensor([p["logits"] for p in predictions])).abs().max()
    if not difference <= 1e-5:
        raise SystemExit(f"the saved model gives other logits: they differ by {difference.item():.2e}")
    return predictions


if __name__ == "__main__":
    main()
