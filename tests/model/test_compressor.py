"""The dual-branch compressor: sizes that floor, a detour through pixels, and an HR branch that starts at nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from wan_reference import assert_close, seeded

from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.errors import PackForcingError
from packforcing.model.compressor import (
    PAPER_CHANNELS,
    Compressor,
    HRBranch,
    floor_padding,
    hr_branch,
    lr_latents,
    pooled_frames,
    whole_block,
)
from packforcing.model.vae import WanVAE, init_vae

DIM = 24
SMALL = (16, 8, 8, 8, 8, DIM)  # channels of a small HR branch
BLOCKS_AND_STRIDES = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2)]
ROWS_AND_COLUMNS = [(rows, 17 - rows) for rows in range(4, 14)]  # each size from 4 to 13, on both axes


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return init_vae(dim=4, seed=3).requires_grad_(False)


@pytest.fixture(scope="module")
def patch_embedding() -> nn.Conv3d:
    """A model's own patch embedding."""
    layer = nn.Conv3d(16, DIM, (1, 2, 2), stride=(1, 2, 2))
    layer.weight.data = seeded(DIM, 16, 1, 2, 2, seed=5) / 8
    return layer.requires_grad_(False)


@pytest.fixture(scope="module")
def patch_tokens(patch_embedding):
    return lambda latents: rearrange(patch_embedding(latents), "b d t h w -> b (t h w) d")


