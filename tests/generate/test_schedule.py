"""Noise levels and updates (docs/method.md, section 2): x_sigma = (1 - sigma) x0 + sigma noise, v = noise - x0."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from packforcing.errors import PackForcingError
from packforcing.generate.sampling import Sampling
from packforcing.generate.schedule import (
    Step,
    denoising_step,
    euler_update,
    even_schedule,
    few_step_update,
    parse_timesteps,
    predicted_x0,
    schedule_of_sigmas,
    schedule_of_timesteps,
    sigmas,
    timesteps_text,
)

LEVELS = [(1.0, 0.9375), (0.9375, 0.8333), (0.8333, 0.625), (0.625, 0.0)]


def noisy(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The flow's straight path from x0 to noise, in the words of docs/method.md, section 2."""
    return (1 - sigma) * x0 + sigma * noise


def a_pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """x0 and noise, float64."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn((2, 1, 16, 4, 6, 8), generator=generator, dtype=torch.float64)
    return x0, noise


def assert_equal_to_rounding(found: Tensor, expected: Tensor) -> None:
    """A handful of float64 roundings of numbers below 8."""
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * 8 * torch.finfo(torch.float64).eps)


# ---------------------------------------------------------------------- noise levels


def test_four_steps_at_shift_five() -> None:
    assert sigmas(4, 5.0) == [1.0, 0.9375, pytest.approx(5 / 6, abs=1e-15), 0.625]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("shift", [1, 3, 5, Fraction(1, 2)])
def test_every_level_is_the_shifted_share_of_a_thousand(steps: int, shift: Fraction) -> None:
    times = [Fraction(1000 * (steps - i), steps) for i in range(steps)]  # 1000, 750, 500, 250 for four
    expected = [float(shift * (t / 1000) / (1 + (shift - 1) * (t / 1000))) for t in times]
    assert sigmas(steps, float(shift)) == pytest.approx(expected, rel=1e-14)


def test_levels_start_at_pure_noise_and_fall() -> None:
    levels = sigmas(20, 5.0)
    assert levels[0] == 1.0
    assert levels[-1] > 0
    assert levels == sorted(set(levels), reverse=True)


def test_no_shift_leaves_the_levels_even() -> None:
    assert sigmas(4, 1.0) == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(("steps", "shift", "found"), [(0, 5.0, "0"), (-1, 5.0, "-1")])
def test_no_steps_are_told_in_one_sentence(steps: int, shift: float, found: str) -> None:
    with pytest.raises(PackForcingError, match=rf"but {found} were asked for\.$"):
        sigmas(steps, shift)


@pytest.mark.parametrize("shift", [0.0, -3.0, float("nan"), float("inf")])
def test_a_shift_that_is_not_positive_is_told_in_one_sentence(shift: float) -> None:
    with pytest.raises(PackForcingError, match=rf"but it is {shift}\.$"):
        sigmas(4, shift)


# ---------------------------------------------------------------------- updates


@pytest.mark.parametrize("sigma", [1.0, 0.9375, 5 / 6, 0.625, 0.01])
def test_the_true_velocity_gives_the_true_x0(sigma: float) -> None:
    x0, noise = a_pair()
    assert_equal_to_rounding(predicted_x0(noisy(x0, noise, sigma), noise - x0, sigma), x0)


@pytest.mark.parametrize(("sigma", "next_sigma"), LEVELS)
def test_the_few_step_update_adds_fresh_noise_to_the_predicted_x0(sigma: float, next_sigma: float) -> None:
    x, velocity = a_pair(1)
    fresh, _ = a_pair(2)
    expected = (1 - next_sigma) * (x - sigma * velocity) + next_sigma * fresh
    assert_equal_to_rounding(few_step_update(x, velocity, sigma, next_sigma, fresh), expected)


@pytest.mark.parametrize(("sigma", "next_sigma"), LEVELS)
def test_the_euler_update_follows_the_velocity(sigma: float, next_sigma: float) -> None:
    x, velocity = a_pair(3)
    expected = x - (sigma - next_sigma) * velocity
    assert_equal_to_rounding(euler_update(x, velocity, sigma, next_sigma), expected)


@pytest.mark.parametrize(("sigma", "next_sigma"), LEVELS)
def test_on_a_straight_path_an_euler_step_lands_on_the_next_level(sigma: float, next_sigma: float) -> None:
    x0, noise = a_pair(4)
    stepped = euler_update(noisy(x0, noise, sigma), noise - x0, sigma, next_sigma)
    assert_equal_to_rounding(stepped, noisy(x0, noise, next_sigma))


def test_updates_keep_the_dtype() -> None:
    x0, noise = (x.bfloat16() for x in a_pair())
    assert few_step_update(x0, noise, 1.0, 0.5, noise).dtype == torch.bfloat16
    assert euler_update(x0, noise, 1.0, 0.5).dtype == torch.bfloat16


# ---------------------------------------------------------------------- a model that knows the answer


def walk(update: str, levels: list[float], x0: Tensor, noises: list[Tensor]) -> Tensor:
    """Denoises with a model whose velocity is always the true one."""
    x = noises[0]
    for step, (sigma, next_sigma) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        velocity = (x - x0) / sigma
        if update == "euler":
            x = euler_update(x, velocity, sigma, next_sigma)
        else:
            x = few_step_update(x, velocity, sigma, next_sigma, noises[step])
    return x


@pytest.mark.parametrize("update", ["few-step", "euler"])
def test_with_a_perfect_model_x0_comes_back_exactly(update: str) -> None:
    # Multiples of 1/16 and levels of 1, 3/4, 1/2, 1/4: nothing rounds, so equal means equal.
    generator = torch.Generator().manual_seed(0)
    x0, *noises = torch.randint(-64, 65, (5, 1, 16, 4, 6, 8), generator=generator).double() / 16
    assert torch.equal(walk(update, sigmas(4, 1.0), x0, noises), x0)


@pytest.mark.parametrize("update", ["few-step", "euler"])
def test_with_a_perfect_model_x0_comes_back_from_the_papers_levels(update: str) -> None:
    x0, _ = a_pair(5)
    noises = [a_pair(6 + i)[1] for i in range(4)]
    assert_equal_to_rounding(walk(update, sigmas(4, 5.0), x0, noises), x0)


# --- one step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "next_sigma", "draws"), [("few-step", 0.5, 1), ("few-step", 0.0, 0), ("euler", 0.5, 0)]
)
def test_a_step_draws_noise_only_where_its_update_needs_some(update: str, next_sigma: float, draws: int) -> None:
    x, velocity, noise = torch.full((2,), 3.0), torch.full((2,), 2.0), torch.full((2,), -1.0)
    drawn = []

    def draw() -> Tensor:
        drawn.append(noise)
        return noise

    found = denoising_step(x, velocity, Step(1.0, 1.0, next_sigma), update, draw)
    # x0 is 3 - 1 * 2 = 1; halfway to the noise is 0; halfway back along the velocity is 3 - 0.5 * 2 = 2.
    expected = {("few-step", 0.5): 0.0, ("few-step", 0.0): 1.0, ("euler", 0.5): 2.0}[update, next_sigma]
    assert torch.equal(found, torch.full((2,), expected))
    assert len(drawn) == draws


def test_the_last_level_leads_to_zero() -> None:
    levels = sigmas(4, 5.0)
    assert even_schedule(4, 5.0).steps(3) == list(zip(levels, levels, [*levels[1:], 0.0], strict=True))


@pytest.mark.parametrize("steps", [1001, 2**31, 10**30])
def test_absurdly_many_steps_are_told_before_their_list_is_made(steps: int):
    with pytest.raises(PackForcingError, match=f"^Denoising takes at most 1,000 steps, but {steps:,} were asked for"):
        sigmas(steps, 5.0)
    assert len(sigmas(1000, 5.0)) == 1000


@pytest.mark.parametrize("value", [2.5, float("inf"), float("nan"), "4", [4], None, True], ids=repr)
def test_steps_and_seeds_are_whole_numbers(value: object):
    with pytest.raises(PackForcingError, match=r"^The number of denoising steps must be a whole number"):
        Sampling(steps=value)
    with pytest.raises(PackForcingError, match=r"^The seed must be a whole number"):
        Sampling(seed=value)


@pytest.mark.parametrize("shift", ["5", [5.0], None, True], ids=repr)
def test_the_shift_is_a_number(shift: object):
    with pytest.raises(PackForcingError, match=r"^The flow shift must be a number"):
        Sampling(shift=shift)


# --- lists of one's own ------------------------------------------------------------------------------------


def test_warped_timesteps_are_the_even_steps_levels():
    """To float32, in which Self-Forcing's scheduler computes them."""
    found = [step.sigma for step in schedule_of_timesteps([1000, 750, 500, 250], shift=5.0).steps(1)]
    assert found == pytest.approx(sigmas(4, 5.0), rel=2e-7)


