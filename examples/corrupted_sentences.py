"""Make labelled data of a text: its sentences, and copies of them with a fault in each, to learn grammar from.

    python examples/corrupted_sentences.py --train_file novels.txt.xz reviews.txt.xz --max_sentences 100000 \\
        --output_dir outputs/corrupted
    python examples/run_glue_no_trainer.py --model_name_or_path ... --task_name cola --data_dir outputs/corrupted ...

A model that is fine-tuned on them first does better on CoLA, which has too few sentences to learn the difference from;
telling sentences from corrupted ones is also what Warstadt et al., "Neural Network Acceptability Judgments", 2019,
train their encoders on beforehand. The output is in the layout of CoLA, in lower case: label 1 for a sentence of the
text, and 0 for its copy, with one or two words swapped, moved, left out, repeated, put in, inflected otherwise or
exchanged.
"""

import argparse
import csv
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from glue_tasks import TASKS
from text_blocks import add_source_arguments, check_source_arguments, sources

# Words of a group take each other's place; any of them is put in.
FUNCTION_WORDS = (
    "a an the this that these those some any no every each".split(),
    "of to in on at by for with from about into over under".split(),
    "is are was were be been being am".split(),
    "has have had having do does did doing done".split(),
    "will would can could shall should may might must".split(),
    "he him his himself she her hers herself it its itself they them their theirs themselves".split(),
    "i me my mine myself we us our ours ourselves you your yours yourself".split(),
    "who whom whose which what when where why how whether if that because".split(),
    "and or but not nor so than as".split(),
)
GROUP_OF = {word: group for group in FUNCTION_WORDS for word in group}
ALL_FUNCTION_WORDS = sorted(GROUP_OF)
# Words that differ in these alone count as forms of one word.
ENDINGS = ("", "s", "es", "ed", "d", "ing", "er", "est", "ly", "'s")
SHORTEST_STEM = 3
# A word must be so frequent in the text to take another's place.
MIN_COUNT = 5

SENTENCE = re.compile(r"[A-Z\"'“\u2018][^.!?\n]*[.!?]")
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[^\sa-z]", re.IGNORECASE)
# Line breaks as datasets of reviews write them.
BREAKS = re.compile(r"\\n|<br />")
# With the full stop. CoLA's sentences are short.
MIN_WORDS, MAX_WORDS = 5, 18
MAX_SIGNS = 2
# A source is read until it has given this many times the sentences that are drawn from it.
OVERSAMPLING = 6
PIECE_CHARACTERS = 100_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--source_shares", type=float, nargs="+", help="share of each --train_file (default: the same)")
    parser.add_argument("--max_sentences", type=int, default=100_000, help="sentences of the text (default: 100,000)")
    parser.add_argument("--validation_sentences", type=int, default=1000, help="so many of them for dev.tsv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder CoLA is written to it")
    args = parser.parse_args()
    check_source_arguments(parser, args)
    count = len(args.train_file or [args.dataset_name])
    args.source_shares = args.source_shares or [1 / count] * count
    if len(args.source_shares) != count or min(args.source_shares) <= 0 or abs(sum(args.source_shares) - 1) > 1e-6:
        parser.error(f"--source_shares must be {count} positive numbers that add up to 1, got {args.source_shares}")
    if not 1 <= args.validation_sentences < args.max_sentences:
        parser.error(
            f"--validation_sentences must be >= 1 and fewer than --max_sentences, got {args.validation_sentences} of "
            f"{args.max_sentences}"
        )
    return args


def main() -> None:
    args = parse_args()
    rng = random.Random(args.seed)
    sentences = []
    for stream, share in zip(sources(args, PIECE_CHARACTERS), args.source_shares, strict=True):
        sentences += draw_sentences(stream, int(args.max_sentences * share), rng)
    if len(sentences) <= args.validation_sentences:
        raise SystemExit(
            f"the text has {len(sentences)} sentences of {MIN_WORDS} to {MAX_WORDS} words: too few for "
            f"{args.validation_sentences} (--validation_sentences) and training"
        )
    corrupt = Corruption(itertools.chain.from_iterable(sentences), rng)
    rng.shuffle(sentences)
    rows = [row for words in sentences for row in ((1, words), (0, corrupt(words)))]
    held_out = 2 * args.validation_sentences
    write_rows(args.output_dir / TASKS["cola"].folder / "dev.tsv", rows[:held_out])
    write_rows(args.output_dir / TASKS["cola"].folder / "train.tsv", rows[held_out:])
    print(f"{len(rows) - held_out} rows to train on and {held_out} for dev in {args.output_dir}")


