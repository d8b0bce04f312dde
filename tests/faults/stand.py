"""A test stand: a small job in a folder of its own, run in forked processes that faults are done to.

The process that forks never reads Parquet nor runs a job: libraries whose threads have begun do not survive a fork.
"""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer import retrier, runner
from batchinfer.backends.echo import EchoBackend
from batchinfer.data import commits
from batchinfer.data.store import LocalStore
from batchinfer.errors import BatchInferError
from batchinfer.job import Job
from tests.echo_jobs import echo_job, tokenizer_dir, write

ROWS, FILES, UNIT_ROWS = 120, 3, 16
HELD = 8  # rows that the engine holds
OPERATIONS = ("write", "fsync", "link", "replace", "unlink", "mkdir")
PATIENCE = 60  # seconds after which a run is taken to hang
LONG = 25  # seconds after which it says where each of its threads is
RETRIED = "id % 2 = 0"


class Noting:
    """A backend that takes its time, holds some rows as an engine does, and notes every answer."""

    def __init__(self, inner: Any, folder: Path, seconds: float) -> None:
        self._inner, self._notes = inner, os.open(folder / "answers", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._seconds = seconds
        self.tokenizer_dir, self.max_seq_len = inner.tokenizer_dir, inner.max_seq_len
        self.fingerprint, self.load, self.close = inner.fingerprint, inner.load, inner.close

    def generate(self, requests):
        held: list[Any] = []
        for answer in self._inner.generate(requests):
            held.append(answer)
            if len(held) > HELD:
                yield self._note(held.pop(len(held) // 2))
        yield from (self._note(answer) for answer in held)

    def _note(self, answer):
        time.sleep(self._seconds)
        os.write(self._notes, b"%d %d\n" % answer.key)
        return answer


class Stand:
    """``begin`` and ``run`` return at once; what a case does in between is its own. ``finish`` runs to the end."""

    def __init__(self, folder: Path, rows: int = ROWS, out: str = "out", native: bool = False) -> None:
        self.folder, self.rows, self.out, self.native = folder, rows, folder / out, native
        self.retried = False
        if (folder / "in").exists():  # a copy of another stand's folder
            return
        for index in range(FILES):
            ids = range(index * rows // FILES, (index + 1) * rows // FILES)
            table = pa.table({"id": pa.array(ids, pa.int64()), "text": [f"row number {i}" for i in ids]})
            write(folder / "in" / f"part={index // 2}" / f"{index}.parquet", table, row_group_size=10)

    @property
    def live(self) -> Path:
        """Is there while readers may look: not while a case itself damages, copies or removes the output."""
        return self.folder / "live"

    @property
    def control(self) -> Path:
        return Path(f"{self.out}.batchinfer")

    def job(self) -> Job:
        engine = {"engine__backend": "native", "engine__dtype": "float32", "model__path": "smollm2-135m-instruct"}
        return echo_job(
            self.folder,
            self.folder / "in",
            output__path=str(self.out),
            checkpoint__unit_rows=UNIT_ROWS,
            checkpoint__sync_rows=4,
            sampling__max_tokens=8,
            **(engine if self.native else {}),
        )

    def begin(
        self,
        seconds: float = 0.002,
        before: Callable[[], None] | None = None,
        retry: bool = False,
        shown: bool = True,
    ) -> int:
        """The pid of a run that goes on. ``before``: what is done to its process first; ``shown``: to readers."""
        self.retried |= retry
        if shown:
            self.live.touch()
        return fork(partial(self._work, seconds, before, retry), self.folder / "said")

    def finish(self, allowed: tuple[int, ...] = (0,), retry: bool = False) -> None:
        code = wait(self.begin(0.0, retry=retry))
        assert code in allowed, f"exit code {code} at the end: {self.said()[-500:]}"

    def said(self) -> str:
        path = self.folder / "said"
        return path.read_text() if path.exists() else ""

    def wait_for(self, what: str, pid: int) -> bool:
        """Wait until there is a file of the control folder that a pattern names. False if the run has ended."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if any(self.control.glob(what)):
                return True
            if not Path(f"/proc/{pid}/stat").exists() or ") Z" in Path(f"/proc/{pid}/stat").read_text():
                return False
            time.sleep(0.002)
        raise AssertionError(f"{self.folder}: no {what} came")

    def check(self) -> None:
        """Raises: AssertionError unless each row is there once, as it ought to be."""
        said = re.sub(r"Exception ignored in.*?StopNow", "", self.said(), flags=re.DOTALL)  # a signal met a __del__
        assert "Traceback" not in said, said[-3000:]
        code = wait(fork(self._check, self.folder / "checked"))
        assert code == 0, (self.folder / "checked").read_text()[-1000:]

    def again(self) -> int:
        """Rows that were computed more than once by the run, and more than once by the retry."""
        paths = [path for path in (self.folder / "answers", self.folder / "again" / "answers") if path.exists()]
        counts = [Counter(path.read_text().splitlines()) for path in paths]
        return sum(sum(count.values()) - len(count) for count in counts)

    def _work(self, seconds: float, before: Callable[[], None] | None, retry: bool) -> int:
        folder = self.folder / "again" if retry else self.folder
        folder.mkdir(exist_ok=True)
        if before is not None:
            before()
        real = runner.open_backend

        def opened(job: Job, progress: bool) -> Noting:
            return Noting(real(job, progress) if self.native else EchoBackend(tokenizer_dir()), folder, seconds)

        with mock.patch.object(runner, "open_backend", opened), mock.patch.object(retrier, "open_backend", opened):
            try:
                if retry:
                    return retrier.retry(self.job(), RETRIED, {"sampling.max_tokens": 9}, progress=False).exit_code
                return runner.run(self.job(), progress=False).exit_code
            except BatchInferError as error:
                print(f"{type(error).__name__}: {error}")
                return error.exit_code

    def _check(self) -> int:
        store = LocalStore(self.control)
        found = commits.read(store, commits.names(store)).values()
        seen = sorted(path.relative_to(self.out).as_posix() for path in self.out.rglob("*") if path.is_file())
        assert seen == sorted(commit.part for commit in found), f"{seen} in OUT"
        table = pa.concat_tables(pq.ParquetFile(self.out / commit.part).read() for commit in found).to_pylist()
        ids = Counter(row["id"] for row in table)
        lost, doubled = set(range(self.rows)) - ids.keys(), [row for row, count in ids.items() if count > 1]
        assert not lost and not doubled and len(ids) == self.rows, f"lost {sorted(lost)}, doubled {doubled}"
        for row in table:
            tokens = 9 if self.retried and row["id"] % 2 == 0 else 8
            assert row["error"] is None and row["text"] == f"row number {row['id']}", row
            assert row["completion_tokens"] <= tokens and (self.native or row["completion_tokens"] == tokens), row
            assert self.native or row["completion"].startswith(f"echo {len('Say ' + row['text'])} "), row
        return 0


def fork(act: Callable[[], int], said: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(said, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        faulthandler.dump_traceback_later(LONG)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a process; minus the signal that killed it. Raises: AssertionError if it hangs."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} hangs")


# ---- what is done to a process before it works


def bypass_lock() -> None:
    """As on a file system that has no locks."""
    import fcntl

    fcntl.flock = lambda *_: None


def limit_files(size: int) -> None:
    """No file may grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fail_at(point: int, number: int, out: Path, once: bool) -> None:
    """The ``point``-th operation on the disk fails with that errno; unless ``once``, so do all later ones.

    Of the bytes of a write that fails half are written.

    Args:
        out: writes to other places do not count.
    """
    lock, count = threading.Lock(), 0

    def armed(name: str):
        plain = getattr(os, name)

        def operation(*args, **kwargs):
            nonlocal count
            if name == "write" and not os.readlink(f"/proc/self/fd/{args[0]}").startswith(str(out)):
                return plain(*args, **kwargs)
            with lock:
                count += 1
                failed = count == point if once else count >= point
            if failed:
                if name == "write":
                    plain(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(number, os.strerror(number))
            return plain(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, armed(name))


def full_disk(folder: Path, size: str) -> bool:
    """Mount a small disk there. False where that may not be done."""
    folder.mkdir(parents=True, exist_ok=True)
    return os.system(f"mount -t tmpfs -o size={size} tmpfs '{folder}' 2>/dev/null") == 0
