"""To a hosted model and back: `export-openai`, `import-openai`."""

from __future__ import annotations

import json

import click

from batchinfer.cli.shared import json_option, parse_settings, say, set_option, verbose_option
from batchinfer.errors import ExitCode
from batchinfer.words import counted


@click.command("export-openai", short_help="Prompts as requests of OpenAI's batch API.")
@click.argument("job_file", metavar="JOB.toml")
@click.option("-o", "--output", required=True, metavar="BATCH.jsonl", help="Where the requests go; more files beside.")
@click.option("--model", metavar="NAME", help="What the service calls the model; the job's model unless given.")
@set_option
@json_option
@verbose_option
def export_openai(job_file: str, output: str, model: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Write a job's prompts as request lines of OpenAI's batch API.

    Rows that cannot be asked are told on stderr; more of them than limits.max_failed_fraction end in exit code 3.
    """
    from batchinfer.data.openai_batch import export_requests
    from batchinfer.job import Job

    job = Job.load(job_file, parse_settings(settings))
    done = export_requests(
        job, output, model or job.model.name, lambda row, why: say(f"row {row} cannot be asked: {why}")
    )
    if done.unspoken:
        say(f"left out, as the API has no word for them: sampling.{', sampling.'.join(done.unspoken)}")
    if as_json:
        files = [str(path) for path in done.files]
        click.echo(json.dumps({"files": files, "requests": done.requests, "failed": done.failed}))
    else:
        failed = f" ({counted(done.failed, 'row')} cannot be asked)" if done.failed else ""
        click.echo(f"{counted(done.requests, 'request')}{failed} · {' '.join(map(str, done.files))}")
    too_many = done.failed > job.limits.max_failed_fraction * done.rows
    click.get_current_context().exit(int(ExitCode.FAILED_ROWS if too_many else ExitCode.OK))


@click.command("import-openai", short_help="Results of OpenAI's batch API as an output.")
@click.argument("job_file", metavar="JOB.toml")
@click.argument("results", metavar="RESULTS.jsonl...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the Parquet parts go, a folder or a URL.")
@set_option
@json_option
@verbose_option
def import_openai(
    job_file: str, results: tuple[str, ...], output: str, settings: tuple[str, ...], as_json: bool
) -> None:
    """Make an output of a job from result and error files of OpenAI's batch API, as if it had been run."""
    from batchinfer.data.openai_results import import_results
    from batchinfer.job import Job

    summary = import_results(Job.load(job_file, parse_settings(settings) | {"output.path": output}), results)
    click.echo(json.dumps(summary.as_dict()) if as_json else str(summary))
    click.get_current_context().exit(int(summary.exit_code))
