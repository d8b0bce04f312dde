from __future__ import annotations

import os
import platform

import pytest

from batchinfer.cache import make_folder
from batchinfer.errors import OutputError
from batchinfer.flock import held_by_another


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError):
        make_folder(tmp_path / "made", fail)
    assert list(tmp_path.iterdir()) == []
    assert make_folder(tmp_path / "made", lambda folder: (folder / "file").touch()) == tmp_path / "made"
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "file"]


def test_what_a_killed_maker_left_goes_when_the_same_is_made_again_and_what_others_are_making_stays(tmp_path):
    here = f"making-{platform.node()}"
    names = (f".made.{here}-a", f".made.{here}-b", f".made-2.{here}-a", ".made.making-elsewhere-a", f".made.{here}-c")
    left, under_way, of_another, elsewhere, fresh = (tmp_path / name for name in names)
    for folder in (left, under_way, of_another, elsewhere, fresh):
        folder.mkdir()
        (folder / "half").touch()
        if folder != fresh:
            os.utime(folder / "half", (0, 0))
        os.utime(folder, (0, 0))
    lock = os.open(under_way, os.O_RDONLY)
    assert not held_by_another(lock)

    def fill(folder):
        mine = os.open(folder, os.O_RDONLY)
        assert held_by_another(mine), "nobody sweeps what is being made"
        os.close(mine)

    make_folder(tmp_path / "made", fill)
    os.close(lock)
    stay = {under_way, of_another, elsewhere, fresh}
    assert {path.name for path in tmp_path.iterdir()} == {"made", *(folder.name for folder in stay)}


def test_a_cache_that_cannot_be_written_says_how_to_choose_another(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="file/engines: Not a directory; BATCHINFER_CACHE names another folder"):
        make_folder(tmp_path / "file" / "engines" / "one", lambda folder: None)
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OutputError, match="file: File exists$"):
        make_folder(tmp_path / "file" / "one", lambda folder: None)
