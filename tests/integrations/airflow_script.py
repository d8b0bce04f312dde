"""Runs in Airflow's own environment and prints what it finds as a last line of JSON.

``nightly DAG_FILE DAY``     ``dag.test()`` for that day: states of the tasks and what they returned
``judge CASES``              runs the operator's command for each case, and says what the task came to; a SIGTERM does
                             what Airflow has it do
``parse DAG_FILE...``        what importing the files costs and brings along
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace


def load(path: str):
    sys.path.insert(0, str(Path(path).parent))
    return importlib.import_module(Path(path).stem)


def dag_of(path: str):
    module = load(path)
    return module.dag if isinstance(getattr(module.dag, "dag_id", None), str) else module.nightly()


def nightly(path: str, day: str) -> dict:
    import pendulum

    dag = dag_of(path)
    for task in dag.tasks:
        getattr(task, "partial_kwargs", vars(task)).update(retry_delay=timedelta(0), retry_exponential_backoff=False)
    when = pendulum.parse(day, tz="UTC")
    try:
        run = dag.test(logical_date=when)
    except TypeError:  # Airflow 2
        run = dag.test(execution_date=when)
    tasks = run.get_task_instances()
    said = {}
    for task in tasks:
        if task.task_id in ("report", "total"):
            said[task.task_id] = task.xcom_pull(task_ids=task.task_id)
    return {
        "state": str(run.state).rpartition(".")[2].lower(),
        "tasks": sorted([task.task_id, task.map_index, str(task.state), task.try_number] for task in tasks),
        "returned": said,
    }


def judge(cases: str) -> list:
    """Each case: the shell command to run instead of batchinfer, and arguments of the operator."""
    from batchinfer.integrations.airflow import AirflowException, AirflowFailException, BatchInferOperator

    def come_to(shell: str, map_index: int = -1, **arguments) -> tuple:
        operator = BatchInferOperator(task_id="t", command=["sh", "-c", shell, "sh"], **arguments)
        signal.signal(signal.SIGTERM, lambda *_: operator.on_kill())
        try:
            return "returned", operator.execute(context(map_index))
        except AirflowFailException as error:
            return "failed for good", str(error)
        except AirflowException as error:
            return "to be tried again", str(error)

    return [come_to(shell, **arguments) for shell, arguments in json.loads(cases)]


def context(map_index: int) -> dict:
    return {"ti": SimpleNamespace(dag_id="dag", task_id="task", map_index=map_index, try_number=3), "run_id": "manual"}


def parse(*paths: str) -> dict:
    import airflow.models  # noqa: F401  (what the scheduler has loaded anyway)

    with contextlib.suppress(ImportError):
        import airflow.sdk  # noqa: F401
    seconds = {}
    for path in paths:
        begun = time.perf_counter()
        load(path)
        seconds[Path(path).name] = round(time.perf_counter() - begun, 3)
    brought = [name for name in ("torch", "transformers", "pyarrow", "polars") if name in sys.modules]

    from airflow.providers_manager import ProvidersManager

    told = ProvidersManager().providers.get("batchinfer")
    return {"seconds": seconds, "brought": brought, "provider": told and [told.data["package-name"], told.version]}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:]), default=str))
