"""batchinfer: embedded, offline batch inference for large language models.

``run`` works through a job, ``retry`` answers some of its rows again, ``build`` makes an engine folder, ``Engine``
generates from token ids or text with no Parquet at all. Everything is imported on first use, so that
``import batchinfer`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from batchinfer.engine.build import build
    from batchinfer.engine.engine import Engine
    from batchinfer.errors import BatchInferError
    from batchinfer.job import Job
    from batchinfer.request import Completion, Request, SamplingParams
    from batchinfer.retrier import retry
    from batchinfer.runner import run

_HOMES = {
    "BatchInferError": "batchinfer.errors",
    "Completion": "batchinfer.request",
    "Engine": "batchinfer.engine.engine",
    "Job": "batchinfer.job",
    "Request": "batchinfer.request",
    "SamplingParams": "batchinfer.request",
    "build": "batchinfer.engine.build",
    "retry": "batchinfer.retrier",
    "run": "batchinfer.runner",
}
__all__ = [
    "BatchInferError",
    "Completion",
    "Engine",
    "Job",
    "Request",
    "SamplingParams",
    "build",
    "retry",
    "run",
    "__version__",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'batchinfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
