"""The Space, laid out and started as on the Hub: over HTTP, and in a browser where there is one."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from gradio_client import Client
from gradio_client.exceptions import AppError
from huggingface_hub.utils import filter_repo_objects
from snippets import ROOT

from modeling_snn_bert import SNNBertConfig, SNNBertForMaskedLM, SNNBertForSequenceClassification

SPACE = ROOT / "examples" / "space"
OVERVIEW = "near the input, in the middle, near the output"
SENTENCE = "The quick brown fox jumps over the lazy dog."
SECONDS = 180


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    """A folder with two tiny checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "id2label": {0: "dull", 1: "joy"},
    }
    torch.manual_seed(0)
    for name, model_class in (("reviews", SNNBertForSequenceClassification), ("masked", SNNBertForMaskedLM)):
        model_class(SNNBertConfig(**config)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def url(checkpoints, tmp_path_factory):
    """The address of the running app. Beside app.py lies the package, as the Space's README says."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(SPACE, folder / "space", ignore=shutil.ignore_patterns("__pycache__"))
    package = ROOT / "modeling_snn_bert"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()]
    # What `hf upload --include "*.py"` sends.
    for name in filter_repo_objects(files, allow_patterns="*.py"):
        copy = folder / "space" / "modeling_snn_bert" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / name, copy)
    assert (folder / "space" / "modeling_snn_bert" / "energy" / "report.py").is_file()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "SNN_BERT_MODEL": str(checkpoints / "reviews"),
        "GRADIO_TEMP_DIR": str(folder / "files"),
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(folder / "matplotlib"),
    }
    command = [sys.executable, "-u", "app.py", "--server_port", str(port)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder / "space", env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + SECONDS
        while "Running on local URL" not in (folder / "log.txt").read_text():
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < deadline, "the app did not start"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.mark.slow
class TestOverHTTP:
    def test_results_are_the_models(self, client, checkpoints, tokenizer):
        results = client.predict(SENTENCE, "", OVERVIEW, api_name="/analyse")
        label, headline, layers, raster, rates, energies, table = results
        model = SNNBertForSequenceClassification.from_pretrained(checkpoints / "reviews").eval()
        with torch.no_grad():
            outputs = model(**tokenizer(SENTENCE, return_tensors="pt"), output_firing_rates=True)
        probabilities = dict(zip(["dull", "joy"], outputs.logits[0].softmax(-1).tolist(), strict=True))
        label = label.get("value", label)
        assert {row["label"]: row["confidence"] for row in label["confidences"]} == pytest.approx(probabilities)
        means = [rate.mean().item() for rate in outputs.firing_rates]
        assert all(0 < mean < 1 for mean in means)
        shown = [value for _, value in plot_rows(rates)]
        assert shown == pytest.approx([sum(means[:7]) / 7, sum(means[7:]) / 7])
        assert f"**{sum(means) / 14:.1%}**" in headline and "times less" in headline
        assert len(layers.get("choices", layers)) == 3
        assert len(plot_rows(energies)) == 2 * 6
        assert "| BERT, float32 |" in table
        assert Path(raster if isinstance(raster, str) else raster["path"]).read_bytes().startswith(b"\x89PNG")

    def test_another_layer(self, client):
        layer = client.predict(SENTENCE, "", "all neuron layers of layer 1", api_name="/analyse")[2]
        assert layer["value"] == "all neuron layers of layer 1"

    @pytest.mark.parametrize(
        ("sentence", "checkpoint", "message"),
        [
            ("  ", "", "Type a sentence first"),
            ("a " * 1500, "", "At most 2,000 characters, this has 3,000"),
            (SENTENCE, "someone/no-such-model", "someone/no-such-model"),
            (SENTENCE, "not an id", "is no Hub id"),
            (SENTENCE, "/etc", "is no Hub id"),
            (SENTENCE, "../checkpoints", "is no Hub id"),
            (SENTENCE, "modeling_snn_bert", "is no Hub id"),
        ],
        ids=["empty", "long", "not-there", "spaces", "folder", "parent", "local-name"],
    )
    def test_errors_reach_the_visitor(self, client, sentence, checkpoint, message):
        with pytest.raises(AppError, match=message):
            client.predict(sentence, checkpoint, OVERVIEW, api_name="/analyse")
        # The app lives on.
        assert client.predict(SENTENCE, "", OVERVIEW, api_name="/analyse")

    def test_folders_of_the_server_are_closed(self, client, checkpoints):
        with pytest.raises(AppError, match="is no Hub id"):
            client.predict(SENTENCE, str(checkpoints / "masked"), OVERVIEW, api_name="/analyse")


def plot_rows(plot):
    """The rows of a plot's data, of which the last two columns are of interest."""
    data = plot.get("value", plot)
    return [row[-2:] for row in data["data"]]


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.mark.slow
def test_in_a_browser(url):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium or Chrome is installed: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1500})
        asked, crashed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: crashed.append(str(error)))
        page.set_default_timeout(1000 * SECONDS)
        page.goto(url)
        page.get_by_role("textbox", name="Sentence").fill(SENTENCE)
        page.get_by_role("button", name="Show the spikes").click()
        page.locator("#raster img").wait_for()
        assert page.locator("#raster img").evaluate("image => image.complete && image.naturalWidth") > 300
        page.get_by_text("times less").wait_for()
        assert page.get_by_text("joy").count() and page.get_by_text("What the model says").count()
        page.get_by_text("Firing rate of each encoder layer").wait_for()
        page.get_by_role("textbox", name="Sentence").fill("")
        page.get_by_role("button", name="Show the spikes").click()
        page.get_by_text("Type a sentence first.").wait_for()
        browser.close()
    assert not crashed
    # No font, script or statistic comes from or goes to anyone else.
    assert {address.split("/")[2] for address in asked if address.startswith("http")} == {url.split("/")[2]}


def test_front_matter():
    """What the Hub reads of a Space's README, and that it names the gradio of the tests."""
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["sdk"] == "gradio" and (SPACE / facts["app_file"]).is_file()
    assert f"gradio=={facts['sdk_version']}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len(facts["short_description"]) <= 60


@pytest.mark.slow
def test_a_bad_checkpoint_at_the_start(tmp_path):
    command = [sys.executable, str(SPACE / "app.py"), str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "nowhere" in result.stderr and "Traceback" not in result.stderr
