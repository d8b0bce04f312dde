"""What this process may use of the machine, and has used: its own limits and its container's, not the host's."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Cores that threads can run on at once: CPU affinity, or the control group's quota where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quota, period = quota or _read(folder / "cpu.cfs_quota_us"), period or _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # "max" and -1 are no limit
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def cpu_flags() -> frozenset[str]:
    """Instruction sets, by the names that Linux has for them; none where it does not tell."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    told = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(told.partition(":")[2].split())


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that the host could give, at most what the control group may hold."""
    lines = _read(root / "proc/meminfo").splitlines()
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    memory = known[0] if known else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _control_groups(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdigit():
            memory = min(memory, int(limit))
    return memory


def peak_rss() -> int:
    """The most memory this process has held, in bytes."""
    try:  # ru_maxrss would count the parent's memory too: Linux hands it down through fork and exec
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_memory() -> None:
    """Hand the system what was freed but kept for later, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those around it, in versions 1 and 2 of the interface."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top / path.strip("/")
        yield from (parent for parent in (folder, *folder.parents) if parent == top or top in parent.parents)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
