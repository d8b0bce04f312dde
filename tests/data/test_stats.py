from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.data.stats import LONGEST, Lengths, kind_of, round_up_nicely


def counted(*groups: list[int]) -> Lengths:
    lengths = Lengths()
    for group in groups:
        lengths.add(np.array(group, np.int64))
    return lengths


@given(st.lists(st.lists(st.integers(0, 3000)), max_size=4), st.floats(0, 1))
def test_counts_are_exact_whatever_the_groups(groups, share):
    lengths, values = counted(*groups), np.sort(np.concatenate([[], *groups]))
    assert (lengths.count, lengths.total) == (len(values), values.sum())
    if len(values):
        assert lengths.mean == pytest.approx(values.mean())
        assert lengths.quantile(share) == np.quantile(values, share, method="inverted_cdf")


@given(st.lists(st.integers(0, 20_000), min_size=1), st.integers(1, 40))
def test_bins_hold_every_length_once_and_touch(values, most):
    bins = counted(values).bins(most)
    assert len(bins) <= most + 2 and sum(bin.count for bin in bins) == len(values)
    assert bins[0].first <= min(values) and bins[-1].last >= max(values)
    assert all(a.last + 1 == b.first for a, b in zip(bins, bins[1:]))


def test_a_long_tail_is_one_bin():
    *usual, tail = counted([100] * 500 + list(range(500)), [90_000]).bins()
    assert {bin.last - bin.first for bin in usual} == {usual[0].last - usual[0].first}
    assert tail.count == 1 and tail.last == 90_000


def test_nothing_counted_is_nothing_to_show():
    assert counted().bins() == [] and counted([]).quantile(0.5) == 0 and counted().mean == 0


def test_an_absurd_length_costs_bounded_memory():
    assert counted([1 << 40]).quantile(1) == LONGEST


@pytest.mark.parametrize("value, wanted", [(0.2, 1), (1, 1), (1.1, 2), (4, 5), (99, 100), (101, 200), (2001, 5000)])
def test_steps_are_round(value, wanted):
    assert round_up_nicely(value) == wanted


def test_errors_that_differ_in_numbers_are_one_kind():
    one, other = (
        "the prompt has 9,001 tokens, and at most 8191 fit.",
        "the prompt has 10,500 tokens, and at most 8191 fit.",
    )
    assert kind_of(one) == kind_of(other) == "the prompt has N tokens, and at most N fit."
