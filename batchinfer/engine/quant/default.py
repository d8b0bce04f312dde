"""Text to calibrate with where there is no job: the topics of Python's own manual, which come with Python."""

from __future__ import annotations

from batchinfer.engine.text import Text

ROW_TOKENS = 256


def default_rows(text: Text, tokens: int) -> list[list[int]]:
    """About ``tokens`` token ids in rows of ROW_TOKENS, spread over the manual."""
    from pydoc_data.topics import topics

    ids = text.encode("\n".join(topics[name] for name in sorted(topics)))
    rows = [ids[first : first + ROW_TOKENS] for first in range(0, len(ids) - ROW_TOKENS, ROW_TOKENS)] or [ids]
    return rows[:: max(1, len(rows) * ROW_TOKENS // tokens)][: max(2, tokens // ROW_TOKENS)]
