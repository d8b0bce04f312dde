"""Airflow 2.10+ and 3.x: an operator that runs a job, a sensor that waits for a complete output.

Airflow keeps its own Python environment: nothing but the standard library is imported here, and the job runs as a
command, in the environment that ``command`` names, in a process group of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

from batchinfer.errors import ExitCode
from batchinfer.integrations.child import Child

try:
    from airflow.sdk import BaseOperator, BaseSensorOperator
except ImportError:  # Airflow 2
    from airflow.models import BaseOperator
    from airflow.sensors.base import BaseSensorOperator
try:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException
except ImportError:
    from airflow.exceptions import AirflowException, AirflowFailException

COMMAND = (sys.executable, "-m", "batchinfer")
HOPELESS = (ExitCode.USAGE, ExitCode.DRIFT, ExitCode.INTEGRITY)  # the same again would end the same way
LAST_LINES = 5  # of its messages, told with a failure


class BatchInferOperator(BaseOperator):
    """Work through a job; a retry of the task, and a task cleared and run again, resume it.

    A run that stopped early, is locked out by another, or dies raises AirflowException: Airflow retries as often as
    the task allows. A wrong, changed or damaged job raises AirflowFailException: nobody need try again. What it returns
    (XCom) is a few numbers and where the output lies, never a row.

    Args:
        job: the job file.
        input_path, output_path, model: instead of those of the job file. Name the data interval in both paths.
        overrides: other keys of the job, as ``--set`` takes them.
        shard, num_shards: do one of several shares of the job, counted from 0; for ``.expand(shard=...)``.
        env: added to the environment of the command, which is the worker's own. Never logged.
        command: what to start, ``["/opt/batchinfer/bin/batchinfer"]`` for one that lives in another environment.
        cwd: the folder that relative paths count from.
        on_failed_rows: what becomes of a finished job with more failed rows than limits.max_failed_fraction.
        stop_seconds: how long a task that is killed waits for running rows before it kills them too. They are computed
            again then; no finished row is lost either way.
    """

    template_fields: ClassVar[Sequence[str]] = (
        "job", "input_path", "output_path", "model", "overrides", "shard", "num_shards", "env",
    )  # fmt: skip
    template_fields_renderers: ClassVar[dict[str, str]] = {"overrides": "json", "env": "json"}
    ui_color = "#dfe8f5"

    def __init__(
        self,
        *,
        job: str | None = None,
        input_path: str | None = None,
        output_path: str | None = None,
        model: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        shard: int | str | None = None,
        num_shards: int | str | None = None,
        env: Mapping[str, str] | None = None,
        command: str | Sequence[str] = COMMAND,
        cwd: str | None = None,
        on_failed_rows: Literal["fail", "retry", "accept"] = "fail",
        stop_seconds: float = 60.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job, self.model = job, model
        self.input_path, self.output_path = input_path, output_path
        self.overrides, self.env = overrides, env
        self.shard, self.num_shards = shard, num_shards
        self.command, self.cwd = command, cwd
        self.on_failed_rows, self.stop_seconds = on_failed_rows, stop_seconds
        self._child: Child | None = None
        self._killed = False

    def execute(self, context: Any) -> dict[str, Any]:
        command = [*([self.command] if isinstance(self.command, str) else self.command), *self._arguments(context)]
        shown = (word.partition("=")[0] + "=…" if before == "--set" else word for before, word in pairwise(command))
        self.log.info("running %s", shlex.join([command[0], *shown]))  # settings may hold what nobody should read
        last: list[str] = []
        self._child = child = Child(command, self.env, self.cwd)
        if self._killed:  # while it was being started
            child.stop(self.stop_seconds)
        for line in child.lines():
            self.log.info("%s", line)
            last = [*last[1 - LAST_LINES :], line]
        return self._judged(child.wait(), child.answer(), "\n".join(last))

    def on_kill(self) -> None:
        self._killed = True
        if self._child is not None:
            self.log.info("stopping process group %s", self._child.pid)
            self._child.stop(self.stop_seconds)

    def _arguments(self, context: Any) -> list[str]:
        if (self.shard is None) != (self.num_shards is None):
            raise AirflowFailException("shard and num_shards go together: give both or neither")
        named = {"-i": self.input_path, "-o": self.output_path, "-m": self.model}
        if self.shard is not None:
            named["--shard"] = f"{self.shard}/{self.num_shards}"
        settings = {"job.name": job_name(context, mapped=self.shard is None), **(self.overrides or {})}
        return [
            "run",
            *([self.job] if self.job else []),
            *(word for flag, value in named.items() if value is not None for word in (flag, str(value))),
            *(word for key, value in settings.items() for word in ("--set", f"{key}={_toml(value)}")),
            "--json",
        ]

    def _judged(self, code: int, summary: dict[str, Any] | None, said: str) -> dict[str, Any]:
        """What the task returns, or raises."""
        if summary is not None:
            manifest = manifest_of(summary)
            if code == ExitCode.OK or code == ExitCode.FAILED_ROWS and self.on_failed_rows == "accept":
                return manifest
            said = f"{manifest}\n{said}"
        told = f"batchinfer ended with exit code {code}{_meaning(code)}:\n{said}"
        if code in HOPELESS or code == ExitCode.FAILED_ROWS and self.on_failed_rows == "fail":
            raise AirflowFailException(told)
        raise AirflowException(told)


class BatchInferSuccessSensor(BaseSensorOperator):
    """Wait until an output is complete: for its ``_SUCCESS``, which is there as long as every row is.

    Args:
        output_path: a folder, or a URL that Airflow's object storage knows (``s3://conn@bucket/out``).
    """

    template_fields: ClassVar[Sequence[str]] = ("output_path",)

    def __init__(self, *, output_path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.output_path = output_path

    def poke(self, context: Any) -> bool:
        success = f"{self.output_path.rstrip('/')}.batchinfer/_SUCCESS"
        self.log.info("looking for %s", success)
        if "://" not in success:
            return os.path.exists(success)
        try:
            from airflow.sdk import ObjectStoragePath
        except ImportError:
            from airflow.io.path import ObjectStoragePath
        return ObjectStoragePath(success).exists()


def job_name(context: Any, mapped: bool = True) -> str:
    """What the job is called: the same in each try of a task. ``mapped``: mapped tasks do jobs of their own."""
    task = context["ti"]
    index = task.map_index if mapped else -1
    return ".".join([task.dag_id, task.task_id, context["run_id"], *([str(index)] if index >= 0 else [])])


def manifest_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a summary that other tasks want to know."""
    whole = summary.get("whole") or summary
    counts = {name: summary["job"][name] for name in ("rows", "ok", "failed", "skipped")}
    tokens = {name: summary["job"][name] for name in ("prompt_tokens", "completion_tokens")}
    return {
        "output": summary["output"],
        "shard": summary.get("shard"),
        "complete": whole["state"] == "complete",
        "manifest": f"{summary['output']}.batchinfer/manifest.json",
        **counts,
        **tokens,
        "seconds": summary["run"]["seconds"],
        "tokens_per_second": summary["run"]["tokens_per_second"]["total"],
    }


def _toml(value: Any) -> str:
    """A value as it is typed after ``--set key=``. Text stays as it is, since templates give nothing else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _meaning(code: int) -> str:
    try:
        return f" ({ExitCode(code).name})"
    except ValueError:
        return f" (signal {-code})" if code < 0 else ""
