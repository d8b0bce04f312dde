"""How a test asks for faults: ``FAKE_TENSORRT_LLM``, a JSON object, and words in prompts (executor/engine.py).

    {"import" | "load" | "shutdown": "exit" | "kill" | "hang" | "raise: what it says", "times": 2,
     "log": "FILE", "die_after": 300, "strip_end": true, "gpu": "8.9", "gpus": 1, "compute_seconds": 0.001}

``log`` is a file that events are appended to as JSON lines; with it, ``times`` and ``die_after`` hold over processes.
"""

import json
import os
import signal
import sys
import threading
import time

ASKED = json.loads(os.environ.get("FAKE_TENSORRT_LLM", "{}"))
_lock = threading.Lock()


def note(event, **more):
    if "log" in ASKED:
        with _lock, open(ASKED["log"], "a") as log:
            log.write(json.dumps({"event": event, "pid": os.getpid(), **more}, default=str) + "\n")


def noted(event):
    if "log" not in ASKED or not os.path.exists(ASKED["log"]):
        return 0
    with open(ASKED["log"]) as log:
        return sum(json.loads(line)["event"] == event for line in log)


def strike(where):
    """Fail as asked for, at most ``times`` over all processes."""
    how = ASKED.get(where)
    if how is None or noted(f"fault {where}") >= ASKED.get("times", 1 << 30):
        return
    note(f"fault {where}")
    if how == "exit":
        os._exit(7)
    if how == "kill":
        kill()
    if how == "hang":
        time.sleep(3600)
    print(how, file=sys.stderr)
    raise RuntimeError(how.removeprefix("raise: "))


def kill():
    note("killed")
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
