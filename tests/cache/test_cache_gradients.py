"""Training goes through the inference cache: its gradients against finite differences, and what `detach` cuts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from packforcing.cache.gradients import GradientCache
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.model.causal_wan import CausalWan
from packforcing.model.wan_modules import WanSizes, build_wan_modules, random_state_dict

SIZES = WanSizes(dim=128, ffn_dim=64, layers=2, heads=2, text_dim=32)
BLOCKS = 5
# A sink, two recent blocks whose slots are reused, and mid blocks, more of them than are attended at the end.
CONFIG = CacheConfig(block_frames=2, sink_frames=2, recent_frames=2, top_k=1, selection="recency")
SIZE = FrameSize(64, 64)


def parts(seed: int = 0) -> tuple[CausalWan, list[Tensor], list[Tensor], Tensor, Tensor]:
    """A model in float64, its blocks, their compressed tokens, the noisy input and the prompt."""
    modules = build_wan_modules(
        SIZES, {k: v.double() for k, v in random_state_dict(SIZES, seed).items()}
    ).requires_grad_(True)
    wan = CausalWan(modules, dtype=torch.float64, text_len=0)
    g = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(1, 16, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(BLOCKS)]
    compressed = [torch.randn(1, 1, SIZES.dim, generator=g, dtype=torch.float64) for _ in range(BLOCKS)]
    noisy = torch.randn(1, 16, 2, 8, 8, generator=g, dtype=torch.float64)
    return wan, blocks, compressed, noisy, torch.randn(1, 3, 32, generator=g, dtype=torch.float64)


def velocity(wan: CausalWan, blocks: list[Tensor], compressed: list[Tensor], noisy: Tensor, prompt: Tensor) -> Tensor:
    """The last block's velocity, after the clean passes of the others."""
    cache = GradientCache(Layout(CONFIG, SIZE, 2), wan.shape, dtype=torch.float64)
    text = wan.embed_text(prompt)
    for i, block in enumerate(blocks[:-1]):
        cache.begin(i)
        wan.denoise(block, 0.5, text, cache)  # as inference writes noisy keys first, into the same slot
        wan.clean_pass(block, text, cache, compressed[i] if CONFIG.becomes_mid(i) else None)
        cache.end()
    cache.begin(BLOCKS - 1)
    return wan.denoise(noisy, 0.7, text, cache)


def test_gradients_equal_finite_differences() -> None:
    """Of the weights, and of a compressed block that is attended as a mid block."""
    wan, blocks, compressed, noisy, prompt = parts()
    probe = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    compressed[2].requires_grad_(True)
    (velocity(wan, blocks, compressed, noisy, prompt) * probe).sum().backward()
    tensors = [*wan.modules.parameters(), compressed[2]]
    g = torch.Generator().manual_seed(3)
    step = 1e-5
    for chosen in (tensors[:-1], tensors[-1:]):  # a direction of all weights, and one of the tokens
        directions = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in chosen]
        along = sum((t.grad * d).sum() for t, d in zip(chosen, directions, strict=True)).item()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for t, d in zip(chosen, directions, strict=True):
                    t += sign * step * d
                values.append((velocity(wan, blocks, compressed, noisy, prompt) * probe).sum().item())
                for t, d in zip(chosen, directions, strict=True):
                    t -= sign * step * d
        assert abs(along) > 1e-3
        assert along == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_results_are_the_same_with_and_without_gradients() -> None:
    wan, *rest = parts()
    with torch.no_grad():
        wanted = velocity(wan, *rest)
    torch.testing.assert_close(velocity(wan, *rest).detach(), wanted, rtol=0, atol=1e-12)


def test_nothing_is_kept_without_gradients() -> None:
    wan, blocks, _compressed, _, prompt = parts()
    cache = GradientCache(Layout(CONFIG, SIZE, 2), wan.shape, dtype=torch.float64)
    cache.begin(0)
    with torch.no_grad():
        wan.clean_pass(blocks[0], wan.embed_text(prompt), cache, None)
    keys, _ = cache.context(0)
    assert keys.data_ptr() == cache.layers[0].kv.keys.data_ptr()  # a view of the buffer, not a copy
    assert not any(cache.live(layer) for layer in range(len(cache.layers)))


def test_detach_makes_the_history_a_constant() -> None:
    wan, blocks, _compressed, noisy, prompt = parts()
    text = wan.embed_text(prompt)

    def gradient(detach: bool) -> Tensor:
        cache = GradientCache(Layout(CONFIG, SIZE, 2), wan.shape, dtype=torch.float64)
        history = blocks[0].clone().requires_grad_(True)
        cache.begin(0)
        wan.clean_pass(history, text, cache, None)
        cache.end()
        if detach:
            cache.detach()
        cache.begin(1)
        found = wan.denoise(noisy, 0.7, text, cache).sum()
        return torch.autograd.grad(found, history, allow_unused=True)[0]

    assert gradient(detach=False).abs().max() > 1e-6
    assert gradient(detach=True) is None


def test_layers_computed_again_give_the_same_gradients() -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        wan, _, _, noisy, prompt = parts()
        wan.recompute = recompute
        cache = GradientCache(Layout(CONFIG, SIZE, 2), wan.shape, dtype=torch.float64)
        cache.begin(0)
        wan.denoise(noisy, 0.7, wan.embed_text(prompt), cache).square().sum().backward()
        return [p.grad for p in wan.modules.parameters() if p.grad is not None]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_gradients_need_keys_and_values_in_the_models_own_type() -> None:
    with pytest.raises(ValueError, match="in the model's own type"):
        GradientCache(Layout(replace(CONFIG, kv_dtype="fp8_e4m3"), SIZE, 2), SIZES.shape)
