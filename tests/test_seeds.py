"""Runs of several seeds: folders, what is done already, mean and spread."""

import json

import pytest
import torch
from transformers import TrainingArguments

from modeling_snn_bert.seeds import checkpoint_of, environment, run_seeds, summarize, summary_line


def test_runs_are_written_and_kept(tmp_path, capsys):
    """An interrupted call goes on with the seeds that are left, if the flags are the same."""
    done = []

    def train_one(args):
        assert args.output_dir == str(tmp_path / f"seed_{args.seed}")
        drawn[args.seed] = torch.rand(1).item()
        if args.seed == 3 and 3 not in done:
            done.append(3)
            raise KeyboardInterrupt
        done.append(args.seed)
        return {"seed": args.seed, "metrics": {"accuracy": args.seed / 10}}

    drawn = {}
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    resumed = TrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint="true")
    flags = {"rate": 1e-3, "seeds": [1, 3], "resume_from_checkpoint": None}
    with pytest.raises(KeyboardInterrupt):
        run_seeds(args, [1, 3], train_one, flags, "mrpc")
    assert drawn[3] == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    runs = run_seeds(resumed, [1, 3], train_one, {**flags, "resume_from_checkpoint": "true"}, "mrpc", rows={"train": 3})
    assert done == [1, 3, 3] and [run["seed"] for run in runs] == [1, 3]
    assert json.loads((tmp_path / "seed_3" / "results.json").read_text())["arguments"]["rate"] == 1e-3
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"] == {"train": 3} and results["environment"]["torch"] == torch.__version__
    assert results["mean"]["accuracy"] == pytest.approx(0.2) and results["runs"] == runs
    assert "mrpc: accuracy 20.0 +- 14.1" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other flags \(rate\)"):
        run_seeds(resumed, [1], train_one, {**flags, "rate": 1e-4}, "mrpc")
    with pytest.raises(ValueError, match="--seeds must differ from each other"):
        run_seeds(args, [1, 1], train_one, flags, "mrpc")
    (run,) = run_seeds(args, None, train_one, flags, "mrpc")
    assert run["seed"] == args.seed


def test_summary():
    runs = [{"seed": seed, "metrics": {"f1": value}} for seed, value in ((0, 0.5), (1, 0.7))]
    summary = summarize(runs)
    assert summary["mean"]["f1"] == pytest.approx(0.6) and summary["seeds"] == [0, 1]
    assert summary["standard_deviation"]["f1"] == pytest.approx(0.02**0.5)
    assert summary_line("mrpc", summary) == "mrpc: f1 60.0 +- 14.1 (last step, 2 seeds)"
    assert summary_line("mrpc", summarize(runs[:1])) == "mrpc: f1 50.0 (last step, 1 seed)"
    assert environment(torch.device("cpu"))["device"] == "cpu"


def test_checkpoints(tmp_path):
    for seed, steps in ((0, (2, 10)), (1, (4,))):
        for step in steps:
            folder = tmp_path / f"seed_{seed}" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "trainer_state.json").write_text("{}")
    zero, one = (tmp_path / f"seed_{seed}" for seed in (0, 1))
    assert checkpoint_of(zero, None) is None and checkpoint_of(tmp_path / "seed_2", "true") is None
    assert checkpoint_of(zero, "true") == str(zero / "checkpoint-10")
    other = str(one / "checkpoint-4")
    assert checkpoint_of(zero, other) == other and checkpoint_of(zero, other, only_own=True) is None
    assert checkpoint_of(one, other, only_own=True) == other
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint_of(zero, str(zero))
