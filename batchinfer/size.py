"""An amount of memory or disk, as a person writes it."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)(i?)b?", re.IGNORECASE)


def in_bytes(size: str) -> int:
    """``"128MB"``, ``"64 MiB"``, ``"1.5G"`` in bytes. Raises: ValueError that says what it must be."""
    found = _SIZE.fullmatch(re.sub(r"\s", "", size))
    total = 0
    if found:
        number, letter, binary = found.groups()
        total = int(float(number) * (1024 if binary else 1000) ** " kmg".index(letter.lower() or " "))
    if total < 1:
        raise ValueError(f'must be a size above zero such as "128MB" or "64MiB", got {size!r}')
    return total
