"""The scheduler's promises, under random jobs: every token computed once and in order, pages never lost or mixed up."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.kv_cache import PagePool, page_hashes
from batchinfer.engine.profile import Profile
from batchinfer.engine.rows import Sequence
from batchinfer.engine.scheduler import _PREFILL_STEPS, Scheduler
from batchinfer.request import SamplingParams

EOS = 1
PAGE = 4
SEQ_LEN = 48


class FakeModel:
    """Remembers what was written to each KV slot, and what each sequence could see there."""

    def __init__(self, pages: int) -> None:
        self.slots = np.full(pages * PAGE, -1, np.int64)
        self.seen: dict[int, np.ndarray] = {}  # row → the tokens its last query could see
        self.last: dict[int, int] = {}  # row → the token sampled last

    def run(self, step, eos_chance: float, rng) -> np.ndarray:
        self.seen.clear()
        # As in each layer of the real model: the whole step writes before any of it reads.
        owners = np.repeat(step.rows, np.diff(step.query_starts))
        self.slots[step.slots] = [
            token if token >= 0 else self.last[row] for token, row in zip(step.token_ids.tolist(), owners.tolist())
        ]
        for s in range(len(step.context_lens)):
            rows = slice(step.query_starts[s], step.query_starts[s + 1])
            context = step.context_lens[s]
            count = rows.stop - rows.start
            assert step.positions[rows].tolist() == list(range(context - count, context))
            pages = step.page_table[s, : -(-context // PAGE)]
            self.seen[int(step.rows[s])] = self.slots[(pages[:, None] * PAGE + np.arange(PAGE)).ravel()[:context]]
        tokens = np.where(rng.random(len(step.sampled)) < eos_chance, EOS, rng.integers(2, 9, len(step.sampled)))
        self.last |= zip(step.sampled_rows.tolist(), tokens.tolist())
        return tokens.astype(np.int32)


def jobs():
    sequence = st.tuples(
        st.integers(1, SEQ_LEN - 1),  # prompt length
        st.integers(1, 30),  # max tokens
        st.integers(0, 2),  # which common prefix
        st.booleans(),  # ignore EOS
    )
    return st.lists(sequence, min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(
    jobs(),
    st.integers(1, 6),  # batch size
    st.integers(1, 40),  # step tokens beyond the batch size
    st.booleans(),  # a second profile, of more and shorter sequences
    st.integers(SEQ_LEN // PAGE, 3 * SEQ_LEN // PAGE),  # pages
    st.booleans(),  # share prefixes
    st.floats(0, 0.3),  # how likely a token is EOS
    st.floats(0, 1),  # what the scheduler believes of output lengths at first
    st.integers(1, 4),  # steps under way at once
    st.integers(0, 2),  # and as many more that begin with tokens nobody knows yet
    st.integers(0, 2),  # steps of prompts under way apart from them, on other ranks
    st.integers(0, 2**31),
)
def test_every_sequence_is_served_and_every_page_returned(
    job, batch, extra, short_ones, pages, share, eos, belief, depth, ahead, apart, seed
):
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(2, 9, (3, SEQ_LEN))
    pool = PagePool(pages)
    profiles = [Profile(batch, batch + extra, SEQ_LEN)]
    profiles += [Profile(2 * batch, 2 * batch + extra, SEQ_LEN // 2)] if short_ones else []
    scheduler = Scheduler(profiles, pool, PAGE, (EOS,), share, depth, ahead, apart)
    scheduler._used_share = belief
    model, prompt_model = FakeModel(pages), FakeModel(pages)
    sequences = []
    for i, (length, max_tokens, prefix, ignore_eos) in enumerate(job):
        ids = prefixes[prefix, :length].astype(np.int32)
        limit = min(length + max_tokens, SEQ_LEN)
        sequences.append(Sequence(i, ids, length, limit, SamplingParams(ignore_eos=ignore_eos)))
        scheduler.add(sequences[-1])
    prompts, turns = {s.owner: s.token_ids for s in sequences}, {s.owner: s.turn for s in sequences}

    finished: list[Sequence] = []
    admitted: list[int] = []
    under_way: list = []
    for _ in range(10_000):
        if not (scheduler.waiting or scheduler.num_running or under_way):
            break
        step = scheduler.schedule()
        assert len(under_way) + (step is not None) <= depth + ahead + apart
        if step is None:
            assert under_way, "work is left and nothing runs: starvation"
            kinds = [of_prompts for _, _, of_prompts, _ in under_way]
            step, tokens, _, written = under_way.pop(kinds.index(rng.choice(list(set(kinds)))))
            for page, content in written.items():  # it comes to the ranks that decode
                model.slots[page * PAGE : (page + 1) * PAGE] = content
            finished += scheduler.complete(step, tokens)
            continue
        profile, limits = scheduler.profile, scheduler.rows.limit[scheduler.rows.running]
        assert 0 < step.num_tokens <= profile.step_tokens
        assert scheduler.num_running <= profile.batch_size and limits.max(initial=0) <= profile.seq_len
        of_prompts, written = bool(apart and not step.extends.all()), {}
        where = prompt_model if of_prompts else model
        assert not (apart and of_prompts and step.extends.any()), "prompts and others in one step"
        tokens = where.run(step, eos, rng)
        if of_prompts:
            pages_written = set((step.slots // PAGE).tolist())
            written = {page: where.slots[page * PAGE : (page + 1) * PAGE].copy() for page in pages_written}
        check_pages(scheduler, pool)
        for row, seen in where.seen.items():
            known = min(len(seen), scheduler.rows.length[row])
            assert seen[:known].tolist() == scheduler.rows.tokens[row, :known].tolist()
        owners = [scheduler.rows.sequences[row].owner for row in step.rows]
        admitted += [owner for owner in owners if owner not in admitted]
        under_way.append((step, tokens, of_prompts, written))
    assert sorted(s.owner for s in finished) == list(range(len(job)))
    assert admitted == sorted(admitted, key=turns.get), "a sequence ran before its turn"
    assert pool.held == 0 and not pool.references.any()
    for s in finished:
        assert s.token_ids[: s.prompt_len].tolist() == prompts[s.owner].tolist()
        ends = s.completion_ids[-1] == EOS and not s.sampling.ignore_eos
        assert s.finish_reason == ("stop" if ends else "length")
        assert ends or len(s.token_ids) == s.limit


def check_pages(scheduler: Scheduler, pool: PagePool) -> None:
    """Each page is free, idle or held, and held exactly as often as the tables of running rows name it."""
    named: Counter = Counter()
    for row in scheduler.rows.running.tolist():
        pages = scheduler.rows.page_table[row, : scheduler.rows.held[row]].tolist()
        assert len(set(pages)) == len(pages)
        named.update(pages)
    assert {page: int(n) for page, n in enumerate(pool.references) if n} == dict(named)
    free = pool._free[: pool._num_free].tolist()
    assert len(set(free)) == len(free)
    assert not set(free) & set(named) and not set(free) & set(pool._idle) and not set(pool._idle) & set(named)
    assert len(free) + len(pool._idle) + len(named) == pool.num_pages


def run_alone(scheduler: Scheduler) -> int:
    steps = 0
    while (step := scheduler.schedule()) is not None:
        scheduler.complete(step, np.full(len(step.sampled), 5, np.int32))
        steps += 1
    return steps


def sequence(ids, max_tokens=4) -> Sequence:
    ids = np.asarray(ids, np.int32)
    return Sequence(None, ids, len(ids), len(ids) + max_tokens, SamplingParams())


def test_short_sequences_run_in_greater_number_until_a_long_one_comes():
    profiles = [Profile(2, 64, SEQ_LEN), Profile(6, 64, 16)]
    scheduler = Scheduler(profiles, PagePool(64), PAGE, (EOS,), False)
    for first, prompt in enumerate([4] * 6 + [30] + [4] * 6):
        scheduler.add(sequence([first + 2] * prompt))
    running = []
    while (step := scheduler.schedule()) is not None:
        running.append((scheduler.num_running, scheduler.profile.seq_len))
        scheduler.complete(step, np.full(len(step.sampled), 5, np.int32))
    assert running[:4] == [(6, 16)] * 4, "the long one waits until two are what runs with it"
    assert running[4:8] == [(2, SEQ_LEN)] * 4
    assert (5, 16) in running[8:]


def test_sequences_admitted_together_compute_their_common_prefix_once():
    scheduler = Scheduler([Profile(8, 400, SEQ_LEN)], PagePool(64), PAGE, (EOS,), True)
    for tail in range(8):
        scheduler.add(sequence([7] * 21 + [tail]))
    step = scheduler.schedule()
    assert step.num_tokens == 22 + 7 * 2  # five full pages are shared, two tokens are each row's own


def test_a_prefix_is_found_again_after_its_rows_have_ended():
    pool = PagePool(64)
    scheduler = Scheduler([Profile(2, 400, SEQ_LEN)], pool, PAGE, (EOS,), True)
    scheduler.add(sequence([7] * 21))
    run_alone(scheduler)
    again = sequence([7] * 21 + [3])
    scheduler.add(again)
    run_alone(scheduler)
    assert again.cached_tokens == 20


def test_a_long_prompt_is_computed_in_chunks_while_others_decode():
    scheduler = Scheduler([Profile(4, 8, SEQ_LEN)], PagePool(64), PAGE, (EOS,), True)
    scheduler.add(sequence([2, 3]))
    scheduler.add(sequence(range(2, 40)))
    sizes = []
    for _ in range(4):
        step = scheduler.schedule()
        sizes.append((step.num_tokens, len(step.sampled)))
        scheduler.complete(step, np.full(len(step.sampled), 5, np.int32))
    assert sizes == [(8, 1)] * 4


def test_a_sequence_with_more_to_say_overtakes_some_that_came_before_but_not_all():
    scheduler = Scheduler([Profile(1, 64, SEQ_LEN)], PagePool(64), PAGE, (EOS,), True)
    for number in range(100):
        scheduler.add(sequence([2 + number % 5], max_tokens=10))
    scheduler.add(sequence([8], max_tokens=20))
    served = [scheduler.waiting[place].token_ids[0] for place in range(101)]
    assert 40 <= served.index(8) <= 80
    assert [token for token in served if token != 8] == [2 + number % 5 for number in range(100)]


def test_rows_whose_token_is_awaited_are_left_out_of_the_next_step():
    scheduler = Scheduler([Profile(4, 64, SEQ_LEN)], PagePool(64), PAGE, (EOS,), True, micro_batches=2)
    scheduler.add(sequence([2, 3]))
    first = scheduler.schedule()
    assert scheduler.schedule() is None
    scheduler.add(sequence([4]))
    second = scheduler.schedule()
    assert set(first.sampled_rows) & set(second.sampled_rows) == set()
    scheduler.complete(second, np.array([5], np.int32))
    scheduler.complete(first, np.array([5], np.int32))
    assert {*scheduler.schedule().rows, *scheduler.schedule().rows} == {*first.rows, *second.rows}
    assert scheduler.full and scheduler.schedule() is None


def two_at_once(scheduler: Scheduler):
    """Each step after the first two, when it is composed."""
    under_way = deque([scheduler.schedule(), scheduler.schedule()])
    while under_way:
        step = under_way.popleft()
        scheduler.complete(step, np.full(len(step.sampled), 5, np.int32))
        if (step := scheduler.schedule()) is not None:
            under_way.append(step)
            yield step


def test_steps_under_way_share_the_decoding_rows_evenly_whichever_rows_have_ended():
    scheduler = Scheduler([Profile(64, 256, SEQ_LEN)], PagePool(64 * 12), PAGE, (EOS,), True, micro_batches=2)
    rng = np.random.default_rng(0)
    for tail in range(64):
        scheduler.add(sequence([2, 3, tail % 7], max_tokens=4 + int(rng.integers(0, 30))))
    # Where all extend, nothing is left of the prefill.
    sizes = [(step.num_tokens, scheduler.num_running) for step in two_at_once(scheduler) if step.extends.all()]
    assert len(sizes) > 30
    assert all(size <= -(-running // 2) for size, running in sizes)


def test_prefill_is_spread_over_the_steps_of_a_pipeline():
    scheduler = Scheduler([Profile(64, 256, SEQ_LEN)], PagePool(64 * 12), PAGE, (EOS,), False, micro_batches=2)
    for _ in range(64):
        scheduler.add(sequence([2] * 40, max_tokens=1))
    sizes = []
    while (step := scheduler.schedule()) is not None:
        sizes.append(step.num_tokens)
        scheduler.complete(step, np.full(len(step.sampled), 5, np.int32))
    assert sum(sizes) == 64 * 40
    assert sizes[0] == -(-64 * 40 // _PREFILL_STEPS) and all(later <= size + 2 for size, later in zip(sizes, sizes[1:]))


def test_prompts_that_follow_others_make_no_step_much_longer_than_its_neighbours():
    scheduler = Scheduler([Profile(256, 4096, SEQ_LEN)], PagePool(256 * 12), PAGE, (EOS,), False, micro_batches=2)
    rng = np.random.default_rng(0)
    for _ in range(768):
        scheduler.add(sequence([2] * 40, max_tokens=2 + int(rng.integers(0, 7))))
    sizes = [step.num_tokens for step in two_at_once(scheduler)]
    assert len(sizes) > 50
    assert all(later <= 2 * size + 32 for size, later in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_a_row_goes_ahead_only_when_its_token_is_as_many_steps_away_as_are_to_be_under_way(micro_batches):
    profile = Profile(64, 256, SEQ_LEN)
    scheduler = Scheduler([profile], PagePool(64 * 12), PAGE, (EOS,), True, micro_batches, ahead=1)
    rng = np.random.default_rng(0)
    for _ in range(64):
        scheduler.add(sequence([2, 3], max_tokens=4 + int(rng.integers(0, 30))))
    under_way, ahead = deque(), 0
    while scheduler.waiting or scheduler.num_running or under_way:
        if len(under_way) <= micro_batches and (step := scheduler.schedule()) is not None:
            recent = [row for other in list(under_way)[1 - micro_batches :] for row in other.rows.tolist()]
            assert not set(step.rows.tolist()) & set(recent)
            ahead += int((step.token_ids < 0).sum())
            under_way.append(step)
        else:
            step = under_way.popleft()
            scheduler.complete(step, np.full(len(step.sampled), 5, np.int32))
    assert ahead > 300


def test_a_step_ahead_begins_with_a_token_that_nobody_knows_and_counts_for_nothing_after_the_end():
    scheduler = Scheduler([Profile(4, 64, SEQ_LEN)], PagePool(64), PAGE, (EOS,), True, ahead=1)
    scheduler.add(sequence([2, 3]))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert (second.token_ids.tolist(), second.positions.tolist()) == ([-1], [2])
    assert scheduler.schedule() is None  # two steps ahead would be too far
    (ended,) = scheduler.complete(first, np.array([EOS], np.int32))
    assert ended.completion_ids.tolist() == [EOS] and scheduler.pages.held == 0
    scheduler.add(sequence([4]))  # gets the row
    third = scheduler.schedule()
    assert third.rows.tolist() == second.rows.tolist()
    assert scheduler.complete(second, np.array([5], np.int32)) == []
    scheduler.complete(third, np.array([6], np.int32))
    assert scheduler.schedule().token_ids.tolist() == [6]


def test_no_step_goes_ahead_of_the_last_token_of_a_row_or_of_a_history_that_is_to_be_penalised():
    scheduler = Scheduler([Profile(4, 64, SEQ_LEN)], PagePool(64), PAGE, (EOS,), True, ahead=1)
    scheduler.add(sequence([2, 3], max_tokens=1))
    penalised = sequence([2, 4])
    penalised.sampling = SamplingParams(repetition_penalty=1.5)
    scheduler.add(penalised)
    assert len(scheduler.schedule().sampled) == 2
    assert scheduler.schedule() is None


def test_logits_that_are_not_finite_end_a_row_with_an_error():
    scheduler = Scheduler([Profile(4, 64, SEQ_LEN)], PagePool(64), PAGE, (EOS,), True)
    scheduler.add(sequence([2, 3]))
    scheduler.add(sequence([2, 4]))
    (failed,) = scheduler.complete(scheduler.schedule(), np.array([-1, 5], np.int32))
    assert failed.finish_reason == "error" and failed.token_ids.tolist() == [2, 3]
    assert scheduler.num_running == 1


def test_pages_are_keyed_by_all_tokens_before_them():
    a = page_hashes(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.int32), PAGE)
    b = page_hashes(np.array([1, 2, 3, 9, 5, 6, 7, 8], np.int32), PAGE)
    assert len(a) == len(b) == 2
    assert a[0] != b[0] and a[1] != b[1]
    assert a == page_hashes(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32), PAGE)


def test_the_least_recently_used_idle_page_is_forgotten_first():
    pool = PagePool(3)
    for name in (b"a", b"b", b"c"):
        (page,) = pool.allocate(1)
        pool.publish(int(page), name)
        pool.release(np.array([page]))
    pool.share(pool.find([b"a"]))
    pool.release(np.array(pool.find([b"a"])))
    pool.allocate(1)
    assert pool.find([b"a"]) and pool.find([b"c"]) and not pool.find([b"b"])


def test_more_pages_than_available_are_refused():
    with pytest.raises(ValueError, match="4 pages asked for, 3"):
        PagePool(3).allocate(4)