def test_unwarped_timesteps_are_told_as_they_are_and_take_the_nearest_noise_level():
    steps = schedule_of_timesteps([1000, 757, 522], shift=8.0, warp=False).steps(1)
    assert [1000 * step.told for step in steps] == [1000, 757, 522]
    # Of 8 s / (1 + 7 s) with s in thousandths: s = 0.28 and 0.12.
    assert [step.sigma for step in steps] == pytest.approx([1, 2.24 / 2.96, 0.96 / 1.84], rel=1e-6)
    assert [step.next_sigma for step in steps] == [steps[1].sigma, steps[2].sigma, 0]


def test_the_first_block_may_have_its_own_steps():
    schedule = schedule_of_timesteps([1000, 500], [1000, 750, 500, 250])
    sampling = Sampling(schedule=schedule)
    assert [len(sampling.steps_of(block)) for block in range(4)] == [4, 2, 2, 2]
    assert sampling.timesteps_of(0) == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert sampling.more_in_first == 2
    assert Sampling().more_in_first == 0


def test_a_final_zero_of_sigmas_is_left_out():
    assert schedule_of_sigmas([1.0, 0.5, 0.0]) == schedule_of_sigmas([1.0, 0.5])
    assert schedule_of_sigmas([1.0000001, 0.5]) == schedule_of_sigmas([1.0, 0.5])
    assert schedule_of_sigmas([1.0, 0.5]).steps(0) == [(1.0, 1.0, 0.5), (0.5, 0.5, 0.0)]


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        ([], r"at least 1 step, but 0 were"),
        ([0.0], r"at least 1 step, but 0 were"),
        ([14.6, 3.0, 0.0], r"at most at 1, but one is 14\.6: use those of a flow model"),
        ([1.0, float("nan")], r"but one is nan"),
        ([1.0, 0.0, 0.5], r"but one is 0:"),
        ([0.5, 1.0], r"must fall from step to step, but 1 follows 0\.5: leave"),
        ([1.0, 1.0], r"must fall"),
        ([1.0] * 1001, r"at most 1,000 steps, but 1,001 were"),
    ],
    ids=str,
)
def test_sigmas_that_are_no_schedule_are_told(levels: list[float], told: str):
    with pytest.raises(PackForcingError, match=told):
        schedule_of_sigmas(levels)


