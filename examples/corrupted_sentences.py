"""Make labelled data of a text, to learn grammar from: its sentences, and copies of them with a fault in each.

    python examples/corrupted_sentences.py --train_file novels.txt.xz reviews.txt.xz --max_sentences 100000 \\
        --output_dir outputs/corrupted
    python examples/run_glue.py --model_name_or_path ... --task_name cola --data_dir outputs/corrupted ...

A model that is fine-tuned on them first does better on CoLA, which has too few sentences to learn the difference from;
telling sentences from corrupted ones is also what Warstadt et al., "Neural Network Acceptability Judgments", 2019,
train their encoders on beforehand. The output is in the layout of CoLA, in lower case: label 1 for a sentence of the
text, and 0 for its copy, with one or two words swapped, moved, left out, repeated, put in, inflected otherwise or
exchanged.
"""

import csv
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glue_tasks import TASKS
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from modeling_snn_bert.atomic_writes import written_whole
from modeling_snn_bert.text_blocks import check_text_files, read_documents
from modeling_snn_bert.unlabelled_data import MAX_WORDS, MIN_WORDS, PIECE_CHARACTERS, Corruption, draw_sentences


@dataclass
class Arguments:
    """The text, and what is made of it."""

    train_file: list[str] = HfArg(help=".txt (a document a line), .csv, .tsv, .json, .parquet; or .xz")
    output_dir: str = HfArg(help="the folder CoLA is written to it")
    text_column: str = HfArg(default="text", help="name of the column of texts")
    source_shares: list[float] | None = HfArg(default=None, help="share of each --train_file (default: the same)")
    max_sentences: int = HfArg(default=100_000, help="sentences of the text")
    validation_sentences: int = HfArg(default=1000, help="so many of them for dev.tsv")
    seed: int = 0

    def __post_init__(self) -> None:
        check_text_files("--train_file", self.train_file)
        count = len(self.train_file)
        shares = self.source_shares = self.source_shares or [1 / count] * count
        if len(shares) != count or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"--source_shares must be {count} positive numbers that add up to 1, got {shares}")
        if not 1 <= self.validation_sentences < self.max_sentences:
            raise ValueError(
                "--validation_sentences must be >= 1 and fewer than --max_sentences, got "
                f"{self.validation_sentences} of {self.max_sentences}"
            )


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    rng = random.Random(args.seed)
    sentences = []
    streams = read_documents(args.train_file, args.text_column, PIECE_CHARACTERS)
    for stream, share in zip(streams, args.source_shares, strict=True):
        sentences += draw_sentences(stream, int(args.max_sentences * share), rng)
    if len(sentences) <= args.validation_sentences:
        raise ValueError(
            f"the text has {len(sentences)} sentences of {MIN_WORDS} to {MAX_WORDS} words: too few for "
            f"{args.validation_sentences} (--validation_sentences) and training"
        )
    corrupt = Corruption(itertools.chain.from_iterable(sentences))
    rng.shuffle(sentences)
    rows = [row for words in sentences for row in ((1, words), (0, corrupt(words, rng)))]
    held_out = 2 * args.validation_sentences
    folder = Path(args.output_dir) / TASKS["cola"].folder
    write_rows(folder / "dev.tsv", rows[:held_out])
    write_rows(folder / "train.tsv", rows[held_out:])
    print(f"{len(rows) - held_out} rows to train on and {held_out} for dev in {args.output_dir}")


def write_rows(path: Path, rows: Iterable[tuple[int, list[str]]]) -> None:
    """Write labels and sentences in CoLA's columns: source, label, mark of a fault, sentence."""
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
        writer.writerows(("text", label, "" if label else "*", " ".join(words)) for label, words in rows)


if __name__ == "__main__":
    main()
