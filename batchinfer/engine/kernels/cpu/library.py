"""Compiles the C++ operators for this machine, once, and loads them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from batchinfer.cache import cache_root

log = logging.getLogger(__name__)

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))

# What may be left out where the compiler does not know it: first the best, then what is slower but works.
TARGETS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
TIMEOUT = 300  # seconds for one run of the compiler
# No contraction: compilers fuse a product here and not there, and results would depend on what a function is inlined
# into. What should be fused says so (simd.h).
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
FLAGS += ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


class BuildError(Exception):
    """There is no compiler, or it could not make a library that loads here."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The operators, or None with one logged warning: then the torch references serve.

    ``BATCHINFER_CPU_KERNELS=off`` asks for the references; ``CXX`` names the compiler, ``BATCHINFER_CXXFLAGS`` adds
    flags to it, ``BATCHINFER_CACHE`` moves the cache from ``~/.cache/batchinfer``.
    """
    if os.environ.get("BATCHINFER_CPU_KERNELS", "").lower() in ("off", "0", "false"):
        return None
    try:
        return _declare(build())
    except (BuildError, OSError) as error:
        log.warning("CPU kernels are not available, the slower torch references serve instead: %s", error)
        return None


def build() -> ctypes.CDLL:
    """Load the library from the cache, compile it first where it is not there yet.

    Safe with concurrent processes: each compiles into a folder of its own, and the finished file is renamed.

    Raises:
        BuildError: no compiler, or no set of flags gave a library that loads; the message carries the compiler's.
    """
    compiler = find_compiler()
    identity = _identity(compiler)
    reason = ""
    for target in TARGETS:
        flags = [*FLAGS, *target, *shlex.split(os.environ.get("BATCHINFER_CXXFLAGS", ""))]
        key = hashlib.sha256("\0".join([*identity, *flags]).encode()).hexdigest()[:24]
        path = cache_folder() / f"{key}.so"
        try:
            if path.exists():
                with contextlib.suppress(OSError):  # torn when the machine went down: made again
                    return ctypes.CDLL(str(path))
            _compile(compiler, flags, path)
            return ctypes.CDLL(str(path))
        except subprocess.CalledProcessError as error:
            reason = reason or f"{shlex.join(compiler)} failed: {_first_error(error.stderr)}"
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{shlex.join(compiler)} took more than {error.timeout:.0f} s") from None
        except OSError as error:
            reason = reason or str(error)
    raise BuildError(reason)


def cache_folder() -> Path:
    """Where compiled libraries lie; one file a combination of sources, flags, compiler and CPU."""
    return cache_root() / "kernels"


def find_compiler() -> list[str]:
    """Raises: BuildError if there is none."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: {f'CXX={asked}' if asked else 'g++, c++ or clang++'} not found on PATH")


def _identity(compiler: list[str]) -> list[str]:
    """Everything the compiled code depends on, flags aside."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.name + "\0" + path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    return [*sources, shlex.join(compiler), version, platform.machine(), _cpu_flags(), torch.__version__]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))}))


def _compile(compiler: list[str], flags: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:

        def compile_one(source: Path) -> str:
            made = f"{folder}/{source.stem}.o"
            _run([*compiler, *flags, "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        made = f"{folder}/library.so"
        _run([*compiler, *flags, "-shared", *objects, *_openmp(flags), "-o", made])
        os.replace(made, path)


def _openmp(flags: list[str]) -> list[str]:
    """torch's own OpenMP runtime, whatever its file is called: two runtimes would be two fighting thread pools."""
    if "-fopenmp" not in flags:
        return []
    home = Path(torch.__file__).parent
    bundled = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    return ["-Wl,--no-as-needed", str(bundled[0])] if bundled else []


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines() or ["no message"]
    return lines[0].strip()[:300]


_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_COUNT, _DOUBLE = ctypes.c_uint32, ctypes.c_double
_TYPED = {  # one for each of f32 and bf16
    "add_rms_norm": (None, [_POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _LONG, _LONG, _INT]),
    "silu_mul": (None, [_POINTER, _POINTER, _LONG, _LONG, _INT]),
    "sample": (None, [_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT]),
    "linear_w8a8": (None, [_POINTER] * 3 + [_LONG] + [_INT] * 2),
    "linear_widened": (None, [_INT] + [_POINTER] * 6 + [_LONG] * 4 + [_INT]),
}
_PAGED = {  # as well as one for each of them with keys and values in 8 bits
    "page_bytes": (_LONG, [_POINTER]),
    "rope_write": (None, [_POINTER] * 7 + [_FLOAT, _POINTER, _INT]),
    "attend": (None, [_POINTER] * 5 + [_INT]),
}
_SIGNATURES = {f"{name}_{suffix}": each for name, each in (_TYPED | _PAGED).items() for suffix in ("f32", "bf16")}
_SIGNATURES |= {f"{name}_{suffix}_int8": each for name, each in _PAGED.items() for suffix in ("f32", "bf16")}
_SIGNATURES |= {
    "want_huge_pages": (None, [_POINTER, _LONG]),
    "linear_bf16": (None, [_POINTER] * 3 + [_LONG] + [_INT] * 2),
    "layers_bf16": (None, [_POINTER, _LONG] + [_POINTER] * 3 + [_INT]),
    "layers_bf16_int8": (None, [_POINTER, _LONG] + [_POINTER] * 3 + [_INT]),
    "dot_products": (_INT, []),
    "best_bf16": (_INT, []),
    "vector_floats": (_INT, []),
    "native_bf16": (_INT, []),
    "openmp_threads": (_INT, []),
    "raise_to": (None, [_POINTER, _COUNT]),
    "wait_for": (_INT, [_POINTER, _COUNT, _DOUBLE, _DOUBLE]),
}


def _declare(made: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(made, name)
        function.restype, function.argtypes = result, arguments
    return made
