"""Joules from counters: those of a made-up machine, whose folder is laid out as Linux lays it out."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from modeling_snn_bert import SNNBertForMultipleChoice
from modeling_snn_bert.energy import energy_report, joules, measured_energy
from modeling_snn_bert.energy.joules import RaplCounter, find_counters, measure_joules
from modeling_snn_bert.event_driven import is_event_driven


def domain(folder, name, energy_uj=0, span_uj=2**32):
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", span_uj)):
        (folder / file).write_text(f"{value}\n")
    return folder


@pytest.fixture
def powercap(tmp_path):
    """Two packages, one with memory of its own; the cores and the whole platform are counted elsewhere as well."""
    root = tmp_path / "powercap"
    for package in (0, 1):
        folder = domain(root / f"intel-rapl:{package}", f"package-{package}")
        domain(folder / f"intel-rapl:{package}:0", "core")
    domain(root / "intel-rapl:0" / "intel-rapl:0:1", "dram")
    domain(root / "intel-rapl:2", "psys")
    # Linux shows the parts a second time, beside the packages.
    (root / "intel-rapl:0:1").symlink_to(root / "intel-rapl:0" / "intel-rapl:0:1")
    return root


def test_packages_and_their_memory_are_found_once(powercap):
    assert [c.name for c in find_counters(powercap=powercap)] == ["package-0", "package-0 dram", "package-1"]


def test_amd_processors_are_found_under_the_same_name_of_another_driver(tmp_path):
    domain(tmp_path / "amd-rapl:0", "package-0")
    assert [c.name for c in find_counters(powercap=tmp_path)] == ["package-0"]


def test_a_counter_that_starts_over_goes_on(tmp_path):
    folder = domain(tmp_path / "intel-rapl:0", "package-0", energy_uj=900_000, span_uj=1_000_000)
    counter = RaplCounter(folder, "package-0")
    start = counter.read()
    for energy, joules_since in ((950_000, 0.05), (50_000, 0.15), (40_000, 1.14)):
        (folder / "energy_uj").write_text(str(energy))
        assert counter.read() - start == pytest.approx(joules_since)


def test_a_machine_without_counters_is_told_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"energy cannot be measured on this machine: .* shows no RAPL counters"):
        find_counters(powercap=tmp_path / "nothing")


def test_a_counter_that_may_not_be_read_is_told_with_the_cure(powercap, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self.folder / "energy_uj"))

    monkeypatch.setattr(RaplCounter, "read", refuse)
    with pytest.raises(RuntimeError, match=r"intel-rapl:0/energy_uj may not be read by this user: .*sudo chmod"):
        find_counters(powercap=powercap)


def test_the_gpu_is_read_by_nvml(powercap, monkeypatch):
    nvml = ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda device: 1500 * (device + 1)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    counters = find_counters("cuda", powercap=powercap)
    assert [c.name for c in counters][-2:] == ["GPU 0", "GPU 1"]
    assert [c.read() for c in counters[-2:]] == [1.5, 3.0]
    # The processor's computation is not charged with what the GPU takes.
    assert not any(c.name.startswith("GPU") for c in find_counters("cpu", powercap=powercap))


def test_a_gpu_without_nvml_is_told_so_if_nothing_else_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(RuntimeError, match=r"RAPL.*NVML gives no energy of the GPU.*pip install nvidia-ml-py"):
        find_counters("cuda", powercap=tmp_path)


class Machine:
    """A machine and its clock: 10 W when it is idle, and 10 W and what a run takes when it works."""

    name = "package-0"

    def __init__(self, monkeypatch):
        self.now = self.energy = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def read(self):
        return self.energy

    def spend(self, seconds, watts=0.0):
        self.now += seconds
        self.energy += seconds * (10 + watts)


def test_energy_is_told_in_all_and_above_idle(monkeypatch):
    machine = Machine(monkeypatch)
    runs = {"light": lambda: machine.spend(0.3, 20), "heavy": lambda: machine.spend(0.7, 50)}
    measured = measure_joules(runs, [machine], seconds=2.0, rounds=3, sleep=machine.spend)
    assert {name: (m.seconds, m.rounds) for name, m in measured.items()} == {
        "light": (pytest.approx(0.3), 3),
        "heavy": (pytest.approx(0.7), 3),
    }
    assert measured["light"].joules["package-0"] == pytest.approx(0.3 * 30)
    assert measured["light"].above_idle["package-0"] == pytest.approx(0.3 * 20)
    assert measured["heavy"].joules["package-0"] == pytest.approx(0.7 * 60)
    assert measured["heavy"].above_idle["package-0"] == pytest.approx(0.7 * 50)


def test_a_run_that_is_longer_than_a_round_is_measured_once_in_it(monkeypatch):
    machine = Machine(monkeypatch)
    calls = []
    runs = {"long": lambda: (calls.append(1), machine.spend(9, 1))}
    measure_joules(runs, [machine], seconds=1.0, rounds=2, sleep=machine.spend)
    assert len(calls) == 1 + 2


def test_a_counter_that_stands_still_is_refused(monkeypatch):
    machine = Machine(monkeypatch)
    monkeypatch.setattr(Machine, "read", lambda self: 5.0)
    with pytest.raises(RuntimeError, match="the counter package-0 stands still"):
        measure_joules({"a": lambda: machine.spend(1)}, [machine], seconds=1.0, rounds=1, sleep=machine.spend)


def test_the_real_machine_is_measured_or_says_why_not():
    try:
        counters = find_counters()
    except RuntimeError as error:
        pytest.skip(str(error))
    measured = measure_joules({"sum": lambda: sum(range(10**5))}, counters, seconds=0.2, rounds=1)
    assert joules.POWERCAP.exists() and all(value > 0 for value in measured["sum"].joules.values())


def test_a_model_is_measured_beside_its_bert(make_with_batches, monkeypatch):
    model, batches = make_with_batches()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ticks = iter(range(10**9))
    counter = SimpleNamespace(name="package-0", read=lambda: next(ticks) / 1e3)
    measured = measured_energy(model, batches, [counter], seconds=0.01, rounds=2)
    assert list(measured) == ["SNN-BERT", "SNN-BERT, event-driven, int8 weights", "BERT, float32"]
    assert all(energy.joules["package-0"] > 0 and energy.seconds > 0 for energy in measured.values())
    assert not is_event_driven(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    report = energy_report(model, batches, run_lengths=False)
    assert "Measured on this machine" not in report.to_markdown()
    report.measured = measured
    section = report.to_markdown().split("## Measured on this machine")[1].split("##")[0]
    assert "| BERT, float32 |" in section and "package-0, mJ (above idle)" in section
    assert report.to_dict()["measured"]["SNN-BERT"]["rounds"] == 2
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        measured_energy(model, [], [counter])


def test_choices_are_measured_as_sequences(make_config):
    model = SNNBertForMultipleChoice(make_config())
    batch = {"input_ids": torch.randint(5, 90, (2, 3, 7)), "attention_mask": torch.ones(2, 3, 7, dtype=torch.long)}
    ticks = iter(range(10**9))
    counter = SimpleNamespace(name="package-0", read=lambda: next(ticks) / 1e3)
    assert measured_energy(model, [batch], [counter], seconds=0.01, rounds=1)["SNN-BERT"].joules["package-0"] > 0
