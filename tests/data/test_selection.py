"""Which rows a job is about: columns, filter, sample, limit, and what folders say."""

from __future__ import annotations

import json
from datetime import date

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.backends.echo import EchoBackend
from batchinfer.data import filter as filter_module
from batchinfer.data.ledger import Ledger
from batchinfer.data.look import check_job
from batchinfer.data.openai_batch import export_requests
from batchinfer.data.openai_results import import_results
from batchinfer.data.source import Source
from batchinfer.errors import DriftError, InputError, JobError
from batchinfer.job import InputSection
from tests.echo_jobs import echo_job, read_output, run_echo, texts, write


@pytest.fixture
def days(tmp_path):
    """Rows 0..299 over three days, and a fourth day without rows of even id."""
    for day in range(3):
        write(tmp_path / "in" / f"day={day}" / "x.parquet", texts(300).slice(100 * day, 100), row_group_size=30)
    return tmp_path / "in"


def chosen(folder, unit_rows: int = 16, **asked) -> list[int]:
    """Ids of the rows that are read, which must lie where the units say."""
    source = Source([str(folder)], asked=InputSection(path=(str(folder),), **asked))
    ids = []
    for unit, rows in source.read(source.units(unit_rows), ["id"]):
        assert rows.num_rows == unit.rows <= unit_rows
        for some in (slice(None), slice(1, None, 2)):
            places = unit.addresses([*range(unit.rows)][some])
            there = (pq.read_table(folder / file, partitioning=None)["id"].take(own) for file, own in places)
            assert [row for own in there for row in own.to_pylist()] == rows["id"].to_pylist()[some]
        ids += rows["id"].to_pylist()
    return ids


@pytest.mark.parametrize(
    "filter, wanted",
    [
        ("id % 7 = 0", range(0, 300, 7)),
        ("id BETWEEN 95 AND 104 OR id IN (3, 250)", [3, *range(95, 105), 250]),
        ("text LIKE '%9'", range(9, 300, 10)),
        ("length(text) < length('row number 10')", range(10)),
        ("day = 1 AND id < 103", range(100, 103)),
        ("nullif(id, 5) > 2 AND id < 8", [3, 4, 6, 7]),
        ("CASE WHEN day = 2 THEN id > 297 ELSE false END", [298, 299]),
        ("day IS NULL", []),
        ("nothing IS NULL AND id < 2", [0, 1]),
    ],
)
def test_a_filter_takes_the_rows_for_which_it_is_true(days, filter, wanted):
    write(
        days / "day=2" / "y.parquet", pa.table({"id": pa.array([], pa.int64()), "nothing": pa.array([], pa.string())})
    )
    assert chosen(days, filter=filter) == list(wanted)


def test_a_limit_is_the_first_rows_of_those_and_reads_nothing(days, monkeypatch):
    assert chosen(days, limit=130) == list(range(130))
    assert chosen(days, filter="id % 2 = 1", limit=60) == list(range(1, 120, 2))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("the input was read"))
    source = Source([str(days)], asked=InputSection(path=(str(days),), limit=130, sample=0.9))
    assert sum(unit.rows for unit in source.units(50)) == 130


def test_a_sample_is_drawn_by_address_and_a_larger_one_holds_the_smaller(days):
    small, large = chosen(days, sample=0.2), chosen(days, sample=0.5)
    assert 35 < len(small) < 85 and 120 < len(large) < 180 and set(small) < set(large)
    assert small == chosen(days, unit_rows=7, sample=0.2) != chosen(days, sample=0.2, sample_seed=1)
    assert chosen(days, sample=0.2, filter="id >= 150") == [i for i in small if i >= 150]
    (days / "day=1" / "x.parquet").unlink()
    assert chosen(days, sample=0.2) == [i for i in small if not 100 <= i < 200]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    unit_rows=st.integers(1, 40),
    modulus=st.integers(1, 60),
    limit=st.integers(0, 80),
)
def test_units_hold_the_chosen_rows_once_and_in_order_however_files_are_cut(
    tmp_path_factory, groups, unit_rows, modulus, limit
):
    folder = tmp_path_factory.mktemp("in")
    for number, group in enumerate(groups):
        write(folder / f"{number}.parquet", texts(300).slice(100 * number, 100), row_group_size=group)
    wanted = list(range(0, 100 * len(groups), modulus))
    assert chosen(folder, unit_rows, filter=f"id % {modulus} = 0", limit=limit) == wanted[: limit or None]


