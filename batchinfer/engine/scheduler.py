"""Scheduler: which tokens run next. In-flight batching with chunked prefill over a paged KV cache."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from batchinfer.engine.kernels.sampling import SamplingBatch
from batchinfer.engine.kv_cache import PagePool, page_hashes
from batchinfer.engine.profile import Profile, in_order, limits
from batchinfer.request import SamplingParams

AHEAD = 1  # steps composed before the last one's tokens are known: one hides the host, more only waste more
_PREFILL_STEPS = 48  # in which what waits for prefill is worked off, where it is throttled
_LEAST_PREFILL = 32  # tokens a step, lest a small job creep
_OVERTAKEN = 4  # sequences that came before, for each token that this one may say more than they


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


@dataclass(slots=True)
class StepBatch:
    """The tokens of one step, on the host. ``rows`` below are rows of the scheduler's table."""

    token_ids: np.ndarray  # int32 [tokens]; -1 stands for the row's token sampled last, which is not known here yet
    positions: np.ndarray  # int32 [tokens]
    slots: np.ndarray  # int32 [tokens] KV slot of each token: page * page_size + offset
    rows: np.ndarray  # int64 [sequences]
    query_starts: np.ndarray  # int32 [sequences + 1]
    context_lens: np.ndarray  # int32 [sequences]
    page_table: np.ndarray  # int32 [sequences, pages]
    extends: np.ndarray  # bool [sequences] it goes on from a token of its own, where it decodes
    sampled: np.ndarray  # int64 [samples] the tokens, by place in this step, whose logits are wanted
    sampled_rows: np.ndarray  # int64 [samples]
    tenancies: np.ndarray  # int64 [samples] which of the sequences that had the row after each other
    sampling: SamplingBatch

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def unknown(self) -> np.ndarray:
        """Places of the tokens that are not known here, which are those of the sequences in the same places."""
        return np.flatnonzero(self.token_ids[: self.singles] < 0)

    @property
    def singles(self) -> int:
        """So many sequences, at the front, have one token in this step."""
        more = np.diff(self.query_starts) != 1
        return int(more.argmax()) if more.any() else len(more)


