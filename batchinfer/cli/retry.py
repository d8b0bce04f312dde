"""`retry`: rows of an output answered again."""

from __future__ import annotations

import json

import click

from batchinfer.cli.shared import json_option, log_format_option, parse_settings, say, set_option, verbose_option
from batchinfer.errors import ExitCode


@click.command(short_help="Answer some rows of an output again.")
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@click.option("--where", metavar="SQL", help="Which rows, over the output's columns; those with an error unless given.")
@click.option("--deadline", metavar="06:00", help="Stop taking up rows then; or an ISO date and time.")
@click.option("--max-time", metavar="4h", help="Stop taking up rows after that long: 4h, 90m, 1h30m.")
@click.option("--dry-run", is_flag=True, help="Only tell how many rows it would be.")
@set_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@log_format_option
@verbose_option
def retry(
    job_or_output: str,
    where: str | None,
    deadline: str | None,
    max_time: str | None,
    dry_run: bool,
    settings: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Answer some rows of an output again, with other settings if need be. Run it again to resume.

    New results take the place of the old ones; a row that fails again keeps the completion that it had.

    \b
    batchinfer retry out/ --where "finish_reason = 'length'" --set sampling.max_tokens=512
    batchinfer retry jobs/demo.toml --dry-run
    """
    from batchinfer import retrier

    limits = {"limits.deadline": deadline, "limits.max_time": max_time}
    overrides = {key: value for key, value in limits.items() if value} | parse_settings(settings)
    if dry_run:
        chosen = retrier.dry_run(job_or_output, where, overrides)
        click.echo(json.dumps(chosen.as_dict()) if as_json else str(chosen))
        return
    summary = retrier.retry(job_or_output, where, overrides, progress=False if quiet else None)
    click.echo(json.dumps(summary.as_dict()) if as_json else str(summary))
    if summary.exit_code == ExitCode.FAILED_ROWS:
        say(f"{summary.job.failed:,} of {summary.job.rows:,} rows fail, more than limits.max_failed_fraction allows")
    click.get_current_context().exit(int(summary.exit_code))
