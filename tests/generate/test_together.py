"""One video by two processes of `torchrun` is that of one process, and the processes exchange what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared_videos import CASES, EXACT, made, wan
from torchrun import REPO, run_two
from toy_videos import SAMPLING, SIZE, SIZES
from wan_reference import TEXT_LENGTH

from packforcing.bench.exchange import Exchange, Link, block_exchange, block_seconds
from packforcing.bench.work import Workload
from packforcing.cache.head_share import HeadShare
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.errors import PackForcingError
from packforcing.generate.memory_budget import MemoryDemand
from packforcing.known_models import KNOWN_MODELS, MODELS, ModelShape
from packforcing.model.tensor_parallel import check_shares

# In float64, sums in another order differ by some 1e-15. The compressor's pooling rounds frames to float32, and fp8
# keeps three bits: what falls on the other side of such a rounding moves by a whole step of it.
TOLERANCE = {"direct": 1e-12, "packforcing": 1e-6, "story": 1e-6, "fp8": 1e-6}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has of all CASES."""
    folder = tmp_path_factory.mktemp("two")
    run = run_two(f"{REPO / 'tests/references/shared_videos.py'}", f"{folder}")
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def by_one() -> dict[str, dict[str, Any]]:
    model = wan(HeadShare())
    return {name: made(case, model) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_video_of_one(name: str, by_two: list[Any], by_one: dict[str, Any]) -> None:
    first, second = (found[name] for found in by_two)
    one = by_one[name]
    assert torch.equal(first["latents"], second["latents"])
    assert first["selected"] == second["selected"] == one["selected"]
    assert any(mids != [1, 2] for block in one["selected"][5:] for mids in block), "nothing was chosen"
    scale = one["latents"].abs().max()
    assert first["latents"].dtype == EXACT
    assert (first["latents"] - one["latents"]).abs().max() < TOLERANCE[name] * scale
    assert first["rounding"] == pytest.approx(one["rounding"], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_each_process_keeps_its_half(name: str, by_two: list[Any], by_one: dict[str, Any]) -> None:
    """Of buffers and archive. The key sums are those of the scored heads, wherever these are."""
    kept = by_one[name]["bytes"]
    halves = [found[name]["bytes"] for found in by_two]
    for owner in kept:
        if owner != "key_sums":
            assert [half[owner] for half in halves] == [kept[owner] / 2] * 2, owner
    assert sum(half["key_sums"] for half in halves) == kept["key_sums"]


def test_weights_are_cut_by_heads_and_hidden_width(by_two: list[Any]) -> None:
    for found in by_two:
        shapes = found["weights"]
        for attention in ("self_attn", "cross_attn"):
            assert all(shapes[f"{attention}.{name}.weight"] == (128, 256) for name in "qkv")
            assert shapes[f"{attention}.o.weight"] == (256, 128)
        assert shapes["ffn.0.weight"] == (128, 256)
        assert shapes["ffn.2.weight"] == (256, 128)
        assert shapes["self_attn.norm_q.weight"] == (128,)


def test_the_parts_compute_what_the_styles_compute(by_two: list[Any]) -> None:
    """PyTorch's own forward pass of what its parallel styles have cut."""
    assert max(found["styles"] for found in by_two) < 1e-13


@pytest.mark.parametrize("name", CASES)
def test_what_is_exchanged_is_what_is_counted(name: str, by_two: list[Any]) -> None:
    """Against the collective operations that PyTorch really called for a block with a full cache."""
    case = CASES[name]
    layout = Layout(case.config, SIZE, 1, case.compressor().direct)
    work = Workload(SIZES, layout, SAMPLING.steps, TEXT_LENGTH, torch.device("cpu"), EXACT)
    for number, found in enumerate(by_two):
        # Where a block is decoded beside the next, and the main process does that, the next was begun before it came.
        begun = 7 if case.overlap and number == 0 else 6
        assert Exchange(**found[name]["exchanged"][6]) == block_exchange(work, begun, exact_bytes=8)


def test_processes_agree_before_they_work(by_two: list[Any]) -> None:
    """Each has its own results, or all have one error."""
    first, second = (found["said"] for found in by_two)
    assert (first.pop("all"), second.pop("all")) == (0, 1)
    assert first == second
    assert first["main"] == 0
    assert first["one fails"] == "SaidByAll: Process 1 of 2: Only this one."
    assert first["main fails"].startswith("SaidByAll: The device 'nonsense' cannot be used here")
    assert first["same"] is None
    assert "process 1 of 2 has other options than process 0" in first["not the same"]
    assert "process 1 of 2 has other weights than process 0" in first["weights"]
    assert first["flag"] is True


# --- counted ----------------------------------------------------------------------------------------------------------


def test_the_counted_block_of_the_paper() -> None:
    """Wan 2.1 1.3B at 832x480, by hand: 149 full layers of three sums of 6,240 tokens, some with 182 more."""
    model = KNOWN_MODELS["wan2.1-1.3b"]
    layout = Layout(CacheConfig(), FrameSize(832, 480), 2)
    work = Workload(model.sizes, layout, 4, 512, torch.device("meta"), torch.bfloat16)
    found = block_exchange(work, 60)
    compressed = layout.compressed_tokens_per_block
    wide = 3 * 1536 * 2 * (120 * 6240 + 29 * (6240 + compressed))
    numbers = 4 * (3 * 120 * 6240 + (3 * 29 + 2) * (6240 + compressed) + 30 * 57)
    assert found == Exchange(120 * 6 + 29 * 6 + 2 + 30, wide + numbers, compressed * 1536 * 2)
    assert found.wire_bytes(2) == found.summed_bytes + found.sent_bytes

    link = Link(flop=1e15, bandwidth=1e30, latency=0.0)
    assert block_seconds(work, 4, link) == pytest.approx(block_seconds(work, 1, link) / 4)
    slow = Link(flop=1e15, bandwidth=1e9, latency=0.0)
    assert block_seconds(work, 2, slow) > block_seconds(work, 1, slow)


def test_shares() -> None:
    model = ModelShape(layers=2, dim=48, heads=12)
    assert HeadShare(1, 3).of(model) == ModelShape(layers=2, dim=16, heads=4)
    assert [HeadShare(rank, 3).scored(model, 0.5) for rank in range(3)] == [4, 2, 0]
    assert HeadShare().scored(model, 0.5) == 6
    check_shares(MODELS["wan2.1-14b"], 13824, 8)
    with pytest.raises(PackForcingError, match=r"12 heads .* which 8 processes .* start 1, 2 or 4 by"):
        check_shares(MODELS["wan2.1-1.3b"], 8960, 8)
    with pytest.raises(PackForcingError, match="which 24 processes"):  # more than there are heads
        check_shares(MODELS["wan2.1-1.3b"], 8960, 24)


def test_a_share_takes_less_memory() -> None:
    """All but the hidden tokens, which every process has whole."""
    layout = Layout(CacheConfig(), FrameSize(832, 480), 2)
    whole = MemoryDemand(MODELS["wan2.1-14b"], 2, layout, 100).least
    part = MemoryDemand(HeadShare(0, 4).of(MODELS["wan2.1-14b"]), 2, layout, 100, processes=4).least
    assert whole / 4 < part < whole / 3
