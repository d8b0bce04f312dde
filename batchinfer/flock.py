"""Locks on files, between processes: the kernel keeps them, and they end with whoever holds them."""

from __future__ import annotations

import fcntl
from typing import TextIO


def held_by_another(file: TextIO | int, shared: bool = False) -> bool:
    """Whether another process holds the lock on an open file; else it is taken, until the file is closed.

    Where a file system knows no locks, nobody holds one.

    Args:
        shared: take it so that others may who do the same.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def was_left(file: TextIO | int) -> bool:
    """Whether whoever held the lock on an open file has ended, and it is taken now.

    Where a file system knows no locks, nobody can tell: False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
