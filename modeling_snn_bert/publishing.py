"""What of the folder of a trained SNN-BERT is sent to the Hugging Face Hub, and what is wrong with it.

`examples/push_to_hub.py` sends it.
"""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

from . import modeling_snn_bert as models
from .checksums import check_checksums, weight_files
from .configuration_snn_bert import AUTO_MAP, SNNBertConfig

# What opens these may run what they hold.
PICKLE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
# Trainer and Accelerate leave these beside a model, to resume a run from; no user of the model needs them.
RUN_FILES = {"optimizer.bin", "optimizer.pt", "scaler.pt", "scheduler.bin", "scheduler.pt", "training_args.bin"}


def choose_files(folder: Path) -> tuple[list[Path], list[tuple[str, str]], list[str]]:
    """The files of `folder` to send, what is left out and why, and what must not be there.

    Raises:
        NotADirectoryError: if there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder}: name one that save_pretrained wrote")
    files, left_out, problems = [], [], []
    has_weights = bool(weight_files(folder))
    for root, names, here in os.walk(folder):
        for name in sorted(names):
            is_link = Path(root, name).is_symlink()
            if is_link or name.startswith((".", "__pycache__", "checkpoint-")):
                names.remove(name)
                reason = "a link to a folder" if is_link else "hidden, or of a training run"
                left_out.append((f"{Path(root, name).relative_to(folder)}/", reason))
        for name in sorted(here):
            path = Path(root, name)
            shown = str(path.relative_to(folder))
            if name.startswith("."):
                left_out.append((shown, "hidden"))
            elif not os.path.exists(path):
                problems.append(f"{shown} is a link to nothing: delete it")
            elif path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                problems.append(f"{shown} is a link to a file outside the folder, {path.resolve()}: put a copy there")
            elif name in RUN_FILES or name.startswith("rng_state"):
                left_out.append((shown, "a pickle of a training run"))
            elif path.suffix.lower() in PICKLE_SUFFIXES:
                advice = "delete it" if has_weights else "load the model and save it again as safetensors"
                problems.append(f"{shown} is or may be a pickle, which can run code where it is opened: {advice}")
            else:
                files.append(path)
    return files, left_out, problems


def check_folder(folder: Path, has_card: bool = True) -> list[str]:
    """Everything that is wrong with a model's folder, in words; without its card, if that is still to be written."""
    if (folder / "adapter_config.json").exists():
        return ["this is a PEFT adapter, not a model: send it with the adapter's own `push_to_hub`"]
    problems = []
    for check in (check_model, check_tokenizer, check_code, *[check_card] * has_card):
        try:
            problems += check(folder)
        # Whatever the libraries make of a file that is not what it should be is a problem of the folder.
        except Exception as error:
            problems.append(f"{check.__name__.removeprefix('check_')}: {type(error).__name__}: {error}")
    return problems


def check_model(folder: Path) -> list[str]:
    """The configuration loads, and the weights are safetensors, undamaged, complete, finite and fit it."""
    config = SNNBertConfig.from_pretrained(folder)
    problems = []
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") != SNNBertConfig.model_type:
        problems.append(f"config.json must be an SNN-BERT's, with the model_type {SNNBertConfig.model_type!r}")
    name = (config.architectures or [""])[0]
    model_class = getattr(models, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, models.SNNBertPreTrainedModel)):
        return [*problems, f"config.json must name one of SNN-BERT's classes in `architectures`, got {name!r}"]
    if not weight_files(folder):
        return [*problems, "there is no model.safetensors: weights are sent as safetensors only"]
    if not check_checksums(folder):
        print("note: the weights carry no checksum, so damage to them cannot be seen; save_pretrained writes one")
    _, info = model_class.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    for key, words in (
        ("missing_keys", "are not in the weights"),
        ("unexpected_keys", "are in the weights, but not in the model that config.json describes"),
        ("mismatched_keys", "have another shape than config.json says"),
    ):
        if info[key]:
            names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info[key])
            problems.append(f"{len(names)} parameters {words}: {', '.join(names[:3])}{', ...' if names[3:] else ''}")
    return problems


def check_tokenizer(folder: Path) -> list[str]:
    """There is a tokenizer of this folder's own, and the model has an embedding for each of its tokens."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        return ["there is no tokenizer: `tokenizer.save_pretrained(folder)` puts it beside the model"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab_size = SNNBertConfig.from_pretrained(folder).vocab_size
    if len(tokenizer) > vocab_size:
        return [f"the tokenizer has {len(tokenizer)} tokens, but the model only {vocab_size} embeddings"]
    return []


def check_code(folder: Path) -> list[str]:
    """All modules of the code are there, and config.json leads every Auto class to them."""
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    lacking = [name for name in AUTO_MAP if name not in auto_map]
    problems = [f"`auto_map` in config.json lacks {', '.join(lacking)}: save the model again"] if lacking else []
    modules = {path.split(".")[0] + ".py" for path in AUTO_MAP.values()}
    missing = {name for name in modules if not (folder / name).exists()}
    for name in modules - missing:
        try:
            get_relative_import_files(folder / name)
        except FileNotFoundError as error:
            missing.add(Path(error.filename).name)
    if missing:
        problems.append(f"the code lacks {', '.join(sorted(missing))}: save the model again, with the package imported")
    return problems


def check_card(folder: Path) -> list[str]:
    """README.md has metadata and nothing in it waits to be filled in."""
    if not (folder / "README.md").exists():
        return ["there is no model card (README.md): --report writes one (or `card_from_report`)"]
    card = ModelCard.load(folder / "README.md")
    problems = [] if card.data.to_dict() else ["README.md has no metadata between lines of --- at its start"]
    if "TO BE FILLED IN" in card.text:
        problems.append("README.md still says TO BE FILLED IN")
    return problems