def test_types_that_cannot_be_taken_by_row_number_are_chosen_all_the_same(tmp_path):
    views = pa.array([f"{i}" * 20 for i in range(40)], pa.string_view())
    table = pa.table({"id": range(40), "view": views, "talk": [[{"role": "user"}]] * 40})
    write(tmp_path / "in.parquet", table)
    source = Source([str(tmp_path)], asked=InputSection(path=("-",), filter="id % 3 = 0"))
    [(_, rows)] = source.read(source.units(100), ["view", "talk"])
    assert rows["view"].to_pylist() == views.to_pylist()[::3]


def test_a_run_computes_chosen_rows_alone_and_resumes_without_asking_the_filter_again(tmp_path, days, monkeypatch):
    job = echo_job(tmp_path, days, input__filter="id % 3 = 0", input__limit=90, input__columns=["id", "text"])

    class Half(EchoBackend):
        def generate(self, requests):
            for number, completion in enumerate(super().generate(requests)):
                if number == 40:
                    raise RuntimeError("the engine dies")
                yield completion

    with pytest.raises(RuntimeError):
        run_echo(job, Half)
    monkeypatch.setattr(filter_module.RowFilter, "mask", lambda *_: pytest.fail("the filter was asked again"))
    summary = run_echo(job)
    out = read_output(tmp_path)
    assert out["id"].to_pylist() == list(range(0, 270, 3)) and out.column_names[:3] == ["id", "text", "completion"]
    assert summary.job.rows == 90 == summary.rows
    told = json.loads((tmp_path / "out.batchinfer" / "manifest.json").read_bytes())
    assert told["parts"][0]["sources"] == [{"file": "day=0/x.parquet", "first_row": 0, "end_row": 100}]
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.verify() == 90


def test_a_row_is_the_same_row_with_and_without_a_filter(tmp_path, days):
    answers = {}
    for name, changes in {"all": {}, "some": {"input__filter": "id % 7 = 3"}}.items():
        run_echo(echo_job(tmp_path / name, days, sampling__temperature=1.0, **changes))  # the echo names the seed
        out = read_output(tmp_path / name)
        answers[name] = dict(zip(out["id"].to_pylist(), out["completion"].to_pylist()))
    assert len(answers["some"]) == 43 and answers["some"].items() < answers["all"].items()


@pytest.mark.parametrize(
    "change",
    [{"filter": "id > 5"}, {"limit": 3}, {"sample": 0.5}, {"columns": ["id", "text"]}, {"sample_seed": 3}],
)
def test_another_choice_is_another_job(tmp_path, days, change):
    run_echo(echo_job(tmp_path, days))
    with pytest.raises(DriftError, match=f"input.{next(iter(change))}"):
        run_echo(echo_job(tmp_path, days, **{f"input__{key}": value for key, value in change.items()}))


def test_no_row_chosen_is_an_output_without_rows_and_files_without_rows_are_watched(tmp_path, days):
    job = echo_job(tmp_path, days, input__filter="id > 1000")
    assert run_echo(job).state == "complete" and read_output(tmp_path).num_rows == 0
    write(days / "day=2" / "x.parquet", texts(1))
    with pytest.raises(DriftError, match="day=2/x.parquet was changed"):
        run_echo(job)


def test_appended_files_count_on_towards_the_limit(tmp_path, days):
    job = echo_job(tmp_path, days, input__filter="id >= 90", input__limit=215, input__on_change="append")
    run_echo(job)
    assert read_output(tmp_path).num_rows == 210
    write(days / "day=0" / "new.parquet", texts(1000).slice(500, 100))
    run_echo(job)
    assert sorted(read_output(tmp_path)["id"].to_pylist()) == [*range(90, 300), *range(500, 505)]


@pytest.mark.parametrize(
    "filter, said",
    [
        ("id >", "is not a condition in SQL"),
        ("ids > 3", "input.filter needs column 'ids', .* did you mean 'id'"),
        ("id", "must be true or false for each row, and it is Int64"),
        ("text > 3", "does not fit the columns"),
        ("id > avg(id)", r"it looks at several \(Agg\)"),
        ("row_number() OVER (ORDER BY id) < 3", "it looks at several"),
        ("id > quantile_cont(id, 0.5)", "it looks at several"),
        ("count(*) > 3", "it looks at several"),
        ("1 = 1", "says the same of each row"),
    ],
)
def test_what_is_no_condition_on_a_row_is_refused_before_anything_is_read(tmp_path, days, filter, said):
    with pytest.raises(JobError, match=said):
        check_job(echo_job(tmp_path, days, input__filter=filter, model__path="smollm2-135m-instruct"))


