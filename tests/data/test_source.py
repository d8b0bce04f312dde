from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.data.source import Source
from batchinfer.errors import DriftError, InputError
from tests.echo_jobs import texts, write


def ids_of(source: Source, units) -> list[list[int]]:
    return [table["id"].to_pylist() for _, table in source.read(units, ["id"])]


def test_a_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    for name in ("b.parquet", "a/2.parquet", "a/10.parquet", "a/_old/x.parquet", ".hidden.parquet", "_x.parquet"):
        write(tmp_path / name, texts(2))
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.txt").write_text("not ours")
    assert list(Source([str(tmp_path)]).files) == ["a/10.parquet", "a/2.parquet", "b.parquet"]


def test_a_glob_names_files_from_its_fixed_part_on(tmp_path):
    for name in ("day=1/a.parquet", "day=2/a.parquet", "other/a.parquet"):
        write(tmp_path / name, texts(1))
    assert list(Source([f"{tmp_path}/day=*/*.parquet"]).files) == ["day=1/a.parquet", "day=2/a.parquet"]


def test_files_of_one_name_in_two_folders_are_two_files_and_a_file_named_twice_is_one(tmp_path):
    for name in ("a/x.parquet", "b/x.parquet"):
        write(tmp_path / name, texts(1))
    source = Source([str(tmp_path / "b/x.parquet"), str(tmp_path / "a/x.parquet"), str(tmp_path / "a")])
    assert list(source.files) == ["a/x.parquet", "b/x.parquet"]


