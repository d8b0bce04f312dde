"""What many tests share: a clean environment, a cache of their own, the demo model's tokenizer."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import settings

DEMO_MODEL = "smollm2-135m-instruct"
_numbers = itertools.count()

for _name in [name for name in os.environ if name.startswith("BATCHINFER_")]:
    del os.environ[_name]
# Kept between test runs: what is cached there is found by content, so it cannot be stale.
os.environ["BATCHINFER_CACHE"] = str(Path(__file__).parents[1] / "build" / "test-cache")

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait leave the cores to the tests beside
    os.environ["OMP_WAIT_POLICY"] = "passive"

# In CI the same examples every time; elsewhere new ones, which may find what nobody thought of.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def demo_tokenizer_dir() -> Path:
    """The demo model's tokenizer and chat template as files."""
    from batchinfer.engine.model.tokenizer import export_tokenizer

    return export_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="session")
def s3_server():
    """A server that speaks S3, and a proxy before it."""
    from tests.s3 import Proxy, start_server

    process, port = start_server()
    proxy = Proxy(port)
    yield port, proxy
    proxy.shutdown()
    proxy.server_close()
    process.kill()
    process.communicate()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """A bucket of the test's own, which this process's environment leads to, by way of the proxy."""
    from batchinfer.data import bucket as module
    from tests.s3 import HASTE, Bucket

    port, proxy = s3_server
    proxy.fault = lambda method, path: None
    made = Bucket(f"test-{next(_numbers)}", port, proxy)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    for name, value in HASTE.items():
        monkeypatch.setattr(module, name, value)
    module._opened.cache_clear()
    proxy.requests.clear()
    proxy.faults.clear()
    proxy.sent, proxy.deaf = 0, False
    yield made
    proxy.fault = lambda method, path: None
