"""Sharing over a Hub on 127.0.0.1: push, load elsewhere at a pinned revision, and what happens when requests fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_clients import DOWNLOAD_FAULTS, UPLOAD_FAULTS
from hub_server import TOKEN, Hub, Repository
from huggingface_hub import ModelCard

from modeling_snn_bert import SNNBertConfig, SNNBertForSequenceClassification
from modeling_snn_bert.configuration_snn_bert import AUTO_MAP
from modeling_snn_bert.energy import energy_report

CLIENTS = Path(__file__).with_name("hub_clients.py")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
AUTO_CLASSES = {name: path.split(".")[-1] for name, path in AUTO_MAP.items() if name != "AutoConfig"}
# What a user reads when an upload fails.
UPLOAD_HINTS = {
    "preupload 401": "log in with `hf auth login`",
    "preupload 403": "no right to write",
    "commit 404": "no such repository or revision",
    "commit 409": "run this again",
    "commit 429": "too many requests",
    "commit broken off": "nothing was committed; run this again",
}
DOWNLOAD_ERRORS = {
    "weights 401": ("OSError", "tester/classifier"),
    "weights 403": ("OSError", "403"),
    "weights 404": ("OSError", "model.safetensors"),
    "weights 409": ("OSError", "409"),
    "weights 500": ("OSError", "500"),
}
pytestmark = pytest.mark.slow


def run_client(action, folder, hub):
    """Run a part of hub_clients.py in a process with a fresh cache, whose Hub is `hub`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder / f"home-{action}"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(CLIENTS), action, str(folder)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-5000:]


