"""A command as a process group of its own: what it says, and that nothing of it outlives anybody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from batchinfer.integrations.child import Child

ROOT = Path(__file__).parents[2]


def shell(script: str, **options) -> Child:
    return Child(["sh", "-c", script], **options)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_lines_come_as_they_are_said_and_the_answer_is_the_last_line_on_stdout():
    child = shell(
        'echo one >&2; sleep 0.1; echo noise; echo "$SAID" >&2; echo \'{"rows": 3}\'; exit 75', env={"SAID": "twö"}
    )
    assert list(child.lines()) == ["one", "twö"]
    assert child.wait() == 75 and child.answer() == {"rows": 3}


def test_a_command_that_says_nothing_or_no_json_has_no_answer():
    for script in ("true", "echo hello"):
        child = shell(script)
        assert list(child.lines()) == [] and child.wait() == 0 and child.answer() is None


def test_it_is_asked_to_stop_and_may_finish_what_it_is_at():
    child = shell("trap 'echo drained >&2; exit 75' TERM; echo begun >&2; while :; do sleep 0.05; done")
    lines = child.lines()
    assert next(lines) == "begun"
    child.stop(patience=20)
    assert list(lines)[-1] == "drained" and child.wait() == 75  # some shells say more


def test_one_that_does_not_stop_is_made_to_with_all_that_it_started():
    child = shell(
        "trap '' TERM; sh -c 'trap \"\" TERM; echo $$ >&2; while :; do sleep 0.05; done' &"
        " wait; while :; do sleep 1; done"
    )
    lines = child.lines()
    grandchild = int(next(lines))
    child.stop(patience=0.2)
    list(lines)
    assert child.wait() == -signal.SIGKILL
    assert ends(grandchild)


def test_what_outlives_the_command_does_not_keep_its_lines_open(monkeypatch):
    monkeypatch.setattr("batchinfer.integrations.child.STRAGGLERS", 0.1)
    child = shell("sleep 600 & echo $! >&2")
    [straggler] = child.lines()
    assert child.wait() == 0 and ends(int(straggler))


def test_the_command_is_asked_to_stop_when_whoever_started_it_dies(tmp_path):
    script = (
        "from batchinfer.integrations.child import Child\n"
        f"child = Child(['sh', '-c', 'trap \"echo drained > {tmp_path}/told; exit\" TERM;"
        " echo $$ >&2; while :; do sleep 0.05; done'])\n"
        "for line in child.lines(): print(line, flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env)
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert ends(pid) and (tmp_path / "told").read_text() == "drained\n"
