"""The wheel with kernels: what it asks of a system, and the kernels at work where no compiler is.

The installed wheel also serves code that came from the Hub alone, whose kernels are tested here for that.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from shared_builds import build_wheel, why_no_kernels_wheel

import modeling_snn_bert
from modeling_snn_bert import cpu_kernels

ROOT = Path(__file__).resolve().parents[1]
MACHINE = os.uname().machine
needs_wheel = pytest.mark.skipif(bool(why_no_kernels_wheel()), reason=str(why_no_kernels_wheel()))
ARM_COMPILER = build_wheel.CROSS_COMPILER.format("aarch64")

OPENMP = """
import os, sys

def openmp():
    with open("/proc/self/maps") as maps:
        names = {line.split()[-1] for line in maps}
    return {name for name in names if name.split("/")[-1].startswith(("libgomp", "libomp", "libiomp"))}
"""
# A model in training and in the event-driven form, by the kernels and by torch's operations.
COMPARE = """
import torch

def tasks():
    return set(os.listdir("/proc/self/task"))

def share_threads(kernels):
    # The kernels' two threads are one more than there was, and torch then takes the same ones.
    torch.set_num_threads(2)
    assert kernels.available(), kernels.kernel_facts()
    before = tasks()
    ones = torch.ones(4)
    current = torch.rand(4, 64, 32)
    kernels.bpsn_forward(current, None, torch.full((32,), 0.4), ones / 10, ones / 10, ones / 2, True, 1, False)
    # Others, of the loader, may end in between.
    of_kernels = tasks() - before
    assert len(of_kernels) == 1, of_kernels
    torch.rand(4_000_000).exp_()
    assert tasks() - before == of_kernels, (before, tasks())
    assert len(openmp()) == 1, openmp()

def compare(make_model, kernels):
    torch.manual_seed(0)
    model = make_model()
    input_ids, mask = torch.randint(1, 64, (3, 12)), torch.ones(3, 12)
    mask[1, 7:] = 0
    results = []
    library = kernels._LIBRARY
    for kernels._LIBRARY in (library, None):
        outputs = model(input_ids, attention_mask=mask, output_firing_rates=True)
        assert all(0 < rate.mean() < 1 for rate in outputs.firing_rates), "spikes do not flow"
        model.zero_grad()
        outputs.logits.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        assert sum(bool(gradient.any()) for gradient in gradients) > len(gradients) / 2
        with torch.no_grad():
            events = model.eval().to_event_driven(dense_above=1.0)(input_ids, attention_mask=mask).logits
            torch.testing.assert_close(events, outputs.logits, rtol=1e-4, atol=1e-4)
        model.to_dense().train()
        results.append([outputs.logits.detach(), *gradients])
    kernels._LIBRARY = library
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    return model
"""
SETTINGS = """
settings = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}
"""


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A Python with the wheel in it and what it needs, and with no compiler."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    environment = {"PATH": "/nonexistent", "HOME": str(folder)}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", packages]
    subprocess.run([*command, wheel], check=True, env=environment)
    # What this process has is behind the environment's own.
    others = [path for path in sys.path if path.endswith("-packages") or Path(path, "torch").is_dir()]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    return folder


def run_in(environment, script, *arguments, **variables):
    """What a script prints in `environment`, without a compiler and without what else this process knows of."""
    result = subprocess.run(
        [environment / "bin" / "python", "-I", "-c", script, *map(str, arguments)],
        cwd=environment,
        env={
            "PATH": "/nonexistent",
            "HOME": str(environment),
            "HF_HOME": str(environment / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "2",
            **variables,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@needs_wheel
@pytest.mark.slow
class TestWheel:
    def test_fits_every_linux_that_its_name_promises(self, wheel):
        assert build_wheel.faults(wheel, MACHINE) == []
        assert wheel.name.endswith(f"-py3-none-manylinux_2_28_{MACHINE}.whl")

    def test_kernels_at_work_without_a_compiler(self, environment):
        script = (
            OPENMP
            + COMPARE
            + SETTINGS
            + """
import shutil
import modeling_snn_bert as snn
from modeling_snn_bert import cpu_kernels

