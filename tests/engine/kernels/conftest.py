"""The fast kernels of this machine, or a skip that says why there are none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from batchinfer.engine.kernels import Kernels, select


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


@pytest.fixture
def kernels(dtype: torch.dtype) -> Kernels:
    kernels = select(torch.device("cpu"), dtype)
    if kernels.name != "cpu":
        pytest.skip("the CPU kernels cannot be built here (see the warning in the log)")
    return kernels


@pytest.fixture
def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of values around 1 against the reference."""
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
