"""A job with slow echo engines on a local Ray of two CPUs: ``python -m tests.integrations.ray_script FOLDER``.

The engines' processes are noted in FOLDER/answers.pids. Prints the summary as a last line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray

from batchinfer.errors import BatchInferError
from batchinfer.integrations.ray import run_on_ray
from tests.echo_jobs import echo_job

CPUS = 2


def main() -> int:
    folder = Path(sys.argv[1])
    hook = "tests.slow_echo.install"
    ray.init(
        num_cpus=CPUS,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": hook, "env_vars": {"SLOW_ECHO_NOTES": str(folder / "answers")}},
    )
    job = echo_job(folder, folder / "in", sampling__temperature=1.0, report__log_seconds=0.5)
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
