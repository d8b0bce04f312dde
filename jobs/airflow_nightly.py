"""Every night at one: the day's prompts through the model, in shards beside each other, then a report. Copy and adapt.

    $NIGHTLY_ROOT/prompts/day=2026-01-31/*.parquet  →  $NIGHTLY_ROOT/answers/day=2026-01-31/*.parquet

batchinfer may live in an environment of its own: BATCHINFER says where its command is. Airflow's own environment needs
the package for the operator alone: `pip install --no-deps batchinfer`.
"""

from __future__ import annotations

import os
import subprocess
from datetime import datetime, timedelta

try:
    from airflow.sdk import DAG, CronDataIntervalTimetable, task
except ImportError:  # Airflow 2
    from airflow.decorators import task
    from airflow.models import DAG
    from airflow.timetables.interval import CronDataIntervalTimetable

from batchinfer.integrations.airflow import BatchInferOperator, BatchInferSuccessSensor

ROOT = os.environ.get("NIGHTLY_ROOT", "/data")
JOB = os.environ.get("NIGHTLY_JOB", "/opt/airflow/jobs/nightly.toml")
COMMAND = os.environ.get("BATCHINFER", "batchinfer").split()
SHARDS = int(os.environ.get("NIGHTLY_SHARDS", 4))  # each is a task, and a slot of the pool where GPUs are counted
OUTPUT = ROOT + "/answers/day={{ data_interval_start | ds }}"


@task
def report(manifests: list[dict]) -> dict:
    """One page about the output, and its totals for whoever comes next."""
    output = manifests[0]["output"]
    subprocess.run([*COMMAND, "report", output], check=True)
    totals = {name: sum(manifest[name] for manifest in manifests) for name in ("rows", "failed", "completion_tokens")}
    return {"output": output, "page": f"{output}.batchinfer/report.html", **totals}


with DAG(
    "batchinfer_nightly",
    schedule=CronDataIntervalTimetable("0 1 * * *", timezone="UTC"),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 5, "retry_delay": timedelta(minutes=2), "retry_exponential_backoff": True},
    doc_md=__doc__,
) as dag:
    answers = BatchInferOperator.partial(
        task_id="infer",
        job=JOB,
        input_path=ROOT + "/prompts/day={{ data_interval_start | ds }}",
        output_path=OUTPUT,
        num_shards=SHARDS,
        command=COMMAND,
        # pool="gpus",
    ).expand(shard=list(range(SHARDS)))
    complete = BatchInferSuccessSensor(task_id="complete", output_path=OUTPUT, timeout=60)

    answers >> complete >> report(answers.output)