@pytest.fixture(scope="module")
def hub():
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, texts):
    """What both processes find: a tokenizer, sentences, a report, and the pickle that a Trainer leaves."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "sentences.json").write_text(json.dumps(texts))
    (folder / "auto_classes.json").write_text(json.dumps(list(AUTO_CLASSES)))
    (folder / "training_args.bin").write_bytes(b"nobody opens this")
    model = SNNBertForSequenceClassification(
        SNNBertConfig(vocab_size=120, max_position_embeddings=64, initializer_range=0.1, **SIZES)
    )
    energy = energy_report(model, [tokenizer(texts, padding=True, return_tensors="pt")], run_lengths=False)
    report = {"accuracy": {"SNN-BERT": 0.75, "BERT": 0.875}, "seed": 3, "energy": energy.to_dict()}
    report["dataset"] = {"name": "six sentences", "split": "validation"}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture(scope="module")
def published(hub, folder):
    run_client("publish", folder, hub)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def read(hub, folder, published):
    run_client("read", folder, hub)
    return json.loads((folder / "read.json").read_text())


def test_repositories_hold_code_and_safetensors(hub, published):
    for name in ("classifier", "trained", "secret", "by-script"):
        files = hub.repositories[f"tester/{name}"].files()
        code = {path for path in files if path.endswith(".py")}
        assert {"modeling_snn_bert.py", "configuration_snn_bert.py", "spiking_neurons.py", "checksums.py"} <= code
        assert {"config.json", "model.safetensors"} <= files.keys()
        # Trainer sends its arguments along, which no one opens to load the model.
        assert [path for path in files if path.endswith((".bin", ".pt", ".pkl"))] == (
            ["training_args.bin"] if name == "trained" else []
        )
    history = hub.repositories["tester/classifier"].history()
    assert history[:2] == ["the second weights", "the first weights"] and "Upload tokenizer" in history
    assert set(hub.repositories["tester/adapter"].files()) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.repositories["tester/secret"].private and not hub.repositories["tester/classifier"].private


def test_every_auto_class_loads_at_a_pinned_revision(read):
    for auto_class, class_name in AUTO_CLASSES.items():
        assert read["loaded"][auto_class] == [class_name, "transformers_modules"]


@pytest.mark.parametrize("what", ["first", "second", "secret", "trained", "adapter", "after damage"])
def test_same_logits(read, what):
    assert read["loaded"][what] is True


def test_tokenizer_and_pipeline(read, tokenizer):
    assert read["loaded"]["tokens"] == tokenizer("It rained all night.")["input_ids"]
    assert read["loaded"]["pipeline"] in ("LABEL_0", "LABEL_1")


class TestScript:
    def test_dry_run(self, published):
        result = published["script"]["dry_run"]
        assert result["code"] == 0 and result["requests"] == 0, result["errors"]
        for name in ("config.json", "model.safetensors", "spiking_neurons.py", "tokenizer.json", "README.md"):
            assert re.search(rf"\d (B|kB)  {re.escape(name)}\n", result["printed"])
        assert "left out  training_args.bin (a pickle of a training run)" in result["printed"]
        assert "nothing was sent" in result["printed"]

    def test_sent(self, hub, published):
        result, repository = published["script"]["main"], hub.repositories["tester/by-script"]
        assert result["code"] == 0, result["errors"]
        assert repository.private and "sent by the script" in repository.history()
        oid = re.search(r'revision="([0-9a-f]{40})"', result["printed"])[1]
        assert repository.commits[oid][1] == "sent by the script"

    def test_card_states_what_was_measured(self, hub, published):
        text = hub.repositories["tester/by-script"].files()["README.md"].decode()
        card = ModelCard(text)
        (score,) = card.data.eval_results
        assert (score.metric_type, score.metric_value, score.dataset_name) == ("accuracy", 0.75, "six sentences")
        assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-classification"
        assert 'from_pretrained("tester/by-script"' in text and "NAMESPACE" not in text

    def test_branch(self, hub, published):
        assert published["script"]["branch"]["code"] == 0
        repository = hub.repositories["tester/by-script"]
        assert repository.history("candidate")[0] == "a candidate" and "a candidate" not in repository.history()

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("namespace", "no right to write there"),
            ("bad_name", "Repo id must"),
            ("bad_token", "log in with `hf auth login`"),
        ],
    )
    def test_refused(self, published, what, message):
        result = published["script"][what]
        assert result["code"] == 1 and message in result["errors"]


@pytest.mark.parametrize("name", UPLOAD_FAULTS)
def test_upload_that_fails(hub, published, name):
    """Nothing of it is in the repository, the error says what to do, and a second try works."""
    result, history = published["faults"][name], hub.repositories["tester/by-script"].history()
    if UPLOAD_FAULTS[name][1]:
        assert result["code"] == 0 and result["requests"] == 2, result
        assert history.count(name) == 1
    else:
        assert result["code"] == 1 and result["requests"] == 1
        assert UPLOAD_HINTS[name] in result["errors"]
        assert name not in history
        assert result["second"]["code"] == 0 and history.count(f"{name}, second try") == 1


@pytest.mark.parametrize("name", DOWNLOAD_FAULTS)
def test_download_that_fails(hub, published, read, name):
    """No file of it is taken for a whole one, the error says what failed, and a second try works."""
    fault = read["faults"][name]
    size = len(hub.repositories["tester/classifier"].files(published["first"])["model.safetensors"])
    assert fault["second"] is True
    if DOWNLOAD_FAULTS[name][1]:
        assert fault["error"] is None and fault["found"] == {"model.safetensors": size}
    else:
        kind, message = DOWNLOAD_ERRORS[name]
        assert fault["found"] == {} and kind in fault["error"][0] and message in fault["error"][1]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no such repository", "tester/nothing"),
        ("no such revision", "0000000000"),
        ("private, no token", "tester/secret"),
        ("private, another token", "tester/secret"),
        ("damaged in the cache", "is damaged: its weights are not those that were saved"),
    ],
)
def test_errors_name_what_is_wrong(read, what, message):
    assert message in read["errors"][what][1]


def test_training_on_a_dataset_of_the_hub(hub, folder):
    rows = [{"sentence": text, "label": label} for text, label in [("null", 0), ('he said "stop', 1), ("NA", 1)] * 2]
    files = {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}
    repository = hub.repositories["datasets/tester/reviews"] = Repository(private=True)
    repository.add("main", None, "six rows", files)
    run_client("train", folder, hub)
    found = json.loads((folder / "train.json").read_text())
    assert found["whole"]["rows"] == found["stream"]["rows"] == rows
    assert len(set(found["whole"]["losses"])) == 3
    assert found["stream"]["losses"] == pytest.approx(found["whole"]["losses"], rel=1e-5)


def test_no_request_went_past_the_hub(hub, read):
    assert not hub.unknown
