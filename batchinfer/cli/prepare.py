"""Before a run: `doctor`, `init`, `validate`, `plan`, `build`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from batchinfer.cli.shared import json_option, log_format_option, parse_settings, set_option, verbose_option
from batchinfer.errors import ExitCode, JobError


@click.command(short_help="What is installed here, and which engines can run.")
@json_option
@verbose_option
def doctor(as_json: bool) -> None:
    """What is installed on this machine, and which engines can run on it."""
    from batchinfer.doctor import examine

    found = examine()
    click.echo(json.dumps(found.as_dict()) if as_json else str(found))


@click.command()
@click.argument("path", metavar="[JOB.toml]", default="job.toml")
def init(path: str) -> None:
    """Write a commented job file to start from."""
    from batchinfer.job import starter

    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(starter())
    except FileExistsError:
        raise JobError(f"{path} exists already; name another file") from None
    except OSError as error:
        raise JobError(f"cannot write {path}: {error.strerror}") from None
    click.echo(f"wrote {path}; next: edit it, then  batchinfer validate {path}")


@click.command(short_help="Check a job without loading the model.")
@click.argument("job_file", metavar="JOB.toml")
@set_option
@click.option(
    "--rows", default=0, metavar="N", help="Also turn the first N rows into prompts, with the model's tokenizer."
)
@json_option
@verbose_option
def validate(job_file: str, settings: tuple[str, ...], rows: int, as_json: bool) -> None:
    """Check a job against its input and model, without loading the model."""
    from batchinfer.backends import check_engine
    from batchinfer.data.look import check_job
    from batchinfer.job import Job

    job = Job.load(job_file, parse_settings(settings))
    check_engine(job)
    found = check_job(job, rows)
    click.echo(json.dumps(found.as_dict()) if as_json else str(found))
    click.get_current_context().exit(int(ExitCode.FAILED_ROWS if found.failures else ExitCode.OK))


@click.command(short_help="Foretell tokens, time and failures from a sample.")
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

    job = Job.load(job_file, parse_settings(settings))
    found = estimate(job, sample, seed, tok_s)
    click.echo(json.dumps(found.as_dict()) if as_json else str(found))
    if save:
        click.echo(f"kept in {keep(found, job.output.path)}", err=True)


@click.command(short_help="Convert a model once, for runs that start fast.")
@click.argument("job_file", metavar="[JOB.toml]", required=False)
@click.option("-m", "--model", metavar="MODEL", help="Hugging Face folder, .gguf file or name of an installed model.")
@click.option("-o", "--output", metavar="FOLDER", help="Where the engine goes; the cache unless given.")
@click.option("--quantization", metavar="SCHEME", help="How weights are kept: none, fp8, int8, gptq …")
@click.option("--fit", "fitted", metavar="JOB.toml", help="Make a profile for the lengths of this job's rows.")
@click.option("--explain", is_flag=True, help="Show which kernels were timed and chosen; of an engine folder as well.")
@click.option("--calibrate", metavar="JOB.toml", help="Quantise with the prompts of this job; else of the job itself.")
@set_option
@log_format_option
@verbose_option
def build(
    job_file: str | None,
    model: str | None,
    output: str | None,
    quantization: str | None,
    fitted: str | None,
    calibrate: str | None,
    explain: bool,
    settings: tuple[str, ...],
) -> None:
    """Make an engine: convert a model once, for runs that start fast. `run` does it by itself if need be.

    The engine is that of JOB.toml; without one it is that of -m, or else of the job that --fit or --calibrate names.
    Without any job file, --set knows the keys of [engine] and [build] alone.

    \b
    batchinfer build nightly.toml -o engine/
    batchinfer build --fit nightly.toml --quantization int8 -o engine/
    batchinfer build -m MODEL --quantization gptq --calibrate nightly.toml
    batchinfer build --explain engine/
    """
    from batchinfer.backends import build_engine
    from batchinfer.job import Job

    if explain and job_file is not None and Path(job_file, "plan.json").is_file():
        click.echo(_explained(Path(job_file)))
        return
    if job_file is None and model is None:
        job_file = fitted or calibrate
    if job_file is None and model is None:
        raise JobError("nothing to build: name a job file, or a model with -m")
    named = {"model.path": model, "build.quantization": quantization}
    chosen = parse_settings(settings) | {key: value for key, value in named.items() if value is not None}
    job = Job.load(job_file, chosen if job_file is not None else _ANY_JOB | chosen)

    def rows_of(file: str | None) -> Job | None:
        """The job whose rows are looked at, through the tokenizer of the model that is built."""
        if file is None or file == job_file:
            return job if file is not None else None
        return Job.load(file, {"model.path": job.model.path})

    path = build_engine(job, output, calibrate=rows_of(calibrate or job_file), fit=rows_of(fitted))
    click.echo(_explained(path) if explain else str(path))
    if fitted is not None:
        click.echo(f"to run with it: batchinfer run {fitted} --set engine.plan={path}", err=True)


def _explained(path: Path) -> str:
    from batchinfer.engine.plan import EnginePlan

    return EnginePlan.load(path).explain()


_ANY_JOB = {"input.path": "-", "output.path": "-", "model.path": "-", "prompt.template": "-"}
