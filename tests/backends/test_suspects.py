"""Bisection without processes: whatever rows kill, they are found, no others are, and few deaths do."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.backends.suspects import PARTS, STRIKES, Suspects
from batchinfer.request import Request


def find(rows: int, poison: set[int], most: int = 16, hang: bool = False) -> tuple[list[int], list[int], int]:
    """Convicted rows, answered rows and deaths, of an engine that dies as soon as it is given a poison row."""
    suspects, convicted, answered, deaths, fresh = Suspects(), [], [], 1, True
    held = [Request(i, [1]) for i in range(rows)]
    suspects.died(held, fresh=True, hung=hang)
    held = []
    while (taken := suspects.take(most, idle=not held)) is not None:
        held += taken
        if any(row.key in poison for row in taken):
            deaths += 1
            guilty = suspects.died(held, fresh, hang)
            convicted += [guilty.key] if guilty else []
            held, fresh = [], True
        else:
            answered += [row.key for row in held]
            held, fresh = [], not taken and fresh
    return convicted, answered, deaths


@given(st.integers(1, 400), st.sets(st.integers(0, 399), max_size=6), st.integers(1, 40), st.booleans())
def test_the_rows_that_kill_are_convicted_and_all_others_answered_once(rows, poison, most, hang):
    poison = {row for row in poison if row < rows}
    convicted, answered, _ = find(rows, poison, most, hang)
    assert sorted(convicted) == sorted(poison)
    assert sorted(answered) == [row for row in range(rows) if row not in poison]


@given(st.integers(1, 2000), st.data())
def test_one_row_costs_a_logarithm_of_deaths(rows, data):
    poison = data.draw(st.integers(0, rows - 1))
    _, _, deaths = find(rows, {poison})
    assert deaths <= math.ceil(math.log(rows, PARTS) - 1e-9) + 1 + STRIKES


def test_a_single_death_convicts_nobody():
    suspects = Suspects()
    row = Request("only", [1])
    assert suspects.died([row], fresh=True, hung=True) is None, "it was not alone on purpose"
    assert suspects.take(8, idle=True) == [row]
    assert suspects.died([row], fresh=True, hung=False) is None
    assert suspects.take(8, idle=True) == [row]
    assert suspects.take(8, idle=False) == [], "nothing else is at risk beside it"
    assert suspects.take(8, idle=True) is None and not suspects, "it did well, so the first death was no one's fault"


def test_a_row_that_hangs_counts_once_if_nothing_was_before_it():
    for fresh in (True, False):
        suspects = Suspects()
        suspects.died([Request("row", [1])], fresh=True, hung=False)
        suspects.take(8, idle=True)
        assert bool(suspects.died([Request("row", [1])], fresh, hung=True)) == fresh
