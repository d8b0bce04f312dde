"""What Airflow's list of providers says of batchinfer. Airflow reads it while it is still being imported itself."""

from __future__ import annotations

from typing import Any

import batchinfer


def get_provider_info() -> dict[str, Any]:
    return {
        "package-name": "batchinfer",
        "name": "batchinfer",
        "description": "Offline batch inference for large language models: Parquet in, Parquet out, resumable",
        "versions": [batchinfer.__version__],
    }