assert not any(shutil.which(name) for name in ("cc", "gcc", "clang", "c99")) and "CC" not in os.environ
share_threads(cpu_kernels)
compare(lambda: snn.SNNBertForSequenceClassification(snn.SNNBertConfig(**settings)), cpu_kernels)
print(cpu_kernels.kernel_facts()["kernels"])
"""
        )
        printed = run_in(environment, script)
        assert f"runs on the CPU kernels in {environment}/lib" in printed and "not installed" not in printed

    def test_a_torch_that_keeps_its_runtime_to_itself(self, environment):
        """Not every build of torch shows its OpenMP runtime to other libraries."""
        script = (
            OPENMP
            + """
import ctypes

initialize = ctypes.CDLL.__init__

def keep_to_yourself(self, name, mode=ctypes.DEFAULT_MODE, *others, **named):
    initialize(self, name, mode & ~ctypes.RTLD_GLOBAL, *others, **named)

ctypes.CDLL.__init__ = keep_to_yourself
import torch
ctypes.CDLL.__init__ = initialize
library = sys.argv[1]
try:
    ctypes.CDLL(library)
except OSError as error:
    assert "undefined symbol" in str(error)
else:
    raise AssertionError("torch shows its runtime all the same")
from modeling_snn_bert import cpu_kernels

assert cpu_kernels.available() and len(openmp()) == 1, (cpu_kernels.kernel_facts(), openmp())
"""
        )
        (library,) = environment.glob("lib/*/site-packages/modeling_snn_bert/*.shared")
        run_in(environment, script, library)


def with_library(wheel, library, folder, name=None):
    """A copy of `wheel` with another library in it, or with none."""
    copy = folder / (name or wheel.name)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(copy, "w") as new:
        for member in old.namelist():
            if member != build_wheel.LIBRARY:
                new.writestr(member, old.read(member))
            elif library is not None:
                new.writestr(member, library)
    return copy


# A library in C, how it is linked, and what is wrong with it.
UNFIT = {
    "no OpenMP": ("int f(void) { return 1; }", [], "without OpenMP"),
    "a runtime of its own": (
        "extern void GOMP_barrier(void); void f(void) { GOMP_barrier(); }",
        ["-Wl,--no-as-needed", "-fopenmp"],
        "needs .*libgomp",
    ),
    "an unknown symbol": (
        "extern void GOMP_barrier(void), GOMP_new(void); void f(void) { GOMP_barrier(); GOMP_new(); }",
        [],
        "wants .'GOMP_new'",
    ),
    "a newer C library": (
        "extern void GOMP_barrier(void); int arc4random(void); int f(void) { GOMP_barrier(); return arc4random(); }",
        [],
        "GLIBC_2.36",
    ),
}


@needs_wheel
@pytest.mark.slow
class TestFaults:
    @pytest.mark.parametrize("what", UNFIT)
    def test_an_unfit_library(self, wheel, tmp_path, what):
        code, options, message = UNFIT[what]
        (tmp_path / "library.c").write_text(code)
        command = [os.environ.get("CC") or "cc", "-shared", "-fPIC", tmp_path / "library.c", *options]
        subprocess.run([*command, "-o", tmp_path / "library"], check=True)
        library = (tmp_path / "library").read_bytes()
        if what == "a newer C library" and b"GLIBC_2.36" not in library:
            pytest.skip("this system's C library is older than 2.36")
        found = build_wheel.faults(with_library(wheel, library, tmp_path), MACHINE)
        assert re.search(message, "\n".join(found)), found

    def test_another_processor(self, wheel):
        (other,) = set(build_wheel.ARCHITECTURES) - {MACHINE}
        found = build_wheel.faults(wheel, other)
        assert any("does not end in" in fault for fault in found)
        assert f"the library is for {MACHINE} in place of {other}" in found

    def test_no_library(self, wheel, tmp_path):
        (fault,) = build_wheel.faults(with_library(wheel, None, tmp_path), MACHINE)
        assert "the kernels did not compile" in fault


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved model with its code."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    namespace = {}
    exec(SETTINGS, namespace)
    config = modeling_snn_bert.SNNBertConfig(**namespace["settings"])
    modeling_snn_bert.SNNBertForSequenceClassification(config).save_pretrained(folder)
    return folder


LOAD = """
import transformers

def load():
    auto_class = transformers.AutoModelForSequenceClassification
    model = auto_class.from_pretrained(sys.argv[1], trust_remote_code=True).train()
    assert type(model).__module__.startswith("transformers_modules.")
    name = type(model).__module__.rpartition(".")[0] + ".cpu_kernels"
    return model, sys.modules[name]
