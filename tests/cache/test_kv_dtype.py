"""Keys and values kept in fp8: half the bytes, each number rounded once, the current block's own exact."""

from __future__ import annotations

import math

import pytest
import torch

from packforcing.cache.cache import Cache
from packforcing.config import MODELS, CacheConfig, FrameSize, Layout
from packforcing.errors import PackForcingError
from packforcing.fp8 import LARGEST
from packforcing.generate.long_video import LongVideo, VideoModels, VideoSettings
from packforcing.generate.plan import plan
from packforcing.generate.sampling import Sampling
from packforcing.inspector import report
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import Compressor
from packforcing.model.vae import init_vae
from packforcing.model.wan_modules import SIZES, build_wan_modules, random_state_dict

SIZE = FrameSize(64, 64)
SMALL = {"block_frames": 2, "sink_frames": 2, "recent_frames": 2, "top_k": 2}
FP8 = CacheConfig(**SMALL, kv_dtype="fp8_e4m3")


def cache_of(config: CacheConfig) -> Cache:
    return Cache(Layout(config, SIZE, 2), MODELS["tiny"])


def video(config: CacheConfig) -> tuple[LongVideo, torch.Tensor]:
    """Eight blocks of random weights, latents [1, 16, 16, 8, 8]."""
    wan = CausalWan(build_wan_modules(SIZES["tiny"], random_state_dict(SIZES["tiny"], 0)))
    text = wan.embed_text(torch.randn((1, 4, 4096), generator=torch.Generator().manual_seed(0)))
    models = VideoModels(wan, init_vae(8), Compressor(2))
    made = LongVideo(models, text, VideoSettings(Layout(config, SIZE, 2), Sampling(0, 2)))
    return made, torch.cat([block.latents for block in made.blocks(8)], dim=2)


def test_a_byte_a_value_everywhere() -> None:
    fp8, bf16 = cache_of(FP8), Cache(Layout(CacheConfig(**SMALL), SIZE, 2), MODELS["tiny"], dtype=torch.bfloat16)
    assert sum(layer.kv.nbytes for layer in fp8.layers) * 2 == sum(layer.kv.nbytes for layer in bf16.layers)
    made, _ = video(FP8)
    other, _ = video(CacheConfig(**SMALL))
    for name in ("sink", "recent", "current", "mid", "archive_device"):
        assert made.record.blocks[-1].bytes[name] * 4 == other.record.blocks[-1].bytes[name] > 0


def test_history_is_rounded_once_and_the_current_block_is_exact() -> None:
    cache = cache_of(FP8)
    g = torch.Generator().manual_seed(0)
    tokens = cache.layout.tokens_per_block
    written = [[torch.randn(1, tokens, 2, 128, generator=g) for _ in range(2)] for _ in range(2)]
    for block, (keys, values) in enumerate(written):
        cache.begin(block)
        cache.write(0, keys, values)
        _, found = cache.context(0)
        torch.testing.assert_close(found[:, -tokens:], values, rtol=0, atol=0)
        cache.end()
    rounded = written[0][1].to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found[:, :tokens], rounded, rtol=0, atol=0)


def test_the_current_block_is_exact_beside_its_compressed_form() -> None:
    cache = cache_of(FP8)
    g = torch.Generator().manual_seed(0)
    full, few = cache.layout.tokens_per_block, cache.layout.compressed_tokens_per_block
    for block in range(2):
        cache.begin(block)
        for layer in range(2):  # of four: the second layer's keys are not taken for the first's
            keys, values = (torch.randn(1, full, 2, 128, generator=g) for _ in range(2))
            compressed_keys, compressed_values = (torch.randn(1, few, 2, 128, generator=g) for _ in range(2))
            cache.write(layer, keys, values)
            cache.write_compressed(layer, compressed_keys, compressed_values)
            torch.testing.assert_close(cache.context(layer)[1][:, -full:], values, rtol=0, atol=0)
            torch.testing.assert_close(cache.compressed_context(layer)[1][:, -few:], compressed_values, rtol=0, atol=0)
    assert not torch.equal(cache.context(0)[1][:, -full:], cache.context(1)[1][:, -full:])
    assert torch.equal(cache.context(0)[1], cache.layers[0].kv.values[:, : 2 * full].float())  # rounded by now


def test_the_error_that_is_reported_is_the_error() -> None:
    """Against the same numbers rounded here; and it stands in the record and in the report."""
    cache = cache_of(FP8)
    g = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, cache.layout.tokens_per_block, 2, 128, generator=g) for _ in range(2))
    cache.begin(0)
    for layer in range(MODELS["tiny"].layers):
        cache.write(layer, keys, values)
    exact = torch.cat([cache.context(MODELS["tiny"].layers - 1)[0], values])  # rotated keys
    rounded = exact.to(torch.float8_e4m3fn).float()
    assert cache.rounding_error == pytest.approx(((rounded - exact).norm() / exact.norm()).item(), rel=1e-4)
    assert 0.01 < cache.rounding_error < 2**-4
    made, _ = video(FP8)
    assert 0.01 < made.record.rounding_error < 2**-4
    assert f"fp8_e4m3, relative error {made.record.rounding_error:.1%}" in report(made.record)
    plain, _ = video(CacheConfig(**SMALL))
    assert plain.record.rounding_error == 0.0


def test_numbers_beyond_the_range_do_not_become_nan() -> None:
    cache = cache_of(FP8)
    cache.begin(0)
    values = torch.full((1, cache.layout.tokens_per_block, 2, 128), 1000.0)
    cache.write(0, torch.zeros_like(values), values)
    cache.begin(1)
    cache.write(0, torch.zeros_like(values), torch.zeros_like(values))
    _, found = cache.context(0)
    assert found[0, 0, 0, 0].item() == LARGEST


def test_videos_come_close() -> None:
    """The first block is the same: it has no history. The second differs by little."""
    _, exact = video(CacheConfig(**SMALL))
    _, fp8 = video(FP8)
    torch.testing.assert_close(fp8[:, :, :2], exact[:, :, :2], rtol=0, atol=0)
    difference = (fp8[:, :, 2:4] - exact[:, :, 2:4]).norm() / exact[:, :, 2:4].norm()
    assert 0 < difference < 0.05
    assert fp8.isfinite().all()


def test_the_plan_halves_the_cache_and_not_what_a_full_one_would_be() -> None:
    size = FrameSize(832, 480)
    exact, fp8 = (plan(MODELS["wan2.1-1.3b"], CacheConfig(kv_dtype=kept), size, 120) for kept in ("model", "fp8_e4m3"))
    assert fp8.cache_bytes * 2 == exact.cache_bytes
    assert fp8.archive_bytes * 2 == exact.archive_bytes
    assert fp8.full_cache_bytes == exact.full_cache_bytes
    assert math.isclose(fp8.cache_bytes, 2.0e9, rel_tol=0.01)


def test_an_unknown_type_is_told() -> None:
    with pytest.raises(PackForcingError, match="kv_dtype must be one of model, fp8_e4m3, but it is 'int4'"):
        CacheConfig(kv_dtype="int4")
