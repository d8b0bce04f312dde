from __future__ import annotations

import time

import pyarrow as pa
import pytest

from batchinfer.data.journal import FinishedUnit, Journal, ResultSchema, Tally, read_log
from batchinfer.data.store import LocalStore
from batchinfer.data.threads import Halt
from batchinfer.data.units import Piece, Unit
from batchinfer.errors import EngineError
from batchinfer.request import Completion, Output


def answer(row: int, unit: int = 0, n: int = 1) -> Completion:
    if row % 5 == 4:
        return Completion((unit, row), prompt_tokens=row, error=f"row {row} is bad")
    outputs = tuple(Output(f"text {row} #{i} é", list(range(row + i)), "stop") for i in range(n))
    return Completion((unit, row), outputs, prompt_tokens=row)


class Harness:
    """A journal over a folder, with what it delivered."""

    def __init__(self, folder, *, epoch: int = 1, n: int = 1, sync=(0.01, 4)) -> None:
        self.store = LocalStore(folder)
        self.store.make_folder("wal")
        self.delivered: list[FinishedUnit] = []
        self.halt = Halt()
        self.results = ResultSchema(n)
        self.journal = Journal(self.store, epoch, self.results, sync, self.deliver, self.halt)

    def deliver(self, finished: FinishedUnit) -> bool:
        self.delivered.append(finished)
        return True

    def expect(self, rows: int, unit: int = 0) -> list[int]:
        return list(
            self.journal.expect(Unit(unit, (Piece("in.parquet", 0, rows, (0, 0)),)), pa.table({"id": range(rows)}))
        )

    def logged_rows(self) -> list[int]:
        rows: list[int] = []
        for name in self.store.list("wal"):
            for batch in read_log(self.store.read(f"wal/{name}"), self.results.logged):
                rows += batch["row"].to_pylist()
        return sorted(rows)


@pytest.mark.parametrize("n", [1, 3])
def test_rows_are_delivered_in_their_order_whatever_order_they_finish_in(tmp_path, n):
    harness = Harness(tmp_path, n=n)
    with harness.journal as journal:
        assert harness.expect(20) == list(range(20))
        for row in reversed(range(20)):
            journal.add(answer(row, n=n))
    harness.halt.check()
    [finished] = harness.delivered
    for row, result in enumerate(finished.results.to_pylist()):
        told = answer(row, n=n)
        assert result["prompt_tokens"] == row and result["error"] == told.error
        if told.error:
            assert result["completion"] is None and result["completion_tokens"] is None
            assert result["finish_reason"] == ("error" if n == 1 else ["error"])
        elif n == 1:
            assert (result["completion"], result["finish_reason"], result["completion_tokens"]) == (
                told.outputs[0].text, "stop", row,
            )  # fmt: skip
        else:
            assert result["completion"] == [o.text for o in told.outputs]
            assert result["completion_tokens"] == [row, row + 1, row + 2]


def test_rows_of_a_run_that_was_cut_off_are_not_asked_for_again(tmp_path):
    first = Harness(tmp_path)
    with first.journal as journal:
        first.expect(10)
        for row in (3, 1, 9):
            journal.add(answer(row))
    assert first.delivered == [] and first.logged_rows() == [1, 3, 9]
    second = Harness(tmp_path, epoch=2)
    with second.journal as journal:
        assert second.expect(10) == [0, 2, 4, 5, 6, 7, 8]
        for row in (0, 2):
            journal.add(answer(row))
    third = Harness(tmp_path, epoch=3)
    with third.journal as journal:
        todo = third.expect(10)
        assert todo == [4, 5, 6, 7, 8]
        for row in todo:
            journal.add(answer(row))
    [finished] = third.delivered
    assert finished.results["prompt_tokens"].to_pylist() == list(range(10))
    assert sorted(finished.logs) == ["wal/000000.1.arrows", "wal/000000.2.arrows"]


def test_a_unit_wholly_in_the_log_is_delivered_at_once(tmp_path):
    first = Harness(tmp_path)
    first.deliver = None  # the run dies before it
    for group in ([0, 1, 2], [3, 4]):
        batch = first.results.batch([answer(row) for row in group])
        opened_log = first.store.path("wal/000000.1.arrows")
        frame = batch.serialize()
        from batchinfer.data import journal as module

        with opened_log.open("ab") as stream:
            stream.write((b"" if stream.tell() else first.results.preamble) + module._frame(frame))
    second = Harness(tmp_path, epoch=2)
    with second.journal:
        assert second.expect(5) == []
    assert second.delivered[0].results.num_rows == 5


