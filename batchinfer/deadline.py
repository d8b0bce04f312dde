"""When a run must stop taking up rows: a time of day, a moment, or a duration, as a person writes them."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta

_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
_SPAN = re.compile(r"(?=\d)(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def seconds(span: str) -> float:
    """``"4h"``, ``"90m"``, ``"1h30m"``, ``"45s"`` in seconds. Raises: ValueError that says what it must be."""
    found = _SPAN.fullmatch(re.sub(r"\s", "", span))
    total = sum(float(n or 0) * unit for n, unit in zip(found.groups(), (86400, 3600, 60, 1))) if found else 0.0
    if not 0 < total < 1e9:
        raise ValueError(f'must be a time span above zero such as "4h", "90m" or "1h30m", got {span!r}')
    return total


def moment(when: str, now: datetime | None = None) -> datetime:
    """A time of day as the next moment at which a local clock shows it, or an ISO date and time (local unless it says).

    Raises: ValueError that says what it must be.
    """
    text, now = when.strip(), now or datetime.now()
    try:
        if found := _CLOCK.fullmatch(text):
            today = datetime.combine(now, time(*(int(part or 0) for part in found.groups())))
            return (today if today > now else today + timedelta(days=1)).astimezone()
        if ":" in text[10:]:  # fromisoformat would take a lone date for its first moment
            return datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text)).astimezone()
    except (ValueError, OverflowError):
        pass
    raise ValueError(f'must be a time of day such as "06:00" or an ISO date and time, got {when!r}')


def ends_at(deadline: str | None, max_time: str | None) -> tuple[float, str] | None:
    """The earlier of both, counted from now: seconds since the epoch, and how to name it. None if neither is set."""
    now = datetime.now()
    ends = []
    if deadline is not None:
        at = moment(deadline, now)
        ends.append((at.timestamp(), f"deadline {at:%Y-%m-%d %H:%M} reached"))
    if max_time is not None:
        ends.append((now.timestamp() + seconds(max_time), f"max_time {max_time} reached"))
    return min(ends, default=None)
