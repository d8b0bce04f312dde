"""The fast kernels of this machine, or a skip that says why there are none.

Every test of the CPU's kernels is one of the GPU's too, where there is one. Without one, TRITON_INTERPRET=1 runs the
GPU's kernels on the CPU, very slowly: good enough to see that they compute the right thing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from batchinfer.engine.kernels import Kernels, select

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAST = ["cpu"] + (["gpu"] if torch.cuda.is_available() or INTERPRETED else [])  # whose kernels can be tested here


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow on a busy machine; the tests about threads ask for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=FAST)
def kernels(request: pytest.FixtureRequest, dtype: torch.dtype) -> Iterator[Kernels]:
    """While a test has them, tensors are made on their device."""
    device = torch.device("cuda" if request.param == "gpu" and not INTERPRETED else "cpu")
    kernels = gpu_kernels() if request.param == "gpu" else select(device, dtype)
    if kernels.name != request.param:
        pytest.skip("the CPU kernels cannot be built here (see the warning in the log)")
    with device:
        yield kernels


def gpu_kernels() -> Kernels:
    from batchinfer.engine.kernels.gpu import KERNELS

    return KERNELS


@pytest.fixture
def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of values around 1 against the reference."""
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
