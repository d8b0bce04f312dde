"""Engines behind one door: see base.Backend."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from batchinfer.backends.base import Backend, Isolation
from batchinfer.errors import JobError
from batchinfer.job import Job

__all__ = ["Backend", "Isolation", "build_engine", "check_engine", "open_backend", "open_engine"]

# engine.backend → the class that opens it in this process. The module loads its engine when it is opened, not before.
_ENGINES = {
    "native": "batchinfer.backends.native:NativeBackend",
    "echo": "batchinfer.backends.echo:EchoBackend",
    "tensorrt-llm": "batchinfer.backends.tensorrt_llm.backend:TensorRTBackend",
}


def open_backend(job: Job, progress: bool = True) -> Backend:
    """Open the engine a job names, in a process of its own where ``engine.isolation`` asks for that.

    Args:
        progress: tell on stderr what takes its time.

    Raises:
        ModelError: the model or the plan cannot be used.
        EngineError: the engine died while it was opened.
    """
    if job.engine.isolation == "none" or (job.engine.isolation == "auto" and job.engine.backend == "echo"):
        return open_engine(job, progress)
    from batchinfer.backends.process import ProcessBackend

    wants = getattr(_engine(job), "isolation", lambda job: Isolation())
    return ProcessBackend(job, progress, isolation=wants(job))


def open_engine(job: Job, progress: bool = True) -> Backend:
    """Open the engine a job names, here. The native engine is built into the cache first, if it was not yet.

    Raises:
        ModelError: the model or the plan cannot be used.
    """
    return _engine(job).open(job, progress)


def check_engine(job: Job) -> None:
    """What can be told of a job's engine without opening it.

    Raises:
        JobError: the engine does not have what the job asks for.
    """
    if (check := getattr(_engine(job), "check", None)) is not None:
        check(job)


def build_engine(job: Job, output: str | None, calibrate: Job | None = None, fit: Job | None = None) -> Path:
    """Make the engine folder that a job runs with; into the cache when no ``output`` is given.

    Args:
        calibrate: the job whose prompts a build calibrates with, if it must.
        fit: the job for the lengths of whose rows a profile is made.

    Raises:
        JobError: there is nothing to build, or it cannot be.
    """
    if job.engine.backend == "echo":
        raise JobError('engine.backend = "echo" has no model: there is nothing to build')
    from batchinfer.data.calibration import lengths, prompts

    calibration = prompts(calibrate) if calibrate is not None else ()
    if job.engine.backend == "tensorrt-llm":
        from batchinfer.backends.tensorrt_llm.build import build as build_tensorrt

        if fit is not None:
            raise JobError('--fit is for engine.backend = "native": set engine.profile instead')
        return build_tensorrt(job, output, calibration).path
    from batchinfer.engine.build import build

    options = job.build_options() | {"calibration_key": calibrate.calibration_key() if calibrate is not None else ""}
    fit_to = lengths(fit) if fit is not None else None
    return build(job.model.path, output, calibration=calibration, fit_to=fit_to, **options).path


def _engine(job: Job) -> Any:
    if job.engine.backend not in _ENGINES:
        raise JobError(f'engine.backend = "{job.engine.backend}" is not available in this version; use "native"')
    module, name = _ENGINES[job.engine.backend].split(":")
    return getattr(importlib.import_module(module), name)
