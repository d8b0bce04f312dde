"""Parquet files as nobody should write them: ``python -m tests.faults.fuzz [--files N] [--seed N]``.

Sound files of many shapes, and the same ones cut, with flipped bits or with blocks of zeros, in the footer, the headers
of pages or the data. A job over each must end in a result with all of the file's rows or in one clear line: no
traceback, no crash of the interpreter, no hang. Prints how many ended how; exit code 1 if one ended otherwise.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.backends.echo import EchoBackend
from batchinfer.errors import BatchInferError
from tests.echo_jobs import echo_job, run_echo, tokenizer_dir
from tests.faults.stand import fork, wait

SECONDS = 30  # for one job
ALLOWED = (0, 2, 3, 4)
COMPRESSIONS = ("zstd", "snappy", "none", "gzip", "lz4")


def tables(chance: random.Random) -> list[tuple[str, pa.Table]]:
    """One table of each shape, and the job's prompt column: ``text``, or ``messages``."""
    rows = chance.choice([1, 7, 300, 3000])
    some = ["river", "été", "market", "🙂", "x" * 50]
    words: list[str | None] = [" ".join(chance.choices(some, k=chance.randrange(12))) for _ in range(rows)]
    words = [None if chance.random() < 0.05 else word for word in words]
    told = [[{"role": "user", "content": word or "?"}] * chance.randrange(1, 3) for word in words]
    texts = pa.array(words)
    messages = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    nested = [{"a": [1, 2], "b": {"c": word}} for word in words]
    columns: dict[str, tuple[str, Any]] = {
        "text": ("text", texts),
        "large_string": ("text", texts.cast(pa.large_string())),
        "string_view": ("text", texts.cast(pa.string_view())),
        "dictionary": ("text", pa.array([word or "" for word in words]).dictionary_encode()),
        "binary": ("text", texts.cast(pa.binary())),
        "numbers": ("text", pa.array(range(rows), pa.int16())),
        "timestamps": ("text", pa.array(range(rows), pa.timestamp("ns"))),
        "nulls": ("text", pa.nulls(rows)),
        "nested": ("text", pa.array(nested)),
        "messages": ("messages", pa.array(told, messages)),
        "messages as large lists": ("messages", pa.array(told, pa.large_list(messages.value_type))),
        "messages as JSON": ("messages", pa.array(['[{"role": "user", "content": "a"}]'] * rows)),
        "messages of another shape": ("messages", pa.array([[{"who": "a"}]] * rows)),
    }
    made = [(shape, pa.table({"id": pa.array(range(rows)), name: column})) for shape, (name, column) in columns.items()]
    made.append(("no rows", pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())})))
    made.append(("no columns", pa.table({"id": pa.array(range(3))}).select([])))
    made.append(("another column", pa.table({"id": pa.array(range(rows)), "words": texts})))
    return made


def write(table: pa.Table, path: Path, chance: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table,
        path,
        compression=chance.choice(COMPRESSIONS),
        row_group_size=chance.choice([1, 50, 1000, 1 << 20]),
        use_dictionary=chance.random() < 0.5,
        data_page_version=chance.choice(["1.0", "2.0"]),
        data_page_size=chance.choice([64, 1 << 20]),
        write_page_checksum=chance.random() < 0.3,
        write_statistics=chance.random() < 0.5,
    )


def cut(data: bytearray, chance: random.Random) -> bytearray:
    return data[: chance.randrange(len(data))]


def flip(low: float, high: float) -> Callable[[bytearray, random.Random], bytearray]:
    """Flips some bits between two shares of the bytes before the footer's length."""

    def flipped(data: bytearray, chance: random.Random) -> bytearray:
        for _ in range(chance.choice([1, 1, 3, 20])):
            at = int(chance.uniform(low, high) * (len(data) - 8))
            data[at] ^= 1 << chance.randrange(8)
        return data

    return flipped


def flip_footer(data: bytearray, chance: random.Random) -> bytearray:
    length = min(int.from_bytes(data[-8:-4], "little"), len(data) - 8)
    return flip(1 - length / max(len(data) - 8, 1), 1)(data, chance)


def zero(data: bytearray, chance: random.Random) -> bytearray:
    at = chance.randrange(len(data))
    data[at : at + 40] = bytes(len(data[at : at + 40]))
    return data


def lengthen(data: bytearray, chance: random.Random) -> bytearray:
    """The footer says that it is longer, or shorter, than it is."""
    data[-8:-4] = chance.randrange(1 << 32).to_bytes(4, "little")
    return data


DAMAGES = {
    "sound": lambda data, chance: data,
    "cut": cut,
    "bits of the footer": flip_footer,
    "bits of page headers": flip(0.0, 0.02),
    "bits of the data": flip(0.0, 0.9),
    "zeros": zero,
    "footer's length": lengthen,
}


def chat_tokenizer(folder: Path) -> Path:
    """Bytes as tokens, and a chat template."""
    shutil.copytree(tokenizer_dir(), folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def one(folder: Path, damage: str, seed: int) -> int:
    """Exit code of a job over a file of its own, which must end in all rows or in a line."""
    chance = random.Random(seed)
    shape, table = chance.choice(tables(chance))
    path = folder / "in" / "x.parquet"
    write(table, path, chance)
    path.write_bytes(DAMAGES[damage](bytearray(path.read_bytes()), chance))
    if chance.random() < 0.2:
        write(pa.table({"id": [1.5], "text": ["other"]}), folder / "in" / "y.parquet", chance)
    print(f"{shape}, {damage}, seed {seed}")
    signal.alarm(SECONDS)
    prompt = {"prompt__template": None, "prompt__messages": "messages"} if "messages" in shape else {}
    tokenizer = chat_tokenizer(folder / "tokenizer")
    try:
        job = echo_job(folder, folder / "in", output__columns=["id"], **prompt)
        summary = run_echo(job, lambda _: EchoBackend(tokenizer))
    except BatchInferError as error:
        assert 0 < len(str(error)) < 3000, f"no clear line but {len(str(error))} characters"
        print(f"{type(error).__name__}: {error}")
        return error.exit_code
    wanted = sum(pq.read_metadata(path).num_rows for path in (folder / "in").iterdir())
    found = sum(pq.read_metadata(path).num_rows for path in (folder / "out").rglob("*.parquet"))
    assert found == wanted == summary.job.rows, f"{found} rows of {wanted}"
    return summary.exit_code


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tokenizer_dir()
    ends: dict[str, collections.Counter[int]] = {damage: collections.Counter() for damage in DAMAGES}
    wrong = 0
    for number in range(asked.files):
        damage = list(DAMAGES)[number % len(DAMAGES)]
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        code = wait(fork(lambda f=folder, d=damage, n=number: one(f, d, asked.seed + n), folder / "said"))
        ends[damage][code] += 1
        if code not in ALLOWED:
            wrong += 1
            print(f"exit code {code}: {(folder / 'said').read_text()[-1500:]}", flush=True)
        shutil.rmtree(folder)
    for damage, codes in ends.items():
        told = ", ".join(f"{count} × exit code {code}" for code, count in sorted(codes.items()))
        print(f"{damage:<22}{told}")
    print(f"{asked.files:,} files, {wrong} ended otherwise than in all rows or one clear line")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
