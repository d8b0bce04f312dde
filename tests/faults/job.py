"""A run to be killed: ``python -m tests.faults.job FOLDER SECONDS_A_ROW [SHARD]``.

Prints ``begun`` when the engine is asked for its first row. Every answer is noted in FOLDER/answers, so that work done
twice can be counted.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from batchinfer.backends.echo import EchoBackend
from batchinfer.errors import BatchInferError
from tests.echo_jobs import echo_job, retry_echo, run_echo

SHORTER = {"sampling.max_tokens": 9}  # of a retry


class Noting(EchoBackend):
    """A slow echo that holds a few rows and answers them out of order."""

    folder: Path
    seconds: float

    def generate(self, requests):
        notes = os.open(self.folder / "answers", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        print("begun", flush=True)
        held = []
        for request in requests:
            if request is not None:
                held.append(request)
            if len(held) >= 8 or (request is None and held):
                yield self._answer(held.pop(len(held) // 2), notes)
        for request in held:
            yield self._answer(request, notes)

    def _answer(self, request, notes):
        time.sleep(self.seconds)
        [completion] = super().generate(iter([request]))
        os.write(notes, b"%d %d\n" % request.key)
        return completion


def work(folder: str, seconds: str, retried: str | None = None, **changes: Any) -> int:
    """Run an echo job, whose answers are noted in the folder. Returns its exit code.

    Args:
        retried: answer these rows of its output again instead, with ``SHORTER``.
    """
    Noting.folder, Noting.seconds = Path(folder), float(seconds)
    try:
        job = echo_job(Noting.folder, Noting.folder / "in", sampling__temperature=1.0, **changes)
        if retried is not None:
            return retry_echo(job, retried, SHORTER, Noting).exit_code
        return run_echo(job, Noting).exit_code
    except BatchInferError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:3], **({"job__shard": sys.argv[3]} if len(sys.argv) > 3 else {})))