@pytest.fixture(scope="module")
def comfy_encode(comfy, vae):
    """ComfyUI's own VAE with the same weights: pixels to latents as its model sees them."""
    from comfy.latent_formats import Wan21
    from comfy.ldm.wan.vae import WanVAE as ComfyVAE

    model = ComfyVAE(dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    model.load_state_dict(vae.state_dict())
    model.eval().requires_grad_(False)
    return lambda pixels: Wan21().process_in(model.encode(pixels))


def layout(block: int, stride: int, rows: int, columns: int) -> Layout:
    config = CacheConfig(block_frames=block, sink_frames=0, recent_frames=block, top_k=1)
    return Layout(config, FrameSize(16 * columns, 16 * rows), stride)


def a_block(block: int, rows: int, columns: int, first: bool = False, batch: int = 1) -> tuple[Tensor, Tensor]:
    """A block's latents and video frames; the first block of a video has 3 frames fewer."""
    latents = seeded(batch, 16, block, 2 * rows, 2 * columns, seed=6)
    frames = seeded(batch, 3, 4 * block - 3 * first, 16 * rows, 16 * columns, seed=7).clamp(-1, 1)
    return latents, frames


def trained(channels: tuple[int, ...] = SMALL, stride: int = 2, **given: object) -> HRBranch:
    """An HR branch of which every weight matters."""
    branch = HRBranch(channels, stride, **given)
    for i, parameter in enumerate(branch.parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        parameter.data = 2 * seeded(*parameter.shape, seed=50 + i) / fan_in**0.5
    return branch.requires_grad_(False)


# --- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "stride"), BLOCKS_AND_STRIDES)
def test_the_hr_branch_floors_every_size(block, stride):
    branch = trained(stride=stride)
    for rows, columns in ROWS_AND_COLUMNS:
        grid = branch(seeded(1, 16, block, 2 * rows, 2 * columns))
        assert grid.shape == (1, DIM, block // stride, rows // 4, columns // 4)


@pytest.mark.parametrize("first", [False, True], ids=["later block", "first block"])
@pytest.mark.parametrize(("block", "stride"), BLOCKS_AND_STRIDES)
def test_a_block_gives_floored_token_counts_for_every_size(vae, patch_tokens, block, stride, first):
    compressor = Compressor(stride, trained(stride=stride))
    for rows, columns in ROWS_AND_COLUMNS[block % 2 :: 2]:
        latents, frames = a_block(block, rows, columns, first)
        tokens = compressor(latents, frames, layout(block, stride, rows, columns), vae, patch_tokens)
        count = (block // stride) * (rows // 4) * (columns // 4)
        assert tokens.shape == (1, count, DIM)
        assert layout(block, stride, rows, columns).compressed_tokens_per_block == count


def test_the_papers_block_at_832x480_is_182_tokens_of_the_models_width():
    """On the meta device: the real sizes, without the work."""
    with torch.device("meta"):
        branch = HRBranch((16, *PAPER_CHANNELS, 1536), temporal_stride=2)
        big = WanVAE()
        embedding = nn.Conv3d(16, 1536, (1, 2, 2), stride=(1, 2, 2))
        assert branch(torch.empty(1, 16, 4, 60, 104)).shape == (1, 1536, 2, 7, 13)
        small = big.encode(torch.empty(1, 3, 9, 120, 208))[0][:, :, 1:]
        assert small.shape == (1, 16, 2, 15, 26)
        assert embedding(small).shape == (1, 1536, 2, 7, 13)
    assert [tuple(layer.weight.shape[:2]) for layer in branch] == [
        (32, 16), (128, 32), (512, 128), (2048, 512), (1536, 2048)
    ]  # fmt: skip
    assert layout(4, 2, 30, 52).compressed_tokens_per_block == 182


def test_a_batch_is_its_videos(vae, patch_tokens):
    compressor = Compressor(2, trained())
    latents, frames = a_block(4, 4, 5, batch=2)
    together = compressor(latents, frames, layout(4, 2, 4, 5), vae, patch_tokens)
    for i in range(2):
        one = compressor(latents[i : i + 1], frames[i : i + 1], layout(4, 2, 4, 5), vae, patch_tokens)
        assert_close(together[i : i + 1], one, 1e-5)


# --- LR branch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_pooling_is_the_mean_of_2x4x4_pixels(stride):
    frames = seeded(2, 3, 8, 24, 16)
    expected = torch.stack(
        [
            frames[:, :, t * stride : (t + 1) * stride, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean((2, 3, 4))
            for t in range(8 // stride)
            for y in range(6)
            for x in range(4)
        ],
        dim=-1,
    ).reshape(2, 3, 8 // stride, 6, 4)
    assert_close(pooled_frames(frames, stride), expected, 1e-6)


def test_pooling_in_half_precision_sums_in_float32():
    frames = seeded(1, 3, 8, 16, 16).to(torch.bfloat16)
    assert torch.equal(pooled_frames(frames, 2), pooled_frames(frames.float(), 2).to(torch.bfloat16))


def test_the_first_blocks_missing_frames_are_copies_of_its_first():
    frames = seeded(1, 3, 13, 2, 2)
    whole = whole_block(frames, 4)
    assert torch.equal(whole[:, :, 3:], frames)
    assert all(torch.equal(whole[:, :, i], frames[:, :, 0]) for i in range(3))
    assert torch.equal(whole_block(whole, 4), whole)


def direct_lr(comfy_encode, frames: Tensor, block: int, stride: int, rows: int, columns: int) -> Tensor:
    """The LR branch's latents step by step: pool, repeat the first, encode with ComfyUI, drop the first latent."""
    if frames.shape[2] == 4 * block - 3:
        frames = torch.cat([frames[:, :, :1]] * 3 + [frames], dim=2)
    pooled = rearrange(
        frames, "b c (t s) (h y) (w x) -> b c t h w s y x", s=stride, y=4, x=4
    ).mean((-3, -2, -1))  # fmt: skip
    pooled = pooled[:, :, : 4 * (block // stride), : 8 * (rows // 2), : 8 * (columns // 2)]
    latents = comfy_encode(torch.cat((pooled[:, :, :1], pooled), dim=2))
    assert latents.shape[2] == 1 + block // stride
    return latents[:, :, 1:]


@pytest.mark.parametrize("first", [False, True], ids=["later block", "first block"])
@pytest.mark.parametrize(("block", "stride"), BLOCKS_AND_STRIDES)
def test_lr_latents_are_comfyuis_encoding_of_the_pooled_block(comfy_encode, vae, block, stride, first):
    for rows, columns in [(4, 8), (5, 7)]:
        frames = a_block(block, rows, columns, first)[1]
        expected = direct_lr(comfy_encode, frames, block, stride, rows, columns)
        assert_close(lr_latents(whole_block(frames, block), vae, stride), expected)


def test_a_still_blocks_latents_are_a_still_videos_without_its_first(comfy_encode, vae):
    """Nothing of the single-frame latent, which falls on the copy, is left."""
    still = seeded(1, 3, 1, 64, 64).clamp(-1, 1)
    pooled = F.avg_pool2d(still[:, :, 0], 4)[:, :, None]
    video = comfy_encode(pooled.expand(-1, -1, 9, -1, -1))
    found = lr_latents(still.expand(-1, -1, 16, -1, -1), vae, 2)
    assert_close(found, video[:, :, 1:])
    assert (found - video[:, :, :1]).abs().max() > 0.01, "the first latent would have been another one"


def test_the_training_free_form_is_the_models_own_patch_embedding_of_the_lr_latents(
    comfy_encode, vae, patch_embedding, patch_tokens
):
    """At an odd row the last one is cropped, so that the first tokens stand where they should."""
    rows, columns = 6, 11
    latents, frames = a_block(4, rows, columns)
    small = direct_lr(comfy_encode, frames, 4, 2, rows, columns)
    assert small.shape[-2:] == (3, 5)
    expected = [
        torch.einsum("bcpq,dcpq->bd", small[:, :, t, :2, 2 * x : 2 * x + 2], patch_embedding.weight[:, :, 0])
        + patch_embedding.bias
        for t in range(2)
        for x in range(2)
    ]
    tokens = Compressor(2)(latents, frames, layout(4, 2, rows, columns), vae, patch_tokens)
    assert_close(tokens, torch.stack(expected, dim=1))


# --- HR branch and fusion -----------------------------------------------------------------------------


def test_hr_adds_exactly_nothing_before_it_is_trained(vae, patch_tokens):
    latents, frames = a_block(4, 4, 8)
    inputs = latents, frames, layout(4, 2, 4, 8), vae, patch_tokens
    assert torch.equal(Compressor(2, HRBranch(SMALL, 2))(*inputs), Compressor(2)(*inputs))


def test_tokens_are_the_sum_of_the_branches_at_the_same_place(vae, patch_tokens):
    latents, frames = a_block(4, 8, 12)
    inputs = latents, frames, layout(4, 2, 8, 12), vae, patch_tokens
    branch = trained()
    hr = branch(latents)
    by_hand = torch.stack([hr[:, :, t, y, x] for t in range(2) for y in range(2) for x in range(3)], dim=1)
    lr, both = Compressor(2)(*inputs), Compressor(2, branch)(*inputs)
    assert by_hand.abs().max() > 0.1
    assert_close(both, lr + by_hand, 1e-6)


def test_hr_is_strided_convolutions_with_silu_between():
    branch, latents = trained(), seeded(1, 16, 4, 12, 18)
    x, strides = latents, [(2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (1, 1, 1)]
    for i, (layer, stride) in enumerate(zip(branch, strides, strict=True)):
        padding = [(k - s) // 2 for k, s in zip(layer.weight.shape[2:], stride, strict=True)]
        x = F.conv3d(x, layer.weight, layer.bias, stride, padding)
        x = x * x.sigmoid() if i < 4 else x
    assert_close(branch(latents), x, 1e-6)


@pytest.mark.parametrize(
    "kernels",
    [
        None,
        [(2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (1, 1, 1)],
        [(4, 5, 3), (3, 4, 6), (1, 2, 4), (1, 8, 2), (1, 3, 3)],
    ],
    ids=["ours", "smallest", "others"],
)
def test_a_branch_reads_channels_and_kernels_from_its_weights(kernels):
    saved = trained((16, 6, 7, 8, 9, 10), 2, kernels=kernels)
    loaded = hr_branch({f"hr.{name}": tensor for name, tensor in saved.state_dict().items()}, 2)
    latents = seeded(1, 16, 5, 14, 10)
    assert loaded(latents).shape == (1, 10, 2, 1, 1)
    assert torch.equal(loaded(latents), saved(latents))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [(0, (3, 3, 3)), (0, (1, 3, 3)), (1, (1, 3, 3)), (2, (1, 4, 3)), (3, (1, 1, 1)), (4, (2, 1, 1))],
)
def test_a_kernel_that_cannot_floor_is_refused(layer, kernel):
    state = {f"hr.{name}": tensor for name, tensor in trained().state_dict().items()}
    name = f"hr.{layer}.weight"
    state[name] = torch.zeros(*state[name].shape[:2], *kernel)
    with pytest.raises(PackForcingError, match="kernel") as error:
        hr_branch(state, 2)
    assert str(kernel) in str(error.value)


def test_a_branch_of_another_temporal_stride_is_refused():
    """A file for stride 2 has a temporal kernel of 2, which cannot keep sizes at stride 1."""
    state = {f"hr.{name}": tensor for name, tensor in trained().state_dict().items()}
    with pytest.raises(PackForcingError, match="kernel"):
        hr_branch(state, 1)
    with pytest.raises(ValueError, match="temporal stride"):
        Compressor(1, trained(stride=2))


def test_a_branch_of_another_depth_is_refused():
    with pytest.raises(PackForcingError, match="5 convolutions"):
        HRBranch((16, 32, 128, 1536), 2)


def test_floor_padding_floors_every_size():
    for kernel, stride in [(1, 1), (3, 1), (7, 1), (2, 2), (4, 2), (6, 2)]:
        padding = floor_padding((kernel,) * 3, (stride,) * 3)[0]
        for size in range(stride, 40):
            assert (size + 2 * padding - kernel) // stride + 1 == size // stride
