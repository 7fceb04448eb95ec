"""Rollouts: videos that the generator itself makes, to train its compressor with. They need nothing but prompts.

A rollout is a file with the latents of its blocks, the LR branch's latents of each block, and the encoded prompt. It is
a function of its prompt and its number. Files that are there are not made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import LATENT_CHANNELS, CacheConfig, FrameSize, Layout
from ..errors import PackForcingError
from ..files.writing import save_tensors
from ..generate.long_video import LongVideo, VideoModels, VideoSettings
from ..generate.sampling import Sampling
from ..model.causal_wan import CausalWan
from ..model.compressor import Compressor, lr_latents, whole_block
from ..model.vae import WanVAE
from ..telling import tell


@dataclass(frozen=True)
class RolloutShape:
    """How rollouts are made. The compressor is the training-free one."""

    blocks: int  # of each rollout
    size: FrameSize
    config: CacheConfig  # the partition
    sampling: Sampling  # its seed is not used: each rollout has its own
    temporal_stride: int = 2  # of the compressor

    @property
    def layout(self) -> Layout:
        return Layout(self.config, self.size, self.temporal_stride)


def rollout_path(folder: Path, number: int) -> Path:
    return folder / f"rollout-{number:05d}.safetensors"


@torch.no_grad()
def make(wan: CausalWan, vae: WanVAE, context: Tensor, shape: RolloutShape, seed: int) -> dict[str, Tensor]:
    """One rollout as its file holds it, float16, for a prompt [L, 4096].

    "latents" [16, blocks * T, h, w]; "reduced" [blocks, 16, T', h', w'], which is `Rollout.compressed`; "context".
    """
    frames = shape.config.block_frames
    sampling = replace(shape.sampling, seed=seed)
    compressor = Compressor(shape.temporal_stride)
    models = VideoModels(wan, vae, compressor)
    video = LongVideo(models, wan.embed_text(context[None]), VideoSettings(shape.layout, sampling))
    latents, compressed = [], []
    for block in video.blocks(shape.blocks):
        latents.append(block.latents[0])
        compressed.append(lr_latents(whole_block(block.decoded, frames), vae, shape.temporal_stride)[0])
    tensors = {"latents": torch.cat(latents, dim=1), "reduced": torch.stack(compressed), "context": context}
    return {name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}


def prepare(
    folder: str | Path,
    contexts: Sequence[Tensor],
    wan: CausalWan,
    vae: WanVAE,
    shape: RolloutShape,
    part: int = 0,
    parts: int = 1,
) -> int:
    """Makes the rollouts that are not there yet, one for each prompt [L, 4096]; returns how many.

    Several processes take a `part` of `parts` each.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = 0
    for number in range(part, len(contexts), parts):
        path = rollout_path(folder, number)
        if path.exists():
            continue
        tensors = make(wan, vae, contexts[number], shape, seed=number)
        save_tensors(path, tensors, None, "rollout")
        made += 1
        tell(f"rollout {number + 1} of {len(contexts)}")
    return made


def read_rollout(path: Path) -> dict[str, Tensor]:
    """The tensors of a rollout. Raises PackForcingError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in ("latents", "reduced", "context")}
    except (OSError, SafetensorError) as error:
        raise PackForcingError(
            f"The rollout {path} is damaged ({str(error)[:80]}): delete it, and make it again."
        ) from error


@dataclass(frozen=True)
class Rollout:
    """One rollout, in float32."""

    latents: Tensor  # [16, blocks * T, h, w]
    compressed: Tensor  # [blocks, 16, T', h', w']: what the compressor's LR branch sees
    context: Tensor  # [L, 4096], the encoded prompt


def _is_whole(tensors: Mapping[str, Tensor], blocks: int) -> bool:
    """Whether a rollout's tensors have axes of a rollout, and hold finite numbers."""
    reduced, context = tensors["reduced"], tensors["context"]
    shapes = reduced.ndim == 5 and context.ndim == 2 and len(context) > 0
    numbers = all(tensor.is_floating_point() and tensor.float().isfinite().all() for tensor in tensors.values())
    return shapes and reduced.shape[:2] == (blocks, LATENT_CHANNELS) and numbers


class Rollouts:
    """The rollouts of a prepared folder, in memory. Raises PackForcingError when one is missing or does not fit."""

    def __init__(self, folder: str | Path, count: int, shape: RolloutShape) -> None:
        frames = shape.blocks * shape.config.block_frames
        wanted = (16, frames, shape.size.latent_height, shape.size.latent_width)
        self._rollouts: list[dict[str, Tensor]] = []
        for number in range(count):
            path = rollout_path(Path(folder), number)
            if not path.exists():
                raise PackForcingError(f"The rollout {path} is missing: give more --rollout-folder or make it again.")
            tensors = read_rollout(path)
            if tuple(tensors["latents"].shape) != wanted:
                raise PackForcingError(
                    f"{path} holds a rollout of shape {list(tensors['latents'].shape)}, and {list(wanted)} is wanted: "
                    "give the options that it was made with, or another folder."
                )
            if not _is_whole(tensors, shape.blocks):
                raise PackForcingError(f"The rollout {path} is damaged: delete it, and make it again.")
            self._rollouts.append(tensors)

    def __len__(self) -> int:
        return len(self._rollouts)

    def __getitem__(self, number: int) -> Rollout:
        stored = {name: tensor.float() for name, tensor in self._rollouts[number].items()}
        return Rollout(stored["latents"], stored["reduced"], stored["context"])
