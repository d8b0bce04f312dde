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

QUICK = {"BATCHINFER_CXXFLAGS": "-O0"}  # where it is built, and how fast it is does not matter


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


@pytest.fixture(scope="module")
def built_at_once(tmp_path_factory, needs_library) -> Path:
    """A cache in which two processes began to build at the same time."""
    folder = tmp_path_factory.mktemp("cache")
    started = [python(SAY_NAME, BATCHINFER_CACHE=str(folder), **QUICK) for _ in range(2)]
    assert [answer(process)[0] for process in started] == ["cpu"] * 2
    return folder / "kernels"


def test_processes_may_build_at_the_same_time(built_at_once):
    (made,) = built_at_once.iterdir()
    assert made.suffix == ".so"


def test_a_torn_library_in_the_cache_is_made_again(built_at_once, tmp_path, monkeypatch, caplog):
    (made,) = built_at_once.iterdir()
    torn = tmp_path / "kernels" / made.name
    torn.parent.mkdir()
    torn.write_bytes(b"")
    for name, value in {"BATCHINFER_CACHE": str(tmp_path), **QUICK}.items():
        monkeypatch.setenv(name, value)
    assert build().vector_floats() == library().vector_floats()
    assert torn.stat().st_size == made.stat().st_size and not caplog.records


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


WITHOUT = {  # flags → floats of a vector
    "avx512-bf16": ("-mno-amx-bf16", 16),
    "avx512": ("-mno-amx-bf16 -mno-avx512bf16", 16),
    "avx2": ("-mno-amx-bf16 -mno-avx512f", 8),
    "sse": ("-mno-amx-bf16 -mno-avx512f -mno-avx2 -mno-fma", 4),
}
PYTEST = """
import sys
import pytest
from batchinfer.engine.kernels.cpu.library import library
assert library().vector_floats() == int(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512 to leave it out")
@pytest.mark.parametrize("best", WITHOUT)
def test_older_instruction_sets_give_the_same_results(best, needs_library):
    if best == "avx512-bf16" and "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the best that this machine has, which the other tests are about")
    flags, lanes = WITHOUT[best]
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("attention", "elementwise", "sampling")]
    some = "not gpu and ((reference and (None or 300)) or depend or elementwise or references)"
    command = [sys.executable, "-c", PYTEST, str(lanes), "-q", "-x", "-p", "no:cacheprovider", "-k", some, *files]
    environment = {**os.environ, "BATCHINFER_CXXFLAGS": flags}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "skipped" not in run.stdout.splitlines()[-1]
