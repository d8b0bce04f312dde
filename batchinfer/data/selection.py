"""Selection: which rows of the input a job is about."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from batchinfer.data.filter import RowFilter
from batchinfer.job import InputSection

_SAMPLE = 0x53414D504C45  # keeps the draw apart from the seeds of the same rows, which begin with the same hash


class Selection:
    """Rows that ``input.filter`` takes, of them a sample, of them the first ``input.limit``.

    Whether a row is in the sample depends on its address and ``input.sample_seed`` alone: not on other rows, and not on
    the fraction either, so that a larger sample holds every smaller one.

    Attributes:
        columns: what must be read to tell; none where the address says it.
        limit: None for all.

    Raises: what RowFilter raises.
    """

    def __init__(self, asked: InputSection, schema: pa.Schema) -> None:
        self._filter = RowFilter(asked.filter, schema) if asked.filter is not None else None
        self._sample, self._seed = asked.sample, asked.sample_seed ^ _SAMPLE
        self.columns = self._filter.columns if self._filter else ()
        self.limit = asked.limit or None

    @property
    def everything(self) -> bool:
        return self._filter is None and self._sample == 1 and self.limit is None

    def mask(self, file: str, first_row: int, count: int, rows: pa.Table | None) -> np.ndarray:
        """What filter and sample say of ``count`` rows of a file, bool [count]. ``rows``: their ``columns``, if any."""
        taken = np.ones(count, bool)
        if self._sample < 1:
            from batchinfer.data.prompt import row_seeds  # here, as it brings the templates' machinery along

            drawn = np.asarray(row_seeds(self._seed, file, range(first_row, first_row + count)), np.int64)
            taken &= drawn < self._sample * 2.0**63
        if self._filter is not None:
            assert rows is not None
            taken &= self._filter.mask(rows, file)
        return taken
