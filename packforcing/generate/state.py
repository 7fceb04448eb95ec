"""Going on from a state: may this run go on from it, and under which prompts.

The blocks that a state holds are taken again under their own prompts, with the mid blocks that they attended to: so the
history is what it was. What comes after them is this run's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig, Layout
from ..errors import PackForcingError
from ..files.state_file import StatePrompt, VideoState
from ..files.state_journal import StateJournal
from ..model.causal_wan import TextKV
from .long_video import Block, LongVideo, Selected, VideoModels
from .made_with import model_digest
from .start import Start
from .story import Story, Stretch, TimedPrompt, start_block

PLACEMENT = ("archive_device", "archive_budget_gb")  # where the archive lies changes no bit


def state_of(video: LongVideo, prompts: Sequence[StatePrompt], latents: Tensor) -> VideoState:
    """The state of a video under these prompts; its finished blocks are `latents` [B, 16, n * T, h, w], normalised."""
    record, layout = video.record, video.layout
    blocks = latents.shape[2] // layout.config.block_frames
    return VideoState(
        model=record.model,
        digest=model_digest(video.wan),
        dtype=record.dtype,
        compressor=record.compressor,
        config=layout.config,
        size=layout.size,
        temporal_stride=layout.temporal_stride,
        prompt_switch=record.prompt_switch,
        blend_blocks=video.story.blend_blocks,
        prompts=tuple(replace(prompt, context=prompt.context.cpu()) for prompt in prompts),
        latents=latents.cpu(),
        made_with=record.made_with,
        selected=_padded(
            [block.selected for block in record.blocks[:blocks]], record.model.layers, layout.config.top_k
        ),
    )


def journalled(
    blocks: Iterable[Block],
    video: LongVideo,
    prompts: Callable[[], Sequence[StatePrompt]],
    journal: StateJournal | None,
) -> Iterator[Block]:
    """The blocks of a video, each of which is in the journal before it is given on, with its latents in host memory.

    Without a journal they come as they are. `prompts` gives the video's prompts; more may have been said while it is
    made.
    """
    if journal is None:
        yield from blocks
        return
    for block in blocks:
        block = replace(block, latents=block.latents.cpu())  # once, for the journal and for whoever keeps them
        if block.index == 0:
            journal.begin(state_of(video, prompts(), block.latents))
        else:
            selected = _padded(
                [video.record.blocks[block.index].selected], video.record.model.layers, video.layout.config.top_k
            )
            journal.add(block.latents, selected, prompts())
        yield block


def _padded(selected: Sequence[Selected], layers: int, top_k: int) -> Tensor:
    """What each block and layer selected, as [n, layers, top_k] int32, filled up with -1."""
    rows = [[mids + [-1] * (top_k - len(mids)) for mids in block] for block in selected]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), layers, top_k)


def selected_of(state: VideoState) -> list[Selected]:
    """The mid blocks that a state's blocks attended to, as `LongVideo.replay` takes them."""
    return [[[mid for mid in layer if mid >= 0] for layer in block] for block in state.selected.tolist()]


def state_start(state: VideoState) -> Start:
    """The start of a video that goes on from a state."""
    return Start("The state", state.latents.shape[2], lambda vae: state.latents, selected_of(state))


def check_fits(state: VideoState, models: VideoModels, layout: Layout) -> None:
    """Raises PackForcingError, with the first thing that differs, when a run cannot go on from a state."""
    for name, made, now in _differences(state, models, layout):
        raise PackForcingError(
            f"The state was made with {name} {made}, but this run has {now}: set it as it was, or go on from saved "
            "latents, which fit any run of the same size."
        )


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
    there = [] if same_context(ruling.context, before[-1].context) else [replace(ruling, start=state.blocks)]
    return (*before, *there, *(prompt for prompt in prompts if prompt.start > state.blocks))


def _told(switch: str, blend_blocks: int) -> str:
    return f"{switch} over {blend_blocks} blocks" if switch == "blend" else switch


def same_context(one: Tensor, other: Tensor) -> bool:
    """Whether two encoded prompts are the same, to the bit."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def story_from(
    prompts: Sequence[StatePrompt], embed: Callable[[Tensor], TextKV], switch: str = "keep", blend_blocks: int = 2
) -> Story:
    """The story of encoded prompts. Raises what `Story` raises."""
    stretches = (Stretch(prompt.start, embed(prompt.context), prompt.prompt) for prompt in prompts)
    return Story(tuple(stretches), switch, blend_blocks)
