"""The compiled kernels for the CPU against float64, and how they are loaded."""

import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from float64_checks import compare, make_neuron, random_mask

import modeling_snn_bert
from modeling_snn_bert import cpu_kernels
from modeling_snn_bert.event_driven import event_driven
from modeling_snn_bert.packed_spikes import packed_form, unpack
from modeling_snn_bert.surrogate_gradients import SURROGATES

needs_kernels = pytest.mark.skipif(
    not cpu_kernels.available(), reason="no compiled kernels: installed without a C compiler, or switched off"
)
PACKAGE = Path(cpu_kernels.__file__).parent


@needs_kernels
@pytest.mark.usefixtures("at_every_level")
class TestBPSN:
    @pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
    @pytest.mark.parametrize("spike_type", ["binary", "ternary"])
    @pytest.mark.parametrize("reset_iterations", [0, 1, 2, 3])
    @pytest.mark.parametrize(
        "shape, groups",
        [((1, 1, 8), 1), ((3, 7, 16), 2), ((2, 40, 96), 4), ((2, 17, 72), 3), ((2, 33, 384), 12), ((1, 300, 40), 1)],
        ids=str,
    )
    def test_is_the_neuron(self, shape, groups, reset_iterations, spike_type, mask):
        neuron = make_neuron(shape[-1], groups, reset_iterations=reset_iterations, spike_type=spike_type)
        mask = random_mask(mask, *shape[:2])
        spikes = compare(neuron, shape, mask)
        if shape[1] > 1:
            assert 0 < spikes.abs().mean() < 1

    @pytest.mark.parametrize("surrogate", list(SURROGATES))
    @pytest.mark.parametrize("alpha", [0.7, 3.0])
    @pytest.mark.parametrize("spike_type", ["binary", "ternary"])
    def test_surrogates(self, surrogate, alpha, spike_type):
        settings = {"surrogate": surrogate, "surrogate_alpha": alpha, "spike_type": spike_type}
        spikes = compare(make_neuron(32, 4, **settings), (2, 21, 32), random_mask("right", 2, 21))
        assert 0 < spikes.abs().mean() < 1

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("bidirectional", [True, False])
    @pytest.mark.parametrize("length", [5, 2000])
    def test_directions_and_sums(self, normalize, bidirectional, length):
        neuron = make_neuron(16, 2, normalize=normalize, bidirectional=bidirectional)
        assert 0 < compare(neuron, (2, length, 16), random_mask("left", 2, length)).mean() < 1

    @pytest.mark.parametrize("mask", ["none", "left", "holes"])
    @pytest.mark.parametrize(
        "spike_type, reset_iterations", [("binary", 0), ("binary", 1), ("ternary", 1), ("binary", 2), ("binary", 3)]
    )
    def test_windows_of_a_long_sequence(self, spike_type, reset_iterations, mask):
        """Groups that soon forget go by windows of tokens, of their own length; one that does not goes in one piece."""
        neuron = make_neuron(72, 3, spike_type=spike_type, reset_iterations=reset_iterations)
        with torch.no_grad():
            neuron.decay_forward_logit.copy_(torch.tensor([0.03, 0.97, 0.4]).logit())
            neuron.decay_backward_logit.copy_(torch.tensor([0.2, 0.5, 0.6]).logit())
        spikes = compare(neuron, (2, 1300, 72), random_mask(mask, 2, 1300), min_clear=0.2)
        assert 0 < spikes.abs().mean() < 1

    def test_a_surrogate_that_they_do_not_know_runs_on_torch(self, monkeypatch):
        monkeypatch.setitem(SURROGATES, "flat", lambda x, alpha: alpha * torch.ones_like(x))
        neuron, current = make_neuron(16, 2, surrogate="flat", reset_iterations=0), torch.randn(2, 9, 16)
        assert torch.equal(neuron(current), make_neuron(16, 2, reset_iterations=0)(current))
        neuron(current).sum().backward()
        torch.testing.assert_close(neuron.v_threshold.grad, torch.full((16,), -2.0 * 2 * 9))

    def test_a_number_that_the_library_does_not_know_gives_no_gradient_of_another(self, monkeypatch):
        monkeypatch.setitem(SURROGATES, "flat", lambda x, alpha: alpha * torch.ones_like(x))
        monkeypatch.setitem(cpu_kernels.SURROGATE_INDEX, "flat", 99)
        neuron = make_neuron(16, 2, surrogate="flat", reset_iterations=0)
        neuron(torch.randn(2, 9, 16)).sum().backward()
        assert neuron.v_threshold.grad.isnan().all()

    def test_nothing_fires_at_masked_tokens(self):
        mask = random_mask("holes", 3, 30)
        current = torch.full((3, 30, 16), 9.0).masked_fill(mask[..., None] == 0, float("nan"))
        spikes = make_neuron(16, 2, reset_iterations=0)(current, mask)
        assert torch.equal(spikes.any(-1), mask) and spikes.isfinite().all()
        assert not make_neuron(16, 2)(current.nan_to_num(), random_mask("all_masked", 3, 30)).any()

    @pytest.mark.parametrize("spike_type", ["binary", "ternary"])
    def test_packed_spikes_are_the_spikes(self, spike_type):
        spikes = make_neuron(48, 2, spike_type=spike_type)(torch.randn(2, 9, 48, requires_grad=True))
        assert torch.equal(unpack(packed_form(spikes), 48, spikes.dtype), spikes) and spikes.any()

    def test_threads_change_nothing(self):
        neuron, current = make_neuron(96, 4), torch.randn(5, 40, 96)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                x = current.clone().requires_grad_()
                spikes = neuron(x)
                results.append((spikes, *torch.autograd.grad(spikes.square().sum(), [x, *neuron.parameters()])))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_currents_are_integrated_in_float32(self, dtype):
        neuron, current = make_neuron(32, 4), torch.randn(2, 30, 32).to(dtype)
        spikes = neuron(current)
        assert spikes.dtype == dtype and torch.equal(spikes.float(), neuron(current.float())) and spikes.any()


