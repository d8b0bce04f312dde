"""How units are dealt to engines of different speed, some of which are lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.data.journal import Tally
from batchinfer.errors import EngineError
from batchinfer.integrations.unit_queue import UnitQueue
from batchinfer.request import Load


def pull(queue: UnitQueue, engine: int, committed=()) -> list[int] | None:
    return queue.pull(engine, committed, Tally(rows=len(committed)), Load(running=1, kv_used=0.5))


@given(st.integers(1, 5), st.integers(0, 60), st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=200))
def test_each_unit_is_committed_once_whoever_is_lost_on_the_way(engines, units, moves):
    queue, had, committed = UnitQueue(engines, attempts=1000), {}, []
    queue.offer(range(units))
    ended = [(engine % engines, False) for engine in range(3 * units + 3 * engines)]
    for engine, dies in [(engine % engines, dies) for engine, dies in moves] + ended:
        if dies:
            assert sorted(queue.lost(engine, ())) == sorted(had.pop(engine, []))
            continue
        done = had.pop(engine, [])
        committed += done
        had[engine] = pull(queue, engine, done) or []
    assert sorted(committed) == list(range(units))
    assert all(pull(queue, engine) is None for engine in range(engines))
    assert queue.standing()[0].rows == units


def test_pieces_are_neighbours_and_grow_smaller_towards_the_end():
    queue, sizes = UnitQueue(2, 3), []
    queue.offer(range(60))
    while units := pull(queue, 0):
        assert units == list(range(units[0], units[0] + len(units)))
        sizes.append(len(units))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 10 and sizes[-1] == 1


def test_an_engine_waits_while_others_may_be_lost_and_takes_over_what_they_had():
    queue = UnitQueue(2, 3)
    assert pull(queue, 0) == [], "nobody has said yet what is to be done"
    queue.offer([4, 7])
    queue.offer([4])
    assert (pull(queue, 0), pull(queue, 1)) == ([4], [7])
    assert pull(queue, 1, committed=[7]) == []
    assert queue.lost(0, committed=()) == [4] and pull(queue, 1) == [4]
    assert pull(queue, 1, committed=[4]) is None


def test_what_was_committed_before_its_engine_died_is_not_dealt_again():
    queue = UnitQueue(1, 3)
    queue.offer([0, 1])
    assert pull(queue, 0) == [0]
    assert queue.lost(0, committed={0}) == [] and pull(queue, 0) == [1]


def test_a_unit_that_kills_one_engine_after_the_other_ends_the_job():
    queue = UnitQueue(1, attempts=2)
    queue.offer([5])
    pull(queue, 0)
    queue.lost(0, ())
    pull(queue, 0)
    with pytest.raises(EngineError, match="2 engines died while they had unit 5"):
        queue.lost(0, ())
