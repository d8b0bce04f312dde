"""A run from and to an object store, to be killed: ``python -m tests.faults.remote_job FOLDER SECONDS_A_ROW IN OUT``.

As job.py, of which the engine is. With ``unlocked`` as a last word no lease keeps it out; with ``elsewhere`` it counts
as a run on another machine; with ``0/2`` it is that shard.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from batchinfer.data import bucket, lease
from batchinfer.errors import BatchInferError
from tests.echo_jobs import echo_job, run_echo
from tests.faults.job import Noting
from tests.s3 import HASTE


def main() -> int:
    folder, seconds, source, target, *how = sys.argv[1:]
    Noting.folder, Noting.seconds = Path(folder), float(seconds)
    for name, value in HASTE.items():
        setattr(bucket, name, value)
    lease.BEAT, lease.STALE = 0.2, 2.0
    if how == ["unlocked"]:
        lease._is_dead = lambda content: True
        lease.Lease.check = lambda self: None
    if how == ["elsewhere"]:
        socket.gethostname = lambda: "elsewhere"
    shard = {"job__shard": how[0]} if how and "/" in how[0] else {}
    try:
        job = echo_job(
            Noting.folder,
            input__path=source,
            output__path=target,
            sampling__temperature=1.0,
            checkpoint__unit_rows=50,
            checkpoint__sync_seconds=0.05,
            **shard,
        )
        return run_echo(job, Noting).exit_code
    except BatchInferError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
