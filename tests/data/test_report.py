from __future__ import annotations

import io
import json
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from batchinfer.data.journal import ResultSchema, Tally
from batchinfer.data.report import Progress, Summary
from batchinfer.data.sink import OutputSchema
from batchinfer.errors import ExitCode, InputError, JobError
from batchinfer.job import OutputSection
from batchinfer.log import say
from batchinfer.request import Load


def test_a_summary_is_one_line_for_people_and_json_for_tools():
    tally = Tally(1200, 3, 50_000, 20_000, Counter(stop=1197, error=3))
    summary = Summary(
        Path("out"), "complete", ExitCode.OK, 1200, tally, tally, 0, 75.0, Load(details={"kernels": "cpu"}),
        {"generate": 70.0}, 1 << 30,
    )  # fmt: skip
    assert str(summary) == "1,200 rows (3 failed) · 50,000 tokens in, 20,000 out · 1,000 tok/s · 1:15 min wall · out"
    told = json.loads(json.dumps(summary.as_dict()))
    assert told["job"].items() <= told["run"].items() and told["job"]["ok"] == 1197 and told["job"]["failed"] == 3
    assert told["run"]["tokens_per_second"] == {"prompt": 714.3, "completion": 285.7, "total": 1000.0}
    assert told["load"]["details"] == {"kernels": "cpu"} and told["exit_code"] == 0


def test_a_stopped_run_says_how_far_it_came_and_how_to_go_on():
    summary = Summary(Path("out"), "stopped", ExitCode.STOPPED, 1000, Tally(rows=200), logged=50)
    assert str(summary).startswith("250 of 1,000 rows") and "run again to go on" in str(summary)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", told := io.StringIO())
    tally = Tally(rows=30, failed=2, prompt_tokens=900)
    load = Load(running=12, kv_used=0.41)
    with Progress(100, lambda: 50, tally, lambda: load, 0.02, None):
        time.sleep(0.1)
    line = told.getvalue().splitlines()[0]
    assert (
        line.startswith("batchinfer: 50/100 rows (50%), ")
        and "12 running, KV 41%, 2 failed" in line
        and " left" in line
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_said_on_a_terminal_takes_the_place_of_the_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", told := Terminal())
    say("stopping")
    assert told.getvalue() == "\r\x1b[Kbatchinfer: stopping\n"


def test_progress_false_is_silent_and_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", told := Terminal())
    with Progress(100, lambda: 50, Tally(), Load, 0.01, False):
        time.sleep(0.05)
    assert told.getvalue() == ""
    with Progress(100, lambda: 50, Tally(rows=30), lambda: Load(running=7), 0.01, None):
        pass
    assert "50/100" in told.getvalue() and "7 running" in told.getvalue()


@pytest.mark.parametrize("n, kind", [(1, pa.string()), (2, pa.list_(pa.string()))])
def test_results_come_after_the_columns_carried(n, kind):
    available = pa.schema({"id": pa.int64(), "text": pa.string()})
    schema = OutputSchema(OutputSection(path="out", columns=("text",), prefix="p_"), available, ResultSchema(n))
    assert schema.carried == ["text"] and schema.results[:2] == ["p_completion", "p_finish_reason"]
    assert ResultSchema(n).columns.field("completion").type == kind


def test_a_result_that_would_hide_a_column_or_a_column_that_is_missing_is_refused():
    available = pa.schema({"id": pa.int64(), "error": pa.string()})
    with pytest.raises(JobError, match="'error'.*output.prefix"):
        OutputSchema(OutputSection(path="out"), available, ResultSchema(1))
    with pytest.raises(InputError, match="'ids'.*did you mean 'id'"):
        OutputSchema(OutputSection(path="out", columns=("ids",)), available, ResultSchema(1))
