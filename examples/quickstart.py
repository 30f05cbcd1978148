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

import copy
import hashlib
import json
import math
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from distilled_checkpoint import unpack
from fetch_inputs import film_reviews, minilm_folder
from glue_tasks import Task, TaskArguments, tokenize
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.hf_argparser import HfArg

from modeling_snn_bert import BPSN, SNNBertModel
from modeling_snn_bert.commands.common import load_bert
from modeling_snn_bert.energy.plots import plot_firing_rates, plot_spikes, raster_panels
from modeling_snn_bert.fine_tuning import Recipe, classifier_settings, timed, train_classifier, write_report

HERE = Path(__file__).resolve().parent
EXAMPLE_SENTENCES = [
    "A gripping, beautifully acted film that stays with you for days.",
    "Two hours of clumsy jokes and not one of them lands.",
    "The plot is thin, but the music and the two leads make it a pleasure.",
]


@dataclass
class Arguments:
    """The two models, and where the results go."""

    model_name_or_path: str | None = HfArg(default=None, help="a BERT: folder or Hub id (default: all-MiniLM-L6-v2)")
    student_name_or_path: str | None = HfArg(default=None, help="an SNN-BERT of the BERT's shape to start from")
    convert: bool = HfArg(default=False, help="convert the fine-tuned BERT, whichever it is")
    num_train_epochs: float = HfArg(default=1.0, help="of fine-tuning, of each of the two")
    output_dir: Path = Path("outputs/quickstart")

    def __post_init__(self) -> None:
        if self.convert and self.student_name_or_path:
            raise ValueError("give either --convert or --student_name_or_path")

    def encoder(self) -> SNNBertModel | None:
        """The SNN-BERT that is to learn from the BERT, or `None` if the BERT is to be converted."""
        if self.student_name_or_path:
            return SNNBertModel.from_pretrained(self.student_name_or_path, dtype=torch.float32)
        # There is a distilled student for the default BERT only.
        return None if self.convert or self.model_name_or_path else unpack()[0]

    def base_model(self) -> str | None:
        """The Hub id of the BERT; `None` for a folder, whose BERT nobody else can look up."""
        if self.model_name_or_path is None:
            return "sentence-transformers/all-MiniLM-L6-v2"
        return None if Path(self.model_name_or_path).exists() else self.model_name_or_path


@dataclass
class DataArguments(TaskArguments):
    """The data: the rated film reviews, unless others are named."""

    max_seq_length: int = HfArg(default=64, aliases=["--max_length"], help="longer inputs are truncated")

    def read(self, task: Task | None) -> DatasetDict:
        named = task or self.data_dir or self.train_file or self.dataset_name
        return super().read(task) if named else film_review_splits()

    def name(self) -> str:
        """What a reader of the results should know the data by."""
        if self.train_file and self.validation_file:
            return f"{Path(self.train_file).name}, {Path(self.validation_file).name}"
        named = " ".join(filter(None, (self.task_name, self.dataset_name, self.dataset_config_name)))
        return named or "film reviews rated by Hutto and Gilbert (VADER, ICWSM 2014)"


def main() -> None:
    parser = HfArgumentParser([Arguments, DataArguments, Recipe], description=__doc__)
    args, data_args, recipe = parser.parse_args_into_dataclasses()
    started = time.perf_counter()
    # Before the seed: what a new model draws is no part of the run.
    encoder = args.encoder()
    set_seed(recipe.seed)
    task, rows = data_args.load()
    if task.is_regression:
        raise ValueError("the labels must be classes, they are real numbers")
    model_path = args.model_name_or_path or str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    # MNLI has two dev sets.
    splits = ("train", next(split for split in rows if split != "train"))
    training, validation = (list(tokenize(rows[x], task, tokenizer, data_args.max_seq_length)) for x in splits)
    bert = load_bert(model_path, "SequenceClassification", None, **classifier_settings(task.labels))
    steps = max(1, round(args.num_train_epochs * math.ceil(len(training) / recipe.batch_size)))
    trained = train_classifier(Accelerator(), bert, training, validation, tokenizer, recipe, steps, encoder=encoder)

    folder, results, statistics = args.output_dir, trained.results, trained.energy.statistics
    pictures = [folder / "firing_rates.png", folder / "spikes.png"]
    with timed(results["seconds"], "draw the pictures"):
        plot_firing_rates(statistics.rates, statistics.names, pictures[0])
        plot_example(trained.model, tokenizer, pictures[1])
    with timed(results["seconds"], "save, and load in a fresh process"):
        trained.model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        results["predictions"] = check_saved_model(trained.model, tokenizer, folder)
    results["seconds"]["all"] = time.perf_counter() - started
    results["command"] = shlex.join(["python", *sys.argv])
    results |= {"base_model": args.base_model(), "dataset": {"name": data_args.name(), "split": splits[1]}}
    print(write_report(trained, folder, folder / "model", "SNN-BERT quickstart", pictures))
    print(f"written to {folder}: report.html, report.md, report.json, firing_rates.png, spikes.png, model/")


def film_review_splits() -> DatasetDict:
    """The rated film reviews as a two-class task.

    A review is positive if its mean rating is above 0 and negative if it is below; the few at exactly 0 are left
    out. One in seven goes to validation, chosen by a hash of its text (lower case, single spaces), and a text that
    occurs twice is used once, so no sentence is in both.
    """
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    seen = set()
    for text, rating in film_reviews():
        key = " ".join(text.lower().split())
        if rating == 0 or key in seen:
            continue
        seen.add(key)
        is_validation = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 7 == 0
        label = "positive" if rating > 0 else "negative"
        rows["validation" if is_validation else "train"].append({"sentence": text, "label": label})
    return DatasetDict({name: Dataset.from_list(split) for name, split in rows.items()})


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
