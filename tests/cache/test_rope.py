"""3D RoPE of docs/method.md, section 6, against a reference that multiplies complex numbers in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from packforcing.cache.rope import (
    axis_dims,
    block_positions,
    centres,
    compiled_rotary,
    grid_positions,
    joined,
    place,
    place_in_reals,
    rotate,
    rotate_in_reals,
    rotation,
    temporal_rotation,
)

HEAD_DIMS = [128, 12, 24, 64]
WAN_AXES = (44, 42, 42)  # channels of a head of 128 that carry time, height and width
SPLITS = {128: WAN_AXES, 12: (4, 4, 4), 24: (8, 8, 8), 64: (24, 20, 20)}
EPS = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}


def by_complex_numbers(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, L, H, D] at positions [L, 3]: channel pair k of an axis of n channels turns by p * 10000^(-2k/n)."""
    angles = [
        positions[:, axis, None].double()
        * torch.tensor([10000 ** (-2 * k / n) for k in range(n // 2)], dtype=torch.float64)
        for axis, n in enumerate(SPLITS[x.shape[-1]])
    ]
    rotary = torch.exp(1j * torch.cat(angles, dim=1))[None, :, None]
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * rotary
    return torch.view_as_real(pairs).flatten(-2)


def random_keys(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform in [-1, 1], so that a rotated channel is at most 2^(1/2)."""
    return (2 * torch.rand(shape, dtype=torch.float64) - 1).to(dtype)


def random_positions(tokens: int) -> Tensor:
    """Fractional positions [L, 3]: times as high as a context has, heights and widths of a large frame."""
    return torch.rand(tokens, 3, dtype=torch.float64) * torch.tensor([80.0, 60.0, 104.0])


def shifted(positions: Tensor, time: float) -> Tensor:
    return positions + torch.tensor([time, 0.0, 0.0])


# ---------------------------------------------------------------------- the channels of a head


def test_a_head_of_128_is_44_time_42_height_42_width() -> None:
    assert axis_dims(128) == WAN_AXES


@pytest.mark.parametrize("head_dim", range(6, 260, 2))
def test_any_head_is_split_into_even_parts_that_fill_it(head_dim: int) -> None:
    time, height, width = axis_dims(head_dim)
    assert time + height + width == head_dim
    assert height == width <= time
    assert time % 2 == height % 2 == 0
    assert time - height < 6


@pytest.mark.parametrize(("axis", "channels"), [(0, range(44)), (1, range(44, 86)), (2, range(86, 128))])
def test_each_axis_turns_its_own_channels(axis: int, channels: range) -> None:
    position = torch.zeros(1, 3)
    position[0, axis] = 7.5
    x = torch.ones(1, 1, 1, 128)
    moved = (rotate(x, rotation(position, 128)) != x).flatten().nonzero().flatten().tolist()
    assert moved == list(channels)


# ---------------------------------------------------------------------- rotation


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_is_complex_multiplication(head_dim: int, dtype: torch.dtype) -> None:
    x, positions = random_keys(2, 30, 3, head_dim, dtype=dtype), random_positions(30)
    expected = by_complex_numbers(x, positions)
    found = rotate(x, rotation(positions, head_dim, dtype))
    assert found.dtype == dtype
    # Four roundings of numbers below 2, and in float64 the angles' own: up to 104 radians.
    tolerance = 4 * EPS[dtype] + 2 * 104 * EPS[torch.float64]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_bfloat16_is_rotated_in_float32_and_rounded_once() -> None:
    x, positions = random_keys(1, 30, 2, 128, dtype=torch.bfloat16), random_positions(30)
    turn = rotation(positions, 128)
    found = rotate(x, turn)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.float(), turn).bfloat16())


def test_nothing_turns_at_the_origin() -> None:
    x = random_keys(2, 5, 3, 128, dtype=torch.float32)
    assert torch.equal(rotate(x, rotation(torch.zeros(5, 3), 128)), x)
    assert torch.equal(rotate(x, temporal_rotation(torch.zeros(5), 128)), x)


def test_rotation_keeps_lengths() -> None:
    x = random_keys(1, 30, 2, 128)
    found = rotate(x, rotation(random_positions(30), 128, torch.float64))
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("position", [1023.0, 1024.0, 99_999.5])
def test_no_table_limits_a_position(position: float) -> None:
    x, positions = random_keys(1, 1, 1, 128), torch.tensor([[position, 2.0, 3.0]], dtype=torch.float64)
    found = rotate(x, rotation(positions, 128, torch.float64))
    tolerance = 4 * EPS[torch.float64] * position
    torch.testing.assert_close(found, by_complex_numbers(x, positions), rtol=0, atol=tolerance)


def test_a_fractional_position_lies_between_its_neighbours() -> None:
    """Half a turn of the way, twice, is the whole way: what a compressed token at t + 0.5 relies on."""
    x, here = random_keys(1, 6, 2, 128), random_positions(6)
    half = torch.tensor([0.5, 1.5, 1.5])
    halfway = rotate(x, rotation(here + half, 128, torch.float64))
    whole = rotate(halfway, rotation(half.expand(6, 3), 128, torch.float64))
    expected = by_complex_numbers(x, here + 2 * half)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-13)


# ---------------------------------------------------------------------- temporal adjustment


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("offset", [-4.0, -0.25, 4.0, 1000.0])
def test_a_position_and_then_a_temporal_offset_equal_their_sum(head_dim: int, offset: float) -> None:
    """docs/method.md, section 6: e^{i theta p} e^{i theta delta} = e^{i theta (p + delta)}."""
    x, positions = random_keys(2, 10, 2, head_dim), random_positions(10)
    placed = rotate(x, rotation(positions, head_dim, torch.float64))
    found = rotate(placed, temporal_rotation(torch.full((10,), offset), head_dim, torch.float64))
    torch.testing.assert_close(found, by_complex_numbers(x, shifted(positions, offset)), rtol=0, atol=2e-12)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_temporal_offset_leaves_height_and_width_alone(head_dim: int) -> None:
    x = random_keys(1, 7, 2, head_dim, dtype=torch.float32)
    found = rotate(x, temporal_rotation(torch.arange(1, 8), head_dim))
    time = SPLITS[head_dim][0]
    assert torch.equal(found[..., time:], x[..., time:])
    assert (found[..., :time] != x[..., :time]).all()


def test_one_offset_serves_all_tokens() -> None:
    x = random_keys(1, 7, 2, 128, dtype=torch.float32)
    one, many = (temporal_rotation(torch.full((count,), -4.0), 128) for count in (1, 7))
    assert torch.equal(rotate(x, one), rotate(x, many))


def test_attention_sees_only_differences_of_positions() -> None:
    q, k = random_keys(1, 8, 2, 128), random_keys(1, 8, 2, 128)
    at_q, at_k = random_positions(8), random_positions(8)

    def scores(time: float) -> Tensor:
        turned_q = rotate(q, rotation(shifted(at_q, time), 128, torch.float64))
        turned_k = rotate(k, rotation(shifted(at_k, time), 128, torch.float64))
        return torch.einsum("bihd,bjhd->bhij", turned_q, turned_k)

    for time in (-80.0, 3.25, 500.0):
        torch.testing.assert_close(scores(time), scores(0.0), rtol=0, atol=1e-11)
    turned_k = rotate(k, rotation(shifted(at_k, 1.0), 128, torch.float64))
    other = torch.einsum("bihd,bjhd->bhij", rotate(q, rotation(at_q, 128, torch.float64)), turned_k)
    assert (other - scores(0.0)).abs().max() > 0.1  # a difference that changes is seen


@pytest.mark.parametrize("form", [place, place_in_reals])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_placing_is_rotating_and_writing(dtype: torch.dtype, form: Callable[..., None]) -> None:
    slots = random_keys(2, 2, 12, 3, 128, dtype=dtype)
    before, window = slots.clone(), slice(4, 9)
    keys, values = random_keys(2, 2, 5, 3, 128, dtype=dtype)
    for turn in (rotation(random_positions(5), 128), temporal_rotation(torch.full((5,), -4.0), 128)):
        form(*slots[:, :, window], keys, values, turn)
        tolerance = 1e-6 if form is place_in_reals and dtype != torch.bfloat16 else 0
        torch.testing.assert_close(slots[0, :, window], rotate(keys, turn), rtol=0, atol=tolerance)
        assert torch.equal(slots[1, :, window], values)
    outside = [0, 1, 2, 3, 9, 10, 11]
    assert torch.equal(slots[:, :, outside], before[:, :, outside])


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_turns_are_the_same_and_do_not_depend_on_strides(compiled_graphs: list[str], batch: int) -> None:
    rotary, turn = compiled_rotary(), rotation(random_positions(5), 128, torch.float32)
    for longer in (5, 7, 9):  # slices of longer tensors, slots of larger buffers
        slots = torch.zeros(2, batch, 2 * longer, 3, 128)
        keys, values = random_keys(2, batch, longer, 3, 128, dtype=torch.float32)[:, :, :5]
        rotary.place(*slots[:, :, 2:7], keys, values, turn)
        torch.testing.assert_close(slots[0, :, 2:7], rotate(keys, turn), rtol=0, atol=1e-6)
        assert torch.equal(slots[1, :, 2:7], values)
        torch.testing.assert_close(rotary.rotate(keys, turn), rotate(keys, turn), rtol=0, atol=1e-6)
    assert sorted(compiled_graphs) == ["place_in_reals", "rotate_in_reals"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_real_operations_are_complex_ones(dtype: torch.dtype) -> None:
    keys = random_keys(2, 5, 3, 128, dtype=dtype)
    for turn in (rotation(random_positions(5), 128, torch.float64), temporal_rotation(torch.ones(1), 128)):
        tolerance = {torch.bfloat16: 0.02, torch.float32: 1e-6, torch.float64: 1e-6}[dtype]
        torch.testing.assert_close(rotate_in_reals(keys, turn), rotate(keys, turn), rtol=0, atol=tolerance)


def test_a_rotation_of_some_tokens_is_the_rotation_at_their_positions() -> None:
    positions, chosen = random_positions(9), torch.tensor([0, 4, 8])
    some, direct = rotation(positions, 128)[chosen], rotation(positions[chosen], 128)
    assert torch.equal(some.cos, direct.cos)
    assert torch.equal(some.sin, direct.sin)


# ---------------------------------------------------------------------- positions of tokens


def test_tokens_of_a_grid_run_over_width_then_height_then_time() -> None:
    found = grid_positions(torch.tensor([0.0, 2.5]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7.0, 8.0]))
    assert found.tolist() == [[t, h, w] for t in (0.0, 2.5) for h in (1.0, 2.0, 3.0) for w in (7.0, 8.0)]


def test_a_block_stands_on_whole_frames_from_its_start() -> None:
    found = block_positions(76.0, frames=2, rows=3, columns=2)
    assert found.tolist() == [[t, h, w] for t in (76.0, 77.0) for h in (0.0, 1.0, 2.0) for w in (0.0, 1.0)]
    assert block_positions(0.5, 1, 1, 1).tolist() == [[0.5, 0.0, 0.0]]


def test_a_compressed_token_stands_at_the_centre_of_what_it_covers() -> None:
    assert centres(2, 2).tolist() == [0.5, 2.5]  # pairs of frames: t0 + 0.5
    assert centres(3, 4).tolist() == [1.5, 5.5, 9.5]  # 4r + 1.5, 4c + 1.5
    assert centres(3, 1).tolist() == [0.0, 1.0, 2.0]


def test_joined_rotations_turn_each_run_of_tokens_by_its_own() -> None:
    x = torch.randn(2, 7, 3, 128, dtype=torch.float64)
    first, second = (temporal_rotation(torch.tensor(offsets), 128, torch.float64) for offsets in ([1.5] * 3, [8.0] * 4))
    apart = torch.cat((rotate(x[:, :3], first), rotate(x[:, 3:], second)), dim=1)
    assert torch.equal(rotate(x, joined([first, second])), apart)


@pytest.mark.parametrize("offsets_only", [False, True])
def test_a_rotation_hands_gradients_back_rotated(offsets_only: bool) -> None:
    by = (
        temporal_rotation(torch.randn(5), 32, torch.float64)
        if offsets_only
        else rotation(torch.randn(5, 3), 32, torch.float64)
    )
    x = torch.randn(2, 5, 3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, by), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keys_are_rotated_wherever_they_lie(dtype: torch.dtype) -> None:
    """Slices of tokens, heads and channels, and tokens that were repeated, rotate as their copies do."""
    whole = torch.randn(2, 9, 4, 32).to(dtype)
    for x in (whole[:, 2:7], whole[:, :5, 1:3], whole[:, ::2], whole[:, :1].expand(-1, 5, -1, -1), whole[..., :32]):
        by = rotation(torch.randn(x.shape[1], 3), 32)
        assert torch.allclose(rotate(x, by), rotate(x.contiguous(), by), rtol=1e-5, atol=1e-6)
        assert rotate(x, by).dtype == dtype
