"""A sampler's noise levels: a list of timesteps, or those that a published checkpoint was trained for."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..packforcing.checks import check_kind
from ..packforcing.errors import PackForcingError
from ..packforcing.flavours import FLAVOURS, flavour_named
from ..packforcing.generate.sampling import sampling_of
from ..packforcing.generate.schedule import (
    MOST_STEPS,
    Schedule,
    parse_timesteps,
    schedule_of_sigmas,
    schedule_of_timesteps,
)
from . import types

CUSTOM = "custom"
FLAVOUR_CHOICES = [CUSTOM, *(flavour.name for flavour in FLAVOURS if flavour.timesteps)]


class TimestepsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingTimesteps",
            display_name="PackForcing Timesteps",
            category=types.CATEGORY,
            description="The noise levels of the Long Video Sampler, in place of its steps and shift: those that a "
            "published checkpoint was trained for, or a list. The first block may have its own.",
            inputs=[
                io.Combo.Input(
                    "flavour",
                    options=FLAVOUR_CHOICES,
                    default=FLAVOUR_CHOICES[0],
                    tooltip="A published checkpoint, whose timesteps are taken: the inputs below are then not used. "
                    "custom: those below.",
                ),
                io.String.Input(
                    "timesteps",
                    default="1000, 750, 500, 250",
                    tooltip="Of 1000, falling, with commas between: a denoising step for each.",
                ),
                io.String.Input(
                    "first_block_timesteps",
                    default="",
                    tooltip="Those of the video's first block, if it has its own; empty: as the others.",
                ),
                io.Float.Input(
                    "shift", default=5.0, min=0.01, max=100.0, step=0.01, tooltip="Flow shift of the noise levels."
                ),
                io.Boolean.Input(
                    "warp",
                    default=True,
                    tooltip="On: the shift warps the timesteps (Self-Forcing). Off: the model is told them as they "
                    "are, and the noise level is the nearest that the shift makes (CausVid, Krea).",
                ),
            ],
            outputs=[types.Schedule.Output(display_name="schedule")],
        )

    @classmethod
    def validate_inputs(
        cls, flavour=None, timesteps=None, first_block_timesteps=None, shift=None, warp=None
    ) -> bool | str:
        """Tells a mistake before anything runs, by an exception; what comes from other nodes is checked later."""
        if None not in (flavour, timesteps, first_block_timesteps, shift, warp):
            schedule_asked(flavour, timesteps, first_block_timesteps, shift, warp)
        return True

    @classmethod
    def execute(
        cls, flavour: str, timesteps: str, first_block_timesteps: str, shift: float, warp: bool
    ) -> io.NodeOutput:
        return io.NodeOutput(schedule_asked(flavour, timesteps, first_block_timesteps, shift, warp))


def schedule_asked(flavour: str, timesteps: str, first: str, shift: float, warp: bool) -> Schedule | None:
    """The schedule that the widgets mean. Raises PackForcingError when they mean none."""
    for name, value in (("timesteps", timesteps), ("first_block_timesteps", first)):
        check_kind(name, value, str)
    if flavour != CUSTOM:
        return sampling_of(flavour_named(flavour)).schedule
    own = parse_timesteps(first) if first.strip() else []
    return schedule_of_timesteps(parse_timesteps(timesteps), own, shift, warp)


def schedule_given(given: Schedule | torch.Tensor | None) -> Schedule | None:
    """The schedule that is connected to the sampler: this pack's, or SIGMAS of any node."""
    if not isinstance(given, torch.Tensor):
        return given
    if given.ndim != 1 or given.numel() > MOST_STEPS + 1:
        raise PackForcingError(
            f"The sigmas must be a list of at most {MOST_STEPS:,} noise levels, but they have the shape "
            f"{list(given.shape)}."
        )
    return schedule_of_sigmas(given.tolist())
