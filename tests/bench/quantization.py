"""What every quantisation costs and gives, as a Markdown table: ``python -m tests.bench.quantization [MODEL]``.

Each scheme is built and run in a process of its own, after plain bfloat16 and on the same requests. Perplexity is that
of the build's held-out rows, which no calibration saw.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# scheme, group size, keys and values
SCHEMES = [
    ("none", 0, "auto"),
    ("none", 0, "int8"),
    *((scheme, 0, "auto") for scheme in ("fp8", "int8", "w8a8", "smoothquant")),
    *((scheme, size, "auto") for size in (32, 128, -1) for scheme in ("int4", "awq", "gptq")),
]


def measure(model: str, scheme: str, group_size: int, kv_dtype: str, requests: int) -> dict[str, Any]:
    """Build, open and run one engine, here."""
    from batchinfer.engine.build import build

    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as folder:
        plan = build(
            model,
            Path(folder, "engine"),
            dtype="bfloat16",
            quantization=scheme,
            group_size=group_size,
            kv_dtype=kv_dtype,
            max_quality_loss=1e9,
            seq_len=1024,
            progress=False,
        )
        layers = sum(file.stat().st_size for file in (plan.path / "weights").glob("layer-*"))
        # A process of its own: the build's memory is not the engine's.
        run = f"engine({str(plan.path)!r}, {requests})"
        call = f"import json; from batchinfer.bench import engine; print(json.dumps({run}))"
        done = subprocess.run([sys.executable, "-c", call], stdout=subprocess.PIPE, check=True)
        ran = json.loads(done.stdout)
    return {"quality": plan.quality, "layer_bytes": layers, **ran}


def row(scheme: str, group_size: int, kv_dtype: str, found: dict[str, Any], plain: dict[str, Any]) -> str:
    quality = found["quality"]
    told = "· | · | ·"
    if quality is not None:
        loss = quality["perplexity"] / quality["reference_perplexity"] - 1
        told = f"{quality['perplexity']:.2f} | {loss:+.1%} | {quality['agreement']:.1%}"
    group = {0: "", -1: ", a scale a row"}.get(group_size, f", groups of {group_size}")
    kept = "" if kv_dtype == "auto" else f", keys and values in {kv_dtype}"
    return (
        f"| {'bfloat16' if scheme == 'none' else scheme}{group}{kept} | {found['layer_bytes'] / 1e6:.1f} "
        f"({plain['layer_bytes'] / found['layer_bytes']:.1f}× less) | {found['peak_rss_mb']:.0f} | "
        f"{found['total_tok_s']:.0f} ({found['total_tok_s'] / plain['total_tok_s']:.2f}×) | {told} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--schemes", help="comma-separated; all unless given")
    options = parser.parse_args()
    wanted = options.schemes and ["none", *options.schemes.split(",")]
    print("| weights of layers | MB | peak memory, MB | tok/s | perplexity | loss | greedy agreement |")
    print("|---|---|---|---|---|---|---|", flush=True)
    plain = None
    for scheme, group_size, kv_dtype in SCHEMES:
        if wanted and scheme not in wanted:
            continue
        found = measure(options.model, scheme, group_size, kv_dtype, options.requests)
        plain = plain or found
        print(row(scheme, group_size, kv_dtype, found, plain), flush=True)


if __name__ == "__main__":
    main()
