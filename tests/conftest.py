"""What many tests share: a clean environment, a cache of their own, the demo model's tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

DEMO_MODEL = "smollm2-135m-instruct"

for _name in [name for name in os.environ if name.startswith("BATCHINFER_")]:
    del os.environ[_name]
# Kept between test runs: what is cached there is found by content, so it cannot be stale.
os.environ["BATCHINFER_CACHE"] = str(Path(__file__).parents[1] / "build" / "test-cache")

# In CI the same examples every time; elsewhere new ones, which may find what nobody thought of.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def demo_tokenizer_dir() -> Path:
    """The demo model's tokenizer and chat template as files."""
    from batchinfer.engine.model.tokenizer import export_tokenizer

    return export_tokenizer(DEMO_MODEL)
