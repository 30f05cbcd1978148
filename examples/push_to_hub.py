"""Check the folder of a trained SNN-BERT and send it to the Hugging Face Hub, in one commit.

    python examples/push_to_hub.py --model_name_or_path outputs/quickstart/model --repo_id you/your-model --dry_run

Checks that the configuration loads, that the weights are safetensors, undamaged, complete and finite, that they fit
the configuration, that tokenizer and code are there and that the model card has its metadata. Shows what will be
sent. Pickles are never sent. Log in first with `hf auth login`, or set HF_TOKEN.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_snn_bert
from modeling_snn_bert import SNNBertConfig, SNNBertPreTrainedModel
from modeling_snn_bert.checksums import check_checksums, weight_files
from modeling_snn_bert.configuration_snn_bert import AUTO_MAP
from modeling_snn_bert.model_card import UNPUBLISHED, card_from_report

# What opens these may run what they hold.
PICKLE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
# Trainer and Accelerate leave these beside a model, to resume a run from; no user of the model needs them.
RUN_FILES = {"optimizer.bin", "optimizer.pt", "scaler.pt", "scheduler.bin", "scheduler.pt", "training_args.bin"}
# An error of the connection, by whichever HTTP library this version of huggingface_hub uses.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
HINTS = {
    401: "the Hub does not know you: log in with `hf auth login`, or set HF_TOKEN",
    403: "your token has no right to write there: check --repo_id, and that the token has the role `write`",
    404: "there is no such repository or revision, or your token does not see it",
    409: "the repository is being changed by someone else: run this again",
    412: "the repository was changed by someone else meanwhile: run this again",
    429: "the Hub has had too many requests from you: wait, and run this again",
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="folder that save_pretrained wrote")
    parser.add_argument("--repo_id", help="where to, as namespace/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to send to; created if it does not exist (default: main)")
    parser.add_argument("--commit_message", default="Upload SNN-BERT")
    parser.add_argument("--report", type=Path, help="report.json of the quickstart or energy report, for README.md")
    parser.add_argument("--license", help="licence of the weights, such as apache-2.0, for a card from --report")
    parser.add_argument("--token", help="access token (default: the one of `hf auth login`, or HF_TOKEN)")
    parser.add_argument("--dry_run", action="store_true", help="check and show what would be sent, and stop there")
    args = parser.parse_args(arguments)
    if args.repo_id is None and not args.dry_run:
        parser.error("--repo_id is required, except with --dry_run")
    if args.license and not args.report:
        parser.error("--license goes into the card that --report writes: give both, or edit README.md")
    if not args.commit_message.strip():
        parser.error("--commit_message must not be empty")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: sent (or could be, with --dry_run); 1: the folder or the Hub refuses; 2: bad arguments."""
    args = parse_args(arguments)
    folder = args.model_name_or_path
    try:
        if args.report:
            write_card(folder, args.report, args.repo_id, args.license)
        files, left_out, problems = choose_files(folder)
        problems += check_folder(folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {len(files)} files, {size_text(sum(path.stat().st_size for path in files))}")
    for path in files:
        print(f"  {size_text(path.stat().st_size):>10}  {path.relative_to(folder)}")
    for name, reason in left_out:
        print(f"  {'left out':>10}  {name} ({reason})")
    if problems:
        print(f"\nnot sent, because of {len(problems)} problem(s):", file=sys.stderr)
        for problem in problems:
            print(f"  - {problem}", file=sys.stderr)
        return 1
    if args.dry_run:
        print("nothing was sent (--dry_run)")
        return 0
    try:
        return send(folder, files, args)
    except HfHubHTTPError as error:
        hint = HINTS.get(error.response.status_code, "nothing was committed; run this again")
        print(f"error: {hint}\n{error}", file=sys.stderr)
    except HTTPError as error:
        print(f"error: the connection failed, nothing was committed; run this again\n{error!r}", file=sys.stderr)
    except (HFValidationError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def write_card(folder: Path, report: Path, repo_id: str | None, license: str | None) -> None:
    """Write README.md from what `report` says was measured."""
    try:
        facts = json.loads(report.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--report {report} is not JSON: {error}") from error
    card_data = {"license": license} if license else {}
    config = SNNBertConfig.from_pretrained(folder)
    card_from_report(config, facts, model_id=repo_id, **card_data).save(folder / "README.md")


def choose_files(folder: Path) -> tuple[list[Path], list[tuple[str, str]], list[str]]:
    """What to send, what is left out and why, and what must not be there.

    Raises:
        NotADirectoryError: if there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"--model_name_or_path must be a folder that save_pretrained wrote, got {folder}")
    files, left_out, problems = [], [], []
    has_weights = bool(weight_files(folder))
    for root, names, here in os.walk(folder):
        for name in sorted(names):
            if name.startswith((".", "__pycache__", "checkpoint-")):
                names.remove(name)
                left_out.append((f"{(Path(root) / name).relative_to(folder)}/", "hidden, or of a training run"))
        for name in sorted(here):
            path = Path(root, name)
            shown = str(path.relative_to(folder))
            if name.startswith("."):
                left_out.append((shown, "hidden"))
            elif path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                problems.append(f"{shown} is a link to a file outside the folder, {path.resolve()}")
            elif name in RUN_FILES or name.startswith("rng_state"):
                left_out.append((shown, "a pickle of a training run"))
            elif path.suffix.lower() in PICKLE_SUFFIXES:
                advice = "delete it" if has_weights else "load the model and save it again as safetensors"
                problems.append(f"{shown} is or may be a pickle, which can run code where it is opened: {advice}")
            else:
                files.append(path)
    return files, left_out, problems


def check_folder(folder: Path) -> list[str]:
    """Everything that is wrong with a model's folder, in words."""
    if (folder / "adapter_config.json").exists():
        return ["this is a PEFT adapter, not a model: send it with the adapter's own `push_to_hub`"]
    problems = []
    for check in (check_model, check_tokenizer, check_code, check_card):
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
    model_class = getattr(modeling_snn_bert, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, SNNBertPreTrainedModel)):
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
        return ["there is no model card (README.md): --report writes one from what was measured"]
    card = ModelCard.load(folder / "README.md")
    problems = [] if card.data.to_dict() else ["README.md has no metadata between lines of --- at its start"]
    if "TO BE FILLED IN" in card.text:
        problems.append("README.md still says TO BE FILLED IN")
    return problems


def send(folder: Path, files: list[Path], args: argparse.Namespace) -> int:
    """Create repository and branch where they do not exist, and commit all files at once."""
    api = HfApi(token=args.token)
    repo_id = api.create_repo(args.repo_id, private=args.private or None, exist_ok=True).repo_id
    if args.revision:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
    operations = []
    for path in files:
        content: str | bytes = str(path)
        if path.name == "README.md":
            content = path.read_text(encoding="utf-8").replace(UNPUBLISHED, repo_id).encode()
        operations.append(CommitOperationAdd(path.relative_to(folder).as_posix(), content))
    commit = api.create_commit(repo_id, operations, commit_message=args.commit_message, revision=args.revision)
    print(f"sent to {commit.commit_url}\nload it with\n")
    print(f'    from_pretrained("{repo_id}", revision="{commit.oid}", trust_remote_code=True)')
    return 0


def size_text(size: int) -> str:
    """A size in bytes as people read it."""
    units = ("B", "kB", "MB", "GB")
    power = min(max(len(str(size)) - 1, 0) // 3, len(units) - 1)
    return f"{size / 1000**power:.{1 if power else 0}f} {units[power]}"


if __name__ == "__main__":
    sys.exit(main())
