from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchinfer.data import prompt
from batchinfer.data.tokenizer import PromptTokenizer


@pytest.fixture(scope="module")
def demo_tokenizer(demo_tokenizer_dir: Path) -> Iterator[PromptTokenizer]:
    """The demo model's, read once for all renderers of a module."""
    once = PromptTokenizer(demo_tokenizer_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt, "PromptTokenizer", lambda d: once if d == demo_tokenizer_dir else PromptTokenizer(d))
        yield once
