"""The command line with an engine that takes its time: ``python -m tests.slow_echo run …``.

$SLOW_ECHO is seconds a row, none unless given. Every answer is noted in the file $SLOW_ECHO_NOTES, so that work done
twice can be counted; which processes answered is in a file beside it, .pids.
"""

from __future__ import annotations

import os
import time

from batchinfer import runner
from batchinfer.__main__ import enter
from batchinfer.backends.echo import EchoBackend
from tests.echo_jobs import tokenizer_dir


class SlowEcho(EchoBackend):
    def generate(self, requests):
        seconds = float(os.environ.get("SLOW_ECHO", "0"))
        answers = _notes("")
        os.write(_notes(".pids"), b"%d\n" % os.getpid())
        for completion in super().generate(requests):
            time.sleep(seconds)
            os.write(answers, b"%d %d\n" % completion.key)
            yield completion


def _notes(suffix: str) -> int:
    path = os.environ.get("SLOW_ECHO_NOTES")
    return os.open(path + suffix if path else os.devnull, os.O_CREAT | os.O_APPEND | os.O_WRONLY)


def install() -> None:
    """Have every run of this process ask the slow echo."""
    runner.open_backend = lambda job, progress: SlowEcho(tokenizer_dir())


if __name__ == "__main__":
    install()
    enter()
