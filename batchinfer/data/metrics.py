"""Metrics: what a run tells of itself, to Prometheus and OpenTelemetry. Its numbers are those of the series.

A file for the node exporter's textfile collector (``report.prometheus``), replaced as a whole; the same text for a push
gateway (``report.pushgateway``); a span and gauges through OpenTelemetry's SDK (``report.opentelemetry``), which the
``OTEL_…`` variables configure. Whatever fails there is said once and leaves the run alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import JobError
from batchinfer.job import Job
from batchinfer.log import say

PUSHED = 10.0  # seconds between two pushes
LONGEST = 80  # characters of a label that says why rows fail
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    name: str
    kind: str  # of Prometheus: gauge or counter
    help: str
    value: Callable[[Values], Any]


def _of(key: str) -> Callable[[Values], float | None]:
    return lambda run: run.get(key)


def _rate(*keys: str) -> Callable[[Values], float | None]:
    return lambda run: sum(run[key] for key in keys) / run["seconds"] if run.get("seconds") else None


def _remaining(run: Values) -> float | None:
    if not run.get("computed") or not run.get("seconds"):
        return 0.0 if run.get("rows") == run["total"] else None
    return (run["total"] - run["rows"]) * run["seconds"] / run["computed"]


def _cost(run: Values) -> float | None:
    return run["price_per_hour"] * run.get("seconds", 0.0) / 3600 if run["price_per_hour"] else None


def _failures(run: Values) -> dict[str, int]:
    """By kind, without what is quoted of the rows."""
    told: Counter[str] = Counter()
    for kind, count in (run.get("failures") or {}).items():
        told[_QUOTED.sub("…", kind)[:LONGEST]] += count
    return told


METRICS = (
    Metric("batchinfer_rows", "gauge", "Rows of the job, or of the shard.", _of("total")),
    Metric("batchinfer_rows_done", "gauge", "Rows that need no more work, whichever run did it.", _of("rows")),
    Metric("batchinfer_rows_computed_total", "counter", "Rows that this run has finished.", _of("computed")),
    Metric("batchinfer_rows_failed_total", "counter", "Rows that this run has finished with an error.", _of("failed")),
    Metric("batchinfer_prompt_tokens_total", "counter", "Prompt tokens of finished rows.", _of("prompt_tokens")),
    Metric("batchinfer_completion_tokens_total", "counter", "Tokens of completions.", _of("completion_tokens")),
    Metric("batchinfer_rows_per_second", "gauge", "Since the engine was opened.", _rate("computed")),
    Metric(
        "batchinfer_tokens_per_second",
        "gauge",
        "In and out, since the engine was opened.",
        _rate("prompt_tokens", "completion_tokens"),
    ),
    Metric("batchinfer_running_sequences", "gauge", "Sequences that hold KV pages.", _of("running")),
    Metric("batchinfer_waiting_sequences", "gauge", "Sequences that wait for KV pages.", _of("waiting")),
    Metric("batchinfer_kv_used_ratio", "gauge", "Share of KV pages in use, 0 to 1.", _of("kv_used")),
    Metric("batchinfer_preemptions_total", "counter", "Sequences that gave their KV pages back.", _of("preemptions")),
    Metric("batchinfer_run_seconds", "gauge", "Time since the engine was opened.", _of("seconds")),
    Metric("batchinfer_remaining_seconds", "gauge", "Time that is left at this run's pace.", _remaining),
    Metric("batchinfer_cost", "gauge", "Of this run, at report.price_per_hour.", _cost),
    Metric("batchinfer_running", "gauge", "1 while the run goes on, then 0.", _of("running_now")),
    Metric("batchinfer_exit_code", "gauge", "How the run ended; none while it goes on.", _of("exit_code")),
    Metric("batchinfer_updated_timestamp_seconds", "gauge", "When these numbers were told.", _of("time")),
)
# Each value is a mapping, whose keys are a label's values.
LABELLED = {
    "finish_reason": Metric(
        "batchinfer_completions_total", "counter", "Completions by finish_reason.", _of("finish_reasons")
    ),
    "reason": Metric("batchinfer_failures_total", "counter", "Failed rows by what failed.", _failures),
}


class Exporter:
    """Follows the lines of a run's series and passes the numbers on."""

    def __init__(self, price_per_hour: float) -> None:
        self.values: dict[str, Any] = {"price_per_hour": price_per_hour}
        self.labels: dict[str, str] = {}
        self._failed = False

    def __call__(self, line: Values) -> None:
        """Take note of a line of the series, as series.py describes them."""
        if line["kind"] == "begin":
            self.labels = {name: str(line[name]) for name in ("job", "model", "shard")}
            self.values |= {"total": line["rows"], "rows": line["done"], "running_now": 1}
        elif line["kind"] == "point":
            self.values |= line
        else:
            summary = line.get("summary") or {}
            self.values |= {"running_now": 0, "exit_code": summary.get("exit_code", 1)}
        self.values["time"] = line["time"]
        try:
            self.export(line["kind"])
        except Exception as error:
            if not self._failed:
                say(f"metrics cannot be told ({type(self).__name__}: {error}); the run goes on", "warning")
            self._failed = True

    def export(self, kind: str) -> None:
        raise NotImplementedError

    def told(self) -> Iterator[tuple[Metric, float]]:
        for metric in METRICS:
            with contextlib.suppress(KeyError):
                if (value := metric.value(self.values)) is not None:
                    yield metric, value

    def text(self) -> str:
        """In Prometheus' text format."""
        labels = [f'{name}="{_escaped(value)}"' for name, value in self.labels.items()]
        lines = []
        for metric, value in self.told():
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
            lines.append(f"{metric.name}{{{','.join(labels)}}} {value!r}")
        for label, metric in LABELLED.items():
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
            for value, count in sorted((metric.value(self.values) or {}).items()):
                all_labels = ",".join([*labels, f'{label}="{_escaped(value)}"'])
                lines.append(f"{metric.name}{{{all_labels}}} {count}")
        return "\n".join(lines) + "\n"


