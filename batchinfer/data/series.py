"""Series: how a run went, a JSON line every few seconds in OUT.batchinfer/runs/<run>.jsonl.

    {"kind": "begin", "time": …, "run": "000001", "job": …, "model": …, "fingerprint": …, "rows": …, "settings": {…}}
    {"kind": "point", "time": …, "seconds": …, "rows": …, "computed": …, "kv_used": …, …}
    {"kind": "end", "time": …, "summary": {…}}          or "error": why the run died; a killed run has no such line

Numbers and settings that hold on any host, never a prompt. Lines are appended whole, so a kill tears the last one at
most, and readers pass over what is not a whole line.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from batchinfer.data.journal import Tally
from batchinfer.data.ledger import Ledger
from batchinfer.data.store import Store
from batchinfer.errors import BatchInferError
from batchinfer.job import Job
from batchinfer.request import Load

FOLDER = "runs"
GAP = (0.5, 5.0)  # seconds between two points: short at first, so that a short run is more than two points
POINT = ("time", "seconds", "rows", "computed", "failed", "prompt_tokens", "completion_tokens")
LOAD = ("running", "waiting", "kv_used", "preemptions")


class Series:
    """Writes the series of one run, on a thread of its own from ``begin`` on. Leaving it writes the last line.

    A disk that takes no more lines ends the series and leaves the run alone.

    Args:
        listeners: are told each line too, as it is written.
    """

    def __init__(self, ledger: Ledger, listeners: Sequence[Callable[[dict[str, Any]], None]] = ()) -> None:
        self._ledger, self._listeners = ledger, listeners
        self._summary: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batchinfer-series", daemon=True)

    def begin(self, job: Job, done: Callable[[], int], tally: Tally, load: Callable[[], Load]) -> None:
        """Write the first line and go on.

        Args:
            done: rows that need no more work, whichever run did it.
            tally: what this run has finished; read from another thread, so it may be a moment old.
        """
        self._done, self._tally, self._load, self._begun = done, tally, load, time.monotonic()
        with contextlib.suppress(BatchInferError):
            self._ledger.store.make_folder(FOLDER)
        run = f"{self._ledger.epoch:06d}"
        self._name, self._lines, self._noted = f"{FOLDER}/{run}.jsonl", b"", 0.0
        self._write(
            "begin",
            run=run,
            job=job.job.name,
            model=PurePath(job.model.path).name,
            fingerprint=self._ledger.fingerprint,
            shard=str(self._ledger.shard or ""),
            rows=sum(unit.rows for unit in self._ledger.share),
            done=done(),
            settings={
                "engine": job.engine.model_dump(mode="json", exclude={"plan"}),
                "sampling": job.sampling.model_dump(mode="json"),
                "checkpoint": job.checkpoint.model_dump(mode="json"),
            },
        )
        self._thread.start()

    def end(self, summary: dict[str, Any]) -> None:
        """What the last line will say."""
        self._summary = {key: value for key, value in summary.items() if key != "output"}

    def __enter__(self) -> Series:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._thread.ident is None:  # no work was begun
            return
        self._ended.set()
        self._thread.join()
        self._write_point()
        if error is None:
            self._write("end", summary=self._summary)
        else:
            told = str(error) if isinstance(error, BatchInferError) else ""  # another's may quote a row
            self._write("end", error=f"{type(error).__name__}{': ' * bool(told)}{told}")

    def _work(self) -> None:
        gap = GAP[0]
        while not self._ended.wait(gap):
            self._write_point()
            gap = min(max((time.monotonic() - self._begun) / 60, GAP[0]), GAP[1])

    def _write_point(self) -> None:
        tally, load = self._tally, self._load()
        self._write(
            "point",
            seconds=round(time.monotonic() - self._begun, 2),
            rows=self._done(),
            computed=tally.rows,
            failed=tally.failed,
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            finish_reasons=dict(tally.finish_reasons),
            failures=dict(tally.failures),
            **{name: round(getattr(load, name), 4) for name in LOAD},
        )

    def _write(self, kind: str, **values: Any) -> None:
        told = {"kind": kind, "time": round(time.time(), 2), **values}
        for listener in self._listeners:
            listener(told)
        line = json.dumps(told, separators=(",", ":"))
        self._lines += line.encode() + b"\n"
        if kind != "point" or time.monotonic() - self._noted >= self._ledger.store.note_gap:
            self._ledger.store.note(self._name, self._lines)
            self._lines, self._noted = b"", time.monotonic()


@dataclass
class RunSeries:
    """What one run told."""

    begin: dict[str, Any]
    points: dict[str, np.ndarray]  # name → float64 [points]
    summary: dict[str, Any] | None = None  # None: the run goes on, was killed or died
    error: str | None = None  # why it died
    last_time: float = 0.0

    @property
    def seconds(self) -> float:
        return float(self.points["seconds"][-1]) if len(self.points["seconds"]) else 0.0


@dataclass
class _Reading:
    begin: dict[str, Any] | None = None
    end: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in (*POINT, *LOAD)})


def read_runs(store: Store) -> list[RunSeries]:
    """All runs on an output, the first one first. What is not a whole line is passed over."""
    runs = []
    for name in store.list(FOLDER, ".jsonl"):
        reading = _Reading()
        for line in store.read(f"{FOLDER}/{name}").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                _read_line(json.loads(line), reading)
        if reading.begin is not None:
            points = {name: np.array(column) for name, column in reading.columns.items()}
            times = [reading.begin["time"], *points["time"][-1:].tolist(), *filter(None, [reading.end.get("time")])]
            runs.append(
                RunSeries(reading.begin, points, reading.end.get("summary"), reading.end.get("error"), max(times))
            )
    return runs


def _read_line(line: dict[str, Any], reading: _Reading) -> None:
    if line["kind"] == "point":
        for name, value in {name: float(line[name]) for name in reading.columns}.items():  # all of them or none
            reading.columns[name].append(value)
    elif line["kind"] == "begin":
        reading.begin = line
    elif line["kind"] == "end":
        reading.end = line


def average_rate(runs: list[RunSeries]) -> float | None:
    """Tokens a second, in and out, over the runs that finished rows; None if there are none."""
    tokens = sum(run.points[name][-1] for run in runs if run.seconds for name in POINT[-2:])
    seconds = sum(run.seconds for run in runs)
    return float(tokens / seconds) if tokens and seconds else None
