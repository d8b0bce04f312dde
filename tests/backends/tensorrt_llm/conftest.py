from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from batchinfer.backends.tensorrt_llm.backend import TensorRTBackend
from batchinfer.request import Completion, Request, SamplingParams
from tests.backends.tensorrt_llm.site import install, make_job, make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def put(tmp_path, monkeypatch) -> Callable[..., None]:
    """Installs a version of the fake in this process, with faults; the last one counts."""
    number = itertools.count()

    def install_here(version: str = "1.2.1", **faults: Any) -> None:
        monkeypatch.setenv("FAKE_TENSORRT_LLM", json.dumps(faults))
        monkeypatch.syspath_prepend(install(tmp_path / f"site-{next(number)}", version))
        forget()

    yield install_here
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("tensorrt_llm", "modelopt")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def ask(tmp_path, model, put) -> Callable[..., list[Completion]]:
    """Asks prompts of a backend opened in this process, and closes it; answers in the order of the prompts.

    Where completions must not all be there, give ``backend`` a place to be looked at.
    """

    def answer(
        *prompts: str | list[int],
        version: str = "1.2.1",
        faults: dict[str, Any] | None = None,
        sampling: SamplingParams = SamplingParams(max_tokens=64),
        model: Path = model,
        look: Callable[[TensorRTBackend], Any] = lambda backend: None,
        **changes: Any,
    ) -> list[Completion]:
        put(version, **(faults or {}))
        with closing(TensorRTBackend.open(make_job(tmp_path, model, **changes), progress=False)) as backend:
            encode = backend._llm.tokenizer.encode
            requests = [Request(i, encode(p) if isinstance(p, str) else p, sampling) for i, p in enumerate(prompts)]
            done = sorted(backend.generate(iter(requests)), key=lambda completion: completion.key)
            look(backend)
        return done

    return answer
