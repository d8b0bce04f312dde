"""`run`: the command that everything else is about."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import click

from batchinfer.cli.shared import (
    WIDTH,
    json_option,
    log_format_option,
    parse_settings,
    say,
    set_option,
    verbose_option,
)
from batchinfer.errors import ExitCode, JobError

if TYPE_CHECKING:
    from batchinfer.data.report import Summary
    from batchinfer.job import Job


@click.command()
@click.argument("job_file", metavar="[JOB.toml]", required=False)
@click.option("-i", "--input", "input_path", multiple=True, metavar="PATH", help="Parquet file, glob, folder or URL.")
@click.option("-o", "--output", "output_path", metavar="FOLDER", help="Where the Parquet parts go, a folder or a URL.")
@click.option("-m", "--model", metavar="MODEL", help="Hugging Face folder, .gguf file or name of an installed model.")
@click.option("--template", help="jinja2 over the row's columns: 'Summarise: {{ text }}'.")
@click.option("--system", help="The system message, jinja2 too.")
@click.option("--messages", metavar="COLUMN", help="A column of chat messages, instead of a template.")
@click.option("--max-tokens", type=int, help="Completion tokens a row.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option(
    "--on-input-change",
    type=click.Choice(["error", "append", "ignore"]),
    help="Files added since the output was begun: refuse, take up last, pass over.",
)
@click.option("--fork", is_flag=True, help="If the job changed, work in OUT-2 (OUT-3, …) instead of refusing.")
@click.option("--deadline", metavar="06:00", help="Stop taking up rows then; or an ISO date and time.")
@click.option("--max-time", metavar="4h", help="Stop taking up rows after that long: 4h, 90m, 1h30m.")
@click.option("--shard", metavar="I/N", help="Share the job with other runs: 0/4 is the first of four; or auto.")
@click.option(
    "--rebuild",
    is_flag=True,
    default=None,
    help="If engine.plan is another device's or version's, build it again in its place.",
)
@click.option("--trace", metavar="FILE", help="Write what the engine did when, for ui.perfetto.dev.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Work on a Ray cluster: --ray=auto, --ray=ray://host:10001; --ray alone starts one on this machine.",
)
@set_option
@json_option
@log_format_option
@click.option("-q", "--quiet", is_flag=True, help="No progress and no table.")
@verbose_option
def run(
    job_file: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    fork: bool,
    ray: str | None,
    **flags: Any,
) -> None:
    """Work through a job; run it again to resume.

    \b
    batchinfer run jobs/demo.toml
    batchinfer run -i prompts.parquet -o out/ -m smollm2-135m-instruct --template "Summarise: {{ text }}"
    """
    from batchinfer.job import Job
    from batchinfer.job.layers import from_environ
    from batchinfer.runner import run as work

    named = {_FLAGS[name]: value for name, value in flags.items() if value not in (None, ())}
    named |= parse_settings(settings)
    if job_file is None and not named and not from_environ(os.environ):
        raise JobError(
            "nothing to run: name a job file (`batchinfer init` writes one), or give -i, -o, -m and --template"
        )
    job = Job.load(job_file, named)
    progress = False if quiet else None
    summary = work(job, progress=progress, fork=fork) if ray is None else _on_ray(job, ray, progress, fork)
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
    elif summary.state == "complete" and not summary.run.rows:
        click.echo(f"The job is complete: {summary}")
    else:
        if not quiet and summary.job.rows:
            click.echo(_first_completions(job, summary))
        click.echo(str(summary))
    if summary.exit_code == ExitCode.FAILED_ROWS:
        limit = job.limits.max_failed_fraction
        say(
            f"{summary.job.failed:,} of {summary.job.rows:,} rows failed, and limits.max_failed_fraction is {limit:g}; "
            f"column {job.output.prefix + 'error'!r} says why"
        )
    click.get_current_context().exit(int(summary.exit_code))


def _on_ray(job: Job, address: str, progress: bool | None, fork: bool) -> Summary:
    if fork:
        raise JobError("--fork does not go with --ray: choose another output.path")
    try:
        from batchinfer.integrations.ray import run_on_ray
    except ImportError as error:
        raise JobError(f'--ray needs Ray on every node: pip install "batchinfer[ray]" ({error})') from None
    return run_on_ray(job, address, progress)


_FLAGS = {
    "input_path": "input.path",
    "output_path": "output.path",
    "model": "model.path",
    "template": "prompt.template",
    "system": "prompt.system",
    "messages": "prompt.messages",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "on_input_change": "input.on_change",
    "deadline": "limits.deadline",
    "max_time": "limits.max_time",
    "rebuild": "build.rebuild",
    "trace": "report.trace",
    "shard": "job.shard",
}


def _first_completions(job: Job, summary: Summary, count: int = 5) -> str:
    """The first rows with what they were asked and what came back, cut to one line a row."""
    import polars as pl

    from batchinfer.data.columns import to_values
    from batchinfer.data.prompt import prompt_columns
    from batchinfer.data.report import first_rows

    table = first_rows(summary.output, count)
    asked = [name for name in (job.input.id_column, *prompt_columns(job.prompt)) if name]
    given = [job.output.prefix + name for name in ("completion", "finish_reason", "error")]
    names = [name for name in dict.fromkeys((*asked, *given)) if name in table.column_names]
    cells = {name: [_one_line(value) for value in to_values(name, table[name])] for name in names}
    if not any(cells.get(given[2], ())):
        cells.pop(given[2], None)
    with pl.Config(
        tbl_hide_column_data_types=True,
        tbl_hide_dataframe_shape=True,
        tbl_formatting="UTF8_FULL",
        tbl_cols=-1,
        fmt_str_lengths=160,
        tbl_width_chars=min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH),
    ):
        return str(pl.DataFrame(cells, dict.fromkeys(cells, pl.String)))


def _one_line(value: Any) -> str | None:
    """A cell for a table. As text, since polars knows neither every type nor broken UTF-8."""
    from batchinfer.data.columns import RowError

    try:
        return None if value is None else " ".join(str(value).split())
    except RowError as error:
        return str(error)
