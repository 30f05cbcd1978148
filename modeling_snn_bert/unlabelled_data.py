"""Unlabelled data, made of text, for a teacher to label: sentences, pairs of them, and copies with faults.

`UnlabelledRows` draws single sentences and pairs, tokenised, without end; `batches.DrawnBatches` makes batches of them.
`Corruption` puts faults into sentences.
"""

import itertools
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from .text_blocks import Separators, check_text_files, read_documents

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

# Sentences to draw rows from: any that are no fragments, with their numbers and names.
ENDS = re.compile(r"(?<=[.!?])\s+|\n")
ANY_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
MIN_CHARACTERS, MAX_CHARACTERS = 25, 220
# So many of them in a row are taken from one place of a text.
PASSAGE_CHARACTERS = 2_000
AUXILIARIES = frozenset(
    "is are was were will would can could shall should may might must has have had do does did".split()
)
NEGATIONS = ("not", "never")
DENIALS = ("it is not true that".split(), "nobody says that".split())
NEGATION_WORDS = {*NEGATIONS, *itertools.chain.from_iterable(DENIALS)}


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
    """

    def __init__(self, words: Iterable[str]) -> None:
        counts = Counter(words)
        self.words = [word for word, count in counts.items() if count >= MIN_COUNT and word.isalpha()]
        self.cumulative = list(itertools.accumulate(counts[word] ** 0.5 for word in self.words))
        self.forms = forms_of(self.words)
        # The two that change a word's form or a function word are the likelier ones.
        self.edits = [self.swap, self.move, self.leave_out, self.repeat, self.put_in]
        self.edits += [self.inflect] * 3 + [self.exchange] * 3 + [self.replace]

    def __call__(self, words: list[str], rng: random.Random, edits: int | None = None) -> list[str]:
        """A copy of `words`, one or more of them and a full stop, that differs from it.

        `edits` is the number of changes; without it, they are one or two.
        """
        new = words
        while new == words:
            for _ in range(edits or (1 if rng.random() < 0.7 else 2)):
                edit = rng.choice(self.edits)
                new = list(new)
                # The full stop stays where it is.
                edit(new, rng.randrange(len(new) - 1), rng)
        return new

    def swap(self, words: list[str], place: int, rng: random.Random) -> None:
        if len(words) > 2:
            place = rng.randrange(len(words) - 2)
            words[place], words[place + 1] = words[place + 1], words[place]

    def move(self, words: list[str], place: int, rng: random.Random) -> None:
        word = words.pop(place)
        words.insert(rng.randrange(len(words)), word)

    def leave_out(self, words: list[str], place: int, rng: random.Random) -> None:
        if len(words) > 3:
            words.pop(place)

    def repeat(self, words: list[str], place: int, rng: random.Random) -> None:
        words.insert(place, words[place])

    def put_in(self, words: list[str], place: int, rng: random.Random) -> None:
        words.insert(place, rng.choice(ALL_FUNCTION_WORDS))

    def inflect(self, words: list[str], place: int, rng: random.Random) -> None:
        """Another form of a content word, if there is one."""
        others = {word: self.forms[word] for word in words if word in self.forms and word not in GROUP_OF}
        self._choose(words, others, rng)

    def exchange(self, words: list[str], place: int, rng: random.Random) -> None:
        """Another function word of the same group."""
        self._choose(words, {word: GROUP_OF[word] for word in words if word in GROUP_OF}, rng)

    def replace(self, words: list[str], place: int, rng: random.Random) -> None:
        """Any other word, the frequent ones more often."""
        if self.words:
            words[place] = rng.choices(self.words, cum_weights=self.cumulative)[0]

    def _choose(self, words: list[str], others: dict[str, list[str]], rng: random.Random) -> None:
        places = [place for place, word in enumerate(words[:-1]) if word in others]
        if places:
            place = rng.choice(places)
            words[place] = rng.choice(others[words[place]])


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


def read_passages(files: Sequence[str], sentences: int, seed: int = 0) -> list[list[str]]:
    """Passages of consecutive sentences, about `sentences` in all, the same number from each file.

    They are drawn from the first part of a file, which is enough to draw them from.

    Raises:
        ValueError: if a file has no sentences.
    """
    rng = random.Random(seed)
    passages = []
    wanted = -(-sentences // len(files))
    for file, documents in zip(files, read_documents(files, piece_characters=PASSAGE_CHARACTERS), strict=True):
        pool: list[list[str]] = []
        found = 0
        for document in documents:
            if found > OVERSAMPLING * wanted:
                break
            new = passages_of(document)
            found += sum(map(len, new))
            pool += new
        if not pool:
            raise ValueError(f"{file} has no sentences of {MIN_CHARACTERS} to {MAX_CHARACTERS} characters")
        rng.shuffle(pool)
        taken = 0
        for passage in pool:
            if taken >= wanted:
                break
            passages.append(passage[: wanted - taken])
            taken += len(passages[-1])
    return passages


def passages_of(text: str) -> list[list[str]]:
    """Runs of consecutive sentences that are neither very short nor very long."""
    runs: list[list[str]] = [[]]
    for sentence in ENDS.split(BREAKS.sub(" ", text)):
        sentence = sentence.strip()
        if MIN_CHARACTERS <= len(sentence) <= MAX_CHARACTERS:
            runs[-1].append(sentence)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def nearest_by_tfidf(texts: Sequence[str], count: int) -> list[list[int]]:
    """For each text the indices of at most `count` others that share words with it, the most alike by tf-idf first.

    Of more than a thousand texts the words that stand in more than a fiftieth are not looked at, unless all do: such
    words say little and cost the most.
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    settings = {"sublinear_tf": True, "token_pattern": r"\w+", "dtype": np.float32}
    counts = Counter(word for text in texts for word in set(re.findall(r"\w+", text.lower())))
    frequent = len(texts) if len(texts) <= 1000 or min(counts.values()) > len(texts) // 50 else len(texts) // 50
    vectors = TfidfVectorizer(max_df=frequent, **settings).fit_transform(texts)
    nearest = []
    for start in range(0, len(texts), 512):
        likeness = (vectors[start : start + 512] @ vectors.T).tocsr()
        for row, (first, last) in enumerate(itertools.pairwise(likeness.indptr), start):
            others, values = likeness.indices[first:last], likeness.data[first:last]
            values = np.where(others == row, -1.0, values)
            if len(values) > count + 1:
                best = np.argpartition(-values, count)[:count]
                others, values = others[best], values[best]
            # By index where they are as near: the order of equal values is nobody's promise.
            order = np.lexsort((others, -values))
            nearest.append([int(others[i]) for i in order if values[i] > 0][:count])
    return nearest


