"""Unlabelled text as blocks of tokens of one length, for masked-LM training and distillation.

The text is read as a stream, from files or from a dataset on the Hub, tokenised once, and kept in one file of token
ids in `cache_folder`. What a training step sees follows from the seed and the step alone, so a run that is resumed goes
on with the very data that it would have seen.
"""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from .atomic_writes import written_whole
from .batches import Batch, BatchOf
from .text_files import check_columns

if TYPE_CHECKING:
    from transformers import TrainingArguments

COMPRESSIONS = (".xz", ".gz", ".bz2", ".zst")
KINDS = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Long documents are cut, so that one novel does not fill the tokens of its source at once.
PIECE_CHARACTERS = 10_000
DOCUMENTS_AT_ONCE = 64
# The shortest block: [CLS], a token or two for each segment of a pair, two [SEP].
MIN_SEQ_LENGTH = 8


@dataclass
class TextArguments:
    """Which text to use, and how to cut it into blocks; `HfArgumentParser` makes flags of it."""

    train_file: list[str] | None = HfArg(
        default=None, help=".txt (a document a line), .csv, .tsv, .json, .parquet; or packed as .xz, .gz"
    )
    dataset_name: str | None = HfArg(default=None, help="a dataset on the Hub, read as a stream")
    dataset_config_name: str | None = HfArg(default=None, help="its configuration")
    text_column: str = HfArg(default="text", help="name of the column of texts")
    max_seq_length: int = HfArg(default=128, help="tokens in a block, with [CLS] and [SEP]")
    max_text_tokens: int | None = HfArg(default=None, help="stop reading after so many (default: all)")
    validation_blocks: int = HfArg(default=64, help="blocks that are held out")
    pair_probability: float = HfArg(default=0.0, help="share of the blocks that are cut into a pair of segments")
    short_probability: float = HfArg(default=0.0, help="share of the batches that are cut to some shorter length")
    calibration_tokens: int = HfArg(default=10_000, help="to convert a BERT")

    def __post_init__(self) -> None:
        if bool(self.train_file) == bool(self.dataset_name):
            raise ValueError("give either --train_file or --dataset_name")
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError("--dataset_config_name needs --dataset_name")
        check_text_files("--train_file", self.train_file or [])
        least = dict.fromkeys(("validation_blocks", "calibration_tokens", "max_text_tokens"), 1)
        for name, minimum in {"max_seq_length": MIN_SEQ_LENGTH, **least}.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"--{name} must be >= {minimum}, got {value}")
        for name in ("pair_probability", "short_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {getattr(self, name)}")

    def documents(self) -> list[Iterator[str]]:
        """A stream of documents for each file, or one for the dataset."""
        if self.dataset_name is None:
            return read_documents(self.train_file or [], self.text_column)
        from datasets import load_dataset

        data = load_dataset(self.dataset_name, self.dataset_config_name, split="train", streaming=True)
        return [_pieces(data, self.dataset_name, self.text_column, PIECE_CHARACTERS)]

    def blocks(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> "TextBlocks":
        """The text as blocks of tokens, which are kept in `cache_folder`, not beside the model that learns from them.

        Raises:
            ValueError: if the text has no tokens, or too few to hold out `validation_blocks`.
        """
        names = ("max_seq_length", "validation_blocks", "pair_probability", "short_probability")
        settings = {name: getattr(self, name) for name in names}
        return TextBlocks(token_file(self, tokenizer, cache_folder() / "tokens"), tokenizer, seed=seed, **settings)


def cache_folder() -> Path:
    """Where texts and their tokens are kept: `$SNN_BERT_CACHE`, or `~/.cache/snn-bert`."""
    return Path(os.environ.get("SNN_BERT_CACHE", Path.home() / ".cache" / "snn-bert"))


def check_text_files(name: str, files: Sequence[str]) -> None:
    """Raise a `ValueError` about the flag `name` if one of its files is missing or of no kind that can be read."""
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{name}: there is no file {file}")
        if kind_of(Path(file)) is None:
            raise ValueError(f"{name} must be one of {', '.join(KINDS)}, may be packed as .xz or .gz; got {file}")


def kind_of(path: Path) -> str | None:
    """The `datasets` loader for a file of that name, or `None`."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return KINDS.get(name.suffix)


def read_documents(
    files: Sequence[str], text_column: str = "text", piece_characters: int = PIECE_CHARACTERS
) -> list[Iterator[str]]:
    """A stream of documents for each file, in pieces of at most that many characters.

    Raises:
        ValueError: while it is read, if a text column is missing.
    """
    from datasets import load_dataset

    streams = []
    for file in files:
        kind = kind_of(Path(file))
        assert kind is not None, "files are checked by `check_text_files`"
        is_tsv = ".tsv" in Path(file).suffixes
        options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
        data = load_dataset(kind, data_files=str(Path(file).resolve()), split="train", streaming=True, **options)
        column = "text" if kind == "text" else text_column
        streams.append(_pieces(data, file, column, piece_characters))
    return streams


def _pieces(rows: Iterable[dict], name: str, column: str, piece_characters: int) -> Iterator[str]:
    for row in rows:
        check_columns(name, row, column, advice=": choose with --text_column")
        text = row[column]
        if isinstance(text, str) and text.strip():
            for start in range(0, len(text), piece_characters):
                yield text[start : start + piece_characters]


def tokenize_sources(
    streams: list[Iterator[str]], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> Iterator[list[int]]:
    """Token ids of the documents, each ended by [SEP], always from the source that has given the fewest tokens.

    So each source gives the same share, until it has nothing left.
    """
    given = dict.fromkeys(range(len(streams)), 0)
    left = float("inf") if max_tokens is None else max_tokens
    while given and left > 0:
        source = min(given, key=given.__getitem__)
        documents = list(islice(streams[source], DOCUMENTS_AT_ONCE))
        if not documents:
            del given[source]
            continue
        for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
            ids = [*ids, tokenizer.sep_token_id][: int(min(left, len(ids) + 1))]
            given[source] += len(ids)
            left -= len(ids)
            yield ids


def token_file(args: TextArguments, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """The file of token ids (int32) of this text with this tokenizer, in `folder`; made if it is not there yet.

    Raises:
        ValueError: if the text has no tokens.
    """
    files = [str(Path(file).resolve()) for file in args.train_file or []]
    sizes = [os.path.getsize(file) for file in files]
    what = [files, sizes, args.dataset_name, args.dataset_config_name, args.text_column, args.max_text_tokens]
    vocabulary = sorted(tokenizer.get_vocab().items())
    fingerprint = hashlib.sha256(json.dumps([what, vocabulary]).encode()).hexdigest()[:16]
    path = folder / f"tokens-{fingerprint}.bin"
    if path.exists():
        return path
    with written_whole(path) as partial:
        with open(partial, "wb") as file, tqdm(desc="tokenize the text", unit=" tokens", unit_scale=True) as progress:
            for ids in tokenize_sources(args.documents(), tokenizer, args.max_text_tokens):
                file.write(np.asarray(ids, dtype=np.int32).tobytes())
                progress.update(len(ids))
        if not partial.stat().st_size:
            raise ValueError(f"there is no text in {files or args.dataset_name}")
    return path


class Separators:
    """How a tokenizer joins one text, or two, which its inputs made by hand have to follow.

    Attributes:
        cls_id, sep_id: what stands in front, and behind each text.
        between: how many separators stand between two texts: one in a BERT's inputs, two in an MPNet's.
        has_token_types: whether its inputs have `token_type_ids`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.cls_id, self.sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.between = tokenizer.num_special_tokens_to_add(pair=True) - 2
        self.has_token_types = "token_type_ids" in tokenizer.model_input_names


class TextBlocks:
    """Blocks `[CLS] tokens [SEP]` of one length, and the order in which training sees them.

    Args:
        path: a file of token ids, see `token_file`.
        tokenizer: a tokenizer with [CLS] and [SEP].
        max_seq_length: tokens in a block.
        validation_blocks: so many blocks, the same ones whatever the seed, are held out.
        pair_probability: share of the blocks that are cut in two: `[CLS] a [SEP] b [SEP]`, with as many separators and
            such token types, if there are any, as the tokenizer gives a pair.
        short_probability: share of the training batches whose blocks are cut to one shorter length.
        seed: seed of the order and of the cuts.

    Raises:
        ValueError: if the text has no more blocks than are held out.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        *,
        validation_blocks: int,
        pair_probability: float = 0.0,
        short_probability: float = 0.0,
        seed: int = 0,
    ) -> None:
        body = max_seq_length - 2
        tokens = np.memmap(path, dtype=np.int32, mode="r")
        count = len(tokens) // body
        if count <= validation_blocks:
            raise ValueError(
                f"the text has {len(tokens)} tokens, {count} blocks of {max_seq_length}: too few to hold out "
                f"{validation_blocks} (--validation_blocks) and train on the rest"
            )
        self.blocks = tokens[: count * body].reshape(count, body)
        self.separators, self.length = Separators(tokenizer), max_seq_length
        self.pair_probability, self.short_probability, self.seed = pair_probability, short_probability, seed
        order = np.random.default_rng(0).permutation(count)
        self.held_out, self.training = order[:validation_blocks], order[validation_blocks:]

    def batch(self, step: int, batch_size: int, part: int = 0, parts: int = 1) -> Batch:
        """The `part`-th of `parts` batches of step `step`, each of `batch_size` blocks; every epoch has a new order."""
        first = (step * parts + part) * batch_size
        indices = []
        for position in range(first, first + batch_size):
            epoch, place = divmod(position, len(self.training))
            indices.append(self.training[self._epoch_order(epoch)[place]])
        generator = np.random.default_rng([self.seed, step, part])
        length = self.length
        if self.short_probability and generator.random() < self.short_probability:
            length = int(generator.integers(MIN_SEQ_LENGTH, length + 1))
        return self._assemble(indices, generator, length)

    def of_run(self, args: "TrainingArguments") -> BatchOf:
        """Makes this process' batch of a number in the run of `args`."""
        return partial(
            self.batch, batch_size=args.per_device_train_batch_size, part=args.process_index, parts=args.world_size
        )

    def validation(self, batch_size: int, part: int = 0, parts: int = 1) -> Iterator[Batch]:
        """The held-out blocks of one of `parts` processes."""
        for number in range(part, math.ceil(len(self.held_out) / batch_size), parts):
            indices = self.held_out[number * batch_size : (number + 1) * batch_size]
            yield self._assemble(indices, np.random.default_rng([0, number]), self.length)

    def calibration(self, tokens: int) -> list[Batch]:
        """Training blocks of about that many tokens in all for `convert_bert`; the same ones in every process."""
        batch_size = max(1, 1024 // self.length)
        return [self.batch(number, batch_size) for number in range(max(1, tokens // (batch_size * self.length)))]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_order", (None, None))[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.training))
        return self._order[1]

    def _assemble(self, indices, generator: np.random.Generator, length: int) -> Batch:
        body = np.stack([self.blocks[index, : length - 2] for index in indices])
        ids = np.pad(body, ((0, 0), (1, 1)))
        cls_id, sep_id, between = self.separators.cls_id, self.separators.sep_id, self.separators.between
        ids[:, 0], ids[:, -1] = cls_id, sep_id
        types = np.zeros_like(ids)
        for row in np.flatnonzero(generator.random(len(ids)) < self.pair_probability):
            # The tokens at the cut give their places to the separators, so that all blocks have one length.
            cut = generator.integers(2, ids.shape[1] - 1 - between)
            ids[row, cut : cut + between] = sep_id
            types[row, cut + between :] = 1
        batch = {"input_ids": torch.from_numpy(ids).long()}
        if self.separators.has_token_types:
            batch["token_type_ids"] = torch.from_numpy(types).long()
        return batch
