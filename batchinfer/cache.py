"""Where built and measured things are kept between runs: engine plans, tokenizers, compiled kernels, timings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchinfer.errors import OutputError


def cache_root() -> Path:
    """``$BATCHINFER_CACHE``, else ``$XDG_CACHE_HOME/batchinfer``, else ``~/.cache/batchinfer``."""
    if root := os.environ.get("BATCHINFER_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "batchinfer"


def make_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make ``target`` all at once: ``fill`` writes a scratch folder beside it, which is then renamed into place.

    An interrupted ``fill`` leaves no ``target``; of two processes that race, the first wins and the other's work is
    thrown away.

    Raises: OutputError if nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        hint = "; BATCHINFER_CACHE names another folder" if cache_root() in target.parents else ""
        raise OutputError(f"cannot write {target.parent}: {error.strerror}{hint}") from None
    try:
        fill(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def kept(kind: str, key: str) -> Any:
    """What ``keep`` kept; None if nothing, or nothing readable, is there."""
    try:
        return json.loads(_file(kind, key).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def keep(kind: str, key: str, value: Any) -> None:
    """Remember something that JSON can hold; where nothing can be written it is forgotten."""
    file = _file(kind, key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(value), "utf-8")
        scratch.replace(file)


def _file(kind: str, key: str) -> Path:
    return cache_root() / kind / f"{key[:24]}.json"


def digest(value: Any) -> str:
    """A stable hex digest of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON gives it back, for comparison with what was kept."""
    return json.loads(json.dumps(value, default=list))