@pytest.mark.parametrize(
    ("timesteps", "told"),
    [
        ([1001], r"above 0 and at most at 1000, but one is 1001\."),
        ([1000, 0], r"but one is 0\."),
        ([1000, -5], r"but one is -5\."),
        ([float("inf")], r"but one is inf\."),
        ([1000, 250, 500], r"Timesteps must fall from step to step, but 500 follows 250: put them in order"),
        ([1000, 999.9], r"must fall"),
        (["1000"], r"A timestep must be a number"),
        ([1000] * 1001, r"at most 1,000 steps, but 1,001 were"),
    ],
    ids=str,
)
def test_timesteps_that_are_no_schedule_are_told(timesteps: list[float], told: str):
    for given in ({"timesteps": timesteps}, {"timesteps": [1000], "first": timesteps}):
        with pytest.raises(PackForcingError, match=told):
            schedule_of_timesteps(**given)


def test_timesteps_are_read_from_text_and_written():
    assert parse_timesteps(" 1000, 757,522 ") == parse_timesteps("1000 757 522") == [1000, 757, 522]
    assert timesteps_text([1000, 757, 2500 / 3]) == "1000, 757, 833.33"
    assert timesteps_text([1000 - i for i in range(50)]) == "1000, 999, 998, ..., 951 (50 steps)"


@pytest.mark.parametrize(
    ("text", "told"), [("", "at least 1 step"), ("fast", "they are 'fast'"), ("1 " * 2000, "but 2,000 were asked for")]
)
def test_text_that_is_no_timesteps_is_told(text: str, told: str):
    with pytest.raises(PackForcingError, match=told):
        parse_timesteps(text)
