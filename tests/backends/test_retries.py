from __future__ import annotations

from collections import Counter

import pytest

from batchinfer.backends.retries import with_retries
from batchinfer.request import Completion, Output, Request
from tests.echo_jobs import echo_job, read_output, run_echo, texts, write


class Flaky:
    """Fails ``times`` times with each row of which it is said; notes what it was asked."""

    def __init__(self, times: dict, retryable: bool = True, holds: int = 0):
        self.times, self.retryable, self.holds, self.asked = Counter(times), retryable, holds, []

    def generate(self, requests):
        held = []
        for request in requests:
            if request is not None:
                held.append(request)
            if request is not None and len(held) > self.holds:
                yield self.answer(held.pop(0))
        for request in held:
            yield self.answer(request)

    def answer(self, request):
        self.asked.append(request.key)
        if self.times[request.key] > 0:
            self.times[request.key] -= 1
            return Completion(request.key, error="flaky", retryable=self.retryable)
        return Completion(request.key, (Output("fine", [1], "stop"),), 1)


def line(*keys):
    for key in keys:
        yield None if key is None else Request(key, [1])


@pytest.mark.parametrize("holds", [0, 2, 100])
def test_a_row_that_failed_for_no_fault_of_its_own_is_asked_again_as_often_as_is_allowed(holds):
    engine = Flaky({"a": 1, "b": 2, "d": 3}, holds=holds)
    told = {c.key: c.error for c in with_retries(engine, line("a", None, "b", "c", "d", None), 2)}
    assert told == {"a": None, "b": None, "c": None, "d": "flaky"}
    assert Counter(engine.asked) == {"a": 2, "b": 3, "c": 1, "d": 3}


def test_it_goes_before_rows_that_were_not_asked_yet():
    engine = Flaky({"a": 1})
    list(with_retries(engine, line("a", "b", "c"), 1))
    assert engine.asked == ["a", "a", "b", "c"]


def test_an_error_of_the_row_itself_stands_at_once():
    engine = Flaky({"a": 1}, retryable=False)
    assert [c.error for c in with_retries(engine, line("a"), 5)] == ["flaky"] and engine.asked == ["a"]


def test_without_retries_every_error_stands():
    assert [c.error for c in with_retries(Flaky({"a": 1}), line("a"), 0)] == ["flaky"]


def test_a_run_asks_again_and_counts_the_row_once(tmp_path):
    write(tmp_path / "in.parquet", texts(200))
    engines = []

    class Engine(Flaky):
        max_seq_len, fingerprint = 1 << 20, {"engine": "flaky"}

        def __init__(self, folder):
            super().__init__({(0, 3): 1, (2, 60): 1, (3, 7): 2})
            self.tokenizer_dir = folder
            engines.append(self)

        def load(self):
            from batchinfer.request import Load

            return Load()

        def close(self):
            pass

    summary = run_echo(echo_job(tmp_path), Engine)
    assert (summary.run.rows, summary.run.failed) == (200, 1)
    assert read_output(tmp_path)["error"].null_count == 199 and len(engines[0].asked) == 203
