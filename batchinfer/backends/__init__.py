"""Engines behind one door: see base.Backend."""

from __future__ import annotations

from batchinfer.backends.base import Backend
from batchinfer.job import Job

__all__ = ["Backend", "open_backend"]


def open_backend(job: Job, progress: bool = True) -> Backend:
    """Open the engine a job names. The native engine is built into the cache first, if it was not yet.

    Args:
        progress: tell on stderr what takes its time.

    Raises:
        ModelError: the model or the plan cannot be used.
    """
    if job.engine.backend == "native":
        from batchinfer.backends.native import NativeBackend

        return NativeBackend.open(job, progress)
    if job.engine.backend == "echo":
        from batchinfer.backends.echo import EchoBackend

        return EchoBackend.open(job)
    from batchinfer.errors import JobError

    raise JobError('engine.backend = "tensorrt-llm" is not available in this version; use "native"')
