"""Every error a user can meet, each with the exit code an operator acts on."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Process exit codes of the command line (documented in the README; they are a contract)."""

    OK = 0
    CRASH = 1
    USAGE = 2
    FAILED_ROWS = 3
    DRIFT = 4
    LOCKED = 5
    INTEGRITY = 6
    STOPPED = 75


class BatchInferError(Exception):
    """Base of all expected failures: one clear line for a person, never a traceback.

    The message says what was expected, what was found, where, and what to do next.
    """

    exit_code = ExitCode.CRASH


class JobError(BatchInferError):
    """The job, its files or its flags are wrong: unknown key, missing file, missing column, bad template."""

    exit_code = ExitCode.USAGE


class ModelError(JobError):
    """The model folder or engine plan cannot be used as it is."""


class StalePlanError(ModelError):
    """The engine plan was built for another device, or by a version that wrote plans differently."""


class InputError(JobError):
    """The input is missing, unreadable as Parquet, or lacks a column."""


class OutputError(JobError):
    """The output cannot be written."""


class WriteError(OutputError):
    """A file of an output that was begun cannot be written, the disk being full for instance: later it may be."""

    exit_code = ExitCode.STOPPED


class DriftError(BatchInferError):
    """The job or its input changed since the output was begun."""

    exit_code = ExitCode.DRIFT


class JobDriftError(DriftError):
    """The job, not its input, differs from the one that the output was begun with: it may begin beside it."""


class StoreError(BatchInferError):
    """An object store did not answer as it should, and trying again did not help; later it may."""

    exit_code = ExitCode.STOPPED


class LockedError(BatchInferError):
    """Another run holds this output."""

    exit_code = ExitCode.LOCKED


class IntegrityError(BatchInferError):
    """What lies on disk is not what was committed."""

    exit_code = ExitCode.INTEGRITY


class EngineError(BatchInferError):
    """The engine failed in a way that no row explains."""
