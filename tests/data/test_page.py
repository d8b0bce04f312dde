from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.backends.echo import EchoBackend
from batchinfer.data.charts import Line, compact, histogram, line_chart
from batchinfer.data.estimate import PREDICTION
from batchinfer.data.page import page
from batchinfer.data.stats import Bin
from batchinfer.data.survey import survey
from batchinfer.errors import EngineError, JobError
from batchinfer.request import Completion, Load, Output
from tests.echo_jobs import echo_job, run_echo, texts, write

EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>&amp;'


class Busy(EchoBackend):
    """Takes a moment, fails some rows, says hostile things."""

    dies_after = 10**9

    def generate(self, requests):
        for i, completion in enumerate(super().generate(requests)):
            if i >= self.dies_after:
                raise EngineError("no memory: <b>2 GiB</b>")
            if i % 50 == 49:
                time.sleep(0.1)
            if i % 10 == 3:
                yield Completion(completion.key, prompt_tokens=5, error=f"lost at step {i} {EVIL}")
            else:
                outputs = tuple(Output(EVIL, o.token_ids, o.finish_reason) for o in completion.outputs)
                yield Completion(completion.key, outputs, completion.prompt_tokens)

    def load(self):
        return Load(running=7, waiting=2, kv_used=0.42, preemptions=3)


class Dying(Busy):
    dies_after = 150


class Strict(HTMLParser):
    """Every tag that is opened is closed, and none of them runs or fetches anything."""

    VOID = {"meta", "br", "img"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href", "srcset", "action") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report_of(tmp_path, samples: int = 6) -> tuple[str, str]:
    """The page and its visible text."""
    html = page(survey(tmp_path / "out", samples))
    parsed = Strict(html)
    assert not {"script", "img", "link", "iframe", "object"} & set(parsed.tags) and "url(" not in html
    return html, " ".join(" ".join(parsed.text).split())


def job_of(tmp_path, rows: int = 300, **changes):
    write(tmp_path / "in.parquet", texts(rows))
    return echo_job(tmp_path, job__name="Nightly <b>&</b>", **changes)


def test_a_complete_output_has_every_panel(tmp_path):
    run_echo(job_of(tmp_path), Busy)
    html, text = report_of(tmp_path)
    assert text.count("Nightly <b>&</b>") >= 2 and "complete" in text
    panels = ("Throughput", "Rows", "KV cache", "Sequences", "Prompt length", "Completion length", "Finish reasons")
    assert all(f"<h2>{panel}" in html for panel in (*panels, "Where the time went", "Failures", "Samples", "Runs"))
    assert "42%" in text and "3 preemptions" in text and "Predicted" not in text
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)


def test_text_from_the_data_stays_text(tmp_path):
    run_echo(job_of(tmp_path), Busy)
    html, text = report_of(tmp_path)
    assert EVIL in text and "<script" not in html and "<img" not in html


def test_failures_are_grouped_with_the_rows_to_look_at(tmp_path):
    run_echo(job_of(tmp_path), Busy)
    found = survey(tmp_path / "out")
    [(kind, told)] = found.failures.items()
    assert kind.startswith("lost at step N") and told.count == found.job.failed == 30
    table = pq.read_table(tmp_path / "out")
    assert len(told.rows) == 3
    for address in told.rows:
        file, row = address.rsplit(":", 1)
        assert file == "in.parquet" and table["error"][int(row)].as_py() is not None


def test_skipped_rows_are_told_and_are_no_failures(tmp_path):
    class Short(EchoBackend):
        def __init__(self, folder):
            super().__init__(folder, max_seq_len=18)

    job = job_of(
        tmp_path, prompt__on_overlong="skip", prompt__template="{% if id == 7 %}{{ 1 / 0 }}{% endif %}Say {{ text }}"
    )
    run_echo(job, Short)
    found = survey(tmp_path / "out")
    assert found.job.skipped == 200 and [told.rows for told in found.failures.values()] == [["in.parquet:7"]]
    assert "200 skipped" in report_of(tmp_path)[1]


def test_rows_are_told_by_where_they_lie_in_the_input(tmp_path):
    run_echo(job_of(tmp_path, input__filter="id % 7 = 3", checkpoint__unit_rows=8), Busy)
    found = survey(tmp_path / "out", samples=3)
    [told] = found.failures.values()
    rows = [int(address.split(":")[1]) for address in (*told.rows, *(sample.address for sample in found.samples))]
    assert all(row % 7 == 3 for row in rows)
    assert all(s.asked["text"] == f"row number {s.address.split(':')[1]}" for s in found.samples)


def test_samples_are_of_rows_that_came_out_and_can_be_left_out(tmp_path):
    run_echo(job_of(tmp_path), Busy)
    found = survey(tmp_path / "out", samples=8)
    assert len(found.samples) == 8 and found.samples == survey(tmp_path / "out", samples=8).samples
    assert all(s.completions == [EVIL] and s.asked["text"].endswith(s.address.split(":")[1]) for s in found.samples)
    html, text = report_of(tmp_path, samples=0)
    assert "Samples" not in text and "row number" not in text


