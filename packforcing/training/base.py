"""`train base`: a causal generator from scratch, by flow matching with clean history (teacher forcing).

A clip goes through the model as at inference, block by block over the same cache: a noisy block is denoised given the
clean passes of the blocks before it, then has its own clean pass. Gradients reach the clean passes too.

Videos at inference are much longer than training clips. Three things prepare the model for that:

- The history is often partitioned (`histories`): blocks are dropped, or compressed by the compressor's LR branch. So
  sinks, compressed mid blocks and gaps in time are nothing new. A clip of five blocks has few mid blocks; so in some
  steps these few fill all mid slots. Then the context has as many tokens as late in a video, and the sinks are as far
  away.
- Clean passes see latents with a little noise (`history_noise`), since a model's own output is a little wrong. Without
  it, small errors of one block count as truth for the next one, and grow.
- Each block of a clip has its own noise level, independent of the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..cache.gradients import GradientCache
from ..config import CacheConfig, FrameSize, Layout
from ..model.attention import training_attention
from ..model.causal_wan import CausalWan, Text
from ..model.compressor import HRBranch
from ..model.wan_modules import WanModules
from ..world.places import showings
from .base_samples import (
    HR_OPTIONS,
    PLACE_OPTIONS,
    SWITCH_BLOCK,
    SWITCH_OPTIONS,
    BaseOptions,
    Batch,
    Sample,
    Samples,
    TrainingClips,
    held_out,
    stacked,
)
from .blocks import levels_like, walk_blocks
from .clips import LatentClips, loudness
from .histories import (
    BLOCK_BEFORE,
    BLOCK_FRAMES,
    HISTORIES,
    MIDS_ONLY,
    History,
)
from .learner import Learner
from .optimizers import muon_and_adamw
from .prompts import Prompts
from .run_config import MicroBatch


class BaseTrainer:
    """A `Trainer` with one learner, "base".

    Args:
        modules: the transformer's weights, float32; they are trained.
        data: the clips.
        options: the hyperparameters.
        histories: the partitions of the history; the first is the one that `evaluate` measures under.
        start: where the weights come from, a file or a seed. A run is continued only from the same start.
        device: where to train.
        cache_dtype: of the cached keys and values.
        hr: an HR branch that is trained with the transformer, float32; without it mid blocks are the LR branch's.
        frozen: whether the transformer stays as it is, and the HR branch alone is trained.
    """

    def __init__(
        self,
        modules: WanModules,
        data: TrainingClips,
        options: BaseOptions,
        histories: Sequence[History] = HISTORIES,
        start: str | int = 0,
        device: torch.device | str = "cpu",
        cache_dtype: torch.dtype = torch.float32,
        hr: HRBranch | None = None,
        frozen: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.options = options
        self.data = data
        self.histories = histories
        self.block_frames = histories[0].block_frames
        self.samples = Samples(data, options, self.block_frames)
        self.cache_dtype = cache_dtype
        self.frozen = frozen
        self.modules = modules.requires_grad_(not frozen).to(self.device)
        self.hr = None if hr is None else hr.requires_grad_(True).to(self.device)
        self.wan = CausalWan(self.modules, training_attention(self.device), device=self.device)
        trained = self.modules if self.hr is None else nn.ModuleDict({"wan": self.modules, "hr": self.hr})
        optimizer = muon_and_adamw(
            trained, modules.blocks.parameters(), options.rate, options.betas, options.weight_decay
        )
        self.learners = {"base": Learner(trained, optimizer, options.ema)}
        clips = data.clips
        self.size = FrameSize(clips.clips.size, clips.clips.size)
        self._start = start
        self.loudness = loudness(clips.latents).view(1, -1, 1, 1, 1).to(self.device)

    def describe(self) -> Mapping[str, Any]:
        away, places, twins = self.data.away, self.data.places, self.data.twins
        sets = {"places": places, "twins": twins}
        named = {name: clips.clips.as_dict() for name, clips in sets.items() if clips is not None}
        ignored = (
            *(PLACE_OPTIONS if places is None else ()),
            *(HR_OPTIONS if self.hr is None else ()),
            *(SWITCH_OPTIONS if twins is None else ()),
        )
        return {
            **{name: value for name, value in vars(self.options).items() if name not in ignored},
            "clips": self.data.clips.clips.as_dict(),
            "away": away.clips.as_dict() if away is not None else None,
            **named,
            "histories": [list(vars(history).values()) for history in self.histories],
            "weights": self._start,
            **({"frozen": True} if self.frozen else {}),  # runs from before there was such a choice go on
        }

    def turns(self, step: int) -> Sequence[str]:
        return ("base",)

    def batch(self, micro: MicroBatch) -> Batch:
        odds = np.array([history.share for history in self.histories])
        rng = np.random.default_rng(micro.step_seed())
        chosen = rng.choice(len(odds), p=odds / odds.sum())
        early = self.data.places is not None and micro.step < self.options.whole_steps
        history = self.histories[0 if early else chosen]
        dual = self.hr is not None and rng.random() < self.options.dual_share
        return stacked([self.samples.drawn(seed) for seed in micro.seeds()], history, self.device, dual)

    def losses(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        errors = self.errors(batch, self.loudness * focus_weights(batch.latents, self.options.focus))
        return {"loss": errors.mean(), "first": errors[0].mean(), "last": errors[-1].mean()}

    def errors(self, batch: Batch, weights: Tensor) -> Tensor:
        """Weighted mean squared errors [n, B] of the velocities of the n denoised blocks.

        `weights`: of the errors of a clip, like [B, 16, T, h, w].
        """
        layout = Layout(batch.history.config(), self.size, self.data.clips.clips.temporal_stride)
        cache = GradientCache(layout, self.wan.shape, self.device, self.cache_dtype, batch=len(batch.latents))
        frames = self.block_frames
        denoised = zip(batch.noise.split(frames, dim=2), batch.sigma.unbind(dim=1), strict=True)
        blocks, block_weights = batch.latents.split(frames, dim=2), weights.split(frames, dim=2)
        noises = zip(blocks, batch.history_noise.split(frames, dim=2), batch.history_sigma.unbind(dim=1), strict=True)
        seen = [torch.lerp(x0, noise, levels_like(sigma, x0)) for x0, noise, sigma in noises]
        texts = self._texts(batch.prompts, len(blocks))
        same = batch.clean_prompts is batch.prompts
        clean_texts = texts if same else self._texts(batch.clean_prompts, len(blocks))
        errors = []

        def denoise(i: int) -> None:
            for noise, sigma in islice(denoised, 1 if i else 1 + self.options.first_again):
                x0 = blocks[i]
                velocity = self.wan.denoise(torch.lerp(x0, noise, levels_like(sigma, x0)), sigma, texts[i], cache)
                error = F.mse_loss(velocity, noise - x0, reduction="none") * block_weights[i]
                errors.append(error.mean(dim=(1, 2, 3, 4)))

        def compressed(i: int) -> Tensor:
            tokens = self.wan.patch_tokens(batch.compressed[:, i])
            if not batch.dual:
                return tokens
            assert self.hr is not None, "only a trainer with an HR branch asks for it"
            return tokens + rearrange(self.hr(seen[i]), "b d t h w -> b (t h w) d")

        walk_blocks(self.wan, cache, clean_texts, seen, compressed, denoise)
        return torch.stack(errors)

    def _texts(self, prompts: Prompts, blocks: int) -> list[Text]:
        texts = prompts.texts(self.wan)
        return texts if len(texts) > 1 else texts * blocks

    @property
    def compressor_layout(self) -> Layout:
        """The layout that the HR branch's file names."""
        return Layout(CacheConfig(self.block_frames), self.size, self.data.clips.clips.temporal_stride)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Losses on held-out clips, with the whole history and the same noise each time.

        If there are clips with things away, also the errors of their last blocks, under captions that say no colour of
        what was away: with the whole history ("away") and with the block before alone ("away_block_before"). A model
        that remembers does better with the whole.

        If there are tours, also the errors of their blocks under captions that say nothing but a name: of places that
        come back ("return", "return_block_before", "return_mids" with compressed blocks and the block before, and
        "return_dual_mids" where an HR branch is trained), and of places that are new ("new"), where no
        history can help.

        If there are twins, also the error of the first block under another prompt, from pure noise: with the history
        as it is ("switch"), and with the block before under the new prompt ("switch_refresh").
        """
        data = self.data
        with self.learners["base"].averaged():
            samples = [self.samples.measured(number) for number in held_out(data.clips, data.held_out)]
            found = {"held_out": self._held_out_errors(samples, self.histories[0]).mean().item()}
            if data.away is not None and self.block_frames == BLOCK_FRAMES:
                numbers = held_out(data.away, data.held_out)
                samples = [self.samples.measured_away(data.away, number) for number in numbers]
                for name, history in (("away", self.histories[0]), ("away_block_before", BLOCK_BEFORE)):
                    found[name] = self._held_out_errors(samples, history)[-2:].mean().item()
            if data.places is not None:
                found.update(self._measured_places(data.places))
            if data.twins is not None:
                found.update(self._measured_switches(data.twins))
        return found

    def _measured_switches(self, twins: LatentClips) -> dict[str, float]:
        found = {}
        for name, refresh in (("switch", False), ("switch_refresh", True)):
            samples = [self.samples.measured_switch(number, refresh) for number in held_out(twins, self.data.held_out)]
            errors = self._held_out_errors(samples, self.histories[0])[self.options.first_again :]
            found[name] = errors[SWITCH_BLOCK].mean().item()
        return found

    def _measured_places(self, places: LatentClips) -> dict[str, float]:
        samples = [self.samples.measured_places(places, number) for number in held_out(places, self.data.held_out)]
        shown = np.array([showings(sample.captions) for sample in samples]).T  # [blocks, clips]
        again = self.options.first_again
        found = {}
        forms = [("", self.histories[0], False), ("_block_before", BLOCK_BEFORE, False), ("_mids", MIDS_ONLY, False)]
        if self.hr is not None:
            forms.append(("_dual_mids", MIDS_ONLY, True))
        for name, history, dual in forms:
            errors = self._held_out_errors(samples, history, dual)[again:].cpu().numpy()
            found["return" + name] = float(errors[shown == "return"].mean())
            if not name:
                found["new"] = float(errors[1:][shown[1:] == "new"].mean())
        return found

    def _held_out_errors(self, samples: Sequence[Sample], history: History, dual: bool = False) -> Tensor:
        """Errors [n, clips] of the denoised blocks, without `focus`."""
        errors = []
        for first in range(0, len(samples), 8):
            batch = stacked(samples[first : first + 8], history, self.device, dual)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cache_dtype == torch.bfloat16):
                errors.append(self.errors(batch, self.loudness * focus_weights(batch.latents, 0)))
        return torch.cat(errors, dim=1)


def focus_weights(latents: Tensor, focus: float) -> Tensor:
    """Weights [B, 1, T, h, w] of mean 1 for the errors of clips [B, 16, T, h, w].

    What moves is small, and a plain background is soon learnt. Then most of what is left to learn is in the last per
    cent of the loss. So a part `focus` of the weight follows the distance of a latent pixel to the mean of its row.
    """
    distance = (latents - latents.mean(dim=(2, 4), keepdim=True)).abs().mean(dim=1, keepdim=True)
    return 1 - focus + focus * distance / distance.mean(dim=(2, 3, 4), keepdim=True)
