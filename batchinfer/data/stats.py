"""Small statistics for people: how long things are, and why rows fail."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
OTHER = "other reasons"  # kinds of failure beyond those that are told apart
LONGEST = 1 << 22  # tokens; what is longer counts as that long


@dataclass(frozen=True)
class Bin:
    first: int  # lengths first … last, both included
    last: int
    count: int


class Lengths:
    """Exact counts of lengths in tokens: memory goes with the longest one, not with how many there are."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, np.int64)

    def add(self, lengths: np.ndarray) -> None:
        """Count whole numbers of 0 or more, int [any number]."""
        counts = np.bincount(np.minimum(lengths, LONGEST))
        if len(counts) < len(self._counts):
            self._counts[: len(counts)] += counts
        else:
            counts[: len(self._counts)] += self._counts
            self._counts = counts

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    @property
    def total(self) -> int:
        return int(self._counts @ np.arange(len(self._counts)))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> int:
        """The shortest length that at least ``share`` of all do not exceed; 0 if there are none."""
        if not self.count:
            return 0
        return int(np.searchsorted(np.cumsum(self._counts), max(math.ceil(share * self.count), 1)))

    def quantiles(self) -> dict[str, int]:
        return {name: self.quantile(share) for name, share in QUANTILES.items()}

    def bins(self, most: int = 24) -> list[Bin]:
        """At most ``most + 1`` bins of one round width (1, 2 or 5 times a power of ten).

        A long tail is one last bin, so that a few lengths do not squeeze all others into a corner.
        """
        if not self.count:
            return []
        low, high = self.quantile(0), self.quantile(1)
        usual = self.quantile(0.99)
        top = high if high <= 1.5 * usual else usual
        width = round_up_nicely((top + 1 - low) / most)
        first = low // width * width
        edges = [*range(first, top + 1, width)]
        bins = [Bin(a, a + width - 1, int(self._counts[a : a + width].sum())) for a in edges]
        if bins[-1].last < high:
            bins.append(Bin(bins[-1].last + 1, high, int(self._counts[bins[-1].last + 1 :].sum())))
        return bins


def round_up_nicely(value: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, … that is no less than ``value``."""
    power = 10 ** max(math.floor(math.log10(max(value, 1))), 0)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def kind_of(error: str) -> str:
    """An error without its numbers, so that equal failures of different rows are one kind."""
    kind = re.sub(r"\d[\d,.]*(?<=\d)", "N", error)
    return kind if len(kind) <= 300 else f"{kind[:300]}…"


def failures(results: pa.RecordBatch | pa.Table, prefix: str = "") -> Iterator[tuple[int, str]]:
    """The rows that failed, and of what kind each failure is. A row that was to be skipped is none."""
    errors, reasons = (results[prefix + name].to_pylist() for name in ("error", "finish_reason"))
    for row, (error, reason) in enumerate(zip(errors, reasons)):
        if error is not None and reason not in ("skipped", ["skipped"]):
            yield row, kind_of(error)
