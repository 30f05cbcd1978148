"""Runs scripts of examples/ and benchmarks/ inside the test process: one of their own takes ten seconds to start."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer
from transformers.trainer_callback import CallbackHandler

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))


def run_script(name, *arguments):
    """`main()` of the script `<name>.py` with these arguments, as if it were started anew."""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        module.main()


def refused(capsys, name, *arguments):
    """The message with which the script ends, before any work."""
    with pytest.raises((SystemExit, ValueError, FileNotFoundError, StrictDataclassError)) as error:
        run_script(name, *arguments)
    if not isinstance(error.value, SystemExit):
        return str(error.value)
    assert error.value.code not in (0, None)
    return capsys.readouterr().err if isinstance(error.value.code, int) else str(error.value.code)


@contextlib.contextmanager
def tokenizers_loaded():
    """The paths of the tokenizers that the block loads, each as often as it does."""
    paths, load = [], AutoTokenizer.from_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            AutoTokenizer, "from_pretrained", lambda path, **kwargs: paths.append(path) or load(path, **kwargs)
        )
        yield paths


@contextlib.contextmanager
def interrupted_after(step):
    """Trainer is interrupted once the checkpoint of that step is written, and the block must end so."""
    on_save = CallbackHandler.on_save

    def stop(self, args, state, control):
        if state.global_step == step:
            raise KeyboardInterrupt
        return on_save(self, args, state, control)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CallbackHandler, "on_save", stop)
        yield
