"""Going on from a state: may this run go on from it, and under which prompts.

The blocks that a state holds are taken again under their own prompts, and by the seed that made them: so the history is
what it was. What comes after them is this run's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig, Layout
from ..errors import PackForcingError
from ..files.state_file import StatePrompt, StateSampling, VideoState
from ..model.causal_wan import CausalWan, TextKV
from .long_video import LongVideo, VideoModels
from .sampling import Sampling
from .story import Story, Stretch, TimedPrompt, start_block

PLACEMENT = ("archive_device", "archive_budget_gb")  # where the archive lies changes no bit


def model_digest(wan: CausalWan) -> str:
    """A short digest of a model: of its modulations in bfloat16, which every fine-tune changes and no LoRA does.

    They are small, and the only weights that always lie in reach. In bfloat16, so that the type they are loaded in does
    not matter.
    """
    digest = hashlib.sha256()
    for modulation in (*(block.modulation for block in wan.modules.blocks), wan.modules.head.modulation):
        values = modulation.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def state_of(
    video: LongVideo, prompts: Sequence[StatePrompt], latents: Tensor, before: VideoState | None = None
) -> VideoState:
    """The state of a video whose finished blocks are `latents` [B, 16, n * T, h, w], normalised.

    Args:
        prompts: of the whole video.
        before: the state that it went on from.
    """
    record, layout = video.record, video.layout
    return VideoState(
        model=record.model,
        digest=model_digest(video.wan),
        dtype=record.dtype,
        compressor=record.compressor,
        config=layout.config,
        size=layout.size,
        temporal_stride=layout.temporal_stride,
        samplings=_samplings_of(latents.shape[2] // layout.config.block_frames, before, asdict(video.sampling)),
        prompt_switch=record.prompt_switch,
        blend_blocks=video.story.blend_blocks,
        prompts=tuple(replace(prompt, context=prompt.context.cpu()) for prompt in prompts),
        latents=latents.cpu(),
    )


def _samplings_of(blocks: int, before: VideoState | None, options: dict[str, Any]) -> tuple[StateSampling, ...]:
    """The samplings of so many blocks, which went on from a state, perhaps not yet to its end, with these options."""
    if before is None:
        return (StateSampling(0, options),)
    made = tuple(sampling for sampling in before.samplings if sampling.start < blocks)
    same = _as_saved(made[-1].options) == options
    return made if same or blocks <= before.blocks else (*made, StateSampling(before.blocks, options))


def made_by(state: VideoState) -> tuple[tuple[int, Sampling], ...]:
    """The samplings that made a state's blocks, each with its first block.

    Raises PackForcingError for an option that is unknown or out of range.
    """
    known = {field.name for field in fields(Sampling)}
    for sampling in state.samplings:
        if set(sampling.options) - known:
            odd = min(set(sampling.options) - known)
            raise PackForcingError(
                f"The state was made with the sampling option '{odd[:40]}', which is not known here: update "
                "PackForcing."
            )
    return tuple((sampling.start, Sampling(**_as_saved(sampling.options))) for sampling in state.samplings)


def _as_saved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were before JSON made lists of their tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def check_fits(state: VideoState, models: VideoModels, layout: Layout) -> None:
    """Raises PackForcingError, with the first thing that differs, when a run cannot go on from a state."""
    for name, made, now in _differences(state, models, layout):
        raise PackForcingError(
            f"The state was made with {name} {made}, but this run has {now}: set it as it was, or go on from saved "
            "latents, which fit any run of the same size."
        )
    made_by(state)


def _differences(state: VideoState, models: VideoModels, layout: Layout) -> Iterator[tuple[str, Any, Any]]:
    """What differs: its name, what it was, and what it is now."""
    wan, config = models.wan, layout.config
    compressor = models.compressor.name if models.compressor is not None and config.top_k else "none"
    shapes = [f"of {shape.layers} layers and width {shape.dim}" for shape in (state.model, wan.shape)]
    sizes = [f"{size.width}x{size.height}" for size in (state.size, layout.size)]
    pairs: list[tuple[str, Any, Any]] = [("the model", shapes[0], shapes[1]), ("the size", sizes[0], sizes[1])]
    pairs += [
        (field.name, getattr(state.config, field.name), getattr(config, field.name))
        for field in fields(CacheConfig)
        if field.name not in PLACEMENT
    ]
    pairs += [
        ("the compressor", state.compressor, compressor),
        ("a temporal stride of", state.temporal_stride, layout.temporal_stride),
        ("the type", state.dtype, str(wan.dtype).removeprefix("torch.")),
    ]
    yield from (pair for pair in pairs if pair[1] != pair[2])
    if (digest := model_digest(wan)) != state.digest:
        yield "the model's weights", state.digest, digest


# --- prompts ----------------------------------------------------------------------------------------------------------


def encoded_prompts(
    prompts: Sequence[TimedPrompt], contexts: Sequence[Tensor], fps: float, block_frames: int
) -> tuple[StatePrompt, ...]:
    """Timed prompts and their encodings [1, L, width], each with the block from which it rules."""
    return tuple(
        StatePrompt(start_block(prompt.seconds, fps, block_frames), prompt.prompt, context)
        for prompt, context in zip(prompts, contexts, strict=True)
    )


def prompts_after(
    state: VideoState | None, prompts: Sequence[StatePrompt], switch: str, blend_blocks: int
) -> tuple[StatePrompt, ...]:
    """The prompts of a whole video: until the state's end its own, and from there on this run's.

    Where the same prompt goes on there is no switch. Raises PackForcingError when the state's own switches were of
    another kind than this run's.
    """
    if state is None:
        return tuple(prompts)
    before = [prompt for prompt in state.prompts if prompt.start < state.blocks]
    made, now = _told(state.prompt_switch, state.blend_blocks), _told(switch, blend_blocks)
    if len(before) > 1 and made != now:
        raise PackForcingError(
            f"The state's story was made with the prompt switch {made}, but this run has {now}: set it as it was."
        )
    ruling = [prompt for prompt in prompts if prompt.start <= state.blocks][-1]
    there = [] if _same(ruling.context, before[-1].context) else [replace(ruling, start=state.blocks)]
    return (*before, *there, *(prompt for prompt in prompts if prompt.start > state.blocks))


def _told(switch: str, blend_blocks: int) -> str:
    return f"{switch} over {blend_blocks} blocks" if switch == "blend" else switch


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def story_from(
    prompts: Sequence[StatePrompt], embed: Callable[[Tensor], TextKV], switch: str = "keep", blend_blocks: int = 2
) -> Story:
    """The story of encoded prompts. Raises what `Story` raises."""
    stretches = (Stretch(prompt.start, embed(prompt.context), prompt.prompt) for prompt in prompts)
    return Story(tuple(stretches), switch, blend_blocks)
