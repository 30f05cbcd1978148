"""Files and folders appear whole or not at all, and nothing else is left behind."""

import os
from pathlib import Path

import pytest

from modeling_snn_bert.atomic_writes import folder_written_whole, write_json, written_whole


@pytest.mark.parametrize("before", [None, "old"])
def test_file(tmp_path, before):
    path = tmp_path / "made" / "x.txt"
    if before is not None:
        path.parent.mkdir()
        path.write_text(before)
    with pytest.raises(ValueError, match="half"), written_whole(path) as temporary:
        temporary.write_text("ne")
        raise ValueError("half")
    assert (path.read_text() if path.exists() else None) == before
    with written_whole(path) as temporary:
        assert temporary.parent == path.parent and temporary != path
        temporary.write_text("new")
        assert (path.read_text() if path.exists() else None) == before
    assert [found.name for found in path.parent.iterdir()] == ["x.txt"] and path.read_text() == "new"


@pytest.mark.parametrize("before", [None, "old"])
def test_folder(tmp_path, before):
    path = tmp_path / "made" / "model"
    if before is not None:
        path.mkdir(parents=True)
        (path / "old.txt").write_text(before)

    def files():
        return {found.name: found.read_text() for found in path.iterdir()} if path.exists() else None

    kept = files()
    with pytest.raises(ValueError, match="half"), folder_written_whole(path) as temporary:
        (temporary / "new.txt").write_text("ne")
        raise ValueError("half")
    assert files() == kept
    with folder_written_whole(path) as temporary:
        (temporary / "new.txt").write_text("new")
        assert files() == kept
    assert files() == {"new.txt": "new"} and [found.name for found in path.parent.iterdir()] == ["model"]


def test_folder_comes_back_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    replace = os.replace

    def fails(source, target):
        if Path(source).name == "new":
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no"), folder_written_whole(path):
        pass
    assert (path / "old.txt").read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["model"]


def test_json(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="set"):
        write_json(path, {"a": {1}})
    assert path.read_text() == '{\n  "a": 1\n}\n' and [x.name for x in path.parent.iterdir()] == ["file.json"]
