"""Draw: a sample of the rows that a job is about, spread over all files."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

import numpy as np

from batchinfer.data.source import Source, Unit
from batchinfer.data.units import Piece

MOST_DECODED = 4_000_000  # rows of row groups that a sample may make us decode
UNIT_ROWS = 1 << 16  # of the units from which rows are drawn


def draw_rows(source: Source, count: int, seed: int) -> tuple[list[Unit], int]:
    """``count`` rows, each a unit of its own, evenly spread with a random place in each stretch; all rows if fewer.

    Reading a row costs decoding its row group up to it. Where the groups drawn hold more than ``MOST_DECODED`` rows, a
    regular subset of them stands for all, and ``count`` is met within a few rows.

    Returns: the rows, and how many there are to draw from.
    """
    units = source.units(UNIT_ROWS)
    ends = {name: list(accumulate(file.row_groups)) for name, file in source.files.items()}

    def draw(count: int) -> list[tuple[str, int, int]]:
        """File, row and row group of each."""
        drawn = []
        for unit, place in _places(units, count, np.random.default_rng(seed)):
            [(file, [row])] = unit.addresses([place])
            drawn.append((file, row, bisect_right(ends[file], row)))
        return drawn

    drawn = draw(count)
    groups = list(dict.fromkeys((name, group) for name, _, group in drawn))
    decoded = sum(source.files[name].row_groups[group] for name, group in groups)
    if decoded > MOST_DECODED:
        every = min(math.ceil(decoded / MOST_DECODED), len(groups))
        kept = set(groups[::every])
        drawn = [row for row in draw(count * every) if (row[0], row[2]) in kept]
    rows = [Unit(i, (Piece(name, row, 1, (group, group)),)) for i, (name, row, group) in enumerate(drawn)]
    return rows, sum(unit.rows for unit in units)


def _places(units: list[Unit], count: int, rng: np.random.Generator) -> list[tuple[Unit, int]]:
    """Unit and place in it of rows drawn from all of them."""
    ends = np.cumsum([unit.rows for unit in units])
    total = int(ends[-1]) if units else 0
    if count >= total:
        drawn = np.arange(total)
    else:
        stretches = np.arange(count + 1) * total // count
        drawn = stretches[:-1] + (rng.random(count) * np.diff(stretches)).astype(np.int64)
    of = np.searchsorted(ends, drawn, side="right")
    return [(units[u], int(row - ends[u] + units[u].rows)) for row, u in zip(drawn.tolist(), of.tolist())]