class TextFile(Exporter):
    def __init__(self, price_per_hour: float, path: str) -> None:
        super().__init__(price_per_hour)
        self._path = Path(path)

    def export(self, kind: str) -> None:
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")  # which the collector does not read
        temporary.write_text(self.text())
        os.replace(temporary, self._path)


class PushGateway(Exporter):
    def __init__(self, price_per_hour: float, url: str) -> None:
        super().__init__(price_per_hour)
        self._url, self._pushed = url.rstrip("/"), 0.0

    def export(self, kind: str) -> None:
        if kind == "point" and time.monotonic() - self._pushed < PUSHED:
            return
        self._pushed = time.monotonic()
        group = "".join(
            f"/{name}/{urllib.parse.quote(value.replace('/', '-'), safe='')}"
            for name, value in self.labels.items()
            if value and name != "model"
        )
        request = urllib.request.Request(f"{self._url}/metrics{group}", self.text().encode(), method="PUT")
        with urllib.request.urlopen(request, timeout=5):
            pass


class OpenTelemetry(Exporter):
    """A span for the run, and gauges; both through whatever providers the process has, or the environment names."""

    def __init__(self, price_per_hour: float) -> None:
        super().__init__(price_per_hour)
        try:
            from opentelemetry import metrics, trace
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.trace import TracerProvider
        except ImportError as error:
            raise JobError(f'report.opentelemetry needs its SDK: pip install "batchinfer[otel]" ({error})') from None
        if not isinstance(trace.get_tracer_provider(), TracerProvider):
            _use_environment(trace, metrics, TracerProvider, MeterProvider)
        self._flush = [trace.get_tracer_provider().force_flush, metrics.get_meter_provider().force_flush]
        self._tracer, meter = trace.get_tracer("batchinfer"), metrics.get_meter("batchinfer")
        self._gauges = {metric.name: meter.create_gauge(metric.name, description=metric.help) for metric in METRICS}
        self._span: Any = None

    def export(self, kind: str) -> None:
        attributes = {f"batchinfer.{name}": value for name, value in self.labels.items() if value}
        if kind == "begin":
            self._span = self._tracer.start_span("batchinfer.run", attributes=attributes)
        for metric, value in self.told():
            self._gauges[metric.name].set(value, attributes)
        if kind == "end":
            for metric, value in self.told():
                self._span.set_attribute(metric.name.replace("batchinfer_", "batchinfer."), value)
            self._span.end()
            for flush in self._flush:
                flush(5000)


def _use_environment(trace: Any, metrics: Any, tracers: Any, meters: Any) -> None:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = tracers()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(meters([PeriodicExportingMetricReader(OTLPMetricExporter())]))


def exporters(job: Job) -> list[Exporter]:
    """Those that a job asks for.

    Raises: JobError if one needs a library that is missing.
    """
    report, price = job.report, job.report.price_per_hour
    found: list[Exporter] = []
    if report.prometheus:
        found.append(TextFile(price, report.prometheus))
    if report.pushgateway:
        found.append(PushGateway(price, report.pushgateway))
    if report.opentelemetry:
        found.append(OpenTelemetry(price))
    return found


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
