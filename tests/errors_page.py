"""docs/errors.md, made of the tables that the tests run: `python tests/errors_page.py` writes it again."""

import os
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
INTRODUCTION = """\
# What is refused, and how

Bad input gets an error that names the argument, what was given and what is wanted, before work is lost. Each row below
is a test: the input is given, and the error must be of this kind and say this (`...` stands for what is left out here).
`tests/errors_page.py` writes this page from the tables of the tests; a test compares the two.

Shapes and types are checked everywhere, values on the CPU only: on a GPU a look at them would stall it. What damage to
a checkpoint is seen, and what is not, is in [SECURITY.md](../SECURITY.md).
"""


def rows():
    """The sections of the page: their titles, and rows of what is given, the errors and what they say."""
    import test_bad_input as bad
    import test_cli as cli
    import test_commands_predict as predict
    import test_commands_serve as serve
    import test_commands_train as train
    import test_configuration_snn_bert as configuration
    import test_examples as examples
    import test_text_files as files
    from huggingface_hub.errors import StrictDataclassError

    sections = {
        "Configuration: settings that are impossible": [
            (code(settings), StrictDataclassError, message) for settings, message in configuration.IMPOSSIBLE.values()
        ],
        "Configuration: wrong types": [
            (code({name: value}), StrictDataclassError, f"... '{name}' ...")
            for name, value in configuration.WRONG_TYPES.items()
        ],
        "Inputs of a model": [(words(name), *case[-2:]) for name, case in bad.BAD_INPUTS.items()],
        "Labels": [(f"{words(name)} ({case[0].__name__})", *case[-2:]) for name, case in bad.BAD_LABELS.items()],
        "Sequences of another length than a PSN takes": [
            (f"{length} tokens", ValueError, message) for length, message in bad.BAD_LENGTHS.values()
        ],
        "Input currents of a neuron": [(words(name), *case[-2:]) for name, case in bad.BAD_CURRENTS.items()],
        "Arguments of a neuron": [(words(name), ValueError, case[-1]) for name, case in bad.BAD_NEURONS.items()],
        "Checkpoints: `from_pretrained`": [(words(name), *case[-2:]) for name, case in bad.BAD_CHECKPOINTS.items()],
        "Files of texts: `snn-bert energy`": [
            (f"`{name}` with `{content!r}`", ValueError, message)
            for name, (content, message) in files.BAD_TEXTS.items()
        ],
        "Files of texts and labels: `snn-bert train`": [
            (f"{words(name)}: `{filename}`", ValueError, message) for name, (filename, _, message) in files.BAD.items()
        ],
        "Files of pairs of texts and labels: `snn-bert train --text_pair_column`": [
            (f"{words(name)}: `{filename}`", ValueError, message)
            for name, (filename, *_, message) in files.BAD_PAIRS.items()
        ],
        "Requests to `snn-bert serve`": [
            (words(name), f"status {status}", message) for name, (*_, status, message) in serve.BAD_REQUESTS.items()
        ],
        "Command line: `snn-bert`": [
            (f"`{' '.join(arguments)}`", f"exit code {exit_code}", message)
            for exit_code, arguments, message in cli.BAD_COMMANDS.values()
        ],
        "Command line: `snn-bert train`, `predict` and `serve`": [
            (f"`{command} {' '.join(arguments)}`", f"exit code {exit_code}", message)
            for command, table in (
                ("train ...", train.BAD_TRAINING),
                ("predict", predict.BAD_PREDICTIONS),
                ("serve", serve.BAD_SERVING),
            )
            for exit_code, arguments, message in table.values()
        ],
        "Command line: `examples/quickstart.py`": [
            (f"`{' '.join(arguments)}`", "exit code not 0", message)
            for arguments, message in examples.BAD_ARGUMENTS.values()
        ],
        "Command line: `examples/push_to_hub.py`": [
            (words(name), f"exit code {case[-2]}", case[-1]) for name, case in bad.BAD_PUSHES.items()
        ],
    }
    return {title: [(given, name_of(error), message) for given, error, message in r] for title, r in sections.items()}


def words(name):
    return name.replace("_", " ")


def code(settings):
    return "`" + ", ".join(f"{name}={value!r}" for name, value in settings.items()) + "`"


def name_of(error):
    return error if isinstance(error, str) else error.__name__


def page():
    """The text of docs/errors.md."""
    lines = INTRODUCTION.splitlines()
    for title, section in rows().items():
        lines += ["", f"## {title}", "", "| given | error | it says |", "|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    # What `pythonpath` of pyproject.toml is to pytest.
    sys.path[:0] = [str(PAGE.parents[1] / folder) for folder in ("tests", "examples")]
    temporary = PAGE.with_name(f".{os.getpid()}.{PAGE.name}")
    temporary.write_text(page(), encoding="utf-8")
    os.replace(temporary, PAGE)
