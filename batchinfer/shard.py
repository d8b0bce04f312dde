"""Shard: one of several runs that do a job together, and which of its units are this one's."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from batchinfer.errors import JobError

if TYPE_CHECKING:
    from batchinfer.data.threads import Halt
    from batchinfer.request import Load

_FORM = re.compile(r"(\d+|auto)/(\d+)|auto")


class _Addressed(Protocol):
    file: str
    first_row: int


class _Planned(Protocol):
    def pending(self) -> Sequence[Any]: ...


Unit = TypeVar("Unit", bound=_Addressed)


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Shard ``index`` of ``count``, counted from 0. Shards with one ``count`` share a job without overlap or gap."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def of(cls, text: str | None, environ: Mapping[str, str] | None = None) -> Shard | None:
        """``"2/8"``; ``"auto"``, what the array job that this process belongs to says; ``"auto/8"``, where that does
        not say how many there are. None for None.

        Raises: JobError if it has another form, or the environment lacks what ``auto`` asks for.
        """
        if text is None:
            return None
        try:
            index, count = check(text)
        except ValueError as error:
            raise JobError(f"shard {error}") from None
        if index is None:
            index, told = _from_array(os.environ if environ is None else environ)
            count = told if count is None else count
            if count is None:
                raise JobError(
                    f"the array job says that this is shard {index} and not of how many: write --shard auto/N, or set "
                    "JOB_COMPLETIONS to the job's completions"
                )
        if index >= count:
            raise JobError(f"no shard {index} of {count}: the first is 0/{count}, the last {count - 1}/{count}")
        return cls(index, count)

    def deal(self, units: Sequence[Unit]) -> list[Unit]:
        """Its own of the units of one plan, in their order. The shards' numbers of units differ by one at most.

        Units are shuffled by the hash of their address first, so that a file whose rows grow longer and longer is no
        harder on one shard than on another.
        """
        shuffled = sorted(range(len(units)), key=lambda i: _hash(units[i]))
        return [units[i] for i in sorted(shuffled[self.index :: self.count])]

    def chunks(self, ledger: _Planned, load: Callable[[], Load], halt: Halt) -> Iterable[Sequence[Any]]:
        """What its run is to do, a chunk of units at a time."""
        return [ledger.pending()]


def check(text: str) -> tuple[int | None, int | None]:
    """Index and count of a shard as it is written; None is for the environment to say.

    Raises: ValueError that says what it must be.
    """
    form = _FORM.fullmatch(text.strip())
    if not form:
        raise ValueError(f'must be written as "0/4", "auto" or "auto/4", got {text!r}')
    index, count = form.groups()
    if count is not None and int(count) < 1 or (index or "auto") != "auto" and int(index) >= int(count):
        raise ValueError(f"counts from 0: the first of four is 0/4 and the last 3/4, got {text!r}")
    return None if index in (None, "auto") else int(index), None if count is None else int(count)


def _hash(unit: _Addressed) -> bytes:
    return hashlib.blake2b(f"{unit.file}:{unit.first_row}".encode(), digest_size=8).digest()


def _from_array(environ: Mapping[str, str]) -> tuple[int, int | None]:
    """Which task of an array job this process is, counted from 0, and of how many if that is told."""

    def number(name: str, default: int | None = None) -> int:
        try:
            return int(environ[name])
        except KeyError:
            if default is None:
                raise JobError(f"{name} is not set, and --shard auto needs it; write --shard auto/N or i/N") from None
            return default
        except ValueError:
            raise JobError(f"{name} must be a whole number, got {environ[name]!r}") from None

    def slurm() -> tuple[int, int | None]:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        index, rest = divmod(number("SLURM_ARRAY_TASK_ID") - first, step)
        count = number("SLURM_ARRAY_TASK_COUNT") if "SLURM_ARRAY_TASK_COUNT" in environ else None
        last = number("SLURM_ARRAY_TASK_MAX", first + step * ((count or 1) - 1))
        if rest or count is not None and first + step * (count - 1) != last:
            raise JobError(
                "the tasks of this Slurm array are not evenly spaced, so a task's number does not tell which shard it "
                "is; use --array=0-N, or write --shard i/N"
            )
        return index, count

    def aws() -> tuple[int, int | None]:
        size = number("AWS_BATCH_JOB_ARRAY_SIZE") if "AWS_BATCH_JOB_ARRAY_SIZE" in environ else None
        return number("AWS_BATCH_JOB_ARRAY_INDEX"), size

    def kubernetes() -> tuple[int, int | None]:  # which tells a pod its index alone
        completions = number("JOB_COMPLETIONS") if "JOB_COMPLETIONS" in environ else None
        return number("JOB_COMPLETION_INDEX"), completions

    arrays: dict[str, Callable[[], tuple[int, int | None]]] = {
        "SLURM_ARRAY_TASK_ID": slurm,
        "AWS_BATCH_JOB_ARRAY_INDEX": aws,
        "JOB_COMPLETION_INDEX": kubernetes,
    }
    for name, read in arrays.items():
        if environ.get(name):
            return read()
    raise JobError(f"--shard auto is for array jobs, and none of {', '.join(arrays)} is set; write --shard i/N")