class UnlabelledRows:
    """Draws single sentences and pairs of them, tokenised, for a teacher to label.

    Single sentences are those of tasks and of text, and copies of them with faults. Pairs are those of tasks and faulty
    copies of them; two sentences that are near by tf-idf; a sentence and a faulty copy of it, a half of it joined to a
    half of a near one, its negation, the sentence that follows it, or a part of it; and two of no relation.
    `KINDS_OF_PAIRS` and `KINDS_OF_SINGLES` have their shares; what the data have nothing for is left out.

    All words are tokenised beforehand, one by one, as BERT's tokenizer cuts them anyhow.

    Args:
        passages: runs of consecutive sentences of a text.
        singles: texts of tasks that have one text in a row.
        pairs: those of tasks that have two.
        tokenizer: a BERT's.
        max_seq_length: rows are cut to so many tokens, the longer text of a pair first.
        single_share: share of the single sentences in all rows.
        neighbours: a near sentence is one of so many nearest.
        with_texts: give rows their `texts` too, for a teacher with another tokenizer: one, or a tuple of two.

    Raises:
        ValueError: if there is nothing to draw from, or an argument is outside its range.
    """

    KINDS_OF_SINGLES = {"single": 7, "faulty_single": 6, "sentence": 4, "faulty_sentence": 3}
    KINDS_OF_PAIRS = {
        "task_pair": 15,
        "faulty_task_pair": 15,
        "near": 30,
        "faulty": 15,
        "halves": 7,
        "negated": 6,
        "following": 4,
        "part": 5,
        "unrelated": 3,
    }

    def __init__(
        self,
        passages: Sequence[Sequence[str]],
        singles: Sequence[str],
        pairs: Sequence[tuple[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        *,
        single_share: float,
        neighbours: int = 8,
        with_texts: bool = False,
    ) -> None:
        if not 0 <= single_share <= 1:
            raise ValueError(f"`single_share` must lie in [0, 1], got {single_share}")
        if neighbours < 1:
            raise ValueError(f"`neighbours` must be >= 1, got {neighbours}")
        if max_seq_length < 5:
            raise ValueError(f"`max_seq_length` must be >= 5, got {max_seq_length}")
        self.single_share, self.max_seq_length, self.with_texts = single_share, max_seq_length, with_texts
        self.separators = Separators(tokenizer)
        lower = tokenizer("The", add_special_tokens=False) == tokenizer("the", add_special_tokens=False)

        def words_of(text: str) -> list[str]:
            return [sys.intern(word) for word in ANY_WORD.findall(text.lower() if lower else text)]

        texts = [sentence for passage in passages for sentence in passage]
        # What follows a sentence, if anything does.
        ends = set(itertools.accumulate(map(len, passages)))
        self.sentences = [words_of(text) for text in texts]
        self.leading = [i for i in range(len(texts) - 1) if i + 1 not in ends]
        self.singles = [words for words in map(words_of, singles) if words]
        first = len(self.sentences)
        flat = [text for pair in pairs for text in pair] if single_share < 1 else []
        self.sentences += [words_of(text) for text in flat]
        self.task_pairs = [(i, i + 1) for i in range(first, len(self.sentences), 2)]
        if not (self.sentences or self.singles):
            raise ValueError("there is no text to draw rows from")
        if single_share < 1 and not self.sentences:
            raise ValueError(
                "there is no text to draw pairs from: give some (--unlabelled_file), or a `single_share` of 1"
            )
        self.nearest = nearest_by_tfidf([*texts, *flat], neighbours) if single_share < 1 else []
        everything = [*self.sentences, *self.singles]
        self.corruption = Corruption(itertools.chain.from_iterable(everything))
        words = sorted(
            {word for sentence in everything for word in sentence} | set(ALL_FUNCTION_WORDS) | NEGATION_WORDS
        )
        ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        self.pieces: dict[str, list[int]] = dict(zip(words, ids, strict=True))
        lacking = set() if self.singles else {"single", "faulty_single"}
        lacking |= set() if self.sentences else {"sentence", "faulty_sentence"}
        lacking |= set() if self.task_pairs else {"task_pair", "faulty_task_pair"}
        lacking |= set() if self.leading else {"following"}
        self._singles = self._draws(self.KINDS_OF_SINGLES, lacking)
        self._pairs = self._draws(self.KINDS_OF_PAIRS, lacking)

    def _draws(self, shares: dict[str, int], lacking: set[str]) -> tuple[list[Callable], list[int]]:
        kinds = [kind for kind in shares if kind not in lacking]
        return [getattr(self, kind) for kind in kinds], list(itertools.accumulate(shares[kind] for kind in kinds))

    def __call__(self, rng: random.Random) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and, if the tokenizer has any, `token_type_ids` of a row.

        All that is random in it comes from `rng`.
        """
        kinds, cumulative = self._singles if rng.random() < self.single_share else self._pairs
        [draw] = rng.choices(kinds, cum_weights=cumulative)
        texts = draw(rng)
        row: dict[str, Any] = self.tokenized(*texts)
        if self.with_texts:
            joined = tuple(" ".join(words) for words in texts)
            row["texts"] = joined if len(joined) == 2 else joined[0]
        return row

    def tokenized(self, first: list[str], second: list[str] | None = None) -> dict[str, list[int]]:
        """The row of one text, or of two, in words that are among those of the data."""
        cls_id, sep_id = self.separators.cls_id, self.separators.sep_id
        a = [i for word in first for i in self.pieces[word]]
        if second is None:
            a = a[: self.max_seq_length - 2]
            ids, types = [cls_id, *a, sep_id], [0] * (len(a) + 2)
        else:
            b = [i for word in second for i in self.pieces[word]]
            between = [sep_id] * self.separators.between
            room = self.max_seq_length - 2 - len(between)
            kept = min(len(a), max(room - len(b), room // 2))
            a, b = a[:kept], b[: room - kept]
            ids = [cls_id, *a, *between, *b, sep_id]
            types = [0] * (1 + len(a) + len(between)) + [1] * (len(b) + 1)
        row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        return {**row, "token_type_ids": types} if self.separators.has_token_types else row

    def faulty_copy(self, words: list[str], rng: random.Random, most: int) -> list[str]:
        """A copy with one to `most` changes."""
        if not words:
            return words
        edits = rng.randint(1, max(1, most))
        if words[-1] in (".", "!", "?") and len(words) > 1:
            return self.corruption(words, rng, edits)
        return self.corruption([*words, "."], rng, edits)[:-1]

    # Each kind of row draws one text, or two.

    def single(self, rng: random.Random) -> tuple[list[str]]:
        return (rng.choice(self.singles),)

    def faulty_single(self, rng: random.Random) -> tuple[list[str]]:
        return (self.faulty_copy(rng.choice(self.singles), rng, 2),)

    def sentence(self, rng: random.Random) -> tuple[list[str]]:
        return (rng.choice(self.sentences),)

    def faulty_sentence(self, rng: random.Random) -> tuple[list[str]]:
        return (self.faulty_copy(rng.choice(self.sentences), rng, 2),)

    def task_pair(self, rng: random.Random) -> tuple[list[str], list[str]]:
        first, second = rng.choice(self.task_pairs)
        return self.sentences[first], self.sentences[second]

    def faulty_task_pair(self, rng: random.Random) -> tuple[list[str], list[str]]:
        first, second = (self.faulty_copy(words, rng, len(words) // 4) for words in self.task_pair(rng))
        return first, second

    def near(self, rng: random.Random) -> tuple[list[str], list[str]]:
        sentence, other = self._near(rng)
        return self._either_order(sentence, other, rng)

    def faulty(self, rng: random.Random) -> tuple[list[str], list[str]]:
        sentence = rng.choice(self.sentences)
        return self._either_order(sentence, self.faulty_copy(sentence, rng, len(sentence) // 4), rng)

    def halves(self, rng: random.Random) -> tuple[list[str], list[str]]:
        sentence, other = self._near(rng)
        cut, other_cut = (len(words) // 2 for words in (sentence, other))
        joined = sentence[:cut] + other[other_cut:] if rng.random() < 0.5 else other[:other_cut] + sentence[cut:]
        return self._either_order(sentence, joined, rng)

    def negated(self, rng: random.Random) -> tuple[list[str], list[str]]:
        sentence = rng.choice(self.sentences)
        return self._either_order(sentence, negation(sentence, rng), rng)

    def following(self, rng: random.Random) -> tuple[list[str], list[str]]:
        place = rng.choice(self.leading)
        return self.sentences[place], self.sentences[place + 1]

    def part(self, rng: random.Random) -> tuple[list[str], list[str]]:
        sentence = rng.choice(self.sentences)
        length = rng.randint(min(3, len(sentence)), max(3, len(sentence) // 2))
        start = rng.randrange(max(1, len(sentence) - length))
        part = sentence[start : start + length]
        return sentence, part if rng.random() < 0.5 else self.faulty_copy(part, rng, 1)

    def unrelated(self, rng: random.Random) -> tuple[list[str], list[str]]:
        return rng.choice(self.sentences), rng.choice(self.sentences)

    def _near(self, rng: random.Random) -> tuple[list[str], list[str]]:
        """A sentence and one of its nearest; any other one if it shares no words with any."""
        place = rng.randrange(len(self.sentences))
        nearest = self.nearest[place]
        return self.sentences[place], self.sentences[rng.choice(nearest)] if nearest else rng.choice(self.sentences)

    def _either_order(self, first: list[str], second: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
        return (first, second) if rng.random() < 0.5 else (second, first)


def negation(words: list[str], rng: random.Random) -> list[str]:
    """`words` without its "not"; or with "not" or "never" after its first auxiliary, or with a denial in front."""
    if "not" in words:
        place = words.index("not")
        return words[:place] + words[place + 1 :]
    for place, word in enumerate(words):
        if word in AUXILIARIES:
            return [*words[: place + 1], rng.choice(NEGATIONS), *words[place + 1 :]]
    return [*rng.choice(DENIALS), *words]


@dataclass
class UnlabelledArguments:
    """A teacher, and text for it to label; `HfArgumentParser` makes flags of it."""

    teacher_name_or_path: str | None = HfArg(default=None, help="a BERT fine-tuned on the tasks: folder or Hub id")
    unlabelled_file: list[str] | None = HfArg(
        default=None, help="text for the teacher to label: .txt, .csv, .tsv, .json, or packed as .xz"
    )
    unlabelled_sentences: int = HfArg(default=60_000, help="taken from it")

    def __post_init__(self) -> None:
        if self.unlabelled_sentences < 1:
            raise ValueError(f"--unlabelled_sentences must be >= 1, got {self.unlabelled_sentences}")
        check_text_files("--unlabelled_file", self.unlabelled_file or [])
        if self.unlabelled_file and not self.teacher_name_or_path:
            raise ValueError("--unlabelled_file needs --teacher_name_or_path, to label it")

    def rows(
        self,
        tasks: Iterable[Sequence[Sequence[str]]],
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        **options: Any,
    ) -> UnlabelledRows:
        """Draws rows made of the files, and of the one or two columns of texts of each task.

        Args:
            tasks: the columns of each task.
            tokenizer, max_seq_length, options: as for `UnlabelledRows`.
        """
        singles: list[str] = []
        pairs: list[tuple[str, str]] = []
        for texts in tasks:
            if len(texts) == 1:
                singles += texts[0]
            else:
                pairs += zip(*texts, strict=True)
        passages = read_passages(self.unlabelled_file, self.unlabelled_sentences) if self.unlabelled_file else []
        return UnlabelledRows(passages, singles, pairs, tokenizer, max_seq_length, **options)
