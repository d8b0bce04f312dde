"""Rows: the table of sequences that run. What each has, and the step that takes so many tokens of some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from batchinfer.engine.kernels.sampling import SamplingBatch
from batchinfer.engine.kv_cache import PagePool
from batchinfer.engine.step import StepBatch
from batchinfer.request import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion in the making. ``owner`` is the caller's and means nothing here."""

    owner: object
    token_ids: np.ndarray  # int32: the prompt; after a preemption everything known so far
    prompt_len: int
    limit: int  # length, prompt included, at which it ends
    sampling: SamplingParams
    index: int = 0  # which of the n completions
    stops: Callable[[np.ndarray], bool] | None = None  # asked after each token, with all completion tokens
    hashes: list[bytes] = field(default_factory=list)  # of the prompt's full pages
    cached_tokens: int | None = None  # prompt tokens that found their pages computed, when first admitted
    finish_reason: str = ""
    turn: float = 0.0  # among those that wait, the lowest is next

    @property
    def completion_ids(self) -> np.ndarray:
        return self.token_ids[self.prompt_len :]


class Rows:
    """All state of a row is in arrays, so that a step costs the host a few array operations, however many rows decode.

    Columns of all rows are indexed by arrays of rows, int64. Who leaves a row gives up its pages.
    """

    def __init__(self, count: int, seq_len: int, pages: PagePool, page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self.sequences: list[Sequence | None] = [None] * count
        self.running = np.empty(0, np.int64)  # rows, oldest first
        self.tokens = np.zeros((count, seq_len), np.int32)
        self.page_table = np.zeros((count, -(-seq_len // page_size)), np.int32)
        self.held = np.zeros(count, np.int32)  # pages in the page table
        self.length = np.zeros(count, np.int32)  # tokens known
        self.computed = np.zeros(count, np.int32)  # tokens whose keys and values are in pages, or will be by then
        self.prompt_len = np.zeros(count, np.int32)
        self.limit = np.zeros(count, np.int32)
        self.awaited = np.zeros(count, np.int32)  # tokens beyond those known, of steps not yet complete
        self.latest = np.zeros(count, np.int64)  # the last step that the row is in
        self.prefilling = np.zeros(count, np.int32)  # steps of prompts alone that are under way and have the row
        self.ignore_eos = np.zeros(count, bool)
        self.asks_stop = np.zeros(count, bool)
        self._free = list(range(count - 1, -1, -1))
        self._published = np.zeros(count, np.int32)  # of the pages held, how many are findable by content
        self._tenancy = np.zeros(count, np.int64)  # sequences that have left the row
        self._index = np.zeros(count, np.int32)
        self._sampling = {
            "temperature": np.zeros(count, np.float32),
            "top_k": np.zeros(count, np.int32),
            "top_p": np.ones(count, np.float32),
            "min_p": np.zeros(count, np.float32),
            "repetition_penalty": np.ones(count, np.float32),
            "seed": np.zeros(count, np.int64),
        }

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def longest(self) -> int:
        """Tokens of the longest that runs, were all as long as they may become."""
        return int(self.limit[self.running].max(initial=0))

    def pages_for(self, tokens):
        return -(-tokens // self.page_size)

    def todo(self, rows: np.ndarray) -> np.ndarray:
        """Tokens to compute, those included that are not known yet."""
        return self.length[rows] + self.awaited[rows] - self.computed[rows]

    def need_history(self, rows: np.ndarray) -> np.ndarray:
        """Whether the next token depends on all that came before: then none of it may be awaited."""
        return self._sampling["repetition_penalty"][rows] != 1

    def still_there(self, step: StepBatch) -> np.ndarray:
        """Of a step's samples, bool: whether the row is still that sequence's."""
        return self._tenancy[step.sampled_rows] == step.tenancies

    # -- coming and leaving ---------------------------------------------------------------------------------------

    def enter(self, sequence: Sequence, shared: list[int]) -> int:
        """Give a sequence a row, of which there is one, with the pages of its prompt that are computed already."""
        row = self._free.pop()
        length = len(sequence.token_ids)
        self.sequences[row] = sequence
        self.tokens[row, :length] = sequence.token_ids
        self.length[row] = length
        self.prompt_len[row] = sequence.prompt_len
        self.limit[row] = sequence.limit
        self.awaited[row] = 0
        self.ignore_eos[row] = sequence.sampling.ignore_eos
        self.asks_stop[row] = sequence.stops is not None
        self._index[row] = sequence.index
        for name, values in self._sampling.items():
            values[row] = getattr(sequence.sampling, name)
        if shared:
            self.pages.share(shared)
        self.page_table[row, : len(shared)] = shared
        self.held[row] = self._published[row] = len(shared)
        self.computed[row] = len(shared) * self.page_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = len(shared) * self.page_size
        self.running = np.append(self.running, row)
        return row

    def leave(self, row: int, known: int) -> Sequence:
        """The sequence, with its first ``known`` tokens; ``without_those_that_left`` is to follow."""
        sequence = self.sequences[row]
        sequence.token_ids = self.tokens[row, :known].copy()
        self.pages.release(self.page_table[row, : self.held[row]])
        self.held[row] = 0
        self.sequences[row] = None
        self._tenancy[row] += 1
        self._free.append(row)
        return sequence

    def without_those_that_left(self) -> None:
        self.running = self.running[self.held[self.running] > 0]  # none is there without a page

    # -- going on -------------------------------------------------------------------------------------------------

    def take_pages(self, rows: np.ndarray, need: np.ndarray) -> None:
        """Append ``need[i]`` new pages to the page table of ``rows[i]``; they are available."""
        total = int(need.sum())
        if not total:
            return
        owners = np.repeat(rows, need)
        offsets = np.arange(total) - np.repeat(np.cumsum(need) - need, need)
        self.page_table[owners, self.held[owners] + offsets] = self.pages.allocate(total)
        self.held[rows] += need

    def advance(self, rows: np.ndarray, chunks: np.ndarray) -> None:
        """Count ``chunks`` as computed, and publish the prompt pages that they complete, where sequences have hashes.

        Pages are published before they are computed: whoever finds them runs in this step or a later one, and in each
        layer the keys and values of a whole step are written before any are read.
        """
        self.computed[rows] += chunks
        full = np.minimum(self.computed[rows], self.prompt_len[rows]) // self.page_size
        for i in np.flatnonzero(full > self._published[rows]):
            row = rows[i]
            for page, content in enumerate(self.sequences[row].hashes[self._published[row] : full[i]]):
                self.pages.publish(int(self.page_table[row, self._published[row] + page]), content)
            self._published[row] = full[i]

    def append(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """A token that was awaited has become known, for each of ``rows``."""
        self.awaited[rows] -= 1
        self.tokens[rows, self.length[rows]] = token_ids
        self.length[rows] += 1

    def step(self, rows: np.ndarray, chunks: np.ndarray, number: int, decode: bool) -> StepBatch:
        """The last ``chunks`` of the tokens computed of each row, as a step; what it samples is awaited from now on.

        Args:
            number: counts steps, so that it is known how long ago a row had its part in one.
            decode: it is computed where sequences decode.
        """
        ends = np.cumsum(chunks)
        context = self.computed[rows]
        owners = np.repeat(rows, chunks)
        positions = np.arange(ends[-1]) - np.repeat(ends - context, chunks)
        pages = self.page_table[owners, positions // self.page_size]
        samples = context == self.length[rows] + self.awaited[rows]
        sampled_rows = rows[samples]
        sampling = self._sampling_batch(sampled_rows)
        self.awaited[sampled_rows] += 1
        self.latest[rows] = number
        return StepBatch(
            token_ids=np.where(positions < self.length[owners], self.tokens[owners, positions], np.int32(-1)),
            positions=positions.astype(np.int32),
            slots=(pages * self.page_size + positions % self.page_size).astype(np.int32),
            rows=rows,
            query_starts=np.concatenate([[0], ends]).astype(np.int32),
            context_lens=context,
            page_table=self.page_table[rows, : self.held[rows].max()],
            extends=samples & (chunks == 1) & (context > self.prompt_len[rows]) & decode,
            sampled=ends[samples] - 1,
            sampled_rows=sampled_rows,
            tenancies=self._tenancy[sampled_rows],
            sampling=sampling,
        )

    def _sampling_batch(self, rows: np.ndarray) -> SamplingBatch:
        chosen = {name: values[rows] for name, values in self._sampling.items()}
        length = self.length[rows] + self.awaited[rows]
        return SamplingBatch(
            **chosen,
            index=self._index[rows],
            position=length.astype(np.int64),
            history=self.tokens,
            history_rows=rows.astype(np.int32),
            history_lens=length,
            all_greedy=bool((chosen["temperature"] == 0).all() and (chosen["repetition_penalty"] == 1).all()),
        )
