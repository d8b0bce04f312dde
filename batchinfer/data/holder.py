"""Holder: the process that holds a lock, as it says who it is, and whether it still runs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from batchinfer.shard import Shard


def holder(shard: Shard | None = None) -> dict[str, Any]:
    """This process, for others to read."""
    since = time.strftime("%Y-%m-%d %H:%M:%S%z")
    here = {"pid": os.getpid(), "host": socket.gethostname(), "namespace": _namespace(), "since": since}
    return here if shard is None else {**here, "shard": str(shard)}


def is_here(told: dict[str, Any]) -> bool:
    """Whether a holder is a process of this machine."""
    return told["host"] == socket.gethostname() and told.get("namespace") == _namespace()


def _namespace() -> str | None:
    """In which space its process ids count: containers of one name may have several."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return None


def is_running(pid: int | str) -> bool:
    """Whether another process of this machine has that id."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return int(pid) != os.getpid()


def who(lock: str | bytes) -> str:
    """``: process 3 on host, since …``, as far as what a lock holds says it."""
    try:
        told = json.loads(lock)
        return f": process {told['pid']} on {told['host']}, since {told['since']}"
    except (ValueError, KeyError, TypeError):
        return ""
