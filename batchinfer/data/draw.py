"""Draw: a sample of rows, spread over all files."""

from __future__ import annotations

import math

import numpy as np

from batchinfer.data.source import InputFile, Unit

MOST_DECODED = 4_000_000  # rows of row groups that a sample may make us decode


def draw_rows(files: list[InputFile], count: int, seed: int) -> list[Unit]:
    """``count`` rows, each a unit of its own, evenly spread with a random place in each stretch; all rows if fewer.

    Reading a row costs decoding its row group up to it. Where the groups drawn hold more than ``MOST_DECODED`` rows, a
    regular subset of them stands for all.
    """
    groups = [
        (file.name, i, first, rows)
        for file in files
        for i, (first, rows) in enumerate(zip(np.cumsum((0, *file.row_groups)).tolist(), file.row_groups))
        if rows
    ]
    rng = np.random.default_rng(seed)
    while True:
        ends = np.cumsum([rows for *_, rows in groups])
        total = int(ends[-1]) if groups else 0
        if count >= total:
            drawn = np.arange(total)
        else:
            stretches = np.arange(count + 1) * total // count
            drawn = stretches[:-1] + (rng.random(count) * np.diff(stretches)).astype(np.int64)
        group_of = np.searchsorted(ends, drawn, side="right")
        hit = np.unique(group_of)
        decoded = sum(groups[g][3] for g in hit)
        if decoded <= MOST_DECODED or len(hit) == 1:
            break
        groups = [groups[g] for g in hit[:: math.ceil(decoded / MOST_DECODED)]]
    units = []
    for row, g in zip(drawn.tolist(), group_of.tolist()):
        name, group, first, rows = groups[g]
        units.append(Unit(len(units), name, first + row - (int(ends[g]) - rows), 1, (group, group)))
    return units
