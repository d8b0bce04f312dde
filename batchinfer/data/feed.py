"""Feed: rows on their way to the engine. Read, rendered and tokenised ahead of it, a bounded distance."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import pyarrow as pa

from batchinfer.data.journal import FinishedUnit, Journal
from batchinfer.data.prompt import PromptRenderer, unit_seeds
from batchinfer.data.source import Source, Unit
from batchinfer.data.threads import Channel, Halt, Window, Worker
from batchinfer.request import Completion, Request

CHUNK_ROWS = 512  # rendered at a time
CHUNK_BYTES = 1 << 20  # of their columns: long documents go in smaller chunks, so that nobody waits for many of them
RENDERERS = 2  # threads: one chunk's templates are rendered while another's text is tokenised
AHEAD = (2048, 4_000_000)  # rows and prompt tokens that may wait for the engine
IN_FLIGHT = (32_768, 512 << 20)  # rows and bytes of units that may be begun and uncommitted
PATIENCE = 0.005  # seconds an engine with nothing to do waits for a prompt


class Feed(Worker):
    """A thread that turns units into requests, and the engine's end of the line, ``requests``.

    Rows that cannot become a request go straight to the journal, and so do not count on the engine. A failure here ends
    the line and is kept in ``error``: the rows that the engine has are worth finishing first.
    """

    def __init__(
        self,
        source: Source,
        chunks: Iterable[Sequence[Unit]],
        columns: Sequence[str],
        renderer: PromptRenderer,
        job_seed: int,
        journal: Journal,
        halt: Halt,
    ) -> None:
        super().__init__("feed", halt)
        self.error: BaseException | None = None
        self.outstanding = 0  # requests the engine has not answered; the caller counts answers down
        self.waited = 0.0  # seconds the engine had nothing to do for want of prompts
        self._source, self._chunks_of_units, self._columns = source, chunks, list(columns)
        self._renderer, self._job_seed, self._journal = renderer, job_seed, journal
        self._channel: Channel[list[Request]] = Channel(*AHEAD, halt)
        self._window = Window(*IN_FLIGHT, halt)

    def __enter__(self) -> Feed:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading. Prompts that the engine did not pull are forgotten."""
        self.halt.ended = True
        self.join()

    def requests(self) -> Iterator[Request | None]:
        """For ``Backend.generate``: the next request, None while none is ready; ends early when the run halts.

        An engine with work under way is never kept waiting; one without is for ``PATIENCE``.
        """
        halt, channel = self.halt, self._channel
        while not halt.now:
            try:
                chunk = channel.get(0.0)
                if chunk is None and not self.outstanding:
                    begun = time.perf_counter()
                    chunk = channel.get(PATIENCE)
                    self.waited += time.perf_counter() - begun
            except EOFError:
                return
            if chunk is None:
                yield None
                continue
            for request in chunk:
                if halt.now:
                    return
                self.outstanding += 1
                yield request

    def committed(self, finished: FinishedUnit) -> None:
        """A unit has left the run: make room for another."""
        self._window.leave(finished.unit.rows, finished.carried.nbytes)

    def work(self) -> None:
        try:
            with (
                closing(self._source.read_chunks(self._chunks_of_units, self._columns)) as units,
                ThreadPoolExecutor(RENDERERS, "batchinfer-render") as pool,
            ):
                rendering: deque[Future[list[Request | Completion]]] = deque()
                for chunk in self._chunks(units):
                    if chunk is not None:
                        rendering.append(pool.submit(self._render, *chunk))
                    while rendering and (chunk is None or len(rendering) == RENDERERS):
                        self._pass_on(rendering.popleft())
                for rendered in rendering:
                    self._pass_on(rendered)
        except BaseException as error:
            self.error = error
        finally:
            self._channel.close()

    def _chunks(
        self, units: Iterator[tuple[Unit, pa.Table] | tuple[None, None]]
    ) -> Iterator[tuple[Unit, pa.Table, Sequence[int]] | None]:
        """Open unit after unit; yield its prompts and which of its rows are still to be rendered, some at a time. None
        while there is no unit.
        """
        while not self.halt.now:
            with self.timed("feed.read"):
                item = next(units, None)
            if item is None:
                return
            unit, rows = item
            if unit is None:
                yield None
                continue
            with self.timed("feed.wait"):
                if not self._window.enter(unit.rows, rows.nbytes):
                    return
            todo = self._journal.expect(unit, rows)
            prompts = rows.select(list(self._renderer.columns))
            step = max(1, min(CHUNK_ROWS, CHUNK_BYTES * unit.rows // max(prompts.nbytes, 1)))
            for begin in range(0, len(todo), step):
                if self.halt.now:
                    return
                yield unit, prompts, todo[begin : begin + step]

    def _render(self, unit: Unit, prompts: pa.Table, rows: Sequence[int]) -> list[Request | Completion]:
        keys = [(unit.index, row) for row in rows]
        seeds = unit_seeds(self._job_seed, unit, rows)
        return self._renderer.render(_rows(prompts, rows), keys, seeds)

    def _pass_on(self, rendering: Future[list[Request | Completion]]) -> None:
        with self.timed("feed.render"):
            rendered = rendering.result()
        requests, tokens = [], 0
        for item in rendered:
            if isinstance(item, Request):
                requests.append(item)
                tokens += len(item.prompt_token_ids)
            else:
                self._journal.add(item)
        if requests:
            with self.timed("feed.wait"):
                self._channel.put(requests, tokens)


def _rows(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Some rows of a table, ascending. Cut and joined, as ``take`` does not know every type (string_view)."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return table.slice(rows[0], len(rows))
    return pa.concat_tables([table.slice(row, 1) for row in rows])
