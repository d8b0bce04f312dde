"""The console's way in and out: ``batchinfer`` and ``python -m batchinfer``."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys

from batchinfer.cli import main


def enter() -> None:
    """Run the command line, and end the process once all that is registered for its end was done.

    The interpreter is not taken down. A thread of a library that comes back into it meanwhile, or drops the last
    reference to one of its objects, would hang or abort the process ("terminate called without an active exception"),
    after all work was done and told.
    """
    code = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # before all others, so that it is called after them
    try:
        main(prog_name="batchinfer")
    except SystemExit as end:
        code = end.code  # click's, always a number
        raise


if __name__ == "__main__":
    enter()
