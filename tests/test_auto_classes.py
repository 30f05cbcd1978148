"""Saved models carry their own code: they load through the Auto classes in a process that lacks this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import modeling_snn_bert
from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.configuration_snn_bert import AUTO_MAP

PACKAGE = Path(modeling_snn_bert.__file__).parent
AUTO_CLASSES = {name: path.split(".")[-1] for name, path in AUTO_MAP.items() if name != "AutoConfig"}
HEADS = list(AUTO_CLASSES)
BLOCK_THE_PACKAGE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_snn_bert":
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocked())
try:
    import modeling_snn_bert
except ImportError:
    pass
else:
    raise AssertionError("the package can be imported")
"""
LOAD_EVERYTHING = """
import json, torch, transformers
from pathlib import Path

root, auto_classes = Path(sys.argv[1]), json.loads(sys.argv[2])
inputs = torch.load(root / "inputs.pt")
trust = {"trust_remote_code": True}
found = {}
for saved in auto_classes:
    folder = root / saved
    config = transformers.AutoConfig.from_pretrained(folder, **trust)
    found[saved] = {"config": type(config).__name__, "module": type(config).__module__}
    for auto_class in auto_classes:
        model = getattr(transformers, auto_class).from_pretrained(folder, ignore_mismatched_sizes=True, **trust)
        found[saved][auto_class] = type(model).__name__
        if auto_class == saved:
            shaped = {k: v[None] if "Choice" in saved else v for k, v in inputs.items()}
            with torch.no_grad():
                outputs = model.eval()(**shaped).to_tuple()
                torch.save(outputs, root / f"{saved}.remote.pt")
                events = model.to_event_driven(dense_above=1.0)(**shaped).to_tuple()
                assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(events, outputs))
                assert "event-driven" in str(model) and "event-driven" not in str(model.to_dense())
            model.save_pretrained(root / "again" / saved)
            config_again = transformers.AutoConfig.from_pretrained(root / "again" / saved, **trust)
            found[saved]["config_again"] = type(config_again).__name__
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    found[saved]["tokens"] = tokenizer("It rained all night.")["input_ids"]
(root / "found.json").write_text(json.dumps(found))
"""
LOAD_WHAT_WAS_SAVED_AGAIN = """
import json, torch, transformers
from pathlib import Path

root, auto_classes = Path(sys.argv[1]), json.loads(sys.argv[2])
inputs = torch.load(root / "inputs.pt")
for saved in auto_classes:
    model = getattr(transformers, saved).from_pretrained(root / "again" / saved, trust_remote_code=True)
    shaped = {k: v[None] if "Choice" in saved else v for k, v in inputs.items()}
    with torch.no_grad():
        torch.save(model(**shaped).to_tuple(), root / f"{saved}.again.pt")
"""
REFUSED = """
import transformers

try:
    loaded = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError(f"loaded without trust: {loaded}")
"""
PIPELINES = """
import json, transformers

transformers.utils.logging.set_verbosity_error()
results = {}
for task, head in json.loads(sys.argv[3]).items():
    pipeline = transformers.pipeline(task, model=f"{sys.argv[1]}/{head}", trust_remote_code=True, device="cpu")
    results[task] = pipeline(json.loads(sys.argv[2]))
print("RESULTS" + json.dumps(results, default=float))
"""


def in_a_fresh_process(tmp_path_factory, script, *arguments):
    """Run a script that can neither import the package nor reach the Hub, and return what it printed."""
    folder = tmp_path_factory.mktemp("process")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", BLOCK_THE_PACKAGE + script, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def needed_modules():
    """The file names of the model's module and of all modules that it imports relatively, now or later."""
    found, new = set(), {"modeling_snn_bert"}
    while new:
        found |= new
        texts = [(PACKAGE / f"{name}.py").read_text() for name in new]
        new = {name for text in texts for name in re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)} - found
    return {f"{name}.py" for name in found}


