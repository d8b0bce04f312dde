"""A run from and to an object store, to be killed: ``python -m tests.faults.remote_job FOLDER SECONDS_A_ROW IN OUT``.

As job.py, of which the engine is. With ``unlocked`` as a last word no lease keeps it out; with ``elsewhere`` it counts
as a run on another machine; with ``0/2`` it is that shard; with ``retry`` it answers the rows of RETRIED again.
"""

from __future__ import annotations

import socket
import sys

from batchinfer.data import bucket, lease
from tests.faults.job import work
from tests.s3 import HASTE

RETRIED = "id % 3 = 0"


def main() -> int:
    folder, seconds, source, target, *how = sys.argv[1:]
    for name, value in HASTE.items():
        setattr(bucket, name, value)
    lease.BEAT, lease.STALE = 0.2, 2.0
    if how == ["unlocked"]:
        lease._is_dead = lambda content: True
        lease.Lease.check = lambda self: None
    if how == ["elsewhere"]:
        socket.gethostname = lambda: "elsewhere"
    changes = {"job__shard": how[0]} if how and "/" in how[0] else {}
    changes |= {"input__path": source, "output__path": target}
    changes |= {"checkpoint__unit_rows": 50, "checkpoint__sync_seconds": 0.05}
    return work(folder, seconds, RETRIED if how == ["retry"] else None, **changes)


if __name__ == "__main__":
    sys.exit(main())
