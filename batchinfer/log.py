"""Log: a line on stderr for people, or a JSON object a line for machines. Never a prompt, a completion or a secret."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Literal

OVER_BAR = "\r\x1b[K"  # to the beginning of the line, and nothing is left of what stands there
_format: Literal["text", "json"] = "text"


def use(form: Literal["text", "json"]) -> None:
    """How this process speaks from here on."""
    global _format
    _format = form


def is_json() -> bool:
    return _format == "json"


def line(message: str, level: str = "info", **fields: Any) -> str:
    """A line as it is said, its end included. ``fields`` are for machines, and in the message for people."""
    if _format == "text":
        return f"{OVER_BAR if sys.stderr.isatty() else ''}batchinfer: {message}\n"
    now = time.time()
    moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"
    return json.dumps({"time": moment, "level": level, "message": message, **fields}, ensure_ascii=False) + "\n"


def say(message: str, level: str = "info", **fields: Any) -> None:
    print(line(message, level, **fields), end="", file=sys.stderr, flush=True)
