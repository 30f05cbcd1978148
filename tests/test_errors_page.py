"""docs/errors.md lists what the tests of bad input run, all of it and nothing else."""

import subprocess
import sys

import errors_page
import pytest


def test_page_is_that_of_the_tables():
    message = "run `python tests/errors_page.py`"
    assert errors_page.PAGE.read_text(encoding="utf-8") == errors_page.page(), message


def test_table_is_long_and_says_something_in_each_row():
    rows = [row for section in errors_page.rows().values() for row in section]
    assert len(rows) >= 60
    assert all(given.strip("` ") and error and message for given, error, message in rows)
    assert len({(given, error, message) for given, error, message in rows}) == len(rows)


@pytest.mark.slow
def test_the_script_writes_the_page():
    before = errors_page.PAGE.read_text(encoding="utf-8")
    subprocess.run([sys.executable, errors_page.__file__], check=True)
    assert errors_page.PAGE.read_text(encoding="utf-8") == before
