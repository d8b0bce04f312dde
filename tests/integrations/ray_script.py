"""A job on a local Ray of two CPUs: ``python -m tests.integrations.ray_script FOLDER``. Prints the summary as JSON.

Its engines are slow echoes, whose processes are noted in FOLDER/answers.pids; or one of two stages, each of which might
be on a node of its own, where there is a FOLDER/model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from batchinfer.errors import BatchInferError
from batchinfer.job import Job
from tests.echo_jobs import echo_job

CPUS = 2


def stages_job(folder: Path, **changes: Any) -> Job:
    return echo_job(
        folder,
        folder / "in",
        model__path=str(folder / "model"),
        engine__backend="native",
        engine__dtype="float32",
        engine__pp=2,
        engine__threads=1,
        engine__profile={"seq_len": 128, "batch_size": 8},
        sampling__max_tokens=24,
        **changes,
    )


def main() -> int:
    import ray

    from batchinfer.integrations.ray import run_on_ray

    folder = Path(sys.argv[1])
    spread = (folder / "model").exists()
    slow = {
        "worker_process_setup_hook": "tests.slow_echo.install",
        "env_vars": {"SLOW_ECHO_NOTES": str(folder / "answers")},
    }
    ray.init(num_cpus=CPUS, include_dashboard=False, log_to_driver=False, runtime_env={} if spread else slow)
    job = stages_job(folder, ray__nodes=2) if spread else echo_job(folder, folder / "in", sampling__temperature=1.0)
    print("begun", os.getpid(), flush=True)
    try:
        summary = run_on_ray(job)
    except BatchInferError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(summary.as_dict()))
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
