"""Words: how numbers are told to people."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """1 row, 1,200 rows."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def clock(seconds: float) -> str:
    """A length of time: 4.2 s, 1:15 min, 2:03:00."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02} min"
