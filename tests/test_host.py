"""The engine takes what its container may use, not what the host has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from batchinfer.host import available_cores, available_memory, peak_rss

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
