"""The command line: parse, call, print, exit code. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchinfer import __version__
from batchinfer.errors import BatchInferError, ExitCode, JobError

if TYPE_CHECKING:
    from batchinfer.data.report import Summary
    from batchinfer.job import Job

INTERRUPTED = 130  # by convention, 128 + SIGINT


class Commands(click.Group):
    """Turns failures into one line on stderr and an exit code; a traceback is for `-v` alone."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BatchInferError as error:
            _say(str(error))
            ctx.exit(int(error.exit_code))
        except KeyboardInterrupt:
            _say("interrupted")
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.meta.get("verbose"):
                raise
            _say(f"unexpected {type(error).__name__}: {error}\n  `-v` shows where; please report it")
            ctx.exit(int(ExitCode.CRASH))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="batchinfer")
def main() -> None:
    """Offline batch inference for large language models: Parquet in, Parquet out, resumable.

    Exit codes: 0 ok · 1 crash · 2 wrong usage, job or model · 3 more failed rows than allowed · 4 job or input changed
    since the output was begun · 5 locked by another run · 6 damaged output · 75 stopped early, run again to resume.
    """


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


@main.command()
@click.argument("job_file", metavar="[JOB.toml]", required=False)
@click.option("-i", "--input", "input_path", multiple=True, metavar="PATH", help="Parquet file, glob or folder.")
@click.option("-o", "--output", "output_path", metavar="FOLDER", help="Where the Parquet parts go.")
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
@set_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress and no table.")
@verbose_option
def run(job_file: str | None, settings: tuple[str, ...], as_json: bool, quiet: bool, fork: bool, **flags: Any) -> None:
    """Work through a job; run it again to resume.

    \b
    batchinfer run jobs/demo.toml
    batchinfer run -i prompts.parquet -o out/ -m smollm2-135m-instruct --template "Summarise: {{ text }}"
    """
    from batchinfer.job import Job
    from batchinfer.runner import run as work

    named = {_FLAGS[name]: value for name, value in flags.items() if value not in (None, ())}
    job = Job.load(job_file, named | _parse_settings(settings))
    summary = work(job, progress=False if quiet else None, fork=fork)
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
        _say(
            f"{summary.job.failed:,} of {summary.job.rows:,} rows failed, and limits.max_failed_fraction is {limit:g}; "
            f"column {job.output.prefix + 'error'!r} says why"
        )
    click.get_current_context().exit(int(summary.exit_code))


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
}


@main.command()
@click.argument("job_file", metavar="[JOB.toml]", required=False)
@click.option("-m", "--model", metavar="MODEL", help="Hugging Face folder, .gguf file or name of an installed model.")
@click.option("-o", "--output", metavar="FOLDER", help="Where the engine goes; the cache unless given.")
@set_option
@verbose_option
def build(job_file: str | None, model: str | None, output: str | None, settings: tuple[str, ...]) -> None:
    """Make an engine: convert a model once, for runs that start fast. `run` does it by itself if need be.

    Without a job file, --set knows the keys of [engine] alone.
    """
    from batchinfer.engine.build import build as make
    from batchinfer.job import Job

    chosen = _parse_settings(settings)
    if job_file is not None:
        job = Job.load(job_file, chosen | ({"model.path": model} if model else {}))
        model, engine = job.model.path, job.engine
    elif model is not None:
        engine = Job.load(None, chosen | _ANY_JOB).engine
    else:
        raise JobError("nothing to build: name a job file, or a model with -m")
    click.echo(str(make(model, output, **engine.build_options()).path))


_ANY_JOB = {"input.path": "-", "output.path": "-", "model.path": "-", "prompt.template": "-"}


@main.command()
@click.argument("job_file", metavar="JOB.toml")
@set_option
@click.option(
    "--rows", default=0, metavar="N", help="Also turn the first N rows into prompts, with the model's tokenizer."
)
@json_option
@verbose_option
def validate(job_file: str, settings: tuple[str, ...], rows: int, as_json: bool) -> None:
    """Check a job against its input and model, without loading the model."""
    from batchinfer.data.look import check_job
    from batchinfer.job import Job

    found = check_job(Job.load(job_file, _parse_settings(settings)), rows)
    click.echo(json.dumps(found.as_dict()) if as_json else str(found))
    click.get_current_context().exit(int(ExitCode.FAILED_ROWS if found.failures else ExitCode.OK))


@main.command()
@click.argument("job_file", metavar="JOB.toml")
@set_option
@click.option("--sample", type=click.IntRange(1), default=1000, show_default=True, help="Rows to look at.")
@click.option("--seed", default=0, show_default=True, help="Draws the sample.")
@click.option("--tok-s", type=click.FloatRange(0, min_open=True), help="Tokens a second, in and out, to reckon with.")
@click.option("--save", is_flag=True, help="Keep it beside the output, for `report` to set against what happens.")
@json_option
@verbose_option
def plan(
    job_file: str, settings: tuple[str, ...], sample: int, seed: int, tok_s: float | None, save: bool, as_json: bool
) -> None:
    """Foretell tokens, time and failures from a sample of the rows, without loading the model."""
    from batchinfer.data.estimate import estimate
    from batchinfer.data.estimate import save as keep
    from batchinfer.job import Job

    job = Job.load(job_file, _parse_settings(settings))
    found = estimate(job, sample, seed, tok_s)
    click.echo(json.dumps(found.as_dict()) if as_json else str(found))
    if save:
        click.echo(f"kept in {keep(found, job.output.path)}", err=True)


