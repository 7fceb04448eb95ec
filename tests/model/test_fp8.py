"""Linear layers in fp8 against the same layers in float32: rounding by the book, a direct sum, and a whole block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from packforcing.cache.cache import Cache
from packforcing.cli.main import main
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.errors import PackForcingError
from packforcing.fp8 import FP8, LARGEST
from packforcing.model.causal_wan import CausalWan
from packforcing.model.fp8_linear import Fp8Linear, check_fp8, multiply_in_fp8, rounded
from packforcing.model.load import check_compiler
from packforcing.model.wan_modules import SIZES, build_wan_modules, random_state_dict

# e4m3 has three bits after the point: a number of a normal exponent is at most 1/16 of itself away.
ROUNDING = 1 / 16


def test_rounding_is_relative_to_each_rows_largest() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]
    x[3] = 0
    rows, scales = rounded(x)
    assert (rows.dtype, scales.dtype, scales.shape) == (FP8, torch.float32, (64, 1))
    back = rows.float() * scales
    assert torch.allclose(back.abs().amax(1), x.abs().amax(1), rtol=1e-6)
    large = x.abs() > x.abs().amax(1, keepdim=True) * 2**-6 / LARGEST  # the least number of a normal exponent
    assert ((back - x).abs() <= ROUNDING * x.abs() + 1e-12)[large].all()
    assert (back[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_sum_of_rounded_products(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias).to(dtype)
    x = torch.randn(2, 5, 48).to(dtype)
    out = Fp8Linear(linear)(x)
    assert (out.shape, out.dtype) == ((2, 5, 32), dtype)
    (rows, row_scales), (weight, scales) = rounded(x.view(10, 48)), rounded(linear.weight.detach())
    wanted = (rows.double() * row_scales) @ (weight.double() * scales).t()
    if bias:
        wanted = wanted + linear.bias.detach().bfloat16().double()
    torch.testing.assert_close(out.view(10, 32).double(), wanted, rtol=2**-7, atol=2**-9)  # through bfloat16
    error = (out - linear(x)).float().norm() / linear(x).float().norm()
    assert 0.001 < error < 0.06  # two roundings of up to 1/16, most of them less


@torch.no_grad()
def velocity(fp8: bool) -> torch.Tensor:
    """Of the second of two blocks of the tiny size, so that the cache's contents count too."""
    modules = build_wan_modules(SIZES["tiny"], random_state_dict(SIZES["tiny"], 0)).to(torch.bfloat16)
    if fp8:
        multiply_in_fp8(modules)
    wan = CausalWan(modules, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    text = wan.embed_text(torch.randn(1, 8, 4096, generator=generator))
    blocks = torch.randn(2, 1, 16, 4, 8, 8, generator=generator)
    cache = Cache(Layout(CacheConfig(top_k=0), FrameSize(64, 64), 2), wan.shape, dtype=torch.bfloat16)
    cache.begin(0)
    wan.clean_pass(blocks[0], text, cache, None)
    cache.end()
    cache.begin(1)
    return wan.denoise(blocks[1], 0.7, text, cache)


def test_a_block_is_that_of_the_model_but_for_rounding() -> None:
    exact, fast = velocity(fp8=False), velocity(fp8=True)
    error = ((fast - exact).norm() / exact.norm()).item()
    assert 0.002 < error < 0.1


def test_only_the_layers_of_the_blocks_are_replaced() -> None:
    modules = build_wan_modules(SIZES["tiny"], random_state_dict(SIZES["tiny"], 0))
    multiply_in_fp8(modules)
    assert all(isinstance(getattr(block.cross_attn, name), Fp8Linear) for block in modules.blocks for name in "qkvo")
    assert isinstance(modules.blocks[0].ffn[2], Fp8Linear)
    assert not any(isinstance(module, nn.Linear) for module in modules.blocks.modules())
    assert isinstance(modules.head.head, nn.Linear)
    assert isinstance(modules.text_embedding[0], nn.Linear)


def test_what_cannot_be_multiplied_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tree(nn.Module):
        blocks = nn.ModuleList([nn.Sequential(nn.Linear(24, 16))])

    with pytest.raises(PackForcingError, match=r"blocks\.0\.0 has 24 and 16"):
        multiply_in_fp8(Tree())
    with pytest.raises(PackForcingError, match="needs a CUDA device, not 'mps'"):
        check_fp8(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An older card")
    with pytest.raises(PackForcingError, match="An older card cannot multiply in fp8"):
        check_fp8(torch.device("cuda"))


def test_compiling_without_a_compiler_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackForcingError, match="needs Triton on a GPU"):
        check_compiler(torch.device("cuda"))
    out = ["--output", f"{tmp_path / 'a.mp4'}"]
    for command in (["generate", "--prompt", "a circle", *out], ["bench", "--model", "tiny", "--no-vae"]):
        assert main([*command, "--device", "cpu", "--compile"]) == 1
        assert "needs a C++ compiler on the CPU" in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()


def test_the_command_line_makes_a_video_and_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = ["--prompt", "a red circle bounces on a blue background", "--seconds", "1", "--steps", "2", "--json"]
    small = ["--width", "64", "--height", "64", "--dtype", "bfloat16"]
    assert main(["generate", *video, *small, "--linear-dtype", "fp8_e4m3", "--output", f"{tmp_path / 'a.mp4'}"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 13
    options = ["--size", "64x64", "--seconds", "2", "--no-vae", "--no-baselines", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", "--model", "tiny", *options, "--linear-dtype", "fp8_e4m3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linear_dtype"] == "fp8_e4m3"
