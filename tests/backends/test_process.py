"""An engine in its own process: the same answers, and no row, signal or hang that can end the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from batchinfer.backends.base import Isolation
from batchinfer.backends.echo import EchoBackend
from batchinfer.backends.process import ProcessBackend
from batchinfer.errors import EngineError, ModelError
from batchinfer.request import Request, SamplingParams
from tests.backends.engines import POISON
from tests.echo_jobs import echo_job, tokenizer_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture
def open_process(tmp_path):
    """Opens an engine of tests.backends.engines; whatever happens, its process is gone after the test."""
    opened = []

    def open_process(engine: str, isolation: Isolation | None = None, **changes) -> ProcessBackend:
        backend = ProcessBackend(echo_job(tmp_path, **changes), False, f"tests.backends.engines:{engine}", isolation)
        opened.append(backend)
        return backend

    yield open_process
    for backend in opened:
        backend.close()


def requests(count: int, poison: set[int] = frozenset()) -> list[Request]:
    return [Request(("row", i), [i, POISON if i in poison else 1, 7], SamplingParams(seed=i)) for i in range(count)]


def pid_of(backend: ProcessBackend) -> int:
    return backend._child._process.pid


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while exists(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not exists(pid)


def test_it_answers_as_the_engine_does_in_this_process(open_process):
    asked = [
        Request(("key", 1), [3, 2**40, 0], SamplingParams(max_tokens=2, temperature=0.1, stop=("a", "b"), seed=-5)),
        Request("ß", range(300), SamplingParams(n=2, stop_token_ids=(4,), top_p=0.25)),
        Request(None, []),
    ]
    here, there = EchoBackend(tokenizer_dir()), open_process("echo")
    assert (there.tokenizer_dir, there.max_seq_len) == (here.tokenizer_dir, here.max_seq_len)
    assert there.fingerprint == here.fingerprint
    for _ in range(2):
        told = list(there.generate(iter(asked)))
        plain = [Request(r.key, list(r.prompt_token_ids), r.sampling) for r in asked]
        assert told == list(here.generate(iter(plain)))
    loads = there.load(), here.load()
    assert loads[0].prompt_tokens == loads[1].prompt_tokens and loads[0].peak_rss > 0
    assert loads[0].details == {"restarts": 0, "quarantined": 0, "recycled": 0}


def test_rows_are_pulled_as_the_engine_has_room_and_not_faster(open_process):
    pulled = 0

    def endless():
        nonlocal pulled
        while True:
            yield Request(pulled, [1], SamplingParams())
            pulled += 1

    answers = open_process("slow").generate(endless())
    for answered in range(1, 100):
        next(answers)
        assert pulled - answered <= 8 + 16 + 8, "what it holds, what is ahead of it, and what is told in one message"
    answers.close()


def test_an_engine_goes_on_with_what_it_has_when_nothing_is_ready(open_process):
    answered = []

    def line():
        yield from requests(3)
        while len(answered) < 3:  # the line goes on when these are answered, and not before
            yield None
        yield from requests(2)

    for completion in open_process("batching").generate(line()):
        answered.append(completion)
    assert len(answered) == 5


@pytest.mark.parametrize(
    "engine, reason",
    [
        ("segfault", r"signal 11 \(SIGSEGV\)"),
        ("exit", "it exited with code 7"),
        ("oom", r"signal 9 \(SIGKILL\), probably out of memory"),
        ("raise", "RuntimeError: an illegal memory access was encountered"),
    ],
)
def test_the_row_that_kills_the_engine_is_found_and_all_others_are_answered(open_process, engine, reason):
    backend = open_process(engine)
    told = {c.key[1]: c for c in backend.generate(iter(requests(60, {23})))}
    assert sorted(told) == list(range(60))
    assert [i for i, c in told.items() if c.error] == [23]
    with pytest.raises(AssertionError, match=f"the engine died with this row alone: {reason}"):
        raise AssertionError(told[23].error)
    assert told[23].prompt_tokens == 3 and not told[23].outputs
    load = backend.load()
    assert load.details["quarantined"] == 1 and load.details["restarts"] <= 6
    assert load.completion_tokens >= 59 * 3, "what dead processes computed counts too"


def test_an_engine_that_hangs_is_killed_after_a_time_without_a_sign_of_life(open_process):
    backend = open_process("seize", limits__engine_timeout="1.5s")
    told = {c.key[1]: c.error for c in backend.generate(iter(requests(3, {0})))}
    assert sorted(told) == [0, 1, 2] and [i for i, error in told.items() if error] == [0]
    assert "no sign of life for 1.5s (limits.engine_timeout)" in told[0]


def test_several_poison_rows_side_by_side_are_each_found(open_process):
    poison = {0, 18, 19}
    told = {c.key[1]: c.error for c in open_process("segfault").generate(iter(requests(40, poison)))}
    assert len(told) == 40 and {i for i, error in told.items() if error} == poison


def test_an_engine_that_answers_nothing_ends_the_run_and_blames_no_row(open_process):
    backend = open_process("segfault", limits__restarts=3)
    told = []
    with pytest.raises(EngineError, match="died 4 times in a row.*SIGSEGV.*limits.restarts is 3, run again"):
        told.extend(backend.generate(iter(requests(64, set(range(64))))))
    assert told == []


def test_without_restarts_the_first_death_ends_the_run(open_process):
    with pytest.raises(EngineError, match="the engine died: signal 11"):
        list(open_process("segfault", limits__restarts=0).generate(iter(requests(64, {10}))))


def test_a_process_that_is_killed_from_outside_costs_no_row(open_process):
    backend, told = open_process("batching"), []
    for completion in backend.generate(iter(requests(2000))):
        told.append(completion)
        if len(told) in (30, 900):
            os.kill(pid_of(backend), signal.SIGKILL)
    assert sorted(c.key[1] for c in told) == list(range(2000)) and not any(c.error for c in told)
    assert backend.load().details["restarts"] >= 1


@pytest.mark.parametrize("engine, left", [("forgetful", "10"), ("lazy", r"\d+")])
def test_an_engine_that_forgets_rows_or_leaves_early_is_found_out(open_process, engine, left):
    with pytest.raises(EngineError, match=f"ended by itself, with {left} requests unanswered"):
        list(open_process(engine).generate(iter(requests(100))))


def test_a_worn_process_is_replaced_when_its_rows_are_answered(open_process):
    backend = open_process("batching", Isolation(recycle_rows=25))
    first = pid_of(backend)
    told = list(backend.generate(iter(requests(60))))
    assert sorted(c.key[1] for c in told) == list(range(60)) and not any(c.error for c in told)
    assert backend.load().details == {"restarts": 0, "quarantined": 0, "recycled": 2}
    assert gone(first) and backend.load().prompt_tokens == 180


def test_what_the_opener_raises_is_raised_here(open_process):
    with pytest.raises(ModelError, match="^no weights in /nowhere$"):
        open_process("no_weights")
    with pytest.raises(EngineError, match="the engine cannot be opened: ZeroDivisionError") as told:
        open_process("broken")
    assert "in broken" in str(told.value.__cause__), "where, for those who look"


def test_a_death_while_it_opens_is_told_as_such(open_process):
    with pytest.raises(EngineError, match="died while it was opened: it exited with code 9"):
        open_process("stillborn")
    begun = time.monotonic()
    with pytest.raises(EngineError, match="died while it was opened: no sign of life for 6 times 0.2s"):
        open_process("endless", limits__engine_timeout="0.2s")
    assert time.monotonic() - begun < 20


def test_long_work_that_shows_its_pulse_may_take_its_time_to_open(open_process):
    assert list(open_process("slow_but_alive", limits__engine_timeout="0.2s").generate(iter(requests(1))))


def test_an_engine_sees_the_environment_that_it_asks_for(open_process, monkeypatch):
    monkeypatch.setenv("OMPI_RANK", "3")
    monkeypatch.setenv("KEPT", "yes")
    seen = open_process("environment", Isolation(("OMPI_", "PMI"), {"GIVEN": "too"})).fingerprint
    assert "OMPI_RANK" not in seen and (seen["KEPT"], seen["GIVEN"]) == ("yes", "too")


def test_nothing_that_an_engine_started_outlives_it(open_process):
    backend = open_process("parent")
    helper = backend.fingerprint["helper"]
    assert exists(helper)
    backend.close()
    assert gone(helper)


def test_a_caller_that_stops_listening_ends_the_engine_and_may_come_back(open_process):
    backend = open_process("batching")
    answers = backend.generate(iter(requests(100)))
    next(answers)
    first = pid_of(backend)
    answers.close()
    assert gone(first)
    assert len(list(backend.generate(iter(requests(10))))) == 10


def test_it_works_off_the_main_thread(open_process):
    told = []
    thread = threading.Thread(target=lambda: told.extend(open_process("batching").generate(iter(requests(20)))))
    thread.start()
    thread.join(30)
    assert len(told) == 20


ALONE = """
import sys, time
from pathlib import Path
from tests.backends.test_process import *
backend = ProcessBackend(echo_job(Path(sys.argv[1])), False, "tests.backends.engines:" + sys.argv[2])
answers = backend.generate(iter(requests(1000, {5})))
print(pid_of(backend), *backend.fingerprint.values(), flush=True)
for answer in answers:
    pass
time.sleep(600)  # it is to be killed, with all its rows answered or not
"""


@pytest.mark.parametrize("engine, stopped", [("parent", False), ("parent", True), ("seize", False)])
def test_it_never_outlives_a_run_that_is_killed(tmp_path, engine, stopped):
    """``parent`` has a process of its own; ``seize`` hangs and lets no other thread of its process run."""
    command = [sys.executable, "-c", ALONE, str(tmp_path), engine]
    run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    pids = [int(word) for word in run.stdout.readline().split() if word.isdigit()]
    assert all(map(exists, pids)) and len(pids) == 1 + (engine == "parent")
    time.sleep(0.2)
    if stopped:
        os.kill(pids[0], signal.SIGSTOP)
    run.kill()
    run.wait()
    assert all(map(gone, pids))
