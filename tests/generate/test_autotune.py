"""The fastest way is found by trying; what it is used for is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape
from packforcing.generate import autotune as tuning
from packforcing.generate.autotune import (
    TunedAttention,
    fastest,
    seconds,
    tried_attention,
    try_vae_layouts,
    tune_vae_layout,
    tuned_attention,
)
from packforcing.model.attention import BACKENDS, fast_attention, sdpa, sdpa_by
from packforcing.model.vae import StreamingDecoder, WanVAE, init_vae

CPU = torch.device("cpu")
MODEL = ModelShape(layers=1, dim=64, heads=2)


def fails() -> None:
    raise RuntimeError("No available kernel")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"usual": 1.0, "a": 2.0, "b": 0.5}, "b"),
        ({"usual": 1.0, "a": 0.96, "b": 1.1}, "usual"),  # too little to be sure of
        ({"usual": 1.0, "a": 0.9, "b": 0.93}, "a"),
        ({"usual": 1.0, "broken": 0.1, "b": 0.5}, "b"),
    ],
)
def test_the_fastest_is_the_first_unless_another_is_clearly_faster(
    times: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {name: fails if name == "broken" else (lambda name=name: name) for name in times}
    monkeypatch.setattr(tuning, "seconds", lambda way, device: times[way()])
    assert fastest(ways, CPU) == expected


def test_the_first_must_work() -> None:
    with pytest.raises(RuntimeError, match="No available kernel"):
        fastest({"usual": fails, "other": lambda: None}, CPU)


def test_the_first_try_only_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 200.0, 203.0, 300.0, 302.0, 400.0, 404.0])
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(clock))
    calls = []
    assert seconds(lambda: calls.append(1), CPU) == 2
    assert len(calls) == 1 + tuning.TRIES


def qkv(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, 2, 32, generator=generator) for length in (queries, keys, keys))
    return q, k, v


def test_each_kernel_is_the_definition_or_says_that_it_is_not_there() -> None:
    """On the CPU there is the flash kernel."""
    given = qkv(5, 9)
    torch.testing.assert_close(sdpa_by("flash_attention")(*given), sdpa(*given))
    with pytest.raises(RuntimeError):
        sdpa_by("cudnn_attention")(*given)
    with pytest.raises(RuntimeError, match="no slow_attention"):
        sdpa_by("slow_attention")(*given)


def test_only_a_full_context_takes_the_tuned_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(tuning, "sdpa_by", lambda backend: lambda *given: taken.append(backend))
    monkeypatch.setattr(tuning, "sdpa", lambda *given: taken.append("default"))
    tuned = TunedAttention("cudnn_attention", 5, 9)
    for lengths in ((5, 9), (5, 7), (3, 9)):
        tuned(*qkv(*lengths))
    TunedAttention("default", 5, 9)(*qkv(5, 9))
    assert taken == ["cudnn_attention", "default", "default", "default"]


def test_attention_is_tried_on_the_shapes_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(CacheConfig(block_frames=1, sink_frames=1, recent_frames=1, top_k=2), FrameSize(64, 64), 1)
    tried = {}

    def flash_wins(ways: dict, device: torch.device) -> str:
        assert set(ways) == {"default", *BACKENDS}
        for name in ("default", "flash_attention"):  # the others a CPU has not
            tried[name] = ways[name]().shape
        return "flash_attention"

    monkeypatch.setattr(tuning, "fastest", flash_wins)
    tuned = tried_attention(MODEL, layout, CPU, torch.float32)
    assert tuned.backend == "flash_attention"
    assert tried == dict.fromkeys(("default", "flash_attention"), (1, layout.tokens_per_block, 2, 32))
    given = qkv(layout.tokens_per_block, layout.context_tokens)
    torch.testing.assert_close(tuned(*given), sdpa(*given))


def test_kernels_that_are_not_there_are_passed_over() -> None:
    layout = Layout(CacheConfig(block_frames=1, sink_frames=1, recent_frames=1, top_k=2), FrameSize(64, 64), 1)
    assert tried_attention(MODEL, layout, CPU, torch.float32).backend in ("default", "flash_attention")


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "fastest", fails)
    layout = Layout(CacheConfig(), FrameSize(64, 64), 2)
    assert tuned_attention(MODEL, layout, CPU, torch.float32) is fast_attention
    vae = init_vae(8)
    assert tune_vae_layout(vae, FrameSize(48, 32)) is True
    assert vae.decoder.head[2].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert tune_vae_layout(vae.bfloat16(), FrameSize(48, 32)) is False
    assert vae.decoder.head[2].weight.is_contiguous()


def test_where_there_is_no_room_to_copy_channels_lie_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "fastest", fails)
    monkeypatch.setattr(WanVAE, "device", torch.device("cuda"))
    vae = init_vae(8)
    assert tune_vae_layout(vae, FrameSize(48, 32), room_to_copy=False) is True
    assert vae.decoder.head[2].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("wins", ["plain", "last"])
def test_the_faster_layout_stays_and_changes_no_picture(
    wins: str, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(ways: dict, device: torch.device) -> str:
        for way in ways.values():
            way()
        return wins

    monkeypatch.setattr(tuning, "fastest", both)
    vae = init_vae(8).requires_grad_(False)
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = StreamingDecoder(vae).decode(latents)
    with torch.inference_mode(inference):  # as in ComfyUI
        assert try_vae_layouts(vae, FrameSize(48, 32)) == (wins == "last")
        found = StreamingDecoder(vae).decode(latents)
    weight = vae.decoder.head[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) == (wins == "last")
    assert weight.is_contiguous() == (wins == "plain")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
