"""ProcessBackend: an engine in a process of its own, so that nothing it does can end the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchinfer.backends.base import Isolation
from batchinfer.backends.child import Child, Died
from batchinfer.backends.suspects import Suspects
from batchinfer.backends.wire import pack_requests, unpack_completions
from batchinfer.errors import EngineError
from batchinfer.job import Job
from batchinfer.log import say
from batchinfer.request import Completion, Load, Request

IN_ALL = 20  # times limits.restarts that an engine may be restarted in a run, however well it goes in between
_COUNTERS = ("prompt_tokens", "cached_tokens", "completion_tokens", "preemptions", "steps")
_END = object()


class ProcessBackend:
    """The engine that ``opener`` opens, behind the same door.

    An engine that dies or hangs is killed and restarted, and the rows it held are asked again, in groups that get
    smaller until the row is found that kills it; that one comes back with an error, all others as if nothing had
    happened. Rows that the engine never held wait meanwhile.

    Args:
        opener: ``module:function`` that opens the engine there, called with the job and ``progress``.

    Raises:
        EngineError: the engine died while it was opened. Other errors of its opening as they were raised.
    """

    def __init__(
        self,
        job: Job,
        progress: bool = True,
        opener: str = "batchinfer.backends:open_engine",
        isolation: Isolation | None = None,
    ) -> None:
        self._job, self._progress, self._opener = job, progress, opener
        self._isolation = isolation or Isolation()
        self._suspects = Suspects()
        self._under_way: dict[int, Request] = {}  # sent and not answered, by number
        self._numbers = 0  # given out
        self._given = self._served = 0  # rows that the process at hand was given, and has answered
        self._last = False  # whether the line has come to its end
        self._vain = 0  # deaths since a row was answered
        self._trust = False  # whether a row was answered since somebody was suspected
        self._load, self._before = Load(), Load()  # of the process at hand, and of all before it
        self._told = {"restarts": 0, "quarantined": 0, "recycled": 0}
        self._child: Child | None = None
        try:
            opened = self._open()
        except Died as died:
            raise EngineError(f"the engine died while it was opened: {died}") from None
        self.tokenizer_dir = Path(opened["tokenizer_dir"])
        self.max_seq_len: int = opened["max_seq_len"]
        self.fingerprint: dict[str, Any] = opened["fingerprint"]

    def _open(self) -> dict[str, Any]:
        """A fresh process. Raises: Died, and what the opener raised."""
        self._given = self._served = 0
        self._child = Child(self._job, self._progress, self._opener, self._isolation)
        try:
            return self._child.opened()
        except BaseException:
            self._kill()
            raise

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        self._last = False
        self._under_way.clear()  # what an earlier caller did not wait for
        self._suspects = Suspects()
        try:
            while not self._last or self._suspects:
                try:
                    if self._child is None:
                        self._reopen()
                    yield from self._converse(self._child, requests)  # type: ignore[arg-type]
                    if self._worn and not self._last:
                        self._told["recycled"] += 1
                        self.close()
                except Died as died:
                    yield from self._bury(died)
        except BaseException:  # the caller stops listening, too: what the engine is at is of no more use
            self._kill()
            raise

    def load(self) -> Load:
        now, before = self._load, self._before
        total = {name: getattr(now, name) + getattr(before, name) for name in _COUNTERS}
        peak = max(now.peak_rss, before.peak_rss)
        return replace(now, **total, peak_rss=peak, details={**now.details, **self._told})

    def close(self) -> None:
        self._leave(Child.close)

    # ---- one process

    def _converse(self, child: Child, requests: Iterator[Request | None]) -> Iterator[Completion]:
        """Give the engine rows as it pulls them, until it has answered all there are or is worn. Raises: Died."""
        child.say({"begin": True})
        end = False
        while True:
            message, ids = child.hear()
            if "done" in message:
                self._load = Load(**message["load"])
                if done := message["done"]:
                    self._vain, self._trust = 0, True
                    self._served += len(done)
                    yield from unpack_completions(done, ids, self._answered)
            elif "wants" in message:
                rows, end = self._rows(message["wants"], requests)
                numbered = {self._numbers + i: row for i, row in enumerate(rows)}
                self._numbers += len(rows)
                self._given += len(rows)
                self._under_way.update(numbered)
                packed, ids = pack_requests(numbered)
                child.say({"rows": packed, "end": end}, ids)
            elif "error" in message:
                raise Died(message["told"])
            elif "ended" in message:
                if self._under_way or not end:
                    left = f"{len(self._under_way):,} requests unanswered"
                    raise EngineError(f"the engine ended by itself, with {left}; run again to go on")
                return

    def _answered(self, number: int) -> Any:
        request = self._under_way.pop(number, None)
        if request is None:
            raise EngineError("the engine answered a row that it was not asked for, or one twice; run again to go on")
        return request.key

    def _rows(self, most: int, requests: Iterator[Request | None]) -> tuple[list[Request], bool]:
        """Rows for the engine, and whether no more will follow."""
        suspected = self._suspects.take(most, idle=not self._under_way)
        if suspected is not None:
            return suspected, False
        if self._worn:
            return [], True
        if self._isolation.recycle_rows:
            most = min(most, self._isolation.recycle_rows - self._given)
        rows: list[Request] = []
        while len(rows) < most:
            request = next(requests, _END)
            if request is _END:
                self._last = True
                return rows, True
            if request is None:
                break
            rows.append(request)  # type: ignore[arg-type]
        return rows, False

    @property
    def _worn(self) -> bool:
        """Whether a fresh process is to take over once this one has answered what it holds."""
        return 0 < self._isolation.recycle_rows <= self._given

    # ---- its death

    def _bury(self, died: Died) -> Iterator[Completion]:
        """Draw the lesson from a death. Raises: EngineError if there were too many."""
        held = list(self._under_way.values())
        self._under_way.clear()
        if not self._suspects:
            self._trust = False
        self._kill()
        guilty = self._suspects.died(held, self._served == 0, died.hung)
        self._vain = 0 if guilty and self._trust else self._vain + 1
        if guilty is not None:
            self._told["quarantined"] += 1
            self._say(f"the engine died again with one row alone, which is set aside: {died}")
            why = f"the engine died with this row alone: {died}"
            yield Completion(guilty.key, prompt_tokens=len(guilty.prompt_token_ids), error=why)
        else:
            self._say(f"the engine died with {len(held):,} rows under way, it is restarted: {died}")
        self._count_restart(died)

    def _count_restart(self, died: Died) -> None:
        most, made = self._job.limits.restarts, self._told["restarts"]
        if self._vain > most:
            often = f" {self._vain} times in a row, with no row answered in between" if most else ""
            raise EngineError(f"the engine died{often}: {died}; limits.restarts is {most}, run again to go on")
        if made >= most * IN_ALL:
            raise EngineError(
                f"the engine died {made + 1} times in this run, the last time: {died}; limits.restarts is {most} and "
                f"{IN_ALL} times as many are the most in all, run again to go on"
            )
        self._told["restarts"] += 1

    def _reopen(self) -> None:
        """Raises: Died, EngineError if another engine was opened than before, and what the opener raised."""
        try:
            fingerprint = self._open()["fingerprint"]
        except EngineError as error:  # it lives, but a process that it needs does not
            raise Died(str(error)) from None
        if fingerprint != self.fingerprint:
            raise EngineError("the engine came back as another one: its model or plan was changed meanwhile")

    def _kill(self) -> None:
        self._leave(Child.kill)

    def _leave(self, how: Callable[[Child], None]) -> None:
        child, self._child = self._child, None
        if child is not None:
            how(child)
            self._before, self._load = self.load(), Load()

    def _say(self, what: str) -> None:
        if self._progress:
            say(what, "warning")
