"""What a run tells to those who watch many: numbers that are those of its summary, and nothing of its rows."""

from __future__ import annotations

import http.server
import json
import re
import threading
from pathlib import Path

import pytest

from batchinfer import log
from batchinfer.backends.echo import EchoBackend
from batchinfer.data.metrics import LABELLED, METRICS, Exporter, TextFile
from batchinfer.request import Completion
from tests.echo_jobs import echo_job, run_echo, texts, write

ROOT = Path(__file__).parents[2]
LINE = re.compile(r'(\w+)\{job="([^"]*)",model="([^"]*)",shard="([^"]*)"(?:,(?:finish_)?reason="([^"]+)")?\} (\S+)')


class Failing(EchoBackend):
    """Fails every tenth row."""

    def generate(self, requests):
        for number, completion in enumerate(super().generate(requests)):
            yield (
                Completion(completion.key, prompt_tokens=3, error="no luck with 'row number', 3 of 4")
                if number % 10 == 9
                else completion
            )


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "in.parquet", texts(200))
    return tmp_path


def read(text: str) -> dict[str, float]:
    """Value by name, and by name and reason where there is one."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    return {f"{m[1]}/{m[5]}" if m[5] else m[1]: float(m[6]) for m in found}


def test_the_text_file_ends_with_the_numbers_of_the_summary(folder):
    job = echo_job(folder, report__prometheus=str(folder / "run.prom"), report__price_per_hour=36.0)
    summary = run_echo(job, Failing)
    text = (folder / "run.prom").read_text()
    told = read(text)
    assert told["batchinfer_rows"] == told["batchinfer_rows_done"] == told["batchinfer_rows_computed_total"] == 200
    assert told["batchinfer_rows_failed_total"] == summary.run.failed == 20
    assert told["batchinfer_completions_total/error"] == 20
    assert told["batchinfer_failures_total/no luck with …, N of N"] == 20
    assert summary.as_dict()["job"]["failures"] == {"no luck with 'row number', N of N": 20}
    assert told["batchinfer_prompt_tokens_total"] == summary.run.prompt_tokens
    assert told["batchinfer_completion_tokens_total"] == summary.run.completion_tokens
    assert told["batchinfer_running"] == 0 and told["batchinfer_exit_code"] == summary.exit_code
    assert told["batchinfer_remaining_seconds"] == 0
    assert told["batchinfer_cost"] == pytest.approx(told["batchinfer_run_seconds"] / 100)
    for name in {name.partition("/")[0] for name in told}:
        assert f"# TYPE {name} " in text and f"# HELP {name} " in text
    assert "row number" not in text and list(folder.glob("*.tmp")) == []


def test_rates_and_time_left_follow_from_the_points():
    exporter = Exporter(price_per_hour=2.0)
    exporter.export = lambda kind: None
    exporter({"kind": "begin", "time": 1, "job": "a", "model": "m", "shard": "0/2", "rows": 1000, "done": 100})
    counts = {
        "failed": 3,
        "prompt_tokens": 4000,
        "completion_tokens": 1000,
        "running": 8,
        "waiting": 0,
        "preemptions": 0,
    }
    exporter({"kind": "point", "time": 11, "seconds": 10.0, "rows": 300, "computed": 200, "kv_used": 0.5, **counts})
    told = {metric.name: value for metric, value in exporter.told()}
    assert told["batchinfer_rows_per_second"] == 20 and told["batchinfer_tokens_per_second"] == 500
    assert told["batchinfer_remaining_seconds"] == 35 and told["batchinfer_kv_used_ratio"] == 0.5
    assert told["batchinfer_cost"] == pytest.approx(2.0 * 10 / 3600)
    assert told["batchinfer_running"] == 1 and "batchinfer_exit_code" not in told


def test_labels_are_escaped(tmp_path):
    exporter = TextFile(0.0, str(tmp_path / "a.prom"))
    exporter({"kind": "begin", "time": 1, "job": 'a"\n\\', "model": "m", "shard": "", "rows": 1, "done": 0})
    assert r'job="a\"\n\\"' in (tmp_path / "a.prom").read_text()


def test_a_push_gateway_gets_the_last_word(folder):
    got = []

    class Gateway(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Silence."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        run_echo(echo_job(folder, report__pushgateway=url, job__name="night ly", job__shard="0/1"))
    finally:
        server.shutdown()
    path, text = got[-1]
    assert path == "/metrics/job/night%20ly/shard/0-1"
    assert read(text)["batchinfer_rows_computed_total"] == 200 and read(text)["batchinfer_running"] == 0


def test_what_cannot_be_told_is_said_once_and_leaves_the_run_alone(folder, capsys):
    job = echo_job(folder, report__prometheus=str(folder / "missing" / "run.prom"))
    assert run_echo(job).exit_code == 0
    assert capsys.readouterr().err.count("metrics cannot be told") == 1


def test_the_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads((ROOT / "jobs" / "grafana_dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in dashboard["templating"]["list"]]
    names = set(re.findall(r"batchinfer_\w+", " ".join(asked)))
    assert len(names) > 8 and names <= {metric.name for metric in (*METRICS, *LABELLED.values())}


def test_a_span_and_gauges_go_through_the_sdk(folder):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, reader, provider = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([reader]))
    run_echo(echo_job(folder, report__opentelemetry=True))
    [span] = spans.get_finished_spans()
    assert span.name == "batchinfer.run" and span.attributes["batchinfer.rows_computed_total"] == 200
    data = json.loads(reader.get_metrics_data().to_json())
    told = {m["name"] for r in data["resource_metrics"] for s in r["scope_metrics"] for m in s["metrics"]}
    assert {"batchinfer_rows_done", "batchinfer_kv_used_ratio"} <= told


def test_log_lines_are_json_objects_if_wanted():
    assert log.line("hello\nthere") == "batchinfer: hello\nthere\n"
    log.use("json")
    try:
        [line] = log.line("héllo\nthere", "warning", rows=3).splitlines()
    finally:
        log.use("text")
    told = json.loads(line)
    assert told.pop("time").endswith("Z")
    assert told == {"level": "warning", "message": "héllo\nthere", "rows": 3}