"""
TRAIN = (
    """
import sys, torch
sys.meta_path[:0] = [Hidden()] if hide else []
"""
    + LOAD
    + """
model, kernels = load()
assert not kernels.available() and "modeling_snn_bert" not in sys.modules
torch.manual_seed(0)
for _ in range(2):
    outputs = model(torch.randint(1, 64, (3, 12)), output_firing_rates=True)
    outputs.logits.sum().backward()
    assert all(0 < rate.mean() < 1 for rate in outputs.firing_rates), "spikes do not flow"
model.eval().to_event_driven(dense_above=1.0)
"""
)
HIDDEN = """
import importlib.abc

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_snn_bert":
            raise ModuleNotFoundError(name)

hide = True
"""


@needs_wheel
@pytest.mark.slow
class TestCodeFromTheHub:
    """A checkpoint's own code, which has no kernels beside it."""

    def test_runs_on_the_kernels_of_an_installed_wheel(self, environment, checkpoint):
        script = (
            OPENMP
            + COMPARE
            + LOAD
            + """
model, kernels = load()
assert "modeling_snn_bert" not in sys.modules
share_threads(kernels)
compare(lambda: model, kernels)
print(kernels.kernel_facts()["kernels"])

# The package itself beside it: two copies of the code, each with operators of its own.
import modeling_snn_bert as snn
from modeling_snn_bert import cpu_kernels

assert cpu_kernels.available() and cpu_kernels is not kernels
both = compare(lambda: snn.SNNBertForSequenceClassification.from_pretrained(sys.argv[1]).train(), cpu_kernels)
inputs = torch.randint(1, 64, (3, 12))
torch.testing.assert_close(model(inputs).logits, both(inputs).logits)
compare(lambda: model, kernels)
"""
        )
        printed = run_in(environment, script, checkpoint)
        assert re.search(rf"runs on the CPU kernels in {environment}/lib\S*/modeling_snn_bert/", printed)
        assert "Without them" not in printed

    def test_warns_once_without_a_package(self, environment, checkpoint):
        printed = run_in(environment, HIDDEN + TRAIN, checkpoint)
        assert printed.count("not installed") == printed.count("Without them") == 1
        assert "times as long" in printed and "install a wheel of snn-bert" in printed

    def test_leaves_another_version_alone(self, environment, checkpoint):
        (module,) = environment.glob("lib/*/site-packages/modeling_snn_bert/__init__.py")
        text = module.read_text()
        module.write_text(text.replace(f'"{modeling_snn_bert.__version__}"', '"47.1.0"'))
        try:
            printed = run_in(environment, "hide = False" + TRAIN, checkpoint)
        finally:
            module.write_text(text)
        path = module.parent / cpu_kernels.FILENAME
        assert f"{path} is of snn-bert 47.1.0, and this code is of snn-bert {cpu_kernels.MAJOR_VERSION}" in printed
        assert printed.count("Without them") == 1


@pytest.mark.slow
def test_wheel_for_arm(tmp_path):
    """Its library is the portable level, in ARM's vectors: built by a cross-compiler, and run by an emulator."""
    for tool, package in ((ARM_COMPILER, "gcc-aarch64-linux-gnu"), ("qemu-aarch64", "qemu-user")):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} (Debian's package {package})")
    wheel = build_wheel.build(tmp_path, "aarch64")
    assert build_wheel.faults(wheel, "aarch64") == []
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(build_wheel.LIBRARY, tmp_path)
    program = tmp_path / "levels"
    options = ["-std=gnu11", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-Wl,-rpath,{Path(library).parent}"]
    sources = [ROOT / "tests" / "kernel_levels.c", library, "-lm", "-fopenmp"]
    subprocess.run([ARM_COMPILER, *options, *sources, "-o", program], check=True)
    # The C library of the cross-compiler, in a folder `lib`.
    command = [ARM_COMPILER, "-print-file-name=libc.so.6"]
    libc = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    emulator = ["qemu-aarch64", "-L", Path(libc).parents[1], program]
    level, spikes = subprocess.run(emulator, check=True, capture_output=True, text=True).stdout.split()
    assert level == "plain" and int(spikes) > 0
