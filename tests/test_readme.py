"""Runs the README's snippets one after the other, as a newcomer would, on the checkpoints that it has them unpack."""

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request

import pytest
from snippets import FENCE, ROOT, check_page, python_blocks, shown_outputs

README = ROOT / "README.md"
COMMAND = [sys.executable, "-m", "modeling_snn_bert"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose `work` holds the checkpoints."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "work").mkdir()
    text = README.read_text("utf-8").replace("\\\n", "")
    commands = re.findall(r"^python (examples/distilled_checkpoint\.py) (.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for script, arguments in commands:
        command = [sys.executable, str(ROOT / script), *arguments.split()]
        subprocess.run(command, cwd=folder / "work", check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_snippets_run_and_print_what_is_shown(folder, hub_cache):
    check_page(README, hub_cache, folder)


def test_every_block_shows_what_it_prints():
    assert len(python_blocks(README)) == 6 and all(shown_outputs(README))


@pytest.mark.slow
def test_from_a_table_to_an_answer_over_http(folder):
    """The commands as they stand, for fewer steps and on a free port."""
    work = folder / "work"
    blocks = list(FENCE.finditer(README.read_text("utf-8").replace("\\\n", "")))
    (number,) = (i for i, block in enumerate(blocks) if "--model outputs/distilled" in block["code"])
    train, predict, serve = (shlex.split(line)[1:] for line in blocks[number]["code"].splitlines())
    curl, answer = blocks[number + 1]["code"], json.loads(blocks[number + 2]["code"])
    rows = [f"take {i} is a joy,positive\ntake {i} is dull,negative\n" for i in range(10)]
    (work / "reviews.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    (work / "texts.txt").write_text("a joy\n\ndull\n", encoding="utf-8")
    run = {"cwd": work, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "HF_HUB_OFFLINE": "1"}}
    subprocess.run([*COMMAND, *train, "--steps", "2"], check=True, **run)
    assert len(subprocess.run([*COMMAND, *predict], check=True, **run).stdout.splitlines()) == 2
    with subprocess.Popen([*COMMAND, *serve, "--port", "0"], **run) as server:
        try:
            address = re.search(r"http://(\S+)", server.stdout.readline())[1]
            _, url, _, header, _, body = shlex.split(curl.replace("127.0.0.1:8000", address))
            headers = dict([header.split(": ")])
            request = urllib.request.Request(f"http://{url}", body.encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                (found,), (shown,) = json.load(response)["predictions"], answer["predictions"]
        finally:
            server.terminate()
    assert found.keys() == shown.keys() and found["label"] in ("positive", "negative")
    assert (work / "my-model" / "report.html").exists()
