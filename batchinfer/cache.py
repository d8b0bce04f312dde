"""Where built and measured things are kept between runs: engine plans, tokenizers, compiled kernels, timings."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchinfer.errors import OutputError
from batchinfer.flock import held_by_another, was_left

_FRESH = 600  # seconds since the last change, in which a scratch folder is its maker's, whatever a lock says


def cache_root() -> Path:
    """``$BATCHINFER_CACHE``, else ``$XDG_CACHE_HOME/batchinfer``, else ``~/.cache/batchinfer``."""
    if root := os.environ.get("BATCHINFER_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "batchinfer"


def make_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make ``target`` all at once: ``fill`` writes a scratch folder beside it, which is then renamed into place.

    An interrupted ``fill`` leaves no ``target``; of two processes that race, the first wins and the other's work is
    thrown away. What a process that was killed left of its scratch folder goes when the same target is made again on
    the same machine, ten minutes later or more.

    Raises: OutputError if nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        scratch = Path(tempfile.mkdtemp(prefix=_scratch_prefix(target), dir=target.parent))
        lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        hint = "; BATCHINFER_CACHE names another folder" if cache_root() in target.parents else ""
        raise OutputError(f"cannot write {target.parent}: {error.strerror}{hint}") from None
    try:
        held_by_another(lock)  # so that nobody sweeps it
        fill(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)
    return target


def _scratch_prefix(target: Path) -> str:
    """With the machine's name: a folder's lock is known to its machine alone, where machines share the file system."""
    return f".{target.name}.making-{platform.node()}-"


def _sweep(target: Path) -> None:
    """Remove scratch folders of ``target`` whose makers, on this machine, were killed."""
    for scratch in target.parent.glob(f"{glob.escape(_scratch_prefix(target))}*"):
        with contextlib.suppress(OSError):
            lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
            try:
                changed = max(path.stat().st_mtime for path in (scratch, *scratch.rglob("*")))
                if time.time() - changed > _FRESH and was_left(lock):
                    shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(lock)


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
