"""Where the values of a job come from: a file, the environment, a command line, laid over one another."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import JobError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX = "BATCHINFER_"


def parse_value(text: str) -> Any:
    """A value typed on a command line or in a variable: TOML if it is TOML (``3``, ``true``, ``["a"]``), else text."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise JobError(f"no job file at {path}; `batchinfer init` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read the job file {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path} is not valid TOML: {error}") from None


def from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """``BATCHINFER_ENGINE__THREADS=2`` → ``{"engine": {"threads": 2}}``; names without ``__`` are not job keys."""
    names = (name for name in sorted(environ) if name.startswith(ENV_PREFIX) and "__" in name)
    return from_dotted({n.removeprefix(ENV_PREFIX).lower().replace("__", "."): parse_value(environ[n]) for n in names})


def from_dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise JobError(f"cannot set {key}: {parent} is a value, not a section")
        node[leaf] = value
    return tree


def merge(tree: dict[str, Any], layer: Mapping[str, Any], origin: dict[str, str], name: str, prefix: str = "") -> None:
    for key, value in layer.items():
        origin[prefix + key] = name
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value, origin, name, f"{prefix}{key}.")
        elif isinstance(value, dict):
            tree[key] = {}
            merge(tree[key], value, origin, name, f"{prefix}{key}.")
        else:
            tree[key] = value
