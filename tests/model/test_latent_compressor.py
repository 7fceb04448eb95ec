"""The compressor of PackForcing-Unofficial: out of a checkpoint, against its network and its use written out anew.

Nothing here is that project's code. What it does was read in its wan/modules/pack_compressor.py and
causal_model_packforcing.py: convolutions over latents, averaged to floor(h/8) x floor(w/8), of which each layer takes
`norm_k(k(tokens))` and `v(tokens)`, rotated to rows and columns 0, 1, 2, ... of the block's own frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from wan_files import RAW, fsdp, sentence, with_prefix
from wan_reference import (
    DIM,
    FFN_DIM,
    HEADS,
    TEXT_DIM,
    TEXT_LENGTH,
    ExplicitWan,
    Method,
    assert_close,
    random_weights,
    seeded,
)

from packforcing.cache.cache import Cache
from packforcing.cache.deferred import DeferredCache
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.errors import PackForcingError
from packforcing.files.compressor_file import has_compressor_inside, load_compressor
from packforcing.files.wan_checkpoint import load_wan
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import TRAINING_FREE, CompressorChoice, LatentCompressor, hr_branch
from packforcing.model.wan_modules import WanModules, WanSizes, build_wan_modules

WIDTHS = (16, 6, 7, 8, DIM)  # of a small network; the published one's are 16, 64, 256, 1024, 1536
NAMES = {0: 0, 2: 1, 4: 2, 6: 3}  # a convolution's place in the file's Sequential -> its number


def network(widths: tuple[int, ...] = WIDTHS) -> dict[str, Tensor]:
    """The compressor's tensors under the names that the project's module has."""
    tensors = {}
    for place, i in NAMES.items():
        kernel = (1, 1, 1) if place == 6 else (1, 3, 3)
        weight = seeded(widths[i + 1], widths[i], *kernel, seed=20 + i)
        tensors[f"pack_compressor.net.{place}.weight"] = 2 * weight / weight[0].numel() ** 0.5
        tensors[f"pack_compressor.net.{place}.bias"] = 0.1 * seeded(widths[i + 1], seed=30 + i)
    return tensors


def direct_tokens(net: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Tokens [B, N_c, d], frame by frame, with the mean over each output cell written out."""
    found = []
    for t in range(latents.shape[2]):
        x = latents[:, :, t]
        for place in (0, 2, 4):
            weight, bias = (net[f"pack_compressor.net.{place}.{part}"] for part in ("weight", "bias"))
            x = F.conv2d(F.pad(x, (1, 1, 1, 1)), weight[:, :, 0], bias, stride=2)
            x = x * torch.sigmoid(x)
        weight, bias = (net[f"pack_compressor.net.6.{part}"] for part in ("weight", "bias"))
        x = torch.einsum("bchw,dc->bdhw", x, weight[:, :, 0, 0, 0]) + bias[:, None, None]
        rows, columns = latents.shape[3] // 8, latents.shape[4] // 8
        for i in range(rows):
            for j in range(columns):
                top, left = i * x.shape[2] // rows, j * x.shape[3] // columns
                bottom, right = -((i + 1) * x.shape[2] // -rows), -((j + 1) * x.shape[3] // -columns)
                found.append(x[:, :, top:bottom, left:right].mean((2, 3)))
    return torch.stack(found, dim=1)


def checkpoint(tmp_path: Path, form: str, net: dict[str, Tensor] | None = None) -> Path:
    """A generator's file with the compressor in it, as the project's trainer saves it (trainer/distillation.py)."""
    tensors = {**RAW, **(network() if net is None else net)}
    path = tmp_path / ("wan.safetensors" if form == "safetensors" else "wan.pt")
    if form == "safetensors":
        save_file(with_prefix(tensors, "model."), path)
    else:
        torch.save({"generator": with_prefix(tensors, "model.")} if form == "raw" else {form: fsdp(tensors)}, path)
    return path


FORMS = ["raw", "generator_ema", "safetensors"]


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_transformer_loads_as_any_other(tmp_path, form):
    loaded = load_wan(checkpoint(tmp_path, form))
    assert loaded.state_dict.keys() == RAW.keys()


@pytest.mark.parametrize("form", FORMS)
def test_the_compressor_is_read_from_the_same_file(tmp_path, form):
    state, metadata = load_compressor(checkpoint(tmp_path, form))
    assert all(torch.equal(tensor, network()[f"pack_compressor.{name}"]) for name, tensor in state.items())
    assert len(state) == 8
    assert metadata.channels == WIDTHS
    choice = CompressorChoice("a checkpoint", state, metadata)
    assert isinstance(choice.build(3, DIM), LatentCompressor)
    with pytest.raises(PackForcingError, match="trained for a model 256 wide \\(PackForcing-Unofficial\\)"):
        choice.build(3, 1536)


@pytest.mark.parametrize("form", FORMS)
def test_such_files_are_found_by_the_names_in_them(tmp_path, form):
    assert has_compressor_inside(checkpoint(tmp_path, form))
    assert not has_compressor_inside(checkpoint(tmp_path, form, net={}))


def test_what_cannot_be_read_has_no_compressor_inside(tmp_path):
    for name, content in (("a.pt", b"PK\x03\x04"), ("b.safetensors", b"\xff" * 9), ("c.safetensors", b"")):
        (tmp_path / name).write_bytes(content)
        assert not has_compressor_inside(tmp_path / name)
    assert not has_compressor_inside(tmp_path / "gone.pt")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"net.2.bias": None}, "missing 'net.2.bias', unexpected none"),
        ({"net.8.bias": torch.ones(3)}, "unexpected 'net.8.bias'"),
        ({"net.2.weight": torch.ones(7, 6, 3, 3, 3)}, "'net.2' are [7, 6, 3, 3, 3] and [7], where [7, 6, 1, 3, 3]"),
        ({"net.4.weight": torch.ones(8, 9, 1, 3, 3)}, "'net.4' are [8, 9, 1, 3, 3]"),
        ({"net.0.weight": torch.ones(6)}, "'net.0' are [6] and [6]"),
        ({"net.6.bias": torch.full((DIM,), float("nan"))}, "'net.6.bias'"),
    ],
)
def test_other_networks_are_refused(tmp_path, changes, says):
    net = network() | {f"pack_compressor.{name}": tensor for name, tensor in changes.items()}
    path = checkpoint(tmp_path, "raw", {name: tensor for name, tensor in net.items() if tensor is not None})
    text = sentence(load_compressor, path)
    assert says in text
    assert str(path) in text


