"""Checksums of a checkpoint's weights, so that damage on a disk or on the way is an error and not another model.

safetensors checks the layout of a file but not the weights in it: where a bit has flipped, another number is loaded.
So `save_pretrained` writes a SHA-256 of each file of weights into the file's own metadata, where every other program
ignores it, and those of the JSON files beside it; `from_pretrained` compares them. This finds accidents. It does not
find malice, because who writes other weights can write other sums: only a pinned `revision` holds both in place.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .atomic_writes import written_whole

logger = logging.get_logger(__name__)

CONFIG_NAME = "config.json"
# Names the file of each tensor where the weights are cut into several.
INDEX_NAME = "model.safetensors.index.json"
# The file of weights where there is one only.
WHOLE_NAME = "model.safetensors"
# Keys of the metadata of a file of weights: its own sum, and the sum of the sums of all files that were saved together.
# Those of the JSON files are the first one, a colon and their names.
SUM_KEY = "sha256"
SHARDS_KEY = "sha256:shards"
# The name of one of several files of weights.
SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
# A weight that both a BERT and an SNN-BERT have in each layer.
LINEAR_OF_LAYER = re.compile(r"\bencoder\.layer\.(\d+)\.attention\.self\.query\.weight$")
# Types of 8 bits belong to quantised models; torch has no such check for them.
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A header holds the names and shapes of the tensors; the format allows no more.
MAX_HEADER_BYTES = 100_000_000


class VerifiedWeights(PreTrainedModel):
    """A model whose weights are saved with their checksums, and checked when they are loaded."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """`PreTrainedModel.from_pretrained`, and damaged or missing weights are refused.

        Raises:
            ValueError: if the weights are not those that were saved, hold NaN or infinite values, are those of fewer
                layers than the configuration asks for, or are of another type of model than BERT and SNN-BERT.
        """
        source = pretrained_model_name_or_path
        is_folder = source is not None and os.path.isdir(source)
        subfolder = kwargs.get("subfolder") or ""
        if is_folder:
            # First, so that there is one error for all kinds of damage.
            check_checksums(Path(source, subfolder))
            check_model_type(source, Path(source, subfolder, CONFIG_NAME), cls.config_class.model_type)
        cache = {name: kwargs[name] for name in ("cache_dir", "revision") if kwargs.get(name) is not None}
        with_loading_info = kwargs.pop("output_loading_info", False)
        model, loading_info = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        if source is not None and not is_folder:
            # The files lie in the cache now, those of one revision in one folder.
            config = try_to_load_from_cache(str(source), os.path.join(subfolder, CONFIG_NAME), **cache)
            if isinstance(config, str):
                check_checksums(Path(config).parent)
                check_model_type(source, Path(config), cls.config_class.model_type)
        if source is not None:
            check_layers(source, model.config.num_hidden_layers, loading_info["missing_keys"])
        check_finite(model)
        return (model, loading_info) if with_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """`PreTrainedModel.save_pretrained`, and the weights are saved with their checksum."""
        super().save_pretrained(save_directory, *args, **kwargs)
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if hasattr(self, "should_save_on_this_rank"):  # the lowest transformers that setup.py allows has no such method
            is_main_process = self.should_save_on_this_rank(is_main_process)
        if is_main_process:
            write_checksums(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # `save_pretrained(push_to_hub=True)` uploads before it returns.
        write_checksums(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def weight_files(folder: str | Path) -> list[Path]:
    """The files of weights of a model (not of an adapter) in `folder`."""
    return sorted(Path(folder).glob("model*.safetensors"))


def write_checksums(folder: str | Path) -> None:
    """Put the sums into the files of weights in `folder` that have none yet. Each file is replaced whole."""
    folder = Path(folder)
    common = {f"{SUM_KEY}:{path.name}": _sha256_of_file(path) for path in _json_files(folder)}
    sums: dict[Path, str] = {}
    for path in weight_files(folder):
        with open(path, "rb") as file:
            header = _read_header(file)
            metadata = header.setdefault("__metadata__", {})
            if SUM_KEY not in metadata:
                metadata.update(common)
                sums[path] = _sha256_of_weights(header, file)
    together = _sha256_of_sums(sums.values())
    for path, own in sums.items():
        with written_whole(path) as temporary, open(path, "rb") as file, open(temporary, "wb") as copy:
            header = _read_header(file)
            header.setdefault("__metadata__", {}).update({**common, SUM_KEY: own, SHARDS_KEY: together})
            text = json.dumps(header, separators=(",", ":")).encode()
            # The tensors start at a multiple of 8 bytes.
            text += b" " * (-len(text) % 8)
            copy.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, copy, 1 << 20)


def check_checksums(folder: str | Path) -> bool:
    """Compare the files of weights in `folder`, and its `config.json`, with the sums that were saved with them.

    To edit a configuration after the weights were saved is usual, so a changed one only logs a warning.

    Returns:
        Whether there was a sum for every file of weights; another program's files have none and pass unchecked.

    Raises:
        ValueError: if a file of weights, or the index that names them, is not what was saved, or if weights that are
            cut into several files come from different saves, or lie beside the one file of another save.
    """
    folder, all_have_sums = Path(folder), True
    stated: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    whole = False
    for path in weight_files(folder):
        with open(path, "rb") as file:
            header = _read_header(file)
            metadata = header.get("__metadata__", {})
            if SUM_KEY not in metadata:
                all_have_sums = False
                continue
            if _sha256_of_weights(header, file) != metadata[SUM_KEY]:
                raise ValueError(
                    f"{path} is damaged: its weights are not those that were saved, by the SHA-256 in its metadata. "
                    "Fetch or save it again."
                )
        stated.update(metadata)
        if SHARD_NAME.fullmatch(path.name):
            shards.setdefault(metadata.get(SHARDS_KEY, ""), []).append(metadata[SUM_KEY])
        whole |= path.name == WHOLE_NAME
    if whole and shards:
        raise ValueError(
            f"{folder} holds the weights of two saves, in {WHOLE_NAME} and cut into several files, and the first would "
            "be loaded whichever is newer: delete one of the two"
        )
    if any(_sha256_of_sums(sums) != together for together, sums in shards.items()):
        raise ValueError(f"the files of weights in {folder} do not belong together: they come from different saves")
    for path in _json_files(folder):
        if stated.get(f"{SUM_KEY}:{path.name}") in (None, _sha256_of_file(path)):
            continue
        if path.name == INDEX_NAME:
            raise ValueError(f"{path} is damaged: it is not what was saved with the weights beside it")
        logger.warning(
            f"{path} has changed since the weights beside it were saved. If nobody has edited it, it is damaged."
        )
    return all_have_sums


def check_layers(source: str | Path, num_hidden_layers: int, missing: Iterable[str]) -> None:
    """Refuse a checkpoint of fewer layers than the configuration asks for: the others would be random.

    One with no encoder at all is another thing, which transformers reports by itself.

    Args:
        source: the checkpoint, for the error.
        num_hidden_layers: as in the configuration.
        missing: names of the parameters that the checkpoint does not have. Those of neurons may be missing, because a
            BERT has none.

    Raises:
        ValueError: if the weights of some encoder layers, but not of all, are missing.
    """
    without = {int(match[1]) for name in missing if (match := LINEAR_OF_LAYER.search(name))}
    if 0 < len(without) < num_hidden_layers:
        numbers = ", ".join(map(str, sorted(without)))
        raise ValueError(
            f"`num_hidden_layers` is {num_hidden_layers}, but {source} holds no weights of the encoder layers "
            f"{numbers} (counted from 0): ask for as many layers as there are, or initialise from a configuration"
        )


def check_model_type(source: str | Path, config: Path, own_type: str) -> None:
    """Refuse a checkpoint that is neither a BERT nor of this type: one of equal names loads and computes other things.

    Args:
        source: the checkpoint, for the error.
        config: its `config.json`, if it has one.
        own_type: the model type of SNN-BERT.

    Raises:
        ValueError: if the configuration names another model type, such as RoBERTa, whose positions start at 2.
    """
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        # There is none, or it is damaged: transformers says so in its own words.
        return
    if model_type not in (None, "bert", own_type):
        hint = ", and converts those of an MPNet (`convert_bert`, `snn-bert convert`)" if model_type == "mpnet" else ""
        raise ValueError(
            f"{source} is a model of the type {model_type!r}; SNN-BERT takes weights of the types 'bert' and "
            f"{own_type!r}{hint}"
        )


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not numbers: a neuron whose threshold is NaN never fires, and says nothing about it.

    Raises:
        ValueError: if a parameter of `model` holds NaN or an infinite value.
    """
    broken = [
        name
        for name, parameter in model.named_parameters()
        if not all(x.is_meta or x.dtype not in FLOAT_TYPES or x.isfinite().all() for x in _plain_parts(parameter))
    ]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"the weights hold NaN or infinite values in {', '.join(broken[:3])}{more}")


def _plain_parts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors of which `x` is made: itself, or those of a quantized tensor, such as numbers and scales."""
    if not hasattr(x, "__tensor_flatten__"):
        yield x
        return
    for name in x.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(x, name))


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file, which is read up to the end of it."""
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header would be {length} bytes long")
        header = json.loads(file.read(length).decode("utf-8"))
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("its header is not a dictionary")
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged or no safetensors file: {error}") from error
    return header


def _sha256_of_weights(header: dict[str, Any], file: BinaryIO) -> str:
    """The sum of the header but for the sums of files of weights, and of what is left of `file`: the tensors."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key not in (SUM_KEY, SHARDS_KEY)}
    digest = hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sha256_of_sums(sums: Iterable[str]) -> str:
    return hashlib.sha256("".join(sorted(sums)).encode()).hexdigest()


def _json_files(folder: Path) -> list[Path]:
    return [folder / name for name in (CONFIG_NAME, INDEX_NAME) if (folder / name).is_file()]


def _sha256_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
