"""`bench`: measure this machine."""

from __future__ import annotations

import json
from typing import Any

import click

from batchinfer.cli.shared import verbose_option


@click.group()
def bench() -> None:
    """Measure this machine; each prints one JSON line."""


model_option = click.option("-m", "--model", default="smollm2-135m-instruct", show_default=True, metavar="MODEL")

repeats_option = click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)


@bench.command("engine")
@model_option
@click.option("--requests", type=click.IntRange(1), default=256, show_default=True)
@repeats_option
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--threads", default=0, help="0: all cores this process may use.")
@verbose_option
def bench_engine(**options: Any) -> None:
    """Tokens a second of the engine alone, on chat-like requests."""
    from batchinfer.bench import engine

    click.echo(json.dumps(engine(**options)))


@bench.command("pipeline")
@model_option
@click.option("--rows", type=click.IntRange(1), default=50_000, show_default=True)
@repeats_option
@verbose_option
def bench_pipeline(**options: Any) -> None:
    """Rows a second of everything around the engine, beside a bare read, tokenize, write loop."""
    from batchinfer.bench import pipeline

    click.echo(json.dumps(pipeline(**options)))
