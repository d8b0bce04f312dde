"""Whole runs without a model: a byte tokenizer, jobs over small tables, backends that misbehave on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers

from batchinfer.backends.echo import EchoBackend
from batchinfer.cache import cache_root, make_folder
from batchinfer.data import commits
from batchinfer.data.report import Summary
from batchinfer.data.store import LocalStore
from batchinfer.job import Job
from batchinfer.retrier import retry
from batchinfer.runner import run


def tokenizer_dir() -> Path:
    """A tokenizer whose tokens are bytes, and no chat template."""

    def fill(folder: Path) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({}))

    folder = cache_root() / "byte-tokenizer"
    return folder if folder.is_dir() else make_folder(folder, fill)


def texts(rows: int) -> pa.Table:
    return pa.table({"id": pa.array(range(rows), pa.int64()), "text": [f"row number {i}" for i in range(rows)]})


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def echo_job(folder: Path, source: Path | None = None, **changes: Any) -> Job:
    """A job from ``folder``/in.parquet to ``folder``/out; ``changes`` are dotted keys with ``__`` for the dot."""
    tree: dict[str, Any] = {
        "input": {"path": str(source or folder / "in.parquet")},
        "prompt": {"template": "Say {{ text }}"},
        "model": {"path": "echo"},
        "engine": {"backend": "echo"},
        "output": {"path": str(folder / "out")},
        "checkpoint": {"unit_rows": 64, "sync_seconds": 0.02},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return Job.from_dict(tree)


def run_echo(job: Job, backend: Callable[[Path], Any] = EchoBackend) -> Summary:
    with mock.patch("batchinfer.runner.open_backend", lambda job, progress: backend(tokenizer_dir())):
        return run(job, progress=False)


def retry_echo(
    job: Job | Path | str, where: str | None, settings: dict[str, Any], backend: Callable[[Path], Any] = EchoBackend
) -> Summary:
    with mock.patch("batchinfer.retrier.open_backend", lambda job, progress: backend(tokenizer_dir())):
        return retry(job, where, settings, progress=False)


def read_output(folder: Path) -> pa.Table:
    """All parts in order, as the ledger has them, which must be all that a plain reader of the folder sees."""
    import polars as pl

    root = folder / "out"
    store = LocalStore(f"{root}.batchinfer")
    found = commits.read(store, commits.names(store)).values()
    tables = [pq.ParquetFile(root / commit.part).read() for commit in found]
    seen = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert seen == sorted(commit.part for commit in found)
    if found:
        assert pl.scan_parquet(root).select(pl.len()).collect().item() == sum(t.num_rows for t in tables)
    return pa.concat_tables([t.replace_schema_metadata(None) for t in tables]) if tables else pa.table({})
