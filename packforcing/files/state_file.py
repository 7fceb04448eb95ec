"""The state of a video as a file: what a run needs to go on from it. Its format, and what is refused.

It holds the latents of all blocks, the mid blocks that they attended to, the encoded prompts, and what they were made
with. A run that goes on takes the blocks from the latents again, which gives the cache that made them
(`LongVideo.replay`), to the bit on the same machine. It is a safetensors file; nothing in it is ever run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..checks import check_whole
from ..config import LATENT_CHANNELS, CacheConfig, FrameSize, ModelShape
from ..errors import PackForcingError
from .weights import DOWNLOAD_AGAIN, SAFETENSORS_SUFFIXES, read_json, read_state_dict, some
from .writing import check_output_file, save_tensors

STATE_KEY = "packforcing.state"
MADE_WITH_KEY = "packforcing.made_with"  # beside it, where earlier versions do not look
STATE_VERSION = 1
LATENTS, SELECTED, MADE_WITH = "latents", "selected", "made_with"


@dataclass(frozen=True)
class StatePrompt:
    """A stretch of a story, with its prompt as the text encoder gives it."""

    start: int  # first block
    prompt: str  # its words; "" where they are not known
    context: Tensor  # [1, L, width]


@dataclass(frozen=True, kw_only=True)
class VideoState:
    """A video so far, and what it was made with. All tensors lie in host memory.

    Raises PackForcingError when the latents are not whole blocks of the size.
    """

    model: ModelShape
    digest: str  # of the model's weights (`state.model_digest`)
    dtype: str  # that the model ran in, such as "bfloat16"
    compressor: str  # its name, or "none"
    config: CacheConfig
    size: FrameSize
    temporal_stride: int  # the compressor's
    prompt_switch: str
    blend_blocks: int
    prompts: tuple[StatePrompt, ...]
    latents: Tensor  # [B, 16, n * T, h, w], normalised, float32
    selected: Tensor  # [n, layers, top_k] int32: the mid blocks that each block attended to, oldest first; -1: none
    made_with: Mapping[str, Any] = field(default_factory=dict)  # seed, versions and so on (`record.CacheRecord`)

    def __post_init__(self) -> None:
        check_whole("The state's temporal stride", self.temporal_stride)
        check_whole("The state's blend_blocks", self.blend_blocks)
        for name, value in asdict(self.model).items():
            check_whole(f"The state's model {name}", value)
        _check_starts([prompt.start for prompt in self.prompts])
        shape, size = self.latents.shape, self.size
        wanted = (LATENT_CHANNELS, size.latent_height, size.latent_width)
        whole = len(shape) == 5 and shape[2] > 0 and shape[2] % self.config.block_frames == 0
        if not whole or (shape[1], *shape[3:]) != wanted or self.latents.dtype != torch.float32:
            raise PackForcingError(
                f"A state's latents must be whole blocks of {self.config.block_frames} frames in float32 with "
                f"(channels, height, width) {wanted}, but they are {list(shape)} in {str(self.latents.dtype)[6:]}."
            )
        _check_selected(self.selected, self.config, (self.blocks, self.model.layers, self.config.top_k))

    @property
    def blocks(self) -> int:
        """How many blocks are made."""
        return self.latents.shape[2] // self.config.block_frames


def _check_starts(starts: list[int]) -> None:
    """Raises PackForcingError unless they begin at block 0 and rise."""
    for start in starts:
        check_whole("The start of a state's prompt", start)
    if starts[:1] != [0] or any(b <= a for a, b in pairwise(starts)):
        raise PackForcingError(f"A state's prompts must start at block 0 and rise, but they start at {starts[:9]}.")


def _check_selected(selected: Tensor, config: CacheConfig, shape: tuple[int, ...]) -> None:
    """Raises PackForcingError unless each block attended to as many mid blocks as it must, and in order."""
    if selected.shape != shape or selected.dtype != torch.int32:
        raise PackForcingError(
            f"A state's selected mid blocks must be {list(shape)} in int32, but they are {list(selected.shape)} in "
            f"{str(selected.dtype)[6:]}."
        )
    for block, layers in enumerate(selected):
        mids, count = config.partition(block).mid, config.attended_mids(block)
        chosen, rest = layers[:, :count], layers[:, count:]
        inside = bool(((chosen >= mids.start) & (chosen < mids.stop)).all() and (rest == -1).all())
        if not inside or (chosen.diff(dim=1) < 0).any():
            raise PackForcingError(f"A state's block {block} attended to mid blocks that cannot be.")


def save_state(path: str | os.PathLike[str], state: VideoState) -> None:
    """Writes a state's file; a run that is stopped midway leaves no half file under `path`.

    Raises PackForcingError when it cannot be written.
    """
    check_state_path(path)
    save_tensors(path, *_stored(state), "state")


def state_bytes(state: VideoState) -> bytes:
    """What `save_state` writes."""
    return save(*_stored(state))


def _stored(state: VideoState) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state as tensors and a header's metadata."""
    apart = (LATENTS, SELECTED, MADE_WITH)
    header = {each.name: getattr(state, each.name) for each in fields(state) if each.name not in apart}
    for name in ("model", "config", "size"):
        header[name] = asdict(header[name])
    header["prompts"], prompts = stored_prompts(state.prompts)
    tensors = {**prompts, LATENTS: state.latents.contiguous(), SELECTED: state.selected.contiguous()}
    header["format_version"] = STATE_VERSION
    return tensors, {STATE_KEY: json.dumps(header), MADE_WITH_KEY: json.dumps(state.made_with)}


