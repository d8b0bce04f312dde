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
@click.option("--threads", default=0, help="0: an even share of the cores this process may use.")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Ranks that share each layer.")
@click.option("--pp", type=click.IntRange(1), default=1, show_default=True, help="Stages the layers are dealt to.")
@click.option("--micro-batches", type=click.IntRange(0), default=0, help="Steps under way at once; 0: one a stage.")
@click.option("--batch-size", type=click.IntRange(0), default=0, help="Sequences that run at once; 0: a default.")
@verbose_option
def bench_engine(**options: Any) -> None:
    """Tokens a second of the engine alone, on chat-like requests."""
    from batchinfer.bench import engine

    click.echo(json.dumps(engine(**options)))


@bench.command("pipeline", short_help="Rows a second of everything but the engine.")
@model_option
@click.option("--rows", type=click.IntRange(1), default=50_000, show_default=True)
@repeats_option
@verbose_option
def bench_pipeline(**options: Any) -> None:
    """Rows a second of everything around the engine, beside a bare read, tokenize, write loop."""
    from batchinfer.bench import pipeline

    click.echo(json.dumps(pipeline(**options)))


@bench.command("pipeline-sim", short_help="Stages measured, simulated and foretold.")
@model_option
@click.option("--requests", type=click.IntRange(8), default=256, show_default=True)
@click.option("--gpus", is_flag=True, help="Only foretell a 70B model on 8 and 32 GPUs, by arithmetic.")
@verbose_option
def bench_pipeline_sim(model: str, requests: int, gpus: bool) -> None:
    """Two pipeline stages measured here and simulated, then up to 16 foretold from what layers and head cost."""
    from batchinfer.bench_pipeline import foretell_gpus, pipeline_sim

    click.echo(
        json.dumps({"bench": "pipeline-sim", "foretold": foretell_gpus()} if gpus else pipeline_sim(model, requests))
    )
