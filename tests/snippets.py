"""Runs the ```python blocks of a page of documentation, as a newcomer would paste them: one after the other.

Every page gets a process of its own, in which nothing is set. They are forked from a server that has imported the slow
libraries, so a page pays for what it does and not for its imports. The one BERT that the pages name lies in a cache of
the Hub, so that its id works offline.
"""

import contextlib
import linecache
import multiprocessing.forkserver
import os
import re
import sys
import textwrap
import traceback
import types
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1200
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
BERT = "sentence-transformers/all-MiniLM-L6-v2"
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["modeling_snn_bert", "datasets", "transformers.trainer"])


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The blocks of a page, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("code")) + 1, textwrap.dedent(match["code"]))
        for match in FENCE.finditer(text)
        if match["language"] == "python"
    ]


def relative_links(page: Path) -> list[str]:
    """Where a page's links and pictures lead in the repository, without what follows a #."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.split("#")[0] for target in LINK.findall(text)]
    return [target for target in targets if target and not re.match(r"[a-z]+:", target)]


def shown_outputs(page: Path) -> list[str | None]:
    """What the page shows that each of its Python blocks prints: a `text` block right below it, or None."""
    matches = list(FENCE.finditer(page.read_text(encoding="utf-8")))
    shown = []
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        if match["language"] == "python":
            is_output = (
                following is not None
                and following["language"] == "text"
                and not match.string[match.end() : following.start()].strip()
            )
            shown.append(textwrap.dedent(following["code"]) if following is not None and is_output else None)
    return shown


def agrees(shown: str, printed: str) -> bool:
    """Whether a page's output is what was printed, but for numbers that differ by 0.05 or by a tenth.

    Kernels of another processor round otherwise, which moves spikes. Runs of spaces are alike, because the width of a
    column follows its numbers. A line `...` stands for any lines.
    """
    shown, printed = (re.sub(r"[ \t]+", " ", text).strip() for text in (shown, printed))
    parts = re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)
    patterns = [f"({NUMBER.pattern})".join(map(re.escape, NUMBER.split(part))) for part in parts]
    match = re.fullmatch(r"[\s\S]*".join(patterns), printed)
    if match is None:
        return False
    wanted = [float(number) for number in NUMBER.findall(shown)]
    found = [float(number) for number in match.groups()]
    return all(abs(x - y) <= max(0.05, 0.1 * abs(x)) for x, y in zip(wanted, found, strict=True))


def write_hub_cache(cache: Path, bert: Path) -> None:
    """Make a cache of the Hub that holds the BERT in the folder `bert` under the name `BERT`."""
    repository = cache / f"models--{BERT.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(bert, target_is_directory=True)


def run_page(page: Path, hub_cache: Path, folder: Path) -> list[str]:
    """Run the blocks of `page` in the folder `folder / "work"` and return what each prints to stdout."""
    log = folder / "log.txt"
    (folder / "work").mkdir(exist_ok=True)
    with mock.patch.dict(os.environ, HF_HUB_CACHE=str(hub_cache), HF_HUB_OFFLINE="1"):
        multiprocessing.forkserver.ensure_running()  # with this environment, at the first page
    process = _SERVER.Process(target=_run_blocks, args=(page, folder, log))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{page.name} ran for over {SECONDS} seconds\n{log.read_text()}")
    printed = [_output(folder, line) for line, _ in python_blocks(page)]
    outputs = [path.read_text(encoding="utf-8") for path in printed if path.exists()]
    assert process.exitcode == 0, f"{page.name} ended with exit code {process.exitcode}\n{log.read_text()}{outputs}"
    return outputs


def check_page(page: Path, hub_cache: Path, folder: Path) -> list[str]:
    """`run_page`, and compare what the blocks print with what the page shows."""
    outputs = run_page(page, hub_cache, folder)
    for (line, _), shown, printed in zip(python_blocks(page), shown_outputs(page), outputs, strict=True):
        if shown is not None:
            where = f"the block at line {line} of {page.name}"
            assert agrees(shown, printed), f"{where} shows\n{shown}\nbut prints\n{printed}"
    return outputs


def _output(folder: Path, line: int) -> Path:
    return folder / f"output_{line}.txt"


def _run_blocks(page: Path, folder: Path, log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The stream that a test runner has put there may buffer, or lead elsewhere.
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    os.chdir(folder / "work")

    import torch

    torch.manual_seed(0)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    linecache.checkcache(str(page))
    for line, code in python_blocks(page):
        try:
            with _output(folder, line).open("w", encoding="utf-8") as stdout, contextlib.redirect_stdout(stdout):
                # The empty lines put the page's own line numbers into a traceback.
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))
        except BaseException:
            traceback.print_exc()
            sys.exit(f"the block at line {line} of {page.name} failed")
