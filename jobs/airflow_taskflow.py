"""The nightly job in TaskFlow style: as many shards as the day has files, and a summary that the next task reads.

See airflow_nightly.py for what the environment says.
"""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

try:
    from airflow.sdk import CronDataIntervalTimetable, dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.timetables.interval import CronDataIntervalTimetable

from batchinfer.integrations.airflow import BatchInferOperator

ROOT = os.environ.get("NIGHTLY_ROOT", "/data")
JOB = os.environ.get("NIGHTLY_JOB", "/opt/airflow/jobs/nightly.toml")
COMMAND = os.environ.get("BATCHINFER", "batchinfer").split()
MOST_SHARDS = 8


@dag(
    "batchinfer_taskflow",
    schedule=CronDataIntervalTimetable("0 1 * * *", timezone="UTC"),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    default_args={"retries": 5, "retry_delay": timedelta(minutes=2)},
)
def nightly():
    @task
    def shards(data_interval_start=None) -> list[dict]:
        day = f"day={data_interval_start:%Y-%m-%d}"
        count = min(MOST_SHARDS, len(list(Path(ROOT, "prompts", day).rglob("*.parquet")))) or 1
        where = {"input_path": f"{ROOT}/prompts/{day}", "output_path": f"{ROOT}/answers/{day}"}
        return [{"shard": index, "num_shards": count, **where} for index in range(count)]

    @task
    def total(manifests: list[dict]) -> dict:
        return {name: sum(manifest[name] for manifest in manifests) for name in ("rows", "failed", "completion_tokens")}

    infer = BatchInferOperator.partial(task_id="infer", job=JOB, command=COMMAND)
    total(infer.expand_kwargs(shards()).output)


nightly()
