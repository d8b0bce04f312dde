"""Part size: how many rows make a part of the size that a job asks for. Told from footers, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from batchinfer.data.files import InputFile, one_line
from batchinfer.data.journal import ResultSchema
from batchinfer.data.sink import OutputSchema
from batchinfer.data.source import Source
from batchinfer.errors import InputError
from batchinfer.job import Job
from batchinfer.size import in_bytes

LOOKED_AT = 16  # files, spread over all
TOKEN_BYTES = 2  # of a completion's text, compressed
ROW_BYTES = 8  # of the other result columns
MOST_ROWS = 1 << 20  # a unit is in memory, twice at times


def unit_rows(job: Job, source: Source) -> int:
    """Rows of a unit, and so of a part: ``checkpoint.unit_rows``, or as many as make ``output.part_size``.

    A row's input columns weigh what they weigh in the input; its completion is reckoned at ``max_tokens``, so that
    parts come out smaller than asked for rather than larger.
    """
    if job.output.part_size is None:
        return job.checkpoint.unit_rows
    carried = OutputSchema(job.output, source.schema, ResultSchema(job.sampling.n), job.input.id_column).carried
    files = [file for file in source.files.values() if file.rows]
    looked = files[:: max(1, len(files) // LOOKED_AT)]
    rows, size = sum(file.rows for file in looked), sum(_bytes(file, carried) for file in looked)
    row_bytes = size / max(rows, 1) + job.sampling.n * job.sampling.max_tokens * TOKEN_BYTES + ROW_BYTES
    return int(min(max(in_bytes(job.output.part_size) / row_bytes, 1), MOST_ROWS))


def _bytes(file: InputFile, columns: Iterable[str]) -> int:
    """What some columns of a file take on disk."""
    wanted, size = set(columns), 0
    try:
        with file.open() as parquet:
            for number in range(parquet.metadata.num_row_groups):
                group = parquet.metadata.row_group(number)
                chunks = (group.column(i) for i in range(group.num_columns))
                size += sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file.path} cannot be read as Parquet: {one_line(error)}") from error
    return size
