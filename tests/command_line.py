"""The command `snn-bert` in this process, for the tests of its commands."""

from typer.testing import CliRunner

from modeling_snn_bert import cli


def run_command(*arguments, exit_code=0, **kwargs):
    """Run the command and return its result: exit_code, stdout, stderr."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), **kwargs)
    assert result.exit_code == exit_code, result.output
    # Anything else than an exit is a traceback in the user's terminal.
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result
