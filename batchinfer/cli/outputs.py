"""About an output: `status`, `report`, `verify`, `vacuum`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from batchinfer.cli.shared import json_option, output_of, verbose_option
from batchinfer.errors import JobError
from batchinfer.words import counted


@click.command()
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@json_option
@verbose_option
def status(job_or_output: str, as_json: bool) -> None:
    """How far a job is, also while it runs."""
    from batchinfer.data.standing import standing

    found = standing(output_of(job_or_output))
    click.echo(json.dumps(found.as_dict()) if as_json else str(found))


@click.command(short_help="Write a page with plots about an output.")
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@click.option("-o", "--output", metavar="FILE", help="The page; OUT.batchinfer/report.html unless given.")
@click.option("--samples", type=click.IntRange(0), default=6, show_default=True, help="Completions to show.")
@verbose_option
def report(job_or_output: str, output: str | None, samples: int) -> None:
    """Write a page with plots about an output, also while it is made. It is one HTML file and needs no network."""
    from batchinfer.data.page import page
    from batchinfer.data.store import open_store
    from batchinfer.data.survey import survey
    from batchinfer.location import is_remote

    found = survey(output_of(job_or_output), samples)
    if output is None or is_remote(output):
        folder, _, name = (output or f"{found.output}.batchinfer/report.html").rpartition("/")
        store = open_store(folder)
        store.replace(name, page(found).encode())
        click.echo(str(store.path(name)))
        return
    try:
        Path(output).write_text(page(found), "utf-8")
    except OSError as error:
        raise JobError(f"cannot write {output}: {error.strerror}; -o names another file") from None
    click.echo(output)


@click.command(short_help="Read everything committed again and compare.")
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@verbose_option
def verify(job_or_output: str) -> None:
    """Read everything committed again and compare checksums and row counts; the manifest too, once it is there."""
    from batchinfer.data.ledger import Ledger
    from batchinfer.data.look import look

    output = look(output_of(job_or_output)).output
    with Ledger(output) as ledger:
        rows, parts = counted(ledger.verify(), "row"), counted(len(ledger.commits), "part")
        click.echo(f"{rows} in {parts} as they were committed · {output}")


@click.command(short_help="Remove what killed runs left behind.")
@click.argument("job_or_output", metavar="JOB.toml|OUT")
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
@json_option
@verbose_option
def vacuum(job_or_output: str, dry_run: bool, as_json: bool) -> None:
    """Remove what killed runs left behind and no commit refers to."""
    from batchinfer.data.vacuum import vacuum as clean

    done = clean(output_of(job_or_output), dry_run)
    click.echo(json.dumps(done.as_dict()) if as_json else str(done))
