"""The benchmark's stages on a CUDA device, as far as they are not about its speed."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from fake_device import FakeDevice

from packforcing.bench import models, rates
from packforcing.cli.main import main

# As in tests/bench; float32, which a CPU multiplies fast.
CHEAP = shlex.split(
    "bench --model tiny --size 64x64 --block 1 --sink 1 --recent 1 --top-k 2 --steps 1 --repeats 1 --device cuda "
    "--dtype float32 --seconds 0.6 --baseline-blocks 3 --json"
)
# As benchmarks/gpu.py runs it.
RUNS = {
    "plain": "",
    "fp8, small card": "--kv-dtype fp8_e4m3 --archive-device host --memory-gb 8.1 --no-baselines --no-vae",
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.SQUARE, "cuda", 64)
    monkeypatch.setitem(rates.COPIED_BYTES, "cuda", 2**16)
    for module in (models, rates):
        monkeypatch.setattr(module, "fast_dtype", lambda device: torch.float32)


@pytest.mark.parametrize("run", RUNS)
def test_the_benchmark_runs_on_the_device(run: str, capsys: pytest.CaptureFixture[str]):
    with FakeDevice():
        assert main([*CHEAP, *shlex.split(RUNS[run])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "Fake GPU"
    assert set(found["stages"]) >= {"denoise", "selection", "clean_pass"}
    assert (found["overlap"] is None) == (run != "plain")
    assert len(found["baselines"]) == (3 if run == "plain" else 0)