@main.command()
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@json_option
@verbose_option
def status(job_or_output: str, as_json: bool) -> None:
    """How far a job is, also while it runs."""
    from batchinfer.data.look import standing

    found = standing(_output_of(job_or_output))
    click.echo(json.dumps(found.as_dict()) if as_json else str(found))


@main.command()
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@click.option("-o", "--output", metavar="FILE", help="The page; OUT.batchinfer/report.html unless given.")
@click.option("--samples", type=click.IntRange(0), default=6, show_default=True, help="Completions to show.")
@verbose_option
def report(job_or_output: str, output: str | None, samples: int) -> None:
    """Write a page with plots about an output, also while it is made. It is one HTML file and needs no network."""
    from batchinfer.data.page import page
    from batchinfer.data.survey import survey

    found = survey(_output_of(job_or_output), samples)
    target = Path(output) if output else Path(f"{found.output}.batchinfer", "report.html")
    try:
        target.write_text(page(found), "utf-8")
    except OSError as error:
        raise JobError(f"cannot write {target}: {error.strerror}; -o names another file") from None
    click.echo(str(target))


@main.command()
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@verbose_option
def verify(job_or_output: str) -> None:
    """Read everything committed again and compare checksums and row counts; the manifest too, once it is there."""
    from batchinfer.data.ledger import Ledger
    from batchinfer.data.look import look

    output = look(_output_of(job_or_output)).output
    with Ledger(output) as ledger:
        click.echo(f"{ledger.verify():,} rows in {len(ledger.commits):,} part(s) as they were committed · {output}")


@main.command("export-openai")
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

    job = Job.load(job_file, _parse_settings(settings))
    done = export_requests(
        job, output, model or job.model.name, lambda row, why: _say(f"row {row} cannot be asked: {why}")
    )
    if done.unspoken:
        _say(f"left out, as the API has no word for them: sampling.{', sampling.'.join(done.unspoken)}")
    if as_json:
        files = [str(path) for path in done.files]
        click.echo(json.dumps({"files": files, "requests": done.requests, "failed": done.failed}))
    else:
        failed = f" ({done.failed:,} rows cannot be asked)" if done.failed else ""
        click.echo(f"{done.requests:,} requests{failed} · {' '.join(map(str, done.files))}")
    too_many = done.failed > job.limits.max_failed_fraction * done.rows
    click.get_current_context().exit(int(ExitCode.FAILED_ROWS if too_many else ExitCode.OK))


@main.command("import-openai")
@click.argument("job_file", metavar="JOB.toml")
@click.argument("results", metavar="RESULTS.jsonl...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the Parquet parts go.")
@set_option
@json_option
@verbose_option
def import_openai(
    job_file: str, results: tuple[str, ...], output: str, settings: tuple[str, ...], as_json: bool
) -> None:
    """Make an output of a job from result and error files of OpenAI's batch API, as if it had been run."""
    from batchinfer.data.openai_results import import_results
    from batchinfer.job import Job

    summary = import_results(Job.load(job_file, _parse_settings(settings) | {"output.path": output}), results)
    click.echo(json.dumps(summary.as_dict()) if as_json else str(summary))
    click.get_current_context().exit(int(summary.exit_code))


@main.command()
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
@json_option
@verbose_option
def vacuum(job_or_output: str, dry_run: bool, as_json: bool) -> None:
    """Remove what killed runs left behind and no commit refers to."""
    from batchinfer.data.vacuum import vacuum as clean

    done = clean(_output_of(job_or_output), dry_run)
    click.echo(json.dumps(done.as_dict()) if as_json else str(done))


@main.command()
@click.argument("path", metavar="[JOB.toml]", default="job.toml")
def init(path: str) -> None:
    """Write a commented job file to start from."""
    from batchinfer.job import starter

    target = Path(path)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(starter())
    except FileExistsError:
        raise JobError(f"{path} exists already; name another file") from None
    except OSError as error:
        raise JobError(f"cannot write {path}: {error.strerror}") from None
    click.echo(f"wrote {path}; next: edit it, then  batchinfer validate {path}")


@main.group()
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


def _parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    from batchinfer.job import parse_value

    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or "." not in key:
            raise JobError(f"--set wants section.key=value, found {setting!r}")
        values[key.strip()] = parse_value(value)
    return values


def _output_of(job_or_output: str) -> str:
    from batchinfer.job import Job

    path = Path(job_or_output)
    return Job.load(path).output.path if path.suffix == ".toml" and not path.is_dir() else job_or_output


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
        tbl_width_chars=110,
    ):
        return str(pl.DataFrame(cells, dict.fromkeys(cells, pl.String)))


def _one_line(value: Any) -> str | None:
    """A cell for a table. As text, since polars knows neither every type nor broken UTF-8."""
    from batchinfer.data.columns import RowError

    try:
        return None if value is None else " ".join(str(value).split())
    except RowError as error:
        return str(error)


def _say(message: str) -> None:
    click.echo(f"batchinfer: {message}", err=True)


if __name__ == "__main__":
    main()