@pytest.fixture(scope="module")
def tiny_config():
    def make(**settings):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return SNNBertConfig(vocab_size=120, max_position_embeddings=64, initializer_range=0.1, **sizes, **settings)

    return make


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_config, tokenizer, texts):
    """A folder with one saved model and tokenizer for every head, and what the models return for `inputs.pt`."""
    root = tmp_path_factory.mktemp("saved")
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    torch.save(inputs, root / "inputs.pt")
    torch.manual_seed(0)
    for head, class_name in AUTO_CLASSES.items():
        model = getattr(modeling_snn_bert, class_name)(tiny_config(num_labels=3)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(root / head)
        tokenizer.save_pretrained(root / head)
        shaped = {name: x[None] if "Choice" in head else x for name, x in inputs.items()}
        with torch.no_grad():
            outputs = model(**shaped, output_firing_rates=True)
        assert all(0 < rate.mean() < 1 for rate in outputs.firing_rates)
        torch.save(model(**shaped).to_tuple(), root / f"{head}.pt")
    return root


@pytest.fixture(scope="module")
def found(saved, tmp_path_factory):
    in_a_fresh_process(tmp_path_factory, LOAD_EVERYTHING, saved, json.dumps(HEADS))
    return json.loads((saved / "found.json").read_text())


@pytest.fixture(scope="module")
def loaded_again(saved, found, tmp_path_factory):
    in_a_fresh_process(tmp_path_factory, LOAD_WHAT_WAS_SAVED_AGAIN, saved, json.dumps(HEADS))


def assert_same_outputs(folder, head, kind):
    expected, outputs = torch.load(folder / f"{head}.pt"), torch.load(folder / f"{head}.{kind}.pt")
    assert len(outputs) == len(expected) > 0
    for x, y in zip(outputs, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
class TestFolder:
    def test_holds_the_weights_as_safetensors_only(self, saved, head):
        weights = {path.name for path in (saved / head).iterdir() if path.suffix in (".bin", ".pt", ".safetensors")}
        assert weights == {"model.safetensors"}

    def test_holds_the_code(self, saved, head):
        copied = {path.name for path in (saved / head).glob("*.py")}
        assert copied == needed_modules()
        for name in copied:
            assert (saved / head / name).read_text() == (PACKAGE / name).read_text()

    def test_names_every_auto_class(self, saved, head):
        auto_map = json.loads((saved / head / "config.json").read_text())["auto_map"]
        assert auto_map == AUTO_MAP


@pytest.mark.parametrize("head", HEADS)
class TestWithoutThePackage:
    def test_every_auto_class_loads_every_folder(self, found, head):
        assert found[head]["config"] == "SNNBertConfig"
        assert found[head]["module"].startswith("transformers_modules.")
        for auto_class, class_name in AUTO_CLASSES.items():
            assert found[head][auto_class] == class_name

    def test_same_outputs(self, saved, found, head):
        assert_same_outputs(saved, head, "remote")

    def test_same_tokens(self, found, head, tokenizer):
        assert found[head]["tokens"] == tokenizer("It rained all night.")["input_ids"]

    def test_saved_again_holds_the_code(self, saved, found, head):
        folder = saved / "again" / head
        assert {path.name for path in folder.glob("*.py")} == needed_modules()
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert {name: path.split("--")[-1] for name, path in auto_map.items()} == AUTO_MAP
        assert found[head]["config_again"] == "SNNBertConfig"

    def test_saved_again_gives_the_same_outputs(self, saved, loaded_again, head):
        assert_same_outputs(saved, head, "again")


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModelForSequenceClassification"])
def test_refused_without_trust(saved, tmp_path_factory, auto_class):
    in_a_fresh_process(tmp_path_factory, REFUSED, saved / "AutoModelForSequenceClassification", auto_class)


def test_pipelines_without_the_package(saved, tmp_path_factory):
    text = "It rained all night and the [MASK] rose."
    tasks = {
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "fill-mask": "AutoModelForMaskedLM",
        "feature-extraction": "AutoModel",
    }
    printed = in_a_fresh_process(tmp_path_factory, PIPELINES, saved, json.dumps(text), json.dumps(tasks))
    results = json.loads(printed.split("RESULTS")[1])
    for task in tasks:
        expected = transformers.pipeline(task, model=str(saved / tasks[task]), device="cpu")(text)
        if task == "feature-extraction":
            torch.testing.assert_close(torch.tensor(results[task]), torch.tensor(expected), rtol=1e-4, atol=1e-4)
        else:
            assert len(results[task]) == len(expected) > 0
            for x, y in zip(results[task], expected, strict=True):
                assert x["score"] == pytest.approx(y["score"], abs=1e-5)


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def no_prompt(self, monkeypatch):
        def fail(*args):
            raise AssertionError("the user was asked")

        monkeypatch.setattr("builtins.input", fail)

    @pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["by_default", "trusted"])
    @pytest.mark.parametrize("head", HEADS)
    def test_local_code_wins(self, saved, head, trust):
        for auto_class, class_name in AUTO_CLASSES.items():
            settings = {"ignore_mismatched_sizes": True, **trust}
            model = getattr(transformers, auto_class).from_pretrained(saved / head, **settings)
            assert type(model) is getattr(modeling_snn_bert, class_name)
        assert type(transformers.AutoConfig.from_pretrained(saved / head, **trust)) is SNNBertConfig

    def test_tokenizer(self, saved, tokenizer):
        loaded = transformers.AutoTokenizer.from_pretrained(saved / "AutoModel")
        assert loaded("It rained.")["input_ids"] == tokenizer("It rained.")["input_ids"]

    @pytest.mark.parametrize("head", HEADS)
    def test_from_config(self, tiny_config, head):
        model = getattr(transformers, head).from_config(tiny_config())
        assert type(model) is getattr(modeling_snn_bert, AUTO_CLASSES[head])

    def test_for_model(self):
        assert type(transformers.AutoConfig.for_model("snn_bert")) is SNNBertConfig

    @pytest.mark.parametrize("shard", ["40KB", "5GB"])
    def test_sharded_or_whole(self, saved, tmp_path, shard):
        inputs = torch.load(saved / "inputs.pt")
        model = transformers.AutoModel.from_pretrained(saved / "AutoModel")
        model.save_pretrained(tmp_path, max_shard_size=shard)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
        loaded = transformers.AutoModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)

    @pytest.mark.parametrize("head", HEADS[1:])
    def test_the_base_model_loads_from_a_head(self, saved, head):
        base = transformers.AutoModel.from_pretrained(saved / head)
        whole = getattr(transformers, head).from_pretrained(saved / head)
        for name, parameter in whole.bert.encoder.named_parameters():
            assert torch.equal(parameter, base.encoder.get_parameter(name))

    @pytest.mark.parametrize("head", HEADS[1:])
    def test_the_base_model_loads_into_a_head(self, saved, head):
        base = transformers.AutoModel.from_pretrained(saved / "AutoModel")
        whole, info = getattr(transformers, head).from_pretrained(saved / "AutoModel", output_loading_info=True)
        assert {name.split(".")[0] for name in info["missing_keys"]} <= {"classifier", "cls", "qa_outputs"}
        for name, parameter in whole.bert.named_parameters():
            assert torch.equal(parameter, base.get_parameter(name))