def test_the_job_s_own_output_among_its_input_is_passed_over(tmp_path):
    for name in ("x.parquet", "out/part.parquet", "out.batchinfer/plan-000.parquet", "outer/y.parquet"):
        write(tmp_path / name, texts(1))
    assert list(Source([str(tmp_path)], str(tmp_path / "out")).files) == ["outer/y.parquet", "x.parquet"]


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 17)), min_size=1, max_size=4),
    unit_rows=st.integers(1, 50),
    data=st.data(),
)
def test_units_cover_every_row_once_never_span_folders_and_any_of_them_can_be_read(
    tmp_path_factory, files, unit_rows, data
):
    folder = tmp_path_factory.mktemp("in")
    total = 0
    for index, (rows, group) in enumerate(files):
        table = pa.table({"id": pa.array(range(total, total + rows), pa.int64())})
        write(folder / f"part={index // 2}" / f"{index}.parquet", table, row_group_size=group)
        total += rows
    source = Source([str(folder)])
    units = source.units(unit_rows)
    assert [unit.index for unit in units] == list(range(len(units)))
    for index in {index // 2 for index in range(len(files))}:
        own = [unit for unit in units if unit.folder == f"part={index}"]
        assert [unit.rows for unit in own[:-1]] == [unit_rows] * (len(own) - 1) and own[-1].rows <= unit_rows
        assert all(piece.file.startswith(f"part={index}/") for unit in own for piece in unit.pieces)
    assert [i for ids in ids_of(source, units) for i in ids] == list(range(total))
    some = sorted(data.draw(st.sets(st.sampled_from(range(len(units))))))
    wanted = ids_of(source, units)
    assert ids_of(source, [units[i] for i in some]) == [wanted[i] for i in some]


def test_no_row_group_is_decoded_twice_and_none_without_need(tmp_path, monkeypatch):
    write(tmp_path / "in.parquet", texts(1000), row_group_size=100)
    decoded: list[int] = []
    plain = pq.ParquetFile.iter_batches

    def spy(self, *args, **kwargs):
        decoded.extend(kwargs["row_groups"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    source = Source([str(tmp_path / "in.parquet")])
    units = source.units(30)
    assert sum(len(ids) for ids in ids_of(source, units)) == 1000
    assert decoded == list(range(10))
    decoded.clear()
    assert ids_of(source, [units[1], units[20]]) == [list(range(30, 60)), list(range(600, 630))]
    assert decoded == [0, 6]


def test_many_small_files_of_a_folder_make_few_units(tmp_path):
    for index in range(20):
        write(tmp_path / "in" / f"{index:02}.parquet", texts(10))
    source = Source([str(tmp_path / "in")])
    [(first, _), (last, rows)] = source.read(source.units(128), ["id"])
    assert (first.rows, last.rows, len(first.pieces), len(last.pieces)) == (128, 72, 13, 8)
    assert list(first.addresses([9, 10, 11, 127])) == [("00.parquet", [9]), ("01.parquet", [0, 1]), ("12.parquet", [7])]
    assert rows["id"].to_pylist() == [8, 9, *[*range(10)] * 7]


def test_an_empty_folder_is_one_empty_unit(tmp_path):
    write(tmp_path / "in.parquet", texts(0))
    source = Source([str(tmp_path / "in.parquet")])
    [(unit, table)] = source.read(source.units(10), ["id", "text"])
    assert unit.rows == table.num_rows == 0 and table.column_names == ["id", "text"]


def test_files_may_differ_in_column_order_missing_columns_and_width_of_numbers(tmp_path):
    write(tmp_path / "1.parquet", pa.table({"a": pa.array([1], pa.int32()), "b": ["x"]}))
    write(tmp_path / "2.parquet", pa.table({"b": ["y"], "a": pa.array([2**40], pa.int64()), "c": [0.5]}))
    source = Source([str(tmp_path)])
    tables = [table for _, table in source.read(source.units(10), ["a", "b", "c"])]
    assert pa.concat_tables(tables).to_pylist() == [{"a": 1, "b": "x", "c": None}, {"a": 2**40, "b": "y", "c": 0.5}]


def test_links_to_folders_are_followed_but_not_back_into_themselves_nor_into_the_output(tmp_path):
    write(tmp_path / "far" / "day=1" / "x.parquet", texts(3))
    write(tmp_path / "in" / "out" / "part-000000-1.parquet", texts(4))
    links = {"linked": "far", "far/day=1/back": "far", "far/up": "in", "in/again": "in/out"}
    for name, target in links.items():
        (tmp_path / ("in" if name == "linked" else ".") / name).symlink_to(tmp_path / target)
    source = Source([str(tmp_path / "in")], str(tmp_path / "in" / "out"))
    assert list(source.files) == ["linked/day=1/x.parquet"]
    assert list(Source([str(tmp_path / "far")]).files)[0] == "day=1/x.parquet"


def test_files_that_do_not_fit_each_other_are_named(tmp_path):
    write(tmp_path / "1.parquet", pa.table({"a": [1]}))
    write(tmp_path / "2.parquet", pa.table({"a": ["text"]}))
    with pytest.raises(InputError, match=r"2\.parquet does not fit"):
        Source([str(tmp_path)])


KINDS = {
    "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
    "large_string": pa.array(["a", None, "b"], pa.large_string()),
    "string_view": pa.array(["a", None, "b" * 50], pa.string_view()),
    "messages": pa.array([[{"role": "user", "content": "hi"}], [], None]),
    "decimal": pa.array([1, None, 3], pa.decimal128(5, 2)),
    "timestamp": pa.array([1, None, 3], pa.timestamp("us", "UTC")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_any_type_come_through_as_they_are(tmp_path, kind):
    table = pa.table({"a.b": [1, 2, 3], "a": KINDS[kind]})
    write(tmp_path / "in.parquet", table)
    source = Source([str(tmp_path / "in.parquet")])
    read = pa.concat_tables([table for _, table in source.read(source.units(2), ["a"])])
    assert read.column_names == ["a"] and read["a"].to_pylist() == KINDS[kind].to_pylist()


def broken(path: Path, how: str) -> Path:
    data = write(path, texts(50)).read_bytes()
    damaged = {"empty": b"", "text": b"id,text\n1,hello\n", "cut": data[:-20], "head": data[:40], "zeros": bytes(500)}
    path.write_bytes(damaged[how])
    return path


@pytest.mark.parametrize("how", ["empty", "text", "cut", "head", "zeros"])
def test_what_is_not_parquet_is_named(tmp_path, how):
    path = broken(tmp_path / "bad.parquet", how)
    with pytest.raises(InputError, match=r"bad\.parquet is not a readable Parquet file"):
        Source([str(path)])


@pytest.mark.parametrize(
    "given, said",
    [
        ("none.parquet", "no input at .*none.parquet"),
        ("*.parquet", "matches no file"),
        (".", "holds no file ending in .parquet"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(tmp_path, given, said):
    with pytest.raises(InputError, match=said):
        Source([str(tmp_path / given)])


def test_a_name_that_is_not_utf8_and_a_folder_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    write(tmp_path / "closed" / "x.parquet", texts(1)).rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet"))
    with pytest.raises(InputError, match=r"'\\udcff.parquet' is not valid UTF-8"):
        Source([str(tmp_path)])

    def scandir(path, scandir=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="cannot look into the input folder .*closed: Permission denied"):
        Source([str(tmp_path)])


def test_no_columns_and_columns_of_one_name_are_refused(tmp_path):
    write(tmp_path / "none.parquet", pa.table({}))
    with pytest.raises(InputError, match="no columns"):
        Source([str(tmp_path / "none.parquet")])
    write(tmp_path / "twice.parquet", pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]))
    with pytest.raises(InputError, match="several columns named a"):
        Source([str(tmp_path / "twice.parquet")])


def test_damage_behind_a_good_footer_is_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "in.parquet", texts(5000), compression="zstd", row_group_size=500)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    path.write_bytes(data)
    source = Source([str(path)])
    with pytest.raises(InputError, match=r"in\.parquet cannot be read"):
        list(source.read(source.units(100), ["id", "text"]))


def test_a_file_that_changes_after_it_was_planned_is_refused(tmp_path):
    path = write(tmp_path / "in.parquet", texts(10))
    source = Source([str(path)])
    os.utime(path, ns=(1, 1))
    with pytest.raises(DriftError, match=r"in\.parquet changed during the run"):
        list(source.read(source.units(5), ["id"]))


def test_a_reader_that_is_left_early_ends_its_thread(tmp_path):
    import threading

    write(tmp_path / "in.parquet", texts(1000))
    source = Source([str(tmp_path / "in.parquet")])
    before = threading.active_count()
    reading = source.read(source.units(10), ["id"])
    next(reading)
    reading.close()
    assert threading.active_count() == before