def a_log(results: ResultSchema, groups: list[list[int]]) -> tuple[bytes, list[int]]:
    """A log's bytes, and where each of its frames ends."""
    from batchinfer.data.journal import _frame

    data, ends = results.preamble, [len(results.preamble)]
    for group in groups:
        data += _frame(results.batch([answer(row) for row in group]).serialize())
        ends.append(len(data))
    return data, ends


def test_a_log_torn_at_any_byte_gives_back_every_whole_batch_before(tmp_path):
    results = ResultSchema(1)
    groups = [[0, 1], [2], [3, 4, 5]]
    data, ends = a_log(results, groups)
    for cut in range(len(data) + 1):
        whole = sum(end <= cut for end in ends[1:]) if cut >= ends[0] else 0
        batches = list(read_log(data[:cut], results.logged))
        assert [b["row"].to_pylist() for b in batches] == groups[:whole], cut


def test_a_log_with_zeros_or_a_flipped_bit_gives_back_no_wrong_row(tmp_path):
    results = ResultSchema(1)
    groups = [[0, 1], [2], [3, 4, 5]]
    data, ends = a_log(results, groups)
    good = [batch.to_pylist() for batch in read_log(data, results.logged)]
    for at in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        zeroed = data[:at] + bytes(len(data) - at)
        for damaged in (bytes(flipped), zeroed):
            batches = [batch.to_pylist() for batch in read_log(damaged, results.logged)]
            assert batches == good[: sum(damaged[:end] == data[:end] for end in ends[1:])]


def test_a_row_that_comes_back_twice_is_an_engine_error_and_not_a_doubled_row(tmp_path):
    harness = Harness(tmp_path)
    with harness.journal as journal:
        harness.expect(3)
        for row in (0, 1, 1):
            journal.add(answer(row))
    with pytest.raises(EngineError, match="twice"):
        harness.halt.check()
    assert harness.delivered == []


def test_a_row_nobody_asked_for_is_an_engine_error(tmp_path):
    harness = Harness(tmp_path)
    with harness.journal as journal:
        journal.add(answer(0, unit=7))
    with pytest.raises(EngineError, match=r"\(7, 0\)"):
        harness.halt.check()


def test_a_finished_row_is_on_disk_within_the_sync_interval_and_groups_share_a_sync(tmp_path, monkeypatch):
    harness = Harness(tmp_path, sync=(0.05, 1000))
    writes: list[int] = []
    plain = harness.store.append
    monkeypatch.setattr(harness.store, "append", lambda name, data: (writes.append(1), plain(name, data)))
    with harness.journal as journal:
        harness.expect(1000)
        for row in range(300):
            journal.add(answer(row))
        time.sleep(0.5)
        assert harness.logged_rows() == list(range(300))
        assert len(writes) <= 3


def test_a_journal_closed_while_it_wakes_ends_at_once(tmp_path):
    harness = Harness(tmp_path, sync=(20.0, 1))
    journal, wake = harness.journal, harness.journal._wake
    plain = wake.clear

    def clear():  # the moment between waking and looking why
        journal._closing = True
        wake.set()
        plain()

    wake.clear = clear
    begun = time.monotonic()
    with journal:
        harness.expect(2)
        journal.add(answer(0))
        journal.join(5)
    assert time.monotonic() - begun < 5 and harness.logged_rows() == [0]


def test_text_that_utf8_cannot_hold_is_replaced_not_fatal(tmp_path):
    harness = Harness(tmp_path)
    with harness.journal as journal:
        harness.expect(1)
        journal.add(Completion((0, 0), (Output("bad \ud800 text", [1], "stop"),), 1))
    assert harness.delivered[0].results["completion"].to_pylist() == ["bad ? text"]


def test_tally_counts_rows_tokens_and_reasons():
    results = ResultSchema(1).batch([answer(row) for row in range(10)])
    tally = Tally().add(results)
    assert (tally.rows, tally.failed, tally.prompt_tokens) == (10, 2, 45)
    assert tally.finish_reasons == {"stop": 8, "error": 2} and tally.completion_tokens == 45 - 4 - 9