def test_several_completions_a_row_are_all_counted_and_shown(tmp_path):
    run_echo(job_of(tmp_path, sampling__n=2, sampling__temperature=1.0), Busy)
    found = survey(tmp_path / "out", samples=1)
    assert found.completion.count == 2 * 270 and len(found.samples[0].completions) == 2
    report_of(tmp_path)


def test_columns_may_have_a_prefix(tmp_path):
    run_echo(job_of(tmp_path, output__prefix="llm_"), Busy)
    assert survey(tmp_path / "out").completion.count == 270


def test_a_run_that_died_is_told_with_what_is_left(tmp_path):
    job = job_of(tmp_path)
    with pytest.raises(EngineError):
        run_echo(job, Dying)
    found = survey(tmp_path / "out")
    assert found.state == "unfinished" and 128 <= found.done <= 150 and found.seconds_left > 0
    html, text = report_of(tmp_path)
    assert "failed" in text and "no memory: <b>2 GiB</b>" in text and "of work left" in text and "expected" in text
    run_echo(job, Busy)
    html, text = report_of(tmp_path)
    assert text.count("died: EngineError") == 1 and "complete" in text and "of work left" not in text


def test_outputs_with_little_to_show(tmp_path):
    with pytest.raises(JobError, match="no job was begun"):
        survey(tmp_path / "out")
    run_echo(job_of(tmp_path, rows=0))
    assert "no rows" in report_of(tmp_path)[1]
    for path in (tmp_path / "out.batchinfer" / "runs").iterdir():
        path.unlink()
    (tmp_path / "out.batchinfer" / "summary.json").write_text("{torn")
    assert "no rows" in report_of(tmp_path)[1]


def test_a_part_that_cannot_be_read_is_told_and_the_others_shown(tmp_path):
    run_echo(job_of(tmp_path))
    first, second, *_ = sorted((tmp_path / "out").iterdir())
    first.unlink()
    second.write_bytes(b"no parquet")
    found = survey(tmp_path / "out")
    assert found.unread == 2 and found.prompt.count == 300 - 2 * 64
    assert "2 committed parts could not be read" in report_of(tmp_path)[1]


@pytest.mark.parametrize("actual, verdict", [(100, "as predicted"), (10, "100% more"), (1000, "80% less")])
def test_what_was_foretold_stands_beside_what_happened(tmp_path, actual, verdict):
    run_echo(job_of(tmp_path))
    tokens = survey(tmp_path / "out").job.prompt_tokens
    expected = {100: [tokens - 1, tokens], 10: [1, tokens // 2], 1000: [tokens * 5, tokens * 6]}[actual]
    told = {"rows": 300, "sampled": 10, "tokens_in": expected, "tokens_out": [0, 10**9], "seconds": None, "time": 0.0}
    (tmp_path / "out.batchinfer" / PREDICTION).write_text(json.dumps(told))
    html, text = report_of(tmp_path)
    assert "Predicted and actual" in text and verdict in text


# ---- charts


def test_axes_have_round_ticks_and_units():
    x = np.linspace(0, 7000, 50)
    html = line_chart([Line("a", [(x, x * 3)], "red", "area")], compact, seconds=7000)
    assert all(f">{name}<" in html for name in ("0 min", "30 min", "90 min", "20k"))
    Strict(html)


@pytest.mark.parametrize("seconds", [1e-9, 0.3, 59, 121, 86_400 * 40])
def test_any_length_of_time_has_a_few_labels(seconds):
    html = line_chart([Line("a", [(np.array([0, seconds]), np.zeros(2))], "red")], compact, seconds=seconds)
    assert 1 <= html.split('class="x"')[1].count("<span") <= 9 and "nan" not in html


def test_a_histogram_says_each_bin_and_names_its_tail():
    html = histogram([Bin(0, 9, 5), Bin(10, 19, 2), Bin(20, 400, 1)], "red", "tokens")
    assert "0–9 tokens: 5 rows" in html and "≥ 20" in html and html.count("<rect") == 3


@pytest.mark.parametrize("value, told", [(0, "0"), (950, "950"), (9_999, "9,999"), (35_210, "35.2k"), (4e6, "4M")])
def test_numbers_are_short(value, told):
    assert compact(value) == told


def test_a_carried_column_of_any_type_can_be_sampled(tmp_path):
    rows = pa.table({"text": [["a", "b"]] * 3, "when": pa.array([1, None, 3], pa.timestamp("ns"))})
    write(tmp_path / "in.parquet", rows)
    run_echo(echo_job(tmp_path, prompt__template="{{ text }}{% if when %}x{% endif %}"))
    found = survey(tmp_path / "out")
    assert found.samples and json.loads(found.samples[0].asked["text"]) == ["a", "b"]
    report_of(tmp_path)
