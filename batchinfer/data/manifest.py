"""Manifest: what a complete output holds, for those who load it elsewhere. Beside the parts, in OUT.batchinfer/:

    manifest.json   every part with its rows, bytes, sha256 and the input rows it answers; schema, totals, fingerprint
    _SUCCESS        the sha256 of manifest.json. Written last, taken away first: where it is, the output is complete

Both follow from the ledger alone, so they can be written again at any time and compared with it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

if TYPE_CHECKING:
    from batchinfer.data.ledger import Ledger
    from batchinfer.data.store import Store

MANIFEST, SUCCESS = "manifest.json", "_SUCCESS"


def publish(ledger: Ledger) -> None:
    """Write both for a complete output, unless they stand already."""
    if ledger.store.size(SUCCESS) is None:
        manifest = _encoded(describe(ledger))
        ledger.store.replace(MANIFEST, manifest)
        ledger.store.replace(SUCCESS, _sealed(manifest))


def withdraw(store: Store) -> None:
    """Take both away, ``_SUCCESS`` first, as the output is about to change.

    Raises: OutputError if they stay, since somebody would take the old answer for the new one.
    """
    for name in (SUCCESS, MANIFEST):
        store.remove([name], strict=True)
        store.sync(".")


def problems(ledger: Ledger) -> list[str]:
    """What ``_SUCCESS`` promises and is not so, a line each. Without ``_SUCCESS`` nothing is promised."""
    try:
        sealed = ledger.store.read(SUCCESS)
    except FileNotFoundError:
        return []
    path = ledger.store.path(MANIFEST)
    try:
        manifest = ledger.store.read(MANIFEST)
    except FileNotFoundError:
        return [f"{path}: is missing, and {SUCCESS} stands"]
    if sealed != _sealed(manifest):
        return [f"{path}: is not the one that {SUCCESS} was written for (sha256 differs)"]
    if not ledger.complete:
        pending = len(ledger.units) - len(ledger.commits)
        return [f"{ledger.store.path(SUCCESS)}: stands, and {pending:,} units are not committed"]
    wrong = _different(json.loads(manifest), json.loads(_encoded(describe(ledger))))
    return [f"{path}: {key} is not what was committed" for key in wrong]


def describe(ledger: Ledger) -> dict[str, Any]:
    """The manifest of a complete output: its content follows from what was committed, in the order of the units."""
    assert ledger.identity is not None
    commits = [ledger.commits[unit.index] for unit in ledger.units]
    reasons: Counter[str] = Counter()
    for commit in commits:
        reasons.update(commit.finish_reasons)
    totals = ("rows", "bytes", "failed", "prompt_tokens", "completion_tokens")
    return {
        "version": 1,
        "job": ledger.identity["job"]["job"]["name"],
        "model": ledger.identity["model"]["path"],
        "fingerprint": ledger.fingerprint,
        "engine": ledger.identity["semantic"].get("engine"),
        "schema": _schema(ledger),
        **{name: sum(getattr(commit, name) for commit in commits) for name in totals},
        "finish_reasons": dict(sorted(reasons.items())),
        **({"retries": [retry.told() for retry in ledger.retries]} if ledger.retries else {}),
        "parts": [
            {
                "part": commit.part,
                "rows": commit.rows,
                "bytes": commit.bytes,
                "sha256": commit.sha256,
                "unit": unit.index,
                "sources": [
                    {"file": piece.file, "first_row": piece.first_row, "end_row": piece.end_row}
                    for piece in unit.pieces
                ],
                **({"retry": commit.retry} if commit.retry else {}),
            }
            for unit, commit in zip(ledger.units, commits)
        ],
    }


def _schema(ledger: Ledger) -> list[dict[str, str]]:
    """Columns of the parts, which all have the same."""
    first = ledger.commits[ledger.units[0].index]
    schema = pq.read_schema(ledger.parts.open(first.part))
    return [{"name": field.name, "type": str(field.type)} for field in schema]


def _different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Keys that differ; of the parts each one that does."""
    keys = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    if "parts" not in keys:
        return keys
    told = {part["unit"]: part for part in found.get("parts", [])}
    real = {part["unit"]: part for part in wanted["parts"]}
    parts = [
        f"the part of unit {unit}" for unit in sorted(told.keys() | real.keys()) if told.get(unit) != real.get(unit)
    ]
    return [key for key in keys if key != "parts"] + (parts or ["the order of parts"])


def _encoded(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _sealed(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()
