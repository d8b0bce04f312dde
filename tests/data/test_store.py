from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from batchinfer.data.store import LocalStore
from batchinfer.errors import OutputError


def test_of_many_writers_of_one_name_exactly_one_wins_and_its_bytes_stay(tmp_path):
    store = LocalStore(tmp_path)
    store.make_folder("commits")

    def put(i: int) -> bool:
        name = f"temporary-{i}"  # threads share a pid; runs do not
        store.write(name, str(i).encode())
        return _link(store, name)

    def _link(store: LocalStore, name: str) -> bool:
        try:
            os.link(store.path(name), store.path("commits/1.json"))
            return True
        except FileExistsError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(put, range(50))) == 1
    assert store.put_if_absent("commits/1.json", b"late") is False
    assert store.read("commits/1.json") != b"late"
    assert store.list("commits") == ["1.json"]


def test_put_if_absent_leaves_nothing_but_the_name(tmp_path):
    store = LocalStore(tmp_path)
    assert store.put_if_absent("a.json", b"first")
    assert not store.put_if_absent("a.json", b"second")
    assert store.list(".") == ["a.json"] and store.read("a.json") == b"first"


def test_replace_append_move_and_remove(tmp_path):
    store = LocalStore(tmp_path)
    store.replace("a", b"1")
    store.replace("a", b"2")
    store.append("log", b"x")
    store.append("log", b"y")
    store.move("log", LocalStore(tmp_path / "deep"), "er/log")
    assert store.read("a") == b"2" and store.read("deep/er/log") == b"xy" and store.size("log") is None
    store.remove(["a", "never there"])
    assert store.list(".") == [] and store.list("nowhere") == []


def test_a_failure_of_the_file_system_names_the_file_and_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    store = LocalStore(tmp_path / "file")
    for act in (lambda: store.write("x", b""), lambda: store.make_folder("x"), lambda: store.sync("x")):
        with pytest.raises(OutputError, match=r"file/x.*Not a directory.*run the same command again"):
            act()
