"""Runs the ```python blocks of a page of documentation, as a newcomer would type them: one after the other.

Every page gets a process of its own. They are forked from a server that has imported the slow libraries, so a page
pays for what it does and not for its imports.
"""

import linecache
import multiprocessing
import os
import re
import sys
import textwrap
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
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


def run_page(page: Path, bert: Path, folder: Path) -> str:
    """Run the blocks of `page` in the empty folder `folder` and return what they print.

    The names `texts`, `dataset`, `bert_checkpoint` and `folder` (which does not exist yet) are there already.
    """
    output = folder / "output.txt"
    (folder / "work").mkdir()
    process = _SERVER.Process(target=_run_blocks, args=(page, str(bert), folder / "work", output))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{page.name} ran for over {SECONDS} seconds\n{output.read_text()}")
    printed = output.read_text(encoding="utf-8")
    assert process.exitcode == 0, f"{page.name} ended with exit code {process.exitcode}\n{printed}"
    return printed


def _run_blocks(page: Path, bert: str, folder: Path, output: Path) -> None:
    with output.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The streams that a test runner has put there may buffer, or lead elsewhere.
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    os.chdir(folder)

    import torch
    from datasets import Dataset

    torch.manual_seed(0)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    texts = ["a joy from start to end", "dull and far too long"] * 8
    vars(module).update(
        texts=texts,
        dataset=Dataset.from_dict({"sentence": texts, "label": [1, 0] * 8}),
        bert_checkpoint=bert,
        folder=str(folder / "saved"),
    )
    linecache.checkcache(str(page))
    for line, code in python_blocks(page):
        try:
            # The empty lines put the page's own line numbers into a traceback.
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))
        except BaseException:
            traceback.print_exc()
            sys.exit(f"the block at line {line} of {page.name} failed")
