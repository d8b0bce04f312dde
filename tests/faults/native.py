"""A run of the native engine to be hurt: ``python -m tests.faults.native MODEL FOLDER ENGINE [KEY=VALUE...]``.

ENGINE opens the engine in its process: ``plain``, or ``poisoned``, to which a row with MARK in its prompt is fatal as a
bad kernel is. Each engine's process id goes to FOLDER/engines. ``begun`` is printed when the first engine is open.
"""

from __future__ import annotations

import ctypes
import os
import sys
from unittest import mock

from batchinfer.backends.process import ProcessBackend
from batchinfer.errors import BatchInferError
from batchinfer.job import Job, parse_value
from batchinfer.runner import run

MARK = "Zyx"
ENGINES = "BATCHINFER_TEST_ENGINES"  # environment variable: the file of process ids


def plain(job, progress):
    from batchinfer.backends.native import NativeBackend

    with open(os.environ[ENGINES], "a") as file:
        print(os.getpid(), file=file)
    return NativeBackend.open(job, progress)


def poisoned(job, progress):
    backend = plain(job, progress)
    plain_generate, mark = backend.generate, backend.engine.text.encode(MARK)

    def generate(requests):
        under_way = set()

        def line():
            for request in requests:
                strike()
                if request is not None and holds(list(request.prompt_token_ids), mark):
                    under_way.add(request.key)
                yield request

        def strike():
            if under_way:
                ctypes.string_at(0)

        for completion in plain_generate(line()):
            strike()
            yield completion

    backend.generate = generate
    return backend


def holds(ids: list[int], mark: list[int]) -> bool:
    return any(ids[i : i + len(mark)] == mark for i in range(len(ids)))


def main() -> int:
    model, folder, engine, *settings = sys.argv[1:]
    os.environ[ENGINES] = f"{folder}/engines"
    told = {
        "input.path": f"{folder}/in.parquet",
        "prompt.template": "{{ text }}",
        "prompt.chat": "off",
        "sampling.max_tokens": 12,
        "sampling.ignore_eos": True,
        "model.path": model,
        "engine.dtype": "float32",
        "engine.profile.batch_size": 8,
        "output.path": f"{folder}/out",
        "checkpoint.unit_rows": 16,
        "checkpoint.sync_seconds": 0.05,
    }
    more = {key: parse_value(value) for key, _, value in (setting.partition("=") for setting in settings)}

    def open_backend(job, progress):
        backend = ProcessBackend(job, True, f"tests.faults.native:{engine}")
        print("begun", flush=True)
        return backend

    try:
        with (
            mock.patch("batchinfer.runner.open_backend", open_backend),
            mock.patch("batchinfer.backends.child.OPENING", 100),  # times a short time-out, and a machine may be busy
        ):
            summary = run(Job.load(None, told | more, {}), progress=False)
        print(summary)
        return summary.exit_code
    except BatchInferError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