class Scheduler:
    """Keeps the table of running sequences and composes each step from it.

    A step takes every decoding sequence's next token first, then prefill chunks in order of arrival, up to the
    ``step_tokens`` of the profile in force: the narrowest that holds all sequences that run, were they as long as they
    may become. A waiting sequence is admitted when a profile holds it beside them, and when pages are available for
    what the running ones and it are expected to need. The first that was added comes first, but one with more to say
    overtakes some, since few long ones that are left at the end would leave the machine nearly idle. When too little
    was expected, the newest sequence is preempted: its pages are given up, and it is computed again later, with the
    same tokens. All state of a row is in arrays, so that a step costs the host a few array operations, however many
    rows decode.

    ``schedule`` may be called again before ``complete``: rows whose token is awaited are left out. With several
    ``micro_batches`` under way in a pipeline, a step takes its share of the decoding rows, whichever are ready, and of
    the prefill that is to be done: so that every stage sees even steps, however unevenly rows end.

    Where other ranks compute prompts than those that decode, a step is either's: up to ``prefill_steps`` of prompts are
    under way beside the others, and each kind is completed in its own order. A row decodes once the steps of its prompt
    are complete, since its pages have to be where it decodes.

    A row may also go on while up to ``ahead`` of its tokens are awaited, where the device knows them. If such a token
    turns out to have ended its sequence, what was composed since is computed for nothing. It does no harm, because
    steps run in order: whoever gets the sequence's pages writes to them later. Rows with a repetition penalty never go
    ahead, since their whole history decides.
    """

    def __init__(
        self,
        profiles: Iterable[Profile],
        pages: PagePool,
        page_size: int,
        eos_token_ids: tuple[int, ...],
        share_prefixes: bool,
        micro_batches: int = 1,
        ahead: int = 0,
        prefill_steps: int = 0,
    ) -> None:
        self.profiles = in_order(profiles)
        most = limits(self.profiles)
        rows = most.batch_size
        self.pages = pages
        self.page_size = page_size
        self.share_prefixes = share_prefixes
        self.micro_batches = micro_batches
        self.ahead = ahead
        self.prefill_steps = prefill_steps
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._added = 0
        self._eos = np.array(eos_token_ids, np.int32)
        self._sequences: list[Sequence | None] = [None] * rows
        self._free_rows = list(range(rows - 1, -1, -1))
        self._running = np.empty(0, np.int64)  # rows, oldest first
        self._tokens = np.zeros((rows, most.seq_len), np.int32)
        self._page_table = np.zeros((rows, -(-most.seq_len // page_size)), np.int32)
        self._held = np.zeros(rows, np.int32)  # pages in the page table
        self._published = np.zeros(rows, np.int32)  # of those, how many are findable by content
        self._length = np.zeros(rows, np.int32)  # tokens known
        self._computed = np.zeros(rows, np.int32)  # tokens whose keys and values are in pages, or will be by then
        self._prompt_len = np.zeros(rows, np.int32)
        self._limit = np.zeros(rows, np.int32)
        self._awaited = np.zeros(rows, np.int32)  # tokens beyond those known, of steps not yet complete
        self._tenancy = np.zeros(rows, np.int64)  # sequences that have left the row
        self._latest = np.zeros(rows, np.int64)  # the last step that the row is in
        self._steps = 0  # composed, those of prompts alone not counted
        self._prefilling = np.zeros(rows, np.int32)  # steps of prompts alone that are under way and have the row
        self._kinds_under_way = [0, 0]  # steps that decode, steps of prompts alone
        self._ignore_eos = np.zeros(rows, bool)
        self._asks_stop = np.zeros(rows, bool)
        self._sampling = {
            "temperature": np.zeros(rows, np.float32),
            "top_k": np.zeros(rows, np.int32),
            "top_p": np.ones(rows, np.float32),
            "min_p": np.zeros(rows, np.float32),
            "repetition_penalty": np.ones(rows, np.float32),
            "seed": np.zeros(rows, np.int64),
        }
        self._index = np.zeros(rows, np.int32)
        self._used_share = 1.0  # running mean of how much of its token limit a completion uses

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def profile(self) -> Profile:
        """The one in force."""
        return self._profile_for(len(self._running), int(self._limit[self._running].max(initial=0)))

    def _profile_for(self, sequences: int, longest: int) -> Profile | None:
        """The narrowest that holds so many sequences of up to so many tokens, if there is one."""
        held = (p for p in self.profiles if p.batch_size >= sequences and p.seq_len >= longest)
        return next(held, None)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits the profile and the page pool."""
        if self.share_prefixes and not sequence.hashes:
            sequence.hashes = page_hashes(sequence.token_ids, self.page_size)
        self._added += 1
        sequence.turn = self._added - _OVERTAKEN * (sequence.limit - sequence.prompt_len)
        insort(self.waiting, sequence, key=lambda waiting: waiting.turn)

    def schedule(self) -> StepBatch | None:
        """Compose the next step and reserve its pages; None when nothing can run before ``complete``."""
        if not self.prefill_steps:
            return self._compose(decode=True, prefill=True)
        step = None
        if self._kinds_under_way[0] < self.micro_batches + self.ahead:
            step = self._compose(decode=True, prefill=False)
        if step is None and self._kinds_under_way[1] < self.prefill_steps:
            step = self._compose(decode=False, prefill=True)
            if step is not None:
                self._prefilling[step.rows] += 1
        if step is not None:
            self._kinds_under_way[self._of_prompts(step)] += 1
        return step

    def _compose(self, decode: bool, prefill: bool) -> StepBatch | None:
        preemptions = self.preemptions
        most_decoding, most_tokens = self._fair_share()
        going_on = self._continue_running(most_decoding if decode else 0, most_tokens, prefill)
        if going_on is None:
            return None
        rows, chunks = going_on
        planned = int(chunks.sum())
        # Whoever had to leave must not come back at once, only to be in the way again.
        admits = prefill and self.preemptions == preemptions
        admitted, their_chunks = self._admit(planned, most_tokens if admits else 0)
        if admitted:
            rows = np.concatenate([rows, np.array(admitted, np.int64)])
            chunks = np.concatenate([chunks, np.array(their_chunks, np.int32)])
        return self._batch(rows, chunks, decode) if len(rows) else None

    def _of_prompts(self, step: StepBatch) -> bool:
        """Whether it is one of prompts alone, where those are computed apart."""
        return bool(self.prefill_steps) and not step.extends.all()

    def complete(self, batch: StepBatch, token_ids: np.ndarray) -> list[Sequence]:
        """Take in the tokens ``int32 [samples]`` sampled for a step; return the sequences that ended with it.

        A negative token id means that the row's logits were not finite; such a sequence ends with reason ``error``.
        """
        if self.prefill_steps:
            of_prompts = self._of_prompts(batch)
            self._kinds_under_way[of_prompts] -= 1
            self._prefilling[batch.rows] -= of_prompts
        still_there = self._tenancy[batch.sampled_rows] == batch.tenancies
        rows, token_ids = batch.sampled_rows[still_there], token_ids[still_there]
        self._awaited[rows] -= 1
        self._tokens[rows, self._length[rows]] = token_ids
        self._length[rows] += 1
        failed = token_ids < 0
        stopped = np.isin(token_ids, self._eos) & ~self._ignore_eos[rows]
        for i in np.flatnonzero(self._asks_stop[rows] & ~failed):
            row = rows[i]
            stopped[i] |= self._sequences[row].stops(self._tokens[row, self._prompt_len[row] : self._length[row]])
        ended = failed | stopped | (self._length[rows] >= self._limit[rows])
        finished = []
        for i in np.flatnonzero(ended):
            reason = "error" if failed[i] else "stop" if stopped[i] else "length"
            finished.append(self._finish(int(rows[i]), reason))
        if finished:
            self._running = self._running[self._held[self._running] > 0]  # none is there without a page
        return finished

    def drop_all(self) -> None:
        """Forget every sequence, waiting or running, and give up their pages."""
        self.waiting.clear()
        for row in self._running.tolist():
            self._vacate(row)
        self._running = self._running[:0]
        self._prefilling[:] = 0
        self._kinds_under_way = [0, 0]

    # -- running rows ---------------------------------------------------------------------------------------------

    def _fair_share(self) -> tuple[int, int]:
        """The rows that decode and the tokens in all that a step may have, so that those under way are alike.

        Prefill is throttled as in gLLM (arXiv:2504.14775): its share of all that waits, not all that fits; where that
        is less than what decodes, it may be as much, since such a step is not much longer than its neighbours.
        """
        step_tokens = self.profile.step_tokens
        if self.micro_batches == 1 and not self.prefill_steps:
            return len(self._running), step_tokens
        todo = self._length[self._running] - self._computed[self._running]
        decoding = -(-np.count_nonzero(todo <= 1) // self.micro_batches)
        prefill = int(todo[todo > 1].sum()) + self._admissible()
        least = step_tokens // 16 if self.prefill_steps else max(decoding, _LEAST_PREFILL)
        prefill = max(-(-prefill // _PREFILL_STEPS), least)
        return max(1, decoding), min(decoding + prefill, step_tokens)

    def _admissible(self) -> int:
        """Tokens of those that wait and that rows and pages could hold now, counted as far as it matters to a step."""
        waiting = list(islice(self.waiting, len(self._free_rows)))
        lengths = np.fromiter((len(sequence.token_ids) for sequence in waiting), np.int32)
        prompts = np.fromiter((sequence.prompt_len for sequence in waiting), np.int32)
        limits = np.fromiter((sequence.limit for sequence in waiting), np.int32)
        pages = np.cumsum(self._pages_for(self._expected_length(prompts, lengths, limits)))
        room = self.pages.available - self._promised_pages()
        return min(int(lengths[pages <= room].sum()), _PREFILL_STEPS * self.profile.step_tokens)

    def _continue_running(
        self, most_decoding: int, most_tokens: int, prefill: bool
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows that go on and the tokens each gets; their pages are taken, by preemption if it must be.

        None when pages are short and all who could give up theirs await a token.
        """
        while True:
            rows = self._running[self._may_go_on(self._running)]
            todo = self._length[rows] + self._awaited[rows] - self._computed[rows]
            decodes = todo <= 1
            if self.prefill_steps:
                decodes &= self._computed[rows] >= self._prompt_len[rows]
            decode_first = np.argsort(~decodes, kind="stable")
            rows, todo, decodes = rows[decode_first], todo[decode_first], decodes[decode_first]
            taken = ~decodes & prefill
            longest_out = np.argsort(self._latest[rows[decodes]], kind="stable")
            taken[longest_out[:most_decoding]] = True  # those that decode are in front
            rows, todo = rows[taken], todo[taken]
            before = np.cumsum(todo) - todo
            chunks = np.clip(most_tokens - before, 0, todo)
            rows, chunks = rows[chunks > 0], chunks[chunks > 0]
            need = self._pages_for(self._computed[rows] + chunks) - self._held[rows]
            if need.sum() <= self.pages.available:
                break
            ready = self._running[(self._awaited[self._running] == 0) & (self._prefilling[self._running] == 0)]
            if not len(ready):
                return None
            self._preempt(int(ready[-1]))
        self._take_pages(rows, need)
        self._advance(rows, chunks)
        return rows, chunks

    def _may_go_on(self, rows: np.ndarray) -> np.ndarray:
        awaited = self._awaited[rows]
        goes_ahead = (awaited <= self.ahead) & (self._sampling["repetition_penalty"][rows] == 1)
        # Not with a token that is so far away that the first stage would wait for it.
        goes_ahead &= self._steps - self._latest[rows] >= self.micro_batches
        may = (awaited == 0) | (goes_ahead & (self._length[rows] + awaited < self._limit[rows]))
        return may & self._is_at_home(rows)

    def _is_at_home(self, rows: np.ndarray) -> np.ndarray:
        """Whether rows can go on where they are: when the steps of a prompt are complete, it moves."""
        return (self._prefilling[rows] == 0) | (self._computed[rows] < self._length[rows] - 1)

    def _preempt(self, row: int) -> None:
        sequence = self._sequences[row]
        sequence.token_ids = self._tokens[row, : self._length[row]].copy()
        self._vacate(row)
        self._running = self._running[self._running != row]
        sequence.turn = float("-inf")
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _take_pages(self, rows: np.ndarray, need: np.ndarray) -> None:
        """Append ``need[i]`` new pages to the page table of ``rows[i]``."""
        total = int(need.sum())
        if not total:
            return
        owners = np.repeat(rows, need)
        offsets = np.arange(total) - np.repeat(np.cumsum(need) - need, need)
        self._page_table[owners, self._held[owners] + offsets] = self.pages.allocate(total)
        self._held[rows] += need

    def _advance(self, rows: np.ndarray, chunks: np.ndarray) -> None:
        """Count ``chunks`` as computed, and publish the prompt pages that they complete.

        Pages are published before they are computed: whoever finds them runs in this step or a later one, and in each
        layer the keys and values of a whole step are written before any are read.
        """
        self._computed[rows] += chunks
        if not self.share_prefixes:
            return
        full = np.minimum(self._computed[rows], self._prompt_len[rows]) // self.page_size
        for i in np.flatnonzero(full > self._published[rows]):
            row = rows[i]
            for page in range(self._published[row], full[i]):
                self.pages.publish(int(self._page_table[row, page]), self._sequences[row].hashes[page])
            self._published[row] = full[i]

    # -- admission and leaving ------------------------------------------------------------------------------------

    def _admit(self, planned: int, most_tokens: int) -> tuple[list[int], list[int]]:
        """Rows that begin in a step of ``planned`` tokens, which may have up to ``most_tokens``, and what each gets."""
        rows: list[int] = []
        chunks: list[int] = []
        if not (self.waiting and planned < most_tokens and self._free_rows):
            return rows, chunks
        promised = self._promised_pages()
        longest = int(self._limit[self._running].max(initial=0))
        while self.waiting and planned < most_tokens and self._free_rows:
            sequence = self.waiting[0]
            length = len(sequence.token_ids)
            longest = max(longest, sequence.limit)
            profile = self._profile_for(self.num_running + 1, longest)
            if profile is None or planned >= profile.step_tokens:
                break
            # At least one token must be computed: its logits are wanted.
            shared = self.pages.find(sequence.hashes[: (length - 1) // self.page_size])
            row = self._free_rows[-1]
            self._place(row, sequence)
            expected = int(self._expected_pages(np.array([row]))[0]) - len(shared)
            if promised + expected + self.pages.idle_among(shared) > self.pages.available and self.num_running:
                self._sequences[row] = None
                break
            self.waiting.popleft()
            self._free_rows.pop()
            self._running = np.append(self._running, row)
            self._share(row, sequence, shared)
            chunk = min(min(most_tokens, profile.step_tokens) - planned, length - len(shared) * self.page_size)
            taken = int(self._pages_for(self._computed[row] + chunk)) - len(shared)
            only = np.array([row])
            self._take_pages(only, np.array([taken]))
            self._advance(only, np.array([chunk], np.int32))
            promised += max(0, expected - taken)
            planned += chunk
            rows.append(row)
            chunks.append(chunk)
        return rows, chunks

    def _place(self, row: int, sequence: Sequence) -> None:
        length = len(sequence.token_ids)
        self._sequences[row] = sequence
        self._tokens[row, :length] = sequence.token_ids
        self._length[row] = length
        self._prompt_len[row] = sequence.prompt_len
        self._limit[row] = sequence.limit
        self._computed[row] = self._held[row] = self._published[row] = self._awaited[row] = 0
        self._ignore_eos[row] = sequence.sampling.ignore_eos
        self._asks_stop[row] = sequence.stops is not None
        self._index[row] = sequence.index
        for name, values in self._sampling.items():
            values[row] = getattr(sequence.sampling, name)

    def _share(self, row: int, sequence: Sequence, pages: list[int]) -> None:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = len(pages) * self.page_size
        if not pages:
            return
        self.pages.share(pages)
        self._page_table[row, : len(pages)] = pages
        self._held[row] = self._published[row] = len(pages)
        self._computed[row] = len(pages) * self.page_size

    def _promised_pages(self) -> int:
        """Beyond what they hold, what those that run are expected to need."""
        return int((self._expected_pages(self._running) - self._held[self._running]).clip(0).sum())

    def _expected_pages(self, rows: np.ndarray) -> np.ndarray:
        """Pages that rows will hold when they end."""
        return self._pages_for(self._expected_length(self._prompt_len[rows], self._length[rows], self._limit[rows]))

    def _expected_length(self, prompt, length, limit):
        """Tokens of sequences when they end, by how much of their limit completions have used so far."""
        expected = prompt + np.ceil((limit - prompt) * min(1.0, 1.25 * self._used_share)).astype(np.int32)
        return np.clip(expected, length, limit)

    def _finish(self, row: int, reason: str) -> Sequence:
        sequence = self._sequences[row]
        known = self._length[row] - (reason == "error")
        sequence.token_ids = self._tokens[row, :known].copy()
        sequence.finish_reason = reason
        used = (known - sequence.prompt_len) / max(1, sequence.limit - sequence.prompt_len)
        self._used_share += 0.02 * (float(used) - self._used_share)
        self._vacate(row)
        return sequence

    def _vacate(self, row: int) -> None:
        self.pages.release(self._page_table[row, : self._held[row]])
        self._held[row] = 0
        self._sequences[row] = None
        self._tenancy[row] += 1
        self._free_rows.append(row)

    # -- the step -------------------------------------------------------------------------------------------------

    def _pages_for(self, tokens):
        return -(-tokens // self.page_size)

    def _batch(self, rows: np.ndarray, chunks: np.ndarray, decode: bool) -> StepBatch:
        ends = np.cumsum(chunks)
        context = self._computed[rows]
        owners = np.repeat(rows, chunks)
        positions = np.arange(ends[-1]) - np.repeat(ends - context, chunks)
        pages = self._page_table[owners, positions // self.page_size]
        samples = context == self._length[rows] + self._awaited[rows]
        sampled_rows = rows[samples]
        sampling = self._sampling_batch(sampled_rows)
        self._awaited[sampled_rows] += 1
        self._latest[rows] = self._steps
        self._steps += decode
        return StepBatch(
            token_ids=np.where(positions < self._length[owners], self._tokens[owners, positions], np.int32(-1)),
            positions=positions.astype(np.int32),
            slots=(pages * self.page_size + positions % self.page_size).astype(np.int32),
            rows=rows,
            query_starts=np.concatenate([[0], ends]).astype(np.int32),
            context_lens=context,
            page_table=self._page_table[rows, : self._held[rows].max()],
            extends=samples & (chunks == 1) & (context > self._prompt_len[rows]) & decode,
            sampled=ends[samples] - 1,
            sampled_rows=sampled_rows,
            tenancies=self._tenancy[sampled_rows],
            sampling=sampling,
        )

    def _sampling_batch(self, rows: np.ndarray) -> SamplingBatch:
        chosen = {name: values[rows] for name, values in self._sampling.items()}
        length = self._length[rows] + self._awaited[rows]
        return SamplingBatch(
            **chosen,
            index=self._index[rows],
            position=length.astype(np.int64),
            history=self._tokens,
            history_rows=rows.astype(np.int32),
            history_lens=length,
            all_greedy=bool((chosen["temperature"] == 0).all() and (chosen["repetition_penalty"] == 1).all()),
        )
