"""The package as it is built and installed, and the lowest version of transformers that setup.py allows.

This file is also a script, `python test_packaging.py save|load FOLDER`: a smoke test of the package, which the tests
run in processes that see another version of transformers.
"""

import ast
import email
import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from shared_builds import build_wheel, has_compiler

# No import of the package up here: as a script this file loads a model without it.
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_snn_bert"
# The compiled kernels, which are built where there is a C compiler.
FILENAME = "_cpu_kernels.shared"
SUBPACKAGES = ("commands", "energy")


def smoke_save(folder):
    """Import all modules, build models, run and train a step, save one; its logits go to `expected.pt` beside it."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    import modeling_snn_bert as snn

    for module in pkgutil.walk_packages(snn.__path__, "modeling_snn_bert."):
        importlib.import_module(module.name)

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = snn.SNNBertConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **settings)
    input_ids = torch.randint(1, 64, (2, 12))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}

    auto_class = transformers.AutoModelForSequenceClassification
    for attn_implementation in ("sdpa", "eager"):
        eager = attn_implementation == "eager"
        model = auto_class.from_config(config, attn_implementation=attn_implementation)
        outputs = model(
            **inputs,
            labels=torch.tensor([0, 2]),
            output_firing_rates=True,
            output_hidden_states=True,
            output_attentions=eager,
        )
        assert len(outputs.hidden_states) == 3
        assert len(outputs.firing_rates) == len(model.neuron_names()) == 14
        assert all(0 < rate.mean() < 1 for rate in outputs.firing_rates), "spikes do not flow"
        assert not eager or outputs.attentions[0].shape == (2, 4, 12, 12)
        outputs.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    masked_lm = transformers.AutoModelForMaskedLM.from_config(config)
    masked_lm(**inputs, labels=input_ids).loss.backward()
    assert masked_lm.get_output_embeddings().weight is masked_lm.get_input_embeddings().weight

    for wrong in ({"decay": 2.0}, {"hidden_size": "wide"}):
        try:
            snn.SNNBertConfig(**wrong)
        except (ValueError, StrictDataclassError):
            continue
        raise AssertionError(f"{wrong} was not refused")

    model.eval().save_pretrained(folder)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(auto_class.from_pretrained(folder).eval()(**inputs).logits, logits)
    torch.save({"inputs": inputs, "logits": logits}, Path(folder) / "expected.pt")
    print(f"saved with transformers {transformers.__version__}, modeling_snn_bert from {Path(snn.__file__).parent}")


def smoke_load(folder):
    """Load what `smoke_save` saved from the code beside the weights, without the package."""
    import torch
    import transformers

    expected = torch.load(Path(folder) / "expected.pt")
    auto_class = transformers.AutoModelForSequenceClassification
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
    # A classifier's folder holds the whole map of Auto classes.
    assert type(transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "SNNBertModel"
    assert "modeling_snn_bert" not in sys.modules
    print(f"loaded with transformers {transformers.__version__}")


def run(*command, **kwargs):
    """Run a command; fail with what it printed."""
    command = [str(part) for part in command]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def pip(*arguments, **kwargs):
    return run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, **kwargs)


def smoke(folder, *python_path):
    """Save in one process and load in another, both with `python_path` ahead of everything installed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, python_path)),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    return [run(sys.executable, __file__, step, folder / "model", env=environment) for step in ("save", "load")]


