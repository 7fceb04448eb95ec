"""What a run is said to take, against what its tensors take; and what is said when it does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn

from packforcing.config import MODELS, CacheConfig, FrameSize, Layout, default_temporal_stride
from packforcing.devices import fast_dtype
from packforcing.errors import PackForcingError
from packforcing.generate.long_video import LongVideo, VideoModels, VideoSettings
from packforcing.generate.memory_budget import (
    DecodePlan,
    DecoderMemory,
    MemoryDemand,
    check_disk,
    check_host,
    decode_plan,
)
from packforcing.generate.sampling import Sampling
from packforcing.model.attention import sdpa
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import Compressor
from packforcing.model.vae import StreamingDecoder, WanVAE, init_vae
from packforcing.model.vae_convolutions import FastOnCPU
from packforcing.model.wan_modules import SIZES, build_wan_modules, random_state_dict

GB = 10**9


def demand(width: int = 832, height: int = 480, blocks: int = 60, **config: Any) -> MemoryDemand:
    chosen = CacheConfig(**config)
    layout = Layout(chosen, FrameSize(width, height), default_temporal_stride(chosen.block_frames))
    return MemoryDemand(MODELS["wan2.1-1.3b"], 2, layout, blocks, DecoderMemory(dim=96, itemsize=2))


# --- the count -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("width", "height", "dtype"), [(832, 480, torch.bfloat16), (128, 64, torch.float32)])
@pytest.mark.parametrize("copies", [False, True])
def test_the_decoder_holds_what_is_said(
    copies: bool, width: int, height: int, dtype: torch.dtype, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without data, the second block of a video, at the real VAE's width.

    With copies, while each convolution runs there is a second form of what it reads and of what it writes.
    """
    with torch.device("meta"):
        vae = WanVAE(96).to(dtype).requires_grad_(False).to_layout(channels_last=not copies)
        latents = torch.empty(1, 16, frames, height // 8, width // 8)
    decoder = StreamingDecoder(vae)
    decoder.decode(latents)
    live = LiveBytes(decoder.state.values())
    held = live.now

    def copying(layer: nn.Module, x: Tensor, *weights: Tensor, convolved: Any = FastOnCPU._conv_forward) -> Tensor:
        output = convolved(layer, x, *weights)
        live.peak = max(live.peak, live.now + x.nbytes + output.nbytes)
        return output

    if copies:
        monkeypatch.setattr(FastOnCPU, "_conv_forward", copying)
    with live:
        decoder.decode(latents)

    said = DecoderMemory(96, dtype.itemsize, copies)
    size = FrameSize(width, height)
    assert held == pytest.approx(said.remembered(size), rel=0.01)
    assert live.peak == pytest.approx(said.peak(size, frames), rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.bfloat16, {"sink_frames": 8}),
        (torch.bfloat16, {"kv_dtype": "fp8_e4m3", "archive_device": "host"}),
        (torch.float32, {"recent_frames": 8}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("vae_dim", "overlap"), [(0, False), (32, False), (32, True)])
def test_a_run_holds_what_is_said(
    vae_dim: int, overlap: bool, dtype: torch.dtype, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors that a whole run makes, the weights left out, counted while it runs."""
    beside = LiveBytes()  # a thread does not see another one's tensors: what both hold at most may come together

    def counted_decode(decoder: StreamingDecoder, latents: Tensor, decode: Any = StreamingDecoder.decode) -> Tensor:
        with beside:
            return decode(decoder, latents)

    if overlap:
        monkeypatch.setattr(StreamingDecoder, "decode", counted_decode)
    layout = Layout(CacheConfig(**({"sink_frames": 4, "top_k": 2 if vae_dim else 0} | config)), FrameSize(64, 64), 2)
    wan = CausalWan(build_wan_modules(SIZES["tiny"], random_state_dict(SIZES["tiny"], 0)).to(dtype), sdpa, dtype)
    # A processor without bfloat16 takes minutes for convolutions in it.
    vae_dtype = dtype if dtype == torch.float32 else fast_dtype("cpu")
    vae = init_vae(vae_dim).to(vae_dtype).requires_grad_(False) if vae_dim else None
    blocks = 6
    text = wan.embed_text(torch.zeros(1, 512, 4096))
    weights = [*wan.modules.parameters(), *(vae.parameters() if vae else ())]
    with LiveBytes([*weights, *(tensor for pair in text.layers for tensor in pair)]) as live:
        settings = VideoSettings(layout, Sampling(steps=1), decode_frames=1, overlap=overlap)
        video = LongVideo(VideoModels(wan, vae, Compressor(2)), text, settings)
        for _ in video.blocks(blocks):
            pass
    counted = live.peak + beside.peak - sum(tensor.nbytes for tensor in weights)
    counted -= video.cache.archive.host_bytes  # on a CPU, host memory is this memory
    said = MemoryDemand(
        wan.shape, dtype.itemsize, layout, blocks, DecoderMemory(vae_dim, vae_dtype.itemsize) if vae else None
    )
    assert counted == pytest.approx(said.bytes(1, overlap), rel=0.15)


# --- the choice ------------------------------------------------------------------------------------------------


def test_a_block_is_decoded_in_as_large_passes_as_fit() -> None:
    run = demand()
    assert run.passes() == [4, 2, 1]
    assert decode_plan(run, None, "cuda", overlap=False) == DecodePlan(4, False)
    for frames in run.passes():
        assert decode_plan(run, run.bytes(frames), "cuda") == DecodePlan(frames, False)
        assert decode_plan(run, run.bytes(frames) + 3 * GB, "cuda", movable=3 * GB) == DecodePlan(frames, False)
    assert decode_plan(run, run.bytes(4) - 1, "cuda") == DecodePlan(2, False)
    assert decode_plan(run, run.bytes(1), "cuda", movable=100 * GB) == DecodePlan(1, False)  # weights make room
    assert demand(block_frames=3, sink_frames=3, recent_frames=3).passes() == [3, 1]
    assert demand(block_frames=1).passes() == [1]


def test_the_small_model_at_its_usual_size_fits_a_card_of_8_gb() -> None:
    """With fp8 keys and values and the archive in host memory; 2 GB are left for weights, which ComfyUI moves."""
    frugal = demand(kv_dtype="fp8_e4m3", archive_device="host", blocks=10_000)
    assert frugal.least < 6.3 * GB
    assert decode_plan(frugal, 8 * GB, "cuda:0", movable=3 * GB) == DecodePlan(1, False)


def test_blocks_are_decoded_beside_the_next_where_that_fits() -> None:
    run = demand()
    needed = run.bytes(4, overlap=True)
    assert needed - run.bytes(4) > 1.6 * GB, "recent and mid blocks once more: 9,152 tokens"
    assert decode_plan(run, None, "cuda") == DecodePlan(4, True)
    assert decode_plan(run, needed + 3 * GB, "cuda", movable=3 * GB) == DecodePlan(4, True)
    assert decode_plan(run, needed + 3 * GB - 1, "cuda", movable=3 * GB) == DecodePlan(4, False)
    assert decode_plan(run, needed, "cuda", overlap=False) == DecodePlan(4, False)
    assert decode_plan(replace(run, vae=None), None, "cuda") == DecodePlan(4, False)
    unneeded = demand(top_k=0)
    assert unneeded.bytes(4, overlap=True) < run.bytes(4, overlap=True) - 1.6 * GB


def test_longer_videos_need_no_more() -> None:
    assert demand(blocks=100, archive_device="host").least == demand(blocks=10**6, archive_device="host").least
    assert demand(blocks=1000).least == demand(blocks=10**6).least  # the archive's budget


# --- what does not fit -----------------------------------------------------------------------------------------


def refusal(run: MemoryDemand, available: float) -> str:
    with pytest.raises(PackForcingError) as told:
        decode_plan(run, int(available), "cuda:0")
    return str(told.value)


def test_what_does_not_fit_is_told_with_what_would() -> None:
    run = demand()
    host, fp8 = run.with_config(archive_device="host"), run.with_config(kv_dtype="fp8_e4m3")
    both = fp8.with_config(archive_device="host")
    assert run.least > host.least > fp8.least > both.least

    told = refusal(run, host.least)
    assert told.startswith("A video of 832x480 needs about ")
    assert "beside the model's weights, but cuda:0 has " in told
    assert told.endswith(f"set archive_device host, which takes {host.least / 1e9:.2f} GB.")
    assert "set kv_dtype fp8_e4m3, which takes" in refusal(run, fp8.least)
    assert "set archive_device host and kv_dtype fp8_e4m3, which takes" in refusal(run, both.least)
    assert "set kv_dtype fp8_e4m3, which takes" in refusal(host, both.least)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_a_smaller_frame_is_the_largest_that_fits(share: float) -> None:
    run = demand(1280, 720)
    frugal = run.with_config(archive_device="host", kv_dtype="fp8_e4m3")
    available = share * frugal.least
    told = refusal(run, available)
    assert "with archive_device host and kv_dtype fp8_e4m3 takes" in told
    width, height = (int(side) for side in told.rpartition(": ")[2].split()[0].split("x"))
    assert width / height == pytest.approx(1280 / 720, rel=0.1)
    assert demand(width, height, kv_dtype="fp8_e4m3", archive_device="host").least <= available
    wider = FrameSize(width + 16, round((width + 16) / 16 * 45 / 80) * 16)
    assert demand(wider.width, wider.height, kv_dtype="fp8_e4m3", archive_device="host").least > available
    assert "with" not in refusal(frugal, available).rpartition(": ")[2]  # nothing is left to set


def test_where_no_size_fits_that_is_said() -> None:
    assert "no size fits with this cache config" in refusal(demand(), 1e6)


# --- the machine's own memory ----------------------------------------------------------------------------------


def test_the_archive_and_the_latents_lie_in_the_machines_memory() -> None:
    """A block of 832x480 has 4 * 60 * 104 numbers in 16 channels, and 2 * 7 * 13 compressed tokens."""
    latents, archived = 4 * 60 * 104 * 16 * 4, 30 * 2 * 1536 * 2 * 182
    blocks = 1000 - 1 - 2  # all but the last and the sinks
    assert demand(blocks=1000, top_k=0, sink_frames=8).host_bytes == 1000 * latents
    assert demand(blocks=1000, archive_device="device").host_bytes == 1000 * latents
    assert demand(blocks=1000, archive_device="host").host_bytes == 1000 * latents + blocks * archived
    auto = demand(blocks=1000, archive_device="auto", archive_budget_gb=2.5)
    assert auto.host_bytes == 1000 * latents + blocks * archived - 25 * 10**8
    assert demand(blocks=2, archive_device="host").host_bytes == 2 * latents
    on_disk = demand(blocks=1000, archive_device="disk")
    assert (on_disk.host_bytes, on_disk.disk_bytes) == (1000 * latents, blocks * archived)
    assert on_disk.least == demand(blocks=1000, archive_device="host").least
    assert auto.disk_bytes == 0


def test_what_the_machine_cannot_hold_is_told() -> None:
    run = demand(blocks=5000, archive_device="host")
    check_host(run, None, shared=True)
    check_host(run, run.host_bytes, shared=False)
    check_host(run, run.host_bytes + run.least, shared=True)
    for available, shared in ((run.host_bytes - 1, False), (run.host_bytes + run.least - 1, True)):
        with pytest.raises(PackForcingError, match=r"^A video of 832x480 and 5000 blocks needs about .* kv_dtype fp8"):
            check_host(run, available, shared)
    with pytest.raises(PackForcingError, match="choose a shorter video, a smaller frame, or top_k 0"):
        check_host(run.with_config(kv_dtype="fp8_e4m3"), GB, shared=False)
    with pytest.raises(PackForcingError, match="a smaller frame, archive_device disk, kv_dtype fp8_e4m3, or top_k 0"):
        check_host(run, run.with_config(archive_device="disk").host_bytes, shared=False)
    check_host(run.with_config(archive_device="disk"), run.with_config(archive_device="disk").host_bytes, shared=False)


def test_a_disk_without_room_for_the_archive_is_told() -> None:
    run = demand(blocks=5000, archive_device="disk")
    check_disk(run, None)
    check_disk(run, run.disk_bytes)
    check_disk(demand(blocks=5000, archive_device="host"), 0)
    with pytest.raises(
        PackForcingError, match=r"^The archive of 5000 blocks takes a file of 167.63 GB, but .* are free"
    ):
        check_disk(run, run.disk_bytes - 1)
