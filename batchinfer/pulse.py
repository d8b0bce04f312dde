"""Pulse: the sign of life of long work that answers nobody yet, such as a build."""

from __future__ import annotations

beats = 0  # since the process began


def beat() -> None:
    """Say that the work got on: once for each part of it that is sure to end, a layer or a file."""
    global beats
    beats += 1