@pytest.fixture(scope="module")
def metadata(wheel):
    """The metadata in the wheel, which is where setup.py's statements end up."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def requirements(metadata):
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def lowest_transformers(requirements):
    """A folder with the lowest transformers that setup.py allows and what it needs, kept in the cache."""
    (specifiers,) = [r.specifier for r in requirements if canonicalize_name(r.name) == "transformers" and not r.marker]
    (version,) = [specifier.version for specifier in specifiers if specifier.operator == ">="]
    cache = Path(os.environ.get("SNN_BERT_CACHE") or Path.home() / ".cache" / "snn-bert")
    folder = cache / f"transformers-{version}-python{sys.version_info.major}.{sys.version_info.minor}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            # transformers itself does not require torch: the one that is installed is used.
            pip("install", "--target", f"{temporary}/new", f"transformers=={version}")
            try:
                os.replace(f"{temporary}/new", folder)
            except OSError:
                assert folder.exists()  # another process was first
    return version, folder


def test_tests_run_on_the_installed_package():
    if not os.environ.get("SNN_BERT_TEST_INSTALLED"):
        pytest.skip("`make test` sets SNN_BERT_TEST_INSTALLED; without it, the package may come from the sources")
    import modeling_snn_bert

    location = Path(modeling_snn_bert.__file__)
    assert "site-packages" in location.parts, f"the tests import the package from {location}"
    sources = {path.relative_to(PACKAGE): path.read_bytes() for path in PACKAGE.rglob("*.py")}
    copies = {path.relative_to(location.parent): path.read_bytes() for path in location.parent.rglob("*.py")}
    assert sources == copies, "the installed package is not that of the sources: `make test` installs it again"
    assert importlib.metadata.version("snn-bert") == modeling_snn_bert.__version__


@pytest.mark.slow
def test_wheel_holds_exactly_the_package(wheel, metadata):
    info = f"snn_bert-{metadata['Version']}.dist-info"
    expected = {
        f"{PACKAGE.name}/{path.relative_to(PACKAGE)}" for path in [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]
    }
    expected |= {
        f"{info}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }
    if has_compiler():
        expected.add(f"{PACKAGE.name}/{FILENAME}")
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == expected
    assert wheel.name.startswith(f"snn_bert-{metadata['Version']}-py3-none-")


@pytest.mark.slow
def test_installs_without_a_working_compiler(tmp_path):
    wheel = build_wheel.build(tmp_path, CC="false")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert f"{PACKAGE.name}/cpu_kernels.py" in names and f"{PACKAGE.name}/{FILENAME}" not in names


def test_package_is_flat():
    # Code that travels to the Hub is copied file by file, so it is in no sub-package, and there is no data file.
    # Neither the commands nor the energy report travel.
    unexpected = [path.name for path in PACKAGE.iterdir() if path.suffix != ".py"]
    assert set(unexpected) <= {"py.typed", "__pycache__", FILENAME, *SUBPACKAGES}
    for name in SUBPACKAGES:
        assert {path.suffix for path in (PACKAGE / name).iterdir() if path.name != "__pycache__"} == {".py"}


@pytest.mark.slow
def test_metadata(metadata, requirements):
    import modeling_snn_bert

    assert metadata["Name"] == "snn-bert"
    assert metadata["Version"] == modeling_snn_bert.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    extras = {"alternatives", "benchmarks", "docs", "examples", "export", "gpu", "serve", "space", "tests", "train"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    always = {canonicalize_name(requirement.name) for requirement in requirements if requirement.marker is None}
    assert always == {"huggingface-hub", "markdown-it-py", "torch", "transformers", "typer"}
    readme = ROOT / "README.md"
    if readme.exists():
        assert metadata.get_payload().strip() == readme.read_text(encoding="utf-8").strip()


@pytest.mark.slow
def test_constraints_pin_each_requirement_within_its_range(requirements):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in versions, f"constraints.txt does not pin {name}"
        assert versions[name] in requirement.specifier


def test_sources_are_python_3_10():
    folders = ("modeling_snn_bert", "examples", "benchmarks", "tests", "hub_configs")
    files = [
        ROOT / "setup.py",
        ROOT / "build_wheel.py",
        *(path for folder in folders for path in (ROOT / folder).rglob("*.py")),
    ]
    # Modules that newer versions of Python have added, and names that they have added to older modules.
    newer = {"tomllib", "compression", "annotationlib"}
    newer_names = {
        "datetime": {"UTC"},
        "enum": {"StrEnum", "ReprEnum", "verify", "member", "nonmember"},
        "itertools": {"batched"},
        "typing": {"Self", "Never", "LiteralString", "Required", "NotRequired", "Unpack", "TypeVarTuple", "override"},
    }
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not newer & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {alias.name for alias in node.names}
                assert node.module.split(".")[0] not in newer, path
                assert not newer_names.get(node.module, set()) & names, path


@pytest.mark.slow
def test_smoke_with_the_installed_transformers(installed, tmp_path):
    saved, loaded = smoke(tmp_path, installed)
    version = importlib.metadata.version("transformers")
    assert f"transformers {version}," in saved and f"transformers {version}" in loaded
    assert str(installed) in saved


@pytest.mark.slow
def test_smoke_with_the_lowest_transformers(installed, lowest_transformers, tmp_path):
    version, folder = lowest_transformers
    saved, loaded = smoke(tmp_path, folder, installed)
    assert f"transformers {version}," in saved and f"transformers {version}" in loaded
    assert str(installed) in saved


if __name__ == "__main__":
    {"save": smoke_save, "load": smoke_load}[sys.argv[1]](sys.argv[2])