def stored_prompts(prompts: Sequence[StatePrompt]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Prompts as a header tells them, and their tensors."""
    # Copies, since the same prompt may come twice, and the format knows no shared memory.
    tensors = {f"prompt.{i}": prompt.context.cpu().contiguous().clone() for i, prompt in enumerate(prompts)}
    return [{"start": prompt.start, "prompt": prompt.prompt} for prompt in prompts], tensors


def prompts_from(told: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> tuple[StatePrompt, ...]:
    """What `stored_prompts` stored."""
    return tuple(StatePrompt(each["start"], str(each["prompt"]), tensors[f"prompt.{i}"]) for i, each in enumerate(told))


def check_state_path(path: str | os.PathLike[str]) -> None:
    """Raises PackForcingError when a state could not be written there at the end of a run."""
    path = Path(path)
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES or not path.parent.is_dir() or path.is_dir():
        raise PackForcingError(
            f"The state's file {path} must end in .safetensors and lie in a folder that exists: change the path."
        )
    check_output_file(path, "state")


def is_state(path: str | os.PathLike[str]) -> bool:
    """Whether a readable file calls itself a state; its contents may still be refused."""
    return Path(path).suffix.lower() in SAFETENSORS_SUFFIXES and STATE_KEY in read_state_dict(path)[1]


def load_state(path: str | os.PathLike[str]) -> VideoState:
    """Reads a file that `save_state` wrote. Raises PackForcingError for any other, and for one that is damaged."""
    source = os.fspath(path)
    tensors, metadata = read_state_dict(path)
    if STATE_KEY not in metadata or Path(path).suffix.lower() not in SAFETENSORS_SUFFIXES:
        raise PackForcingError(
            f"{source} is not the state of a PackForcing video: it is no safetensors file with '{STATE_KEY}' in "
            f"its header (found {some(tensors, 'tensor')}); choose a file that PackForcing Save State or --save-state "
            "wrote."
        )
    return state_from(tensors, metadata, source)


def state_from(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> VideoState:
    """The state of a file's tensors and of its header's metadata. Raises what `load_state` raises."""
    try:
        header = read_json(metadata[STATE_KEY])
        version = header.pop("format_version")
        header[MADE_WITH] = dict(read_json(metadata.get(MADE_WITH_KEY, "{}")))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(source, error) from error
    if version != STATE_VERSION:
        raise PackForcingError(
            f"{source} has the state format version {str(version)[:20]}, and this PackForcing knows version "
            f"{STATE_VERSION}: update PackForcing, or make the video again."
        )
    try:
        state = _parsed(header, tensors)
    except PackForcingError as error:
        raise PackForcingError(f"{source} cannot be used: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged(source, error) from error
    if not torch.isfinite(state.latents).all():
        raise PackForcingError(f"{source} holds latents that are not finite numbers: choose an earlier state.")
    return state


def _parsed(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> VideoState:
    """The state that a header and its tensors make."""
    prompts = prompts_from(header.pop("prompts"), tensors)
    if len(tensors) != len(prompts) + 2 or any(prompt.context.ndim != 3 for prompt in prompts):
        raise ValueError("its tensors are not the latents and the prompts")
    kinds = {"model": ModelShape, "config": CacheConfig, "size": FrameSize}
    parts = {name: kind(**header.pop(name)) for name, kind in kinds.items()}
    for name in ("digest", "dtype", "compressor", "prompt_switch"):
        header[name] = str(header[name])
    latents, selected = tensors[LATENTS], tensors[SELECTED]
    return VideoState(**header, **parts, prompts=prompts, latents=latents, selected=selected)


def _damaged(source: str, error: Exception) -> PackForcingError:
    return PackForcingError(
        f"{source} is the state of a video, but damaged or of another version ({type(error).__name__}: "
        f"{str(error)[:80]}); {DOWNLOAD_AGAIN}, or make the video again."
    )