def draw_sentences(documents: Iterable[str], count: int, rng: random.Random) -> list[list[str]]:
    """At most `count` sentences, drawn from the first ones of `documents`, each a list of words and signs."""
    pool: list[list[str]] = []
    for document in documents:
        if len(pool) > OVERSAMPLING * count:
            break
        pool += usable_sentences(document)
    rng.shuffle(pool)
    return pool[:count]


def usable_sentences(text: str) -> Iterator[list[str]]:
    """The words, in lower case, of the sentences that are neither long nor full of numbers and signs."""
    for match in SENTENCE.finditer(BREAKS.sub(" ", text)):
        words = [word.lower() for word in WORD.findall(match.group())]
        plain = sum(word.replace("'", "").isalpha() for word in words)
        if (
            MIN_WORDS <= len(words) <= MAX_WORDS
            and plain >= len(words) - MAX_SIGNS
            and all(word.isascii() for word in words)
            and words[0] not in ('"', "'")
        ):
            yield words


class Corruption:
    """Makes corrupted copies of sentences.

    Args:
        words: the words of a text, which say what forms of a word there are and what words to put in.
        rng: where the draws come from.
    """

    def __init__(self, words: Iterable[str], rng: random.Random) -> None:
        counts = Counter(words)
        self.rng = rng
        self.words = [word for word, count in counts.items() if count >= MIN_COUNT and word.isalpha()]
        self.cumulative = list(itertools.accumulate(counts[word] ** 0.5 for word in self.words))
        self.forms = forms_of(self.words)
        edits = {
            self.swap: 1,
            self.move: 1,
            self.leave_out: 1,
            self.repeat: 1,
            self.put_in: 1,
            self.inflect: 3,
            self.exchange: 3,
            self.replace: 1,
        }
        self.edits = [edit for edit, share in edits.items() for _ in range(share)]

    def __call__(self, words: list[str]) -> list[str]:
        """A copy of `words`, two or more of them and a full stop, that differs from it."""
        new = words
        while new == words:
            for _ in range(1 if self.rng.random() < 0.7 else 2):
                edit = self.rng.choice(self.edits)
                new = list(new)
                # The full stop stays where it is.
                edit(new, self.rng.randrange(len(new) - 1))
        return new

    def swap(self, words: list[str], place: int) -> None:
        if len(words) > 2:
            place = self.rng.randrange(len(words) - 2)
            words[place], words[place + 1] = words[place + 1], words[place]

    def move(self, words: list[str], place: int) -> None:
        word = words.pop(place)
        words.insert(self.rng.randrange(len(words)), word)

    def leave_out(self, words: list[str], place: int) -> None:
        if len(words) > 3:
            words.pop(place)

    def repeat(self, words: list[str], place: int) -> None:
        words.insert(place, words[place])

    def put_in(self, words: list[str], place: int) -> None:
        words.insert(place, self.rng.choice(ALL_FUNCTION_WORDS))

    def inflect(self, words: list[str], place: int) -> None:
        """Another form of a content word, if there is one."""
        self._choose(words, {word: self.forms[word] for word in words if word in self.forms and word not in GROUP_OF})

    def exchange(self, words: list[str], place: int) -> None:
        """Another function word of the same group."""
        self._choose(words, {word: GROUP_OF[word] for word in words if word in GROUP_OF})

    def replace(self, words: list[str], place: int) -> None:
        """Any other word, the frequent ones more often."""
        if self.words:
            words[place] = self.rng.choices(self.words, cum_weights=self.cumulative)[0]

    def _choose(self, words: list[str], others: dict[str, list[str]]) -> None:
        places = [place for place, word in enumerate(words[:-1]) if word in others]
        if places:
            place = self.rng.choice(places)
            words[place] = self.rng.choice(others[words[place]])


def forms_of(words: Iterable[str]) -> dict[str, list[str]]:
    """For each word the others that differ from it in their `ENDINGS` only, if their common stem is a word too."""
    known = set(words)
    families: dict[str, set[str]] = {}
    for word in known:
        for ending in ENDINGS:
            if word.endswith(ending) and len(word) - len(ending) >= SHORTEST_STEM:
                families.setdefault(word.removesuffix(ending), set()).add(word)
    forms: dict[str, set[str]] = {}
    for stem, family in families.items():
        if stem in known and len(family) > 1:
            for word in family:
                forms.setdefault(word, set()).update(family - {word})
    return {word: sorted(others) for word, others in forms.items()}


def write_rows(path: Path, rows: Iterable[tuple[int, list[str]]]) -> None:
    """Write labels and sentences in CoLA's columns: source, label, mark of a fault, sentence. Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
        writer.writerows(("text", label, "" if label else "*", " ".join(words)) for label, words in rows)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
