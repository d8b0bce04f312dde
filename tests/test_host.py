"""The engine takes what its container may use, not what the host has."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer.host import available_cores, available_memory, give_back_memory, peak_rss

GIB = 2**30


@pytest.fixture
def root(tmp_path):
    def write(**files):
        for name, text in {"proc/meminfo": "MemTotal: 999 kB\nMemAvailable: 67108864 kB", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return tmp_path

    return write


def test_without_a_limit_it_is_what_the_host_has(root):
    assert available_memory(root()) == 64 * GIB
    assert available_cores(root()) == len(os.sched_getaffinity(0))
    unlimited = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/cpu.max": "max 100000"}
    assert available_memory(root(**unlimited)) == 64 * GIB
    assert available_cores(root(**unlimited)) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 4 * GIB, "sys/fs/cgroup/cpu.max": "50000 100000"},
        {
            "proc/self/cgroup": "0::/slurm/job/step",
            "sys/fs/cgroup/slurm/job/memory.max": 4 * GIB,
            "sys/fs/cgroup/slurm/job/step/memory.max": "max",
            "sys/fs/cgroup/slurm/job/cpu.max": "100000 100000",
        },
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/docker/abc",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 4 * GIB,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 100000,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    ],
    ids=["version 2", "a group around it", "version 1"],
)
def test_a_limit_of_the_control_group_holds(root, files):
    assert available_memory(root(**files)) == 4 * GIB
    assert available_cores(root(**files)) == 1


def test_peak_memory_is_this_process_s_own_and_not_its_parent_s():
    ballast = bytearray(300 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    code = "from batchinfer.host import peak_rss; print(peak_rss())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert child < 200 << 20 < 300 << 20 < peak_rss()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not known to keep what is freed")
def test_what_was_freed_can_be_handed_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [ctypes.c_void_p(libc.malloc(64 << 10)) for _ in range(1024)]  # too small to be mapped each by itself
    for block in blocks:
        ctypes.memset(block, 1, 64 << 10)
    for block in blocks[:-1]:  # the last keeps the heap from shrinking by itself
        libc.free(block)
    kept = rss()
    give_back_memory()
    assert rss() < kept - (50 << 20)
    libc.free(blocks[-1])


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
