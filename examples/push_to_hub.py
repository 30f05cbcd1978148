"""Check the folder of a trained SNN-BERT and send it to the Hugging Face Hub, in one commit.

    python examples/push_to_hub.py --model_name_or_path outputs/quickstart/model --repo_id you/your-model --dry_run

Checks that the configuration loads, that the weights are safetensors, undamaged, complete and finite, that they fit
the configuration, that tokenizer and code are there and that the model card has its metadata. Shows what will be
sent. Pickles are never sent. Log in first with `hf auth login`, or set HF_TOKEN.
"""

import argparse
import json
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.model_card import UNPUBLISHED, card_from_report
from modeling_snn_bert.publishing import check_card, check_folder, choose_files

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
    parser.add_argument("--report", type=Path, help="report.json to write README.md from, also with --dry_run")
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
        if args.repo_id:
            validate_repo_id(args.repo_id)
        files, left_out, problems = choose_files(folder)
        problems += check_folder(folder, has_card=not args.report)
        if args.report and not problems:
            write_card(folder, args.report, args.repo_id, args.license)
            files, problems = choose_files(folder)[0], check_card(folder)
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
    except (OSError, ValueError) as error:
        raise ValueError(f"--report {report} cannot be read, or is not JSON: {error}") from error
    card_data = {"license": license} if license else {}
    config = SNNBertConfig.from_pretrained(folder)
    card_from_report(config, facts, model_id=repo_id, **card_data).save(folder / "README.md")


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
