"""What several commands share: options, and how they read and speak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from batchinfer import log
from batchinfer.errors import JobError

WIDTH = 110  # columns of text, on a terminal that has as many


def _note_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["verbose"] = value
    if value:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)


set_option = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key: engine.threads=2.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout instead of text.")
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_note_verbose, help="Log more; show tracebacks."
)


log_format_option = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    expose_value=False,
    is_eager=True,
    callback=lambda _, __, value: log.use(value),
    help="What is said on stderr: lines for people, or a JSON object a line.",
)


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    from batchinfer.job import parse_value

    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or "." not in key:
            raise JobError(f"--set wants section.key=value, found {setting!r}")
        values[key.strip()] = parse_value(value)
    return values


def output_of(job_or_output: str) -> str:
    from batchinfer.job import Job

    path = Path(job_or_output)
    return Job.load(path).output.path if path.suffix == ".toml" and not path.is_dir() else job_or_output


def say(message: str) -> None:
    click.echo(log.line(message, "error"), err=True, nl=False)
