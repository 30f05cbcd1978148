"""Runs the example scripts inside the test process: a process of its own costs ten seconds for each run."""

import importlib
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))


def run_script(name, *arguments):
    """`main()` of `examples/<name>.py` with these arguments, as if it were started anew."""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        module.main()


def refused(capsys, name, *arguments):
    """The message with which the script ends, before any work."""
    with pytest.raises(SystemExit) as error:
        run_script(name, *arguments)
    assert error.value.code not in (0, None)
    return capsys.readouterr().err if isinstance(error.value.code, int) else str(error.value.code)


def interrupt_after(step):
    """For `TrainingLoop._save`: saves, and interrupts the run once the checkpoint of that step is written."""
    from accelerate_loop import TrainingLoop

    save = TrainingLoop._save

    def save_and_stop(self):
        save(self)
        if self.step == step:
            raise KeyboardInterrupt

    return save_and_stop
