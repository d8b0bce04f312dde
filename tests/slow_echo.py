"""The command line with an engine that takes its time: ``python -m tests.slow_echo run …``.

$SLOW_ECHO is seconds a row, none unless given. Every answer is noted in the file $SLOW_ECHO_NOTES, so that work done
twice can be counted.
"""

from __future__ import annotations

import os
import time
from unittest import mock

from batchinfer.backends.echo import EchoBackend
from batchinfer.cli import main
from tests.echo_jobs import tokenizer_dir


class SlowEcho(EchoBackend):
    def generate(self, requests):
        notes = os.open(os.environ.get("SLOW_ECHO_NOTES", os.devnull), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        for completion in super().generate(requests):
            time.sleep(float(os.environ.get("SLOW_ECHO", "0")))
            os.write(notes, b"%d %d\n" % completion.key)
            yield completion


if __name__ == "__main__":
    with mock.patch("batchinfer.runner.open_backend", lambda job, progress: SlowEcho(tokenizer_dir())):
        main(prog_name="batchinfer")
