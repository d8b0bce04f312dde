"""Trace: what each rank did and when, as a file that chrome://tracing and ui.perfetto.dev show."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

MOST_SPANS = 1_000_000  # the newest are kept


class Span(NamedTuple):
    rank: int  # ENGINE for what the engine itself does
    name: str
    begun: float  # seconds of time.perf_counter, which processes of one machine share
    ended: float
    about: dict[str, Any]


ENGINE = -1


class Trace:
    def __init__(self) -> None:
        self.spans: deque[Span] = deque(maxlen=MOST_SPANS)

    def add(self, rank: int, name: str, begun: float, ended: float, **about: Any) -> None:
        self.spans.append(Span(rank, name, begun, ended, about))

    def write(self, path: str | Path, names: dict[int, str]) -> None:
        """As JSON in the Trace Event Format, times from the first span on.

        Args:
            names: of the ranks, as they are to be shown.
        """
        first = min((span.begun for span in self.spans), default=0.0)
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank + 1, "args": {"name": name}}
            for rank, name in sorted(names.items())
        ]
        for rank, name, begun, ended, about in self.spans:
            at, took = round((begun - first) * 1e6, 1), round((ended - begun) * 1e6, 1)
            events.append({"ph": "X", "name": name, "pid": 0, "tid": rank + 1, "ts": at, "dur": took, "args": about})
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), "utf-8")
