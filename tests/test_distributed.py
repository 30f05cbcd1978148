"""Training in two processes over gloo: one process gives the same losses, and a killed run ends as an unbroken one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed_training import CHECKPOINT_AT, KILLED_IN, STEPS, build_data, build_model, train
from heads import HEADS
from penalty_training import NUM_ROWS, one_step
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "accelerate_configs"


def launch(*arguments, script="distributed_training.py"):
    """Run a script of this folder in two processes; its exit status and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", CONFIGS / "cpu.yaml", "--main_process_port", port]
    command += [ROOT / "tests" / script, *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


@pytest.fixture(scope="module")
def one_process():
    """Losses and weights of the plain run in this process, with the same global batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()
    try:
        return train("ddp")
    finally:
        torch.set_num_threads(threads)
        for kind in (AcceleratorState, GradientState, PartialState):
            kind._reset_state()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_and_a_killed_run(tmp_path, one_process, engine, assert_spikes_flow):
    status, output = launch(engine, tmp_path)
    # The third of the three runs was killed, and not for another reason; the others did not go on without it.
    assert status != 0 and "SIGKILL" in output, output
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["plain", "unbroken"], output

    losses, weights = one_process
    assert len(losses) == STEPS and max(losses) - min(losses) > 0.01
    batch = {name: torch.stack([row[name] for row in build_data()[:8]]) for name in ("input_ids", "attention_mask")}
    assert_spikes_flow(build_model(False), **batch)
    torch.testing.assert_close(torch.tensor(read_losses(tmp_path, "plain")), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    plain = load_file(tmp_path / "plain.safetensors")
    assert set(plain) == set(weights)
    for name, expected in weights.items():
        torch.testing.assert_close(plain[name], expected, rtol=1e-3, atol=1e-4)

    status, output = launch(engine, tmp_path, "resume")
    assert status == 0, output
    unbroken, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("unbroken", "resumed"))
    assert CHECKPOINT_AT < KILLED_IN < STEPS
    assert read_losses(tmp_path, "resumed") == read_losses(tmp_path, "unbroken")[CHECKPOINT_AT:]
    assert read_losses(tmp_path, "unbroken") != read_losses(tmp_path, "plain")
    assert [name for name, x in unbroken.items() if not torch.equal(x, resumed[name])] == []


@pytest.mark.slow
def test_the_penalty_of_two_processes_that_accumulate_is_that_of_one_batch(tmp_path):
    status, output = launch(tmp_path, script="penalty_training.py")
    assert status == 0, output
    for head in HEADS:
        for kind in (AcceleratorState, GradientState, PartialState):
            kind._reset_state()
        wanted = one_step(head, tmp_path / "one", NUM_ROWS, 1)
        got = load_file(tmp_path / f"{head}.safetensors")
        assert set(got) == set(wanted)
        for name, step in wanted.items():
            torch.testing.assert_close(got[name], step, rtol=1e-3, atol=1e-4, msg=f"{head}: {name}")


def read_losses(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def parsed(path):
    """What `accelerate launch` makes of a file, and what its parser knew before it read one."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    known = set(vars(arguments))
    return _validate_launch_command(arguments)[0], known


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_launch_reads(path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    arguments, known = parsed(path)
    for name in ("num_processes", "num_machines", "mixed_precision", "machine_rank"):
        assert name not in given or getattr(arguments, name) == given[name]
    # Of these sections Accelerate takes any key, and passes over those that it does not know.
    for section in ("fsdp_config", "deepspeed_config"):
        for name, value in given.get(section, {}).items():
            assert name in known and getattr(arguments, name) == value
    engine = {"ddp": "multi_gpu", "cpu": "multi_gpu", "fsdp": "use_fsdp", "deepspeed_zero2": "use_deepspeed"}
    for name in ("multi_gpu", "use_fsdp", "use_deepspeed"):
        assert getattr(arguments, name) is (engine.get(path.stem) == name)


def test_fsdp_finds_the_units(monkeypatch):
    """The plugin that the file's settings make wraps what the model names, with no class named in the file."""
    arguments, _ = parsed(CONFIGS / "fsdp.yaml")
    with monkeypatch.context() as patch:
        for name, value in prepare_multi_gpu_env(arguments).items():
            patch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    model = build_model(False)
    plugin.set_auto_wrap_policy(model)
    found = {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert found == set(model._no_split_modules)


def test_there_is_a_configuration_for_each_engine():
    assert {path.stem for path in CONFIGS.glob("*")} == {"one_gpu", "ddp", "fsdp", "deepspeed_zero2", "cpu"}
