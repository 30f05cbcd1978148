"""Runs the README's snippets one after the other, as a newcomer would, on the checkpoints that it has them unpack."""

import re
import subprocess
import sys

import pytest
from snippets import ROOT, check_page, python_blocks, shown_outputs

README = ROOT / "README.md"


@pytest.mark.slow
def test_snippets_run_and_print_what_is_shown(tmp_path, hub_cache):
    (tmp_path / "work").mkdir()
    text = README.read_text("utf-8").replace("\\\n", "")
    commands = re.findall(r"^python (examples/distilled_checkpoint\.py) (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for script, arguments in commands:
        command = [sys.executable, str(ROOT / script), *arguments.split()]
        subprocess.run(command, cwd=tmp_path / "work", check=True, capture_output=True)
    check_page(README, hub_cache, tmp_path)


def test_every_block_shows_what_it_prints():
    assert len(python_blocks(README)) == 5 and all(shown_outputs(README))
