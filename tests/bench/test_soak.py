"""benchmarks/soak.py in short: a video's samples, and that its check of positions can fail."""

from __future__ import annotations

import pytest
import torch
from benchmark import imported

soak = imported("soak")


def test_a_video_holds_its_files_threads_and_positions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soak, "SAMPLES", 3)
    found = soak.long_video(9)
    samples = found["samples"]
    assert [sample["blocks"] for sample in samples] == [3, 6, 9]
    assert samples[1]["files"] == samples[2]["files"]
    assert samples[1]["threads"] == samples[2]["threads"]
    assert all(sample["position_error"] < 1e-5 for sample in samples)
    assert samples[-1]["context_tokens"] == 16 * 3 + 4  # sink, recent and current, and mid blocks of one token each
    assert found["growth"]["record_mb"] > 0


def test_a_key_that_stands_a_frame_off_is_seen():
    keys = torch.randn(1, 16, 2, 128).double()
    size = soak.FrameSize(64, 64)
    assert (soak.turned(keys, 6, size) - soak.turned(keys, 7, size)).abs().max() > 0.1


def test_a_record_is_counted_with_all_that_it_holds():
    empty, full = soak.BlockRecord(1, []), soak.BlockRecord(1, [[1000] * 16] * 4)
    assert soak.record_bytes([full]) - soak.record_bytes([empty]) > 4 * 16 * 28
