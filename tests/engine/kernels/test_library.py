"""Building the C++ operators: once, safely, for any instruction set, and doing without them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from batchinfer.engine.kernels.cpu.library import HEADERS, SOURCES, BuildError, build, library

SAY_NAME = """
import torch
from batchinfer.engine.kernels import select
print(select(torch.device("cpu"), torch.bfloat16).name)
"""


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def answer(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


@pytest.fixture(scope="module")
def needs_library() -> None:
    if library() is None:
        pytest.skip("the CPU kernels cannot be built here")


def test_off_means_the_references():
    assert answer(python(SAY_NAME, BATCHINFER_CPU_KERNELS="off"))[0] == "torch"


def test_no_compiler_is_one_warning_and_the_references(tmp_path):
    out, err = answer(python(SAY_NAME, CXX="no-such-compiler", BATCHINFER_CACHE=str(tmp_path)))
    assert out == "torch"
    assert len(err.splitlines()) == 1 and "no-such-compiler" in err


def test_a_failing_compiler_is_named_with_its_message(tmp_path, needs_library):
    out, err = answer(python(SAY_NAME, BATCHINFER_CXXFLAGS="--no-such-flag", BATCHINFER_CACHE=str(tmp_path)))
    assert out == "torch"
    assert len(err.splitlines()) == 1 and "no-such-flag" in err
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob(".build-*"))


def test_processes_may_build_at_the_same_time(tmp_path, needs_library):
    started = [python(SAY_NAME, BATCHINFER_CACHE=str(tmp_path)) for _ in range(2)]
    assert [answer(process)[0] for process in started] == ["cpu"] * 2
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_a_torn_library_in_the_cache_is_made_again(tmp_path, needs_library):
    assert answer(python(SAY_NAME, BATCHINFER_CACHE=str(tmp_path)))[0] == "cpu"
    (made,) = (tmp_path / "kernels").iterdir()
    size = made.stat().st_size
    made.write_bytes(b"")
    assert answer(python(SAY_NAME, BATCHINFER_CACHE=str(tmp_path))) == ("cpu", "")
    assert made.stat().st_size == size


def test_a_compiler_that_hangs_means_the_references(tmp_path, monkeypatch, needs_library):
    slow = tmp_path / "slow-c++"
    slow.write_text("#!/bin/sh\n[ $1 = --version ] || exec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys.modules[build.__module__], "TIMEOUT", 0.2)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path))
    with pytest.raises(BuildError, match="slow-c.. took more than"):
        build()


def test_the_thread_pool_is_torchs(needs_library):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert library().openmp_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here")
def test_no_second_openmp_runtime_is_loaded(needs_library):
    code = """
        import re, torch
        from batchinfer.engine.kernels.cpu.library import library
        library().openmp_threads()
        print(*set(re.findall(r"/\\S*/lib(?:gomp|omp|iomp)[^/\\s]*", open("/proc/self/maps").read())))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


def test_sources_are_found():
    assert {path.stem for path in SOURCES} >= {"attention", "norm", "rope"} and HEADERS


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512 to leave it out")
@pytest.mark.parametrize(
    ("flags", "lanes"),
    [
        ("-mno-amx-bf16", 16),
        ("-mno-amx-bf16 -mno-avx512bf16", 16),
        ("-mno-amx-bf16 -mno-avx512f", 8),
        ("-mno-amx-bf16 -mno-avx512f -mno-avx2 -mno-fma", 4),
    ],
    ids=["avx512-bf16", "avx512", "avx2", "sse"],
)
def test_older_instruction_sets_give_the_same_results(flags, lanes, needs_library):
    environment = {**os.environ, "BATCHINFER_CXXFLAGS": flags}
    check = f"from batchinfer.engine.kernels.cpu.library import library; assert library().vector_floats() == {lanes}"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("attention", "elementwise", "sampling")]
    some = "not gpu and ((reference and (None or 300)) or depend or elementwise or references)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", some, *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "skipped" not in run.stdout.splitlines()[-1]
