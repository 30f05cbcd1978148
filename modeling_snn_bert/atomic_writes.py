"""Files and folders that are written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block succeeds and vanishes if it does not.

    The folder is made if there is none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, *, allow_nan: bool = True) -> None:
    """Write `content` as JSON; the folder is made if there is none.

    Raises:
        TypeError: if JSON has nothing for a part of it.
        ValueError: if a number is not finite, unless `allow_nan`.
    """
    text = json.dumps(content, indent=2, allow_nan=allow_nan) + "\n"
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place if the block succeeds and vanishes if it does not."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as outer:
        new, old = Path(outer, "new"), Path(outer, "old")
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
