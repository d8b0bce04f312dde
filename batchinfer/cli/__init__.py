"""The command line: parse, call, print, exit code. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

from typing import Any

import click

from batchinfer import __version__
from batchinfer.cli.bench import bench
from batchinfer.cli.openai import export_openai, import_openai
from batchinfer.cli.outputs import report, status, vacuum, verify
from batchinfer.cli.prepare import build, doctor, init, plan, validate
from batchinfer.cli.retry import retry
from batchinfer.cli.run import run
from batchinfer.cli.shared import WIDTH, say
from batchinfer.errors import BatchInferError, ExitCode

INTERRUPTED = 130  # by convention, 128 + SIGINT


class Commands(click.Group):
    """Turns failures into one line on stderr and an exit code; a traceback is for `-v` alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they are met, not by their letters."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BatchInferError as error:
            say(str(error))
            ctx.exit(int(error.exit_code))
        except KeyboardInterrupt:
            say("interrupted")
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.meta.get("verbose"):
                raise
            say(f"unexpected {type(error).__name__}: {error}\n  `-v` shows where; please report it")
            ctx.exit(int(ExitCode.CRASH))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH})
@click.version_option(__version__, prog_name="batchinfer")
def main() -> None:
    """Offline batch inference for large language models: Parquet in, Parquet out, resumable.

    Exit codes: 0 ok · 1 crash · 2 wrong usage, job or model · 3 more failed rows than allowed · 4 job or input changed
    since the output was begun · 5 locked by another run · 6 damaged output · 75 stopped early, run again to resume.
    """


COMMANDS = (
    run,
    retry,
    init,
    doctor,
    validate,
    plan,
    build,
    status,
    report,
    verify,
    vacuum,
    export_openai,
    import_openai,
    bench,
)
for command in COMMANDS:
    main.add_command(command)