def test_a_trainer_of_dual_branch_compressors_refuses_it(tmp_path):
    state, metadata = load_compressor(checkpoint(tmp_path, "raw"))
    assert "no HR branch beside an LR branch" in sentence(hr_branch, state, metadata.temporal_stride)


# --- the network -----------------------------------------------------------------------------------------------------


def compressor(tmp_path: Path) -> LatentCompressor:
    built = CompressorChoice("a checkpoint", *load_compressor(checkpoint(tmp_path, "raw"))).build(3, DIM)
    assert isinstance(built, LatentCompressor)
    return built


@pytest.mark.parametrize(("frames", "size"), [(3, (832, 480)), (1, (64, 64)), (4, (144, 208)), (3, (176, 80))], ids=str)
def test_tokens_are_the_networks(tmp_path, frames, size):
    layout = Layout(CacheConfig(frames, frames, frames), FrameSize(*size), temporal_stride=1, direct=True)
    latents = seeded(2, 16, frames, layout.size.latent_height, layout.size.latent_width)
    tokens = compressor(tmp_path)(latents, None, layout, None, None)
    assert tokens.shape == (2, layout.compressed_tokens_per_block, DIM)
    if (frames, size) == (3, (832, 480)):
        assert tokens.shape[1] == 273
    assert_close(tokens, direct_tokens(network(), latents), 1e-5)


