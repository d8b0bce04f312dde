from __future__ import annotations

import json
import os
import stat

import pytest
from click.testing import CliRunner

from batchinfer.backends.tensorrt_llm.versions import needed
from batchinfer.cli import main
from batchinfer.doctor import examine
from batchinfer.errors import ModelError
from tests.backends.tensorrt_llm.conftest import put  # noqa: F401


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that says so."""

    def say(script: str) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")

    return say


H200 = 'echo "NVIDIA H200, 9.0, 143771 MiB, 580.1"'


def test_what_is_installed_is_told_and_what_is_missing_too(smi):
    smi("exit 9")  # a driver that does not answer
    found = examine()
    assert found.installed["GPU"] == "none" and found.installed["TensorRT-LLM"] == "not installed"
    assert {"torch", "CUDA", "driver", "FlashInfer", "compiler", "Python"} <= set(found.installed)
    assert found.backends["native"].startswith("on the CPU") and "echo" in found.backends
    assert "no NVIDIA GPU" in found.lacks["tensorrt-llm"]


def test_a_gpu_alone_does_not_run_tensorrt_llm(smi):
    smi(H200)
    found = examine()
    assert found.installed["GPU"] == "NVIDIA H200 (sm_90, 143771 MiB)" and found.installed["driver"] == "580.1"
    assert "not installed: pip install" in found.lacks["tensorrt-llm"]
    with pytest.raises(ModelError, match="which is not installed"):
        needed()


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("1.2.1", '1.2.1, flavour "pytorch" and "engine"'), ("1.4.0rc1", '1.4.0rc1, flavour "pytorch" alone')],
)
def test_each_version_has_its_flavours(smi, put, version, wanted):  # noqa: F811
    smi(H200)
    put(version)
    assert examine().backends["tensorrt-llm"] == f"tensorrt_llm {wanted}"


def test_a_version_that_is_not_known_is_why_it_cannot(smi, put):  # noqa: F811
    smi(H200)
    put("0.21.0")
    assert "0.21.0 is not known here: expected 1.0 to 1.4" in examine().lacks["tensorrt-llm"]


def test_the_command_prints_a_table_or_json():
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0 and "native" in shown.output and "runs here" in shown.output
    told = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert set(told) == {"installed", "backends", "lacks"}
