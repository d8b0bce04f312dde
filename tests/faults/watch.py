"""A reader of outputs that are being written: ``python -m tests.faults.watch FOLDER``, until it is terminated.

Reads the outputs beside FOLDER/*/live again and again, as polars and pyarrow do that know nothing of the run. Prints
how often it looked, how often a retry replaced a part under its hands so that it had to look again (polars opens a file
twice, once for its footer and once for its rows), and what it saw that must not be. Exit code 1 if anything.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds

MOST_TRIES = 10  # of a look, while parts are replaced
PANIC = pl.exceptions.PanicException


def by_polars(out: Path) -> list[int]:
    return pl.scan_parquet(out).select("id").collect()["id"].to_list()


def by_pyarrow(out: Path) -> list[int]:
    return ds.dataset(out, format="parquet").to_table(["id"])["id"].to_pylist()


def look(out: Path) -> tuple[list[str], list[str]]:
    """Why an output cannot be read as it is, and which rows are there twice."""
    unread, doubled = [], []
    for read in (by_polars, by_pyarrow):
        try:
            ids = read(out)
        except (OSError, pa.ArrowException, pl.exceptions.PolarsError, PANIC) as error:
            unread.append(f"{out}: {read.__name__}: {error}")
            continue
        if len(ids) != len(set(ids)):
            doubled.append(f"{out}: {read.__name__}: {len(ids) - len(set(ids))} rows twice")
    return unread, doubled


def main() -> int:
    root, looks, replaced, wrong, goes_on = Path(sys.argv[1]), 0, 0, [], True

    def stop(*_: object) -> None:
        nonlocal goes_on
        goes_on = False

    signal.signal(signal.SIGTERM, stop)
    while goes_on:
        for live in root.glob("*/live"):
            for out in (live.with_name("out"), live.parent / "disk" / "out"):
                if not any(out.rglob("*.parquet")):
                    continue
                unread, doubled = look(out)
                for _ in range(MOST_TRIES if live.with_name("again").exists() else 0):
                    if not unread:
                        break
                    replaced += 1
                    unread, again = look(out)
                    doubled += again
                if live.exists():  # else the case itself did something to the output
                    looks, wrong = looks + 1, [*wrong, *unread, *doubled]
        time.sleep(0.02)
    print(looks, replaced, *(line.replace("\n", " ") for line in wrong), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