@needs_kernels
class TestOperators:
    def test_pass_torchs_own_checks(self):
        neuron, current = make_neuron(16, 2), torch.randn(2, 6, 16)
        mask = random_mask("right", 2, 6)
        values = [
            x.detach() for x in (neuron.v_threshold, neuron.decay_forward, neuron.decay_backward, neuron.soft_reset)
        ]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(cpu_kernels.bpsn_forward, (current, mask, *values, True, 1, True), test_utils=checks)
        arguments = (torch.randn(2, 6, 16), current, mask, *values, True, 1, True, "atan", 2.0)
        torch.library.opcheck(cpu_kernels.bpsn_backward, arguments, test_utils=checks)

    def test_inputs_that_are_not_contiguous(self):
        neuron, current = make_neuron(16, 2), torch.randn(16, 6, 2)
        got, wanted = neuron(current.transpose(0, 2)), neuron(current.transpose(0, 2).contiguous())
        assert torch.equal(got, wanted) and got.any()


class TestLoading:
    """Every way to be without kernels ends on torch's operations, and says so."""

    @pytest.fixture
    def load(self, tmp_path, monkeypatch, caplog):
        """A function that loads the kernels of a folder with the given file in it; returns them and what was logged.

        Nothing is installed elsewhere, until a test says so.
        """
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(cpu_kernels, "__file__", str(tmp_path / "cpu_kernels.py"))
        monkeypatch.setattr(cpu_kernels.logger, "propagate", True)
        monkeypatch.setattr(cpu_kernels.logging.get_logger("transformers"), "propagate", True)

        def load_from(library):
            if library is not None:
                (tmp_path / cpu_kernels.FILENAME).write_bytes(library)
            with caplog.at_level("INFO"):
                loaded, why = cpu_kernels._load()
            assert why in caplog.text
            return loaded, why

        return load_from

    @needs_kernels
    def test_there(self, load, tmp_path):
        library, logged = load((PACKAGE / cpu_kernels.FILENAME).read_bytes())
        assert library.kernels_version() == cpu_kernels.KERNELS_VERSION
        assert f"runs on the CPU kernels in {tmp_path}" in logged

    def test_missing(self, load):
        library, logged = load(None)
        assert library is None and "not installed" in logged

    def test_switched_off(self, load, monkeypatch):
        monkeypatch.setenv("SNN_BERT_CPU_KERNELS", "0")
        library, logged = load(None)
        assert library is None and "switched off by SNN_BERT_CPU_KERNELS=0" in logged

    @pytest.mark.parametrize("content", [b"", b"\x7fELF no library"], ids=["empty", "damaged"])
    def test_damaged(self, load, content):
        library, logged = load(content)
        assert library is None and "cannot be loaded" in logged

    @pytest.mark.parametrize(
        "symbols, message",
        [
            ({"kernels_version": lambda: cpu_kernels.KERNELS_VERSION + 1}, "in place of"),
            ({}, "cannot be loaded"),
        ],
        ids=["other", "none"],
    )
    def test_another_version(self, load, monkeypatch, symbols, message):
        monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(**symbols))
        library, logged = load(b"")
        assert library is None and message in logged

    @pytest.mark.parametrize(
        "version, message", [("0.0.1", "runs on the CPU kernels"), ("1.0.0", "is of snn-bert 1.0.0"), (None, "unknown")]
    )
    @needs_kernels
    def test_installed_elsewhere(self, load, monkeypatch, tmp_path, version, message):
        """As for code from the Hub, where a package of that version is installed."""
        installed = tmp_path / "installed"
        installed.mkdir()
        (installed / "__init__.py").write_text(
            "" if version is None else f'"""A package."""\n__version__ = "{version}"\n'
        )
        spec = importlib.machinery.ModuleSpec("modeling_snn_bert", None, origin=str(installed / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", {"modeling_snn_bert": spec}.get)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        library, logged = load(None)
        assert library is None and "not installed" in logged
        shutil.copy(PACKAGE / cpu_kernels.FILENAME, installed)
        library, logged = load(None)
        assert (library is not None) == (version == "0.0.1") and message in logged
        assert str(installed / cpu_kernels.FILENAME) in logged

    @needs_kernels
    def test_sources_in_front_of_the_installed_package(self, tmp_path):
        """As in a clone's folder, where Python finds the sources first, and they have no kernels beside them."""
        shutil.copytree(PACKAGE, tmp_path / "site" / "modeling_snn_bert")
        without = shutil.ignore_patterns(cpu_kernels.FILENAME)
        shutil.copytree(PACKAGE, tmp_path / "clone" / "modeling_snn_bert", ignore=without)
        code = "from modeling_snn_bert import cpu_kernels; print(cpu_kernels.__file__, cpu_kernels.kernel_facts())"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        command, folder = [sys.executable, "-c", code], tmp_path / "clone"
        printed = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert printed.startswith(str(folder))
        assert f"runs on the CPU kernels in {tmp_path / 'site' / 'modeling_snn_bert' / cpu_kernels.FILENAME}" in printed

    @pytest.mark.parametrize("error", [ModuleNotFoundError("hidden"), ValueError("modeling_snn_bert.__spec__ is None")])
    def test_a_package_that_cannot_be_found(self, load, monkeypatch, error):
        def find_spec(name):
            raise error

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        library, logged = load(None)
        assert library is None and "not installed" in logged

    def test_major_version_is_the_packages(self):
        assert modeling_snn_bert.__version__.split(".")[0] == str(cpu_kernels.MAJOR_VERSION)

    @needs_kernels
    def test_neurons_do_without(self, monkeypatch):
        neuron, current = make_neuron(16, 2), torch.randn(2, 20, 16)
        wanted = neuron(current)
        monkeypatch.setattr(cpu_kernels, "_LIBRARY", None)
        assert torch.equal(neuron(current), wanted) and wanted.any()


class TestLevels:
    @needs_kernels
    @pytest.mark.parametrize("asked", cpu_kernels.CPU_LEVELS)
    def test_the_environment_sets_the_highest(self, tmp_path, asked):
        """In a fresh process, as a user would. A level that the processor lacks allows all that it has."""
        code = "from modeling_snn_bert import cpu_kernels as k; print(k.cpu_level(), k.highest_cpu_level())"
        environment = {**os.environ, cpu_kernels.LEVEL_VARIABLE: asked}
        # Not in the repository, whose sources have no kernels beside them.
        command = [sys.executable, "-c", code]
        printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        level, highest = printed.stdout.splitlines()[-1].split()
        assert level == min(asked, highest, key=cpu_kernels.CPU_LEVELS.index)

    def test_a_level_that_does_not_exist(self, monkeypatch):
        with pytest.raises(ValueError, match=r"`level` must be one of \['plain', .*\], got 'sse'"):
            cpu_kernels.cap_cpu_level("sse")
        monkeypatch.setenv(cpu_kernels.LEVEL_VARIABLE, "AVX2")
        with pytest.raises(ValueError, match=r"SNN_BERT_CPU_LEVEL in the environment must be one of .* got 'AVX2'"):
            cpu_kernels._load()

    @needs_kernels
    def test_facts(self, cap_cpu_level):
        facts = cpu_kernels.kernel_facts()
        assert cpu_kernels.FILENAME in facts["kernels"] and facts["level"] == cpu_kernels.cpu_level()
        highest = cpu_kernels.highest_cpu_level()
        if highest != "plain":
            cap_cpu_level("plain")
            facts = cpu_kernels.kernel_facts()
            assert facts["level"] == "plain" and facts["why this level"].endswith(f"have {highest}")

    def test_without_kernels(self, monkeypatch):
        monkeypatch.setattr(cpu_kernels, "_LIBRARY", None)
        cpu_kernels.cap_cpu_level("avx2")
        assert cpu_kernels.cpu_level() is None and list(cpu_kernels.kernel_facts()) == ["kernels"]


class TestMissing:
    """One warning where the slow path is taken, and only there."""

    @pytest.fixture
    def warnings(self, monkeypatch, caplog):
        """What was logged from a time at which there are no kernels."""
        monkeypatch.setattr(cpu_kernels, "_LIBRARY", None)
        monkeypatch.setattr(cpu_kernels.logger, "propagate", True)
        monkeypatch.setattr(cpu_kernels.logging.get_logger("transformers"), "propagate", True)
        cpu_kernels.warn_if_missing.cache_clear()
        yield caplog
        cpu_kernels.warn_if_missing.cache_clear()

    def test_in_training_once(self, warnings):
        neuron = make_neuron(16, 2).eval()
        neuron(torch.randn(2, 20, 16))
        with torch.no_grad():
            neuron.train()(torch.randn(2, 20, 16))
        neuron.double()(torch.randn(2, 20, 16).double())
        assert cpu_kernels.WITHOUT_KERNELS not in warnings.text
        for _ in range(2):
            neuron.float()(torch.randn(2, 20, 16))
        assert warnings.text.count(cpu_kernels.WITHOUT_KERNELS) == 1

    def test_in_event_driven_inference_once(self, warnings, make_config):
        model = modeling_snn_bert.SNNBertModel(make_config()).eval()
        for _ in range(2):
            event_driven(model, dense_above=1.0)
        assert warnings.text.count(cpu_kernels.WITHOUT_KERNELS) == 1

    def test_not_if_switched_off(self, warnings, monkeypatch):
        monkeypatch.setenv(cpu_kernels.SWITCH, "0")
        make_neuron(16, 2).train()(torch.randn(2, 20, 16))
        assert not warnings.text