# --- its tokens in the cache -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DirectMethod(Method):
    """The method with a compressed token for each latent frame, which stands at its number in the grid."""

    temporal_stride: int = 1

    def compressed_positions(self, start: float, scale: float = 1.0) -> Tensor:
        rows, columns = range(self.rows // 4), range(self.columns // 4)
        places = [(start + scale * t, i, j) for t in range(self.block_frames) for i in rows for j in columns]
        return torch.tensor(places, dtype=torch.float64)


class DirectWan(ExplicitWan):
    """`ExplicitWan`, in which compressed tokens pass through no layer."""

    def compressed_pass(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [self.keys_values(f"blocks.{i}.self_attn", tokens) for i in range(self.layers)]


BASE = DirectMethod(rows=4, columns=8, block_frames=3)
METHODS = {
    "PackForcing-Unofficial's partitions": replace(BASE, sink_blocks=3, recent_blocks=2),
    "small": BASE,
    "squeezed": replace(BASE, position_range=12),
    "positions with gaps": replace(BASE, rope_adjustment=False),
}


@pytest.mark.parametrize("kind", [Cache, DeferredCache])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_block_is_as_written_out(method, kind):
    """Velocities and selections in float64; in a deferred cache the tokens come one block late."""
    sizes = WanSizes(dim=DIM, ffn_dim=FFN_DIM, layers=2, heads=HEADS, text_dim=TEXT_DIM)
    with torch.device("meta"):
        like = WanModules(sizes).state_dict()
    state = {name: tensor.double() for name, tensor in random_weights(like, seed=7).items()}
    text = seeded(1, TEXT_LENGTH, TEXT_DIM, seed=2).double()
    wan, frames = CausalWan(build_wan_modules(sizes, state), dtype=torch.float64, text_len=0), method.block_frames
    config = CacheConfig(
        block_frames=frames,
        sink_frames=method.sink_blocks * frames,
        recent_frames=method.recent_blocks * frames,
        top_k=method.top_k,
        query_fraction=1.0,
        position_range=method.position_range,
        rope_adjustment=method.rope_adjustment,
    )
    layout = Layout(config, FrameSize(16 * method.columns, 16 * method.rows), temporal_stride=1, direct=True)
    cache, prompt = kind(layout, wan.shape, dtype=torch.float64, batch=1), wan.embed_text(text)
    reference = DirectWan(state, method, text)
    shape = (1, 16, frames, 2 * method.rows, 2 * method.columns)
    waiting = None
    for block in range(9):
        cache.begin(block)
        x = seeded(*shape, seed=1000 + block).double()
        assert_close(wan.denoise(x, 0.9375, prompt, cache), reference.denoise(x, 0.9375), 1e-9)
        assert [list(chosen) for chosen in cache.selected] == reference.selected
        x0, tokens = seeded(*shape, seed=2000 + block).double(), None
        if config.becomes_mid(block):
            tokens = seeded(1, method.compressed_tokens, DIM, seed=3000 + block).double()
        reference.clean_pass(x0, tokens)
        now, waiting = (waiting, tokens) if kind is DeferredCache else (tokens, None)
        wan.clean_pass(x0, prompt, cache, now)
        cache.end()


def test_the_layout_says_how_tokens_enter_the_cache(tmp_path):
    choice = CompressorChoice("a checkpoint", *load_compressor(checkpoint(tmp_path, "raw")))
    config, size = CacheConfig(block_frames=3, sink_frames=9, recent_frames=6), FrameSize(832, 480)
    assert choice.layout(config, size) == Layout(config, size, temporal_stride=1, direct=True)
    assert choice.layout(config, size).compressed_tokens_per_block == 273
    assert TRAINING_FREE.layout(CacheConfig(), size) == Layout(CacheConfig(), size, temporal_stride=2)
