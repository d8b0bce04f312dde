"""Scheduler: which tokens run next. In-flight batching with chunked prefill over a paged KV cache."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from itertools import islice

import numpy as np

from batchinfer.engine.kv_cache import PagePool, page_hashes
from batchinfer.engine.profile import Profile, in_order, limits
from batchinfer.engine.rows import Rows, Sequence
from batchinfer.engine.step import StepBatch

AHEAD = 1  # steps composed before the last one's tokens are known: one hides the host, more only waste more
_PREFILL_STEPS = 48  # in which what waits for prefill is worked off, where it is throttled
_LEAST_PREFILL = 32  # tokens a step, lest a small job creep
_OVERTAKEN = 4  # sequences that came before, for each token that this one may say more than they


class Scheduler:
    """Composes each step from the table of running sequences, and those that wait.

    A step takes every decoding sequence's next token first, then prefill chunks in order of arrival, up to the
    ``step_tokens`` of the profile in force: the narrowest that holds all sequences that run, were they as long as they
    may become. A waiting sequence is admitted when a profile holds it beside them, and when pages are available for
    what the running ones and it are expected to need. The first that was added comes first, but one with more to say
    overtakes some, since few long ones that are left at the end would leave the machine nearly idle. When too little
    was expected, the newest sequence is preempted: its pages are given up, and it is computed again later, with the
    same tokens.

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
        self.pages = pages
        self.share_prefixes = share_prefixes
        self.micro_batches = micro_batches
        self.ahead = ahead
        self.prefill_steps = prefill_steps
        self.rows = Rows(most.batch_size, most.seq_len, pages, page_size)
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._added = 0
        self._eos = np.array(eos_token_ids, np.int32)
        self._steps = 0  # composed, those of prompts alone not counted
        self._under_way = [0, 0]  # steps that decode, steps of prompts alone
        self._used_share = 1.0  # running mean of how much of its token limit a completion uses

    @property
    def num_running(self) -> int:
        return len(self.rows.running)

    @property
    def profile(self) -> Profile:
        """The one in force."""
        return self._profile_for(self.num_running, self.rows.longest)

    @property
    def full(self) -> bool:
        """As many steps are under way as may be, of each kind."""
        return self._under_way[0] >= self.micro_batches + self.ahead and self._under_way[1] >= self.prefill_steps

    def _profile_for(self, sequences: int, longest: int) -> Profile | None:
        """The narrowest that holds so many sequences of up to so many tokens, if there is one."""
        held = (p for p in self.profiles if p.batch_size >= sequences and p.seq_len >= longest)
        return next(held, None)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits the profile and the page pool."""
        if self.share_prefixes and not sequence.hashes:
            sequence.hashes = page_hashes(sequence.token_ids, self.rows.page_size)
        self._added += 1
        sequence.turn = self._added - _OVERTAKEN * (sequence.limit - sequence.prompt_len)
        insort(self.waiting, sequence, key=lambda waiting: waiting.turn)

    def schedule(self) -> StepBatch | None:
        """Compose the next step and reserve its pages; None when nothing can run before ``complete``."""
        step, apart = None, self.prefill_steps > 0
        if self._under_way[0] < self.micro_batches + self.ahead:
            step = self._compose(decode=True, prefill=not apart)
        if step is None and self._under_way[1] < self.prefill_steps:
            step = self._compose(decode=False, prefill=True)
            if step is not None:
                self.rows.prefilling[step.rows] += 1
        if step is not None:
            self._under_way[self._of_prompts(step)] += 1
        return step

    def _compose(self, *, decode: bool, prefill: bool) -> StepBatch | None:
        preemptions = self.preemptions
        most_decoding, most_tokens = self._fair_share()
        going_on = self._continue_running(most_decoding if decode else 0, most_tokens, prefill)
        if going_on is None:
            return None
        rows, chunks = going_on
        # Whoever had to leave must not come back at once, only to be in the way again.
        admits = prefill and self.preemptions == preemptions
        admitted, their_chunks = self._admit(int(chunks.sum()), most_tokens if admits else 0)
        rows = np.concatenate([rows, np.array(admitted, np.int64)])
        chunks = np.concatenate([chunks, np.array(their_chunks, np.int32)])
        if not len(rows):
            return None
        step = self.rows.step(rows, chunks, self._steps, decode)
        self._steps += decode
        return step

    def _of_prompts(self, step: StepBatch) -> bool:
        """Whether it is one of prompts alone, where those are computed apart."""
        return bool(self.prefill_steps) and not step.extends.all()

    def complete(self, step: StepBatch, token_ids: np.ndarray) -> list[Sequence]:
        """Take in the tokens ``int32 [samples]`` sampled for a step; return the sequences that ended with it.

        A negative token id means that the row's logits were not finite; such a sequence ends with reason ``error``.
        """
        table = self.rows
        of_prompts = self._of_prompts(step)
        self._under_way[of_prompts] -= 1
        table.prefilling[step.rows] -= of_prompts
        still_there = table.still_there(step)
        rows, token_ids = step.sampled_rows[still_there], token_ids[still_there]
        table.append(rows, token_ids)
        failed = token_ids < 0
        stopped = np.isin(token_ids, self._eos) & ~table.ignore_eos[rows]
        for i in np.flatnonzero(table.asks_stop[rows] & ~failed):
            row = rows[i]
            said = table.tokens[row, table.prompt_len[row] : table.length[row]]
            stopped[i] |= table.sequences[row].stops(said)
        ended = failed | stopped | (table.length[rows] >= table.limit[rows])
        finished = []
        for i in np.flatnonzero(ended):
            reason = "error" if failed[i] else "stop" if stopped[i] else "length"
            finished.append(self._finish(int(rows[i]), reason))
        if finished:
            table.without_those_that_left()
        return finished

    def _finish(self, row: int, reason: str) -> Sequence:
        sequence = self.rows.leave(row, int(self.rows.length[row]) - (reason == "error"))
        sequence.finish_reason = reason
        used = len(sequence.completion_ids) / max(1, sequence.limit - sequence.prompt_len)
        self._used_share += 0.02 * (used - self._used_share)
        return sequence

    def drop_all(self) -> None:
        """Forget every sequence, waiting or running, and give up their pages."""
        self.waiting.clear()
        for row in self.rows.running.tolist():
            self.rows.leave(row, 0)
        self.rows.without_those_that_left()
        self.rows.prefilling[:] = 0
        self._under_way = [0, 0]

    # -- running rows ---------------------------------------------------------------------------------------------

    def _fair_share(self) -> tuple[int, int]:
        """The rows that decode and the tokens in all that a step may have, so that those under way are alike.

        Prefill is throttled as in gLLM (arXiv:2504.14775): its share of all that waits, not all that fits; where that
        is less than what decodes, it may be as much, since such a step is not much longer than its neighbours.
        """
        step_tokens, running = self.profile.step_tokens, self.rows.running
        if self.micro_batches == 1 and not self.prefill_steps:
            return len(running), step_tokens
        todo = self.rows.length[running] - self.rows.computed[running]
        decoding = -(-np.count_nonzero(todo <= 1) // self.micro_batches)
        prefill = int(todo[todo > 1].sum()) + self._admissible()
        least = step_tokens // 16 if self.prefill_steps else max(decoding, _LEAST_PREFILL)
        prefill = max(-(-prefill // _PREFILL_STEPS), least)
        return max(1, decoding), min(decoding + prefill, step_tokens)

    def _admissible(self) -> int:
        """Tokens of those that wait and that rows and pages could hold now, counted as far as it matters to a step."""
        waiting = list(islice(self.waiting, self.rows.num_free))
        lengths = np.fromiter((len(sequence.token_ids) for sequence in waiting), np.int32)
        prompts = np.fromiter((sequence.prompt_len for sequence in waiting), np.int32)
        limits = np.fromiter((sequence.limit for sequence in waiting), np.int32)
        pages = np.cumsum(self._expected_pages(prompts, lengths, limits))
        room = self.pages.available - self._promised_pages()
        return min(int(lengths[pages <= room].sum()), _PREFILL_STEPS * self.profile.step_tokens)

    def _continue_running(
        self, most_decoding: int, most_tokens: int, prefill: bool
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows that go on and the tokens each gets; their pages are taken, by preemption if it must be.

        None when pages are short and all who could give up theirs await a token.
        """
        table = self.rows
        while True:
            rows = table.running[self._may_go_on(table.running)]
            todo = table.todo(rows)
            decodes = todo <= 1
            if self.prefill_steps:
                decodes &= table.computed[rows] >= table.prompt_len[rows]
            decode_first = np.argsort(~decodes, kind="stable")
            rows, todo, decodes = rows[decode_first], todo[decode_first], decodes[decode_first]
            taken = ~decodes & prefill
            longest_out = np.argsort(table.latest[rows[decodes]], kind="stable")
            taken[longest_out[:most_decoding]] = True  # those that decode are in front
            rows, todo = rows[taken], todo[taken]
            before = np.cumsum(todo) - todo
            chunks = np.clip(most_tokens - before, 0, todo)
            rows, chunks = rows[chunks > 0], chunks[chunks > 0]
            need = table.pages_for(table.computed[rows] + chunks) - table.held[rows]
            if need.sum() <= self.pages.available:
                break
            ready = table.running[(table.awaited[table.running] == 0) & (table.prefilling[table.running] == 0)]
            if not len(ready):
                return None
            self._preempt(int(ready[-1]))
        table.take_pages(rows, need)
        table.advance(rows, chunks)
        return rows, chunks

    def _may_go_on(self, rows: np.ndarray) -> np.ndarray:
        table = self.rows
        awaited = table.awaited[rows]
        goes_ahead = (awaited <= self.ahead) & ~table.need_history(rows)
        # Not with a token that is so far away that the first stage would wait for it.
        goes_ahead &= self._steps - table.latest[rows] >= self.micro_batches
        may = (awaited == 0) | (goes_ahead & (table.length[rows] + awaited < table.limit[rows]))
        return may & self._is_at_home(rows)

    def _is_at_home(self, rows: np.ndarray) -> np.ndarray:
        """Whether rows can go on where they are: when the steps of a prompt are complete, it moves."""
        return (self.rows.prefilling[rows] == 0) | (self.rows.computed[rows] < self.rows.length[rows] - 1)

    def _preempt(self, row: int) -> None:
        sequence = self.rows.leave(row, int(self.rows.length[row]))
        self.rows.without_those_that_left()
        sequence.turn = float("-inf")
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    # -- admission ------------------------------------------------------------------------------------------------

    def _admit(self, planned: int, most_tokens: int) -> tuple[list[int], list[int]]:
        """Rows that begin in a step of ``planned`` tokens, which may have up to ``most_tokens``, and what each gets."""
        table = self.rows
        rows: list[int] = []
        chunks: list[int] = []
        if not (self.waiting and planned < most_tokens and table.num_free):
            return rows, chunks
        promised, longest = self._promised_pages(), table.longest
        while self.waiting and planned < most_tokens and table.num_free:
            sequence = self.waiting[0]
            length = len(sequence.token_ids)
            longest = max(longest, sequence.limit)
            profile = self._profile_for(self.num_running + 1, longest)
            if profile is None or planned >= profile.step_tokens:
                break
            # At least one token must be computed: its logits are wanted.
            shared = self.pages.find(sequence.hashes[: (length - 1) // table.page_size])
            expected = int(self._expected_pages(sequence.prompt_len, length, sequence.limit)) - len(shared)
            if promised + expected + self.pages.idle_among(shared) > self.pages.available and self.num_running:
                break
            row = table.enter(self.waiting.popleft(), shared)
            chunk = min(min(most_tokens, profile.step_tokens) - planned, length - len(shared) * table.page_size)
            taken = int(table.pages_for(table.computed[row] + chunk)) - len(shared)
            only = np.array([row])
            table.take_pages(only, np.array([taken]))
            table.advance(only, np.array([chunk], np.int32))
            promised += max(0, expected - taken)
            planned += chunk
            rows.append(row)
            chunks.append(chunk)
        return rows, chunks

    def _promised_pages(self) -> int:
        """Beyond what they hold, what those that run are expected to need."""
        table, rows = self.rows, self.rows.running
        expected = self._expected_pages(table.prompt_len[rows], table.length[rows], table.limit[rows])
        return int((expected - table.held[rows]).clip(0).sum())

    def _expected_pages(self, prompt, length, limit):
        """Pages of sequences when they end, by how much of their limit completions have used so far."""
        expected = prompt + np.ceil((limit - prompt) * min(1.0, 1.25 * self._used_share)).astype(np.int32)
        return self.rows.pages_for(np.clip(expected, length, limit))
