"""Counts of FLOP against PyTorch's own counter, and against the numbers of the method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from packforcing.bench.baselines import block_input, fill
from packforcing.bench.floors import pass_ms, stage_floors
from packforcing.bench.rates import Rates, best_of, measure_rates
from packforcing.bench.work import PassWork, Work, Workload, attended_tokens, clean_work, denoise_work, vae_flop
from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.generate.sampling import Sampling
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import lr_latents
from packforcing.model.vae import StreamingDecoder, init_vae
from packforcing.model.wan_modules import SIZES, WanSizes, build_wan_modules, random_state_dict

SMALL = WanSizes(dim=64, ffn_dim=96, layers=3, heads=2, text_dim=32, freq_dim=16)
LAYOUT = Layout(CacheConfig(block_frames=2, sink_frames=2, recent_frames=2, top_k=2), FrameSize(128, 64), 2)
TEXT = 5
WORKLOAD = Workload(SMALL, LAYOUT, steps=4, text_tokens=TEXT, device=torch.device("cpu"), dtype=torch.float32)
UNIT = Rates(gemm=1e12, vae_gemm=1e12, attention=1e12, cross_attention=1e12, copy=1e12, host_copy=1e11)


def flop(work: PassWork) -> int:
    return work.linear.flop + work.attention.flop + work.cross_attention.flop


def paper_layout() -> Layout:
    return Layout(CacheConfig(), FrameSize(832, 480), 2)


@pytest.mark.parametrize("block", [1, 4, 7])
@torch.no_grad()
def test_a_passes_flop_are_what_pytorch_counts(block: int):
    wan = CausalWan(build_wan_modules(SMALL, random_state_dict(SMALL, seed=1)), text_len=0)
    text = wan.embed_text(torch.randn(1, TEXT, SMALL.text_dim))
    cache = Cache(LAYOUT, SMALL.shape)
    fill(cache, block)
    given = block_input(wan, LAYOUT, Sampling(steps=1), block)
    cache.begin(block)
    tokens, context = LAYOUT.tokens_per_block, attended_tokens(LAYOUT, block)

    # The counter does not know the CPU's fused attention, but knows the products of the plain one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        wan.denoise(given.noises[0], 1.0, text, cache)
    selection = affinity_flop(cache, block)
    assert counter.get_total_flops() - selection == flop(denoise_work(SMALL, tokens, context, TEXT, 4))

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        wan.clean_pass(given.noises[0], text, cache, given.compressed)
    compressed = LAYOUT.compressed_tokens_per_block
    assert counter.get_total_flops() == flop(clean_work(SMALL, tokens, compressed, context, TEXT, 4))


def affinity_flop(cache: Cache, block: int) -> int:
    """The scores of more mid blocks than are attended: too few operations to be part of a floor."""
    mids = len(cache.config.partition(block).mid)
    chooses = mids > cache.config.top_k
    return 2 * mids * cache.heads * SMALL.shape.head_dim * SMALL.layers if chooses else 0


def test_the_papers_model_takes_what_the_method_says():
    layout = paper_layout()
    work = denoise_work(SIZES["wan2.1-1.3b"], layout.tokens_per_block, layout.context_tokens, 512, 2)
    tera = [round(kind.flop / 1e12, 1) for kind in (work.linear, work.attention, work.cross_attention)]
    assert tera == [15.6, 32.1, 0.6]


@pytest.mark.parametrize(("block", "full", "mids"), [(0, 1, 0), (3, 4, 0), (4, 4, 1), (19, 4, 16), (500, 4, 16)])
def test_the_context_grows_until_the_cache_is_full(block: int, full: int, mids: int):
    layout = paper_layout()
    expected = full * layout.tokens_per_block + mids * layout.compressed_tokens_per_block
    assert attended_tokens(layout, block) == expected
    assert (expected == layout.context_tokens) == (mids == 16)


def test_the_vaes_flop_are_those_of_a_real_decode_and_a_real_encode():
    vae = init_vae(dim=8).requires_grad_(False)
    decoder = StreamingDecoder(vae)
    latents = torch.zeros(1, 16, 2, 8, 16)
    decoder.decode(latents)
    # The counter does not know convolutions that ask for oneDNN by name.
    with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as decode:
            frames = decoder.decode(latents)
        with FlopCounterMode(display=False) as encode, torch.no_grad():
            lr_latents(frames, vae, 2)
        assert vae_flop(8, LAYOUT) == (decode.get_total_flops(), encode.get_total_flops())


def test_work_is_bound_by_whichever_is_slower():
    compute, traffic, nothing = Work(flop=2 * 10**9, bytes=1), Work(flop=1, bytes=3 * 10**9), Work()
    assert pass_ms(PassWork(compute, nothing, nothing), UNIT) == pytest.approx(2)
    assert pass_ms(PassWork(nothing, traffic, nothing), UNIT) == pytest.approx(3)
    assert pass_ms(PassWork(compute, traffic, nothing), UNIT) == pytest.approx(5)


def test_a_blocks_floor_counts_every_step_and_what_crosses_the_bus():
    def floors(steps: int, slots: float, on_host: bool) -> dict[str, float]:
        return stage_floors(replace(WORKLOAD, steps=steps), UNIT, 9, slots, on_host)

    one, four = floors(1, 6, False), floors(4, 6, False)
    assert four["denoise"] == pytest.approx(4 * one["denoise"])
    assert four["clean_pass"] == one["clean_pass"] < 1.2 * one["denoise"]
    assert set(one) == {"denoise", "clean_pass", "selection"}

    slot_bytes = LAYOUT.compressed_tokens_per_block * 2 * SMALL.dim * 4
    moved = (6 + SMALL.layers) * slot_bytes
    assert one["selection"] == pytest.approx(1000 * 2 * moved / UNIT.copy)
    assert floors(1, 6, True)["selection"] == pytest.approx(1000 * moved / UNIT.host_copy)


def test_without_mid_blocks_nothing_is_compressed():
    layout = replace(LAYOUT, config=replace(LAYOUT.config, top_k=0))
    floors = stage_floors(replace(WORKLOAD, layout=layout, vae_dim=8), UNIT, 9, 0.0, False)
    assert floors["selection"] == 0
    assert "compression" not in floors
    assert floors["decode"] > 0


def test_rates_are_measured_on_this_machine():
    rates = measure_rates(replace(WORKLOAD, vae_dim=8), repeats=1)
    assert min(rates.gemm, rates.vae_gemm, rates.attention, rates.cross_attention, rates.copy) > 0
    assert rates.host_copy == rates.copy
    assert best_of(rates, UNIT) == best_of(UNIT, rates)
    assert best_of(UNIT, replace(UNIT, gemm=2e12, copy=1.0)) == replace(UNIT, gemm=2e12)