def test_a_value_that_the_filter_cannot_take_is_told_with_its_file(days):
    with pytest.raises(InputError, match="input.filter fails on rows of day=0/x.parquet"):
        chosen(days, filter="CAST(text AS INTEGER) > 3")


def test_broken_text_is_null_to_a_filter_and_a_type_that_polars_lacks_is_one_line(tmp_path):
    text = pa.StringArray.from_buffers(3, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffb"))
    table = pa.table({"id": range(3), "text": text, "big": pa.array([1, 2, 3], pa.decimal256(60, 0))})
    write(tmp_path / "in" / "x.parquet", table)
    assert chosen(tmp_path / "in", filter="text > '0'") == [0, 2]
    assert chosen(tmp_path / "in", filter="text IS NULL") == [1]
    with pytest.raises(JobError, match="does not fit the columns: .*Int256"):
        chosen(tmp_path / "in", filter="big = 1")


def test_only_the_columns_asked_for_are_read_and_there_for_templates(tmp_path, days):
    job = echo_job(tmp_path, days, input__columns=["text", "day"], input__filter="id < 3")
    run_echo(job)
    assert read_output(tmp_path).column_names[:2] == ["text", "completion"] and read_output(tmp_path).num_rows == 3
    with pytest.raises(InputError, match="which the input lacks"):
        run_echo(echo_job(tmp_path / "b", days, input__columns=["text"], prompt__template="{{ id }}"))
    with pytest.raises(InputError, match="input.columns needs column 'txt'.* did you mean 'text'"):
        run_echo(echo_job(tmp_path / "c", days, input__columns=["txt"]))


def test_folders_are_columns_of_prompts_and_never_written_twice(tmp_path):
    for place in (
        "day=2026-01-02/lang=de",
        "day=2026-01-03/lang=a%20b",
        "day=2026-01-03/lang=__HIVE_DEFAULT_PARTITION__",
    ):
        write(tmp_path / "in" / place / "n=7" / "x.parquet", texts(2))
    seen = []

    class Watching(EchoBackend):
        def generate(self, requests):
            return super().generate(seen.append(bytes(r.prompt_token_ids)) or r if r else r for r in requests)

    template = "{{ day }}/{{ lang or 'none' }}/{{ n + 1 }}"
    run_echo(echo_job(tmp_path, tmp_path / "in", prompt__template=template, output__columns=["id", "day"]), Watching)
    out = read_output(tmp_path)
    assert out.column_names[:2] == ["id", "completion"]
    lengths = [len("2026-01-02/de/8"), len("2026-01-03/none/8"), len("2026-01-03/a b/8")]
    assert sorted(set(out["prompt_tokens"].to_pylist())) == sorted(set(lengths)) and len(seen) == 6
    told = pl.scan_parquet(tmp_path / "out", hive_partitioning=True).select("day", "lang", "n").unique().collect()
    assert (date(2026, 1, 2), "de", 7) in told.rows()


def test_a_column_of_the_file_wins_over_a_folder_of_its_name(tmp_path):
    write(tmp_path / "in" / "id=9" / "x.parquet", texts(2))
    run_echo(echo_job(tmp_path, tmp_path / "in", prompt__template="{{ id }}"))
    assert read_output(tmp_path)["id"].to_pylist() == [0, 1]


def test_folders_with_names_that_are_no_numbers_stay_text(tmp_path):
    for hour in ("07", "08"):
        write(tmp_path / f"hour={hour}" / "x.parquet", texts(1))
    source = Source([str(tmp_path)])
    rows = pa.concat_tables(rows for _, rows in source.read(source.units(9), ["hour"]))
    assert rows["hour"].to_pylist() == ["07", "08"]


def test_chosen_rows_go_to_openai_and_back_under_their_own_addresses(tmp_path, days):
    job = echo_job(tmp_path, days, input__filter="id % 50 = 1")
    export_requests(job, tmp_path / "batch.jsonl", "gpt", lambda *_: pytest.fail("a row was refused"))
    ids = [json.loads(line)["custom_id"] for line in (tmp_path / "batch.jsonl").read_text().splitlines()]
    assert ids == [f"day={day}/x.parquet#{row}" for day in range(3) for row in (1, 51)]
    choice = {"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}
    lines = [{"custom_id": i, "response": {"status_code": 200, "body": {"choices": [choice]}}} for i in ids]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, reversed(lines))))
    import_results(job, [str(tmp_path / "results.jsonl")])
    out = read_output(tmp_path)
    assert out["id"].to_pylist() == [1, 51, 101, 151, 201, 251] and set(out["completion"].to_pylist()) == {"yes"}
