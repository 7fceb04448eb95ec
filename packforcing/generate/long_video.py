"""The long-video loop (method 7): one block after another over a bounded cache.

noise -> denoising steps (the first selects mid blocks) -> x0 -> caller -> compressor -> clean pass -> next block

With `overlap`, a block's pixels are decoded beside its clean pass and the denoising of the next block, so it reaches
the caller, and the compressor, one block late:

    main   clean pass i-1 (with i-2 compressed) | denoise i   | clean pass i (with i-1 compressed) | denoise i+1 ...
    side     decode i-1 ......................               decode i .........................
    caller                                     i-1                                             i
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..cache.cache import Cache
from ..cache.deferred import DeferredCache
from ..config import LATENT_CHANNELS, Layout
from ..devices import to_device
from ..errors import PackForcingError
from ..model.causal_wan import CausalWan, TextKV
from ..model.compressor import Compressor
from ..model.vae import StreamingDecoder, WanVAE
from .record import BlockRecord, CacheRecord
from .schedule import UPDATES, euler_update, few_step_update, predicted_x0, sigmas
from .side_stream import SideStream
from .stopwatch import Stopwatch


@dataclass(frozen=True)
class Sampling:
    """How each block is denoised.

    Attributes:
        seed: any integer from 0 below 2^64.
        steps: denoising steps a block.
        shift: flow shift of the noise levels (5 in Self-Forcing and PackForcing).
        update: "few-step" for step-distilled models, "euler" for others.
    """

    seed: int = 0
    steps: int = 4
    shift: float = 5.0
    update: str = "few-step"

    def __post_init__(self) -> None:
        if self.update not in UPDATES:
            raise PackForcingError(f"update must be one of {', '.join(UPDATES)}, but it is '{self.update}'.")
        if not 0 <= self.seed < 2**64:
            raise PackForcingError(f"The seed must lie between 0 and 2^64 - 1, but it is {self.seed}.")
        sigmas(self.steps, self.shift)  # checks both

    @property
    def passes(self) -> int:
        """Model passes a block: the denoising steps and the clean pass."""
        return self.steps + 1


@dataclass(frozen=True)
class Block:
    """A finished block: normalised latents [B, 16, T, h, w] float32, and its video frames [B, 3, F, H, W] in [-1, 1]
    (None without a VAE)."""

    index: int
    latents: Tensor
    frames: Tensor | None


@dataclass(frozen=True)
class _Made:
    """A block whose latents are final; its frames may have to be waited for."""

    index: int
    latents: Tensor
    frames: Callable[[], Tensor | None]


def noise_generator(seed: int, block: int) -> torch.Generator:
    """The source of all noise of one block: independent between blocks, and of the video's length."""
    state = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0]
    # On the CPU, so that a seed means the same on every device; torch takes seeds below 2^63.
    return torch.Generator().manual_seed(int(state) >> 1)


def no_callback(block: int, step: int) -> None:
    """The default `on_step`."""


class LongVideo:
    """A video in the making. `blocks(n)` yields the next n blocks; calling it again goes on where the last call ended.

    Each block is yielded as soon as it is final; its clean pass, which only the next block needs, runs when the next
    one is asked for. So a caller that stops has lost nothing, and the last block costs no clean pass. When a run ends
    by an exception, all blocks that were made are yielded before it is raised.

    Args:
        wan: the transformer.
        text: the prompt's `TextKV`.
        layout: partitions and sizes.
        sampling: denoising settings.
        compressor: needed unless `layout.config.top_k` is 0.
        vae: decodes frames; needed by the compressor.
        decode: whether blocks come with frames even where the compressor does not need them.
        fps: for the record.
        batch: videos made at once.
        decode_frames: latent frames that the VAE decodes at a time; None takes a block whole.
        overlap: whether blocks are decoded beside the next one's denoising: faster, in more memory, and the same video
            to rounding.
        on_step: called as on_step(block, step) before each model pass (the clean pass has step = steps); an exception
            that it raises ends the run.

    Raises PackForcingError when something is missing, before anything is computed.
    """

    def __init__(
        self,
        wan: CausalWan,
        text: TextKV,
        layout: Layout,
        sampling: Sampling,
        compressor: Compressor | None = None,
        vae: WanVAE | None = None,
        decode: bool = True,
        fps: float = 16.0,
        batch: int = 1,
        decode_frames: int | None = None,
        overlap: bool = False,
        on_step: Callable[[int, int], None] = no_callback,
    ) -> None:
        config = layout.config
        if config.top_k and compressor is None:
            raise PackForcingError(
                f"Mid blocks are compressed, but there is no compressor and top_k is {config.top_k}: connect a "
                "PackForcing Compressor Loader, or set top_k to 0."
            )
        if config.top_k and vae is None:
            raise PackForcingError(
                "The compressor's LR branch goes through pixels and needs a VAE, but there is none: connect the Wan "
                "2.1 VAE, or set top_k to 0 to run without mid blocks."
            )
        if config.top_k and compressor.temporal_stride != layout.temporal_stride:
            raise PackForcingError(
                f"The layout has a temporal stride of {layout.temporal_stride}, but the compressor's is "
                f"{compressor.temporal_stride}."
            )
        self.wan = wan
        self.text = text
        self.layout = layout
        self.sampling = sampling
        self.compressor = compressor
        self.vae = vae
        self.decoder = StreamingDecoder(vae, decode_frames) if vae is not None and (decode or config.top_k) else None
        self.on_step = on_step
        self._side = SideStream(wan.device) if overlap and self.decoder is not None else None
        self._deferred = self._side is not None and config.can_defer
        kind = DeferredCache if self._deferred else Cache
        self.cache = kind(layout, wan.shape, wan.device, wan.dtype, batch, wan.rotary)
        self.record = CacheRecord(
            model=wan.shape,
            config=config,
            size=layout.size,
            fps=fps,
            temporal_stride=layout.temporal_stride,
            compressor=compressor.name if config.top_k and compressor is not None else "none",
            dtype=str(wan.dtype).removeprefix("torch."),
            device=str(wan.device),
        )
        self._stopwatch = Stopwatch(wan.device)
        self._awaiting_clean_pass: _Made | None = None  # the newest block
        self._before: _Made | None = None  # the one before, where compressed blocks are late
        self._unfinished: list[_Made] = []  # made, but not yielded

    @property
    def next_block(self) -> int:
        """Index of the block that is yielded next."""
        return len(self.record.blocks) - len(self._unfinished)

    def blocks(self, count: int) -> Iterator[Block]:
        """Makes the next `count` blocks.

        Raises PackForcingError when a block's latents are not finite.
        """
        yield from islice(self._each([None] * (count - len(self._unfinished))), count)

    def replay(self, latents: Tensor) -> Iterator[Block]:
        """Takes the next blocks from latents [B, 16, n * T, h, w] instead of denoising them.

        The cache ends up as if the same seed had made them here, so a run goes on exactly where an earlier one ended,
        for one pass or two a block instead of all. Raises PackForcingError when the latents are not whole blocks.
        """
        frames = self.layout.config.block_frames
        size = self.layout.size
        wanted = (LATENT_CHANNELS, size.latent_height, size.latent_width)
        found = (latents.shape[1], *latents.shape[3:])
        if found != wanted or latents.shape[2] % frames:
            raise PackForcingError(
                f"The latents to go on from must be whole blocks of {frames} frames with (channels, height, width) "
                f"{wanted}, but they have {latents.shape[2]} frames with {found}."
            )
        yield from self._each(latents.split(frames, dim=2))

    def _each(self, given: Iterable[Tensor | None]) -> Iterator[Block]:
        for latents in given:
            try:
                self._next(latents)
            except BaseException:
                yield from self._finish(keep=0)
                raise
            yield from self._finish(keep=0 if self._side is None else 1)
        yield from self._finish(keep=0)

    def _finish(self, keep: int) -> Iterator[Block]:
        """Yields all blocks that were made but the newest ones, as soon as their frames are there."""
        while len(self._unfinished) > keep:
            made = self._unfinished[0]
            if self._side is None:
                frames = made.frames()
            else:
                with self._stopwatch.stretch(self.record.blocks[made.index].seconds, "wait"):
                    frames = made.frames()
            self._unfinished.pop(0)
            self._stopwatch.settle()
            yield Block(made.index, made.latents, frames)

    @torch.no_grad()
    def _next(self, given: Tensor | None) -> None:
        """Makes a block, or takes it as given."""
        self._clean_pass()
        index = len(self.record.blocks)
        self.cache.begin(index)
        record = BlockRecord(index, selected=[])
        with self._stopwatch.stretch(record.seconds, "denoise"):
            if given is None:
                latents = self._denoise(index)
            else:
                latents = given.to(self.wan.device, torch.float32)
                self._select_only(index, latents)
        self._check_finite(index, latents)
        made = _Made(index, latents, self._decode(latents, record))
        self._fill(record)
        self.record.blocks.append(record)
        self._awaiting_clean_pass = made
        self._unfinished.append(made)

    def _decode(self, latents: Tensor, record: BlockRecord) -> Callable[[], Tensor | None]:
        """Decodes a block, or begins to; returns what gives its frames."""
        if self.decoder is None:
            return lambda: None
        decode = partial(self.decoder.decode, latents)
        if self._side is not None:
            return partial(self._decoded_beside, self._side.submit(decode), record)
        with self._stopwatch.stretch(record.seconds, "decode"):
            frames = decode()
        return lambda: frames

    def _decoded_beside(self, decoding: Future[tuple[Tensor, float]], record: BlockRecord) -> Tensor:
        frames, record.seconds["decode"] = decoding.result()
        if frames.is_cuda:  # made on another stream, which must not take their memory back while this one reads them
            frames.record_stream(torch.cuda.current_stream(frames.device))
        return frames

    def _noise(self, generator: torch.Generator) -> Tensor:
        size = self.layout.size
        shape = (LATENT_CHANNELS, self.layout.config.block_frames, size.latent_height, size.latent_width)
        return to_device(torch.randn((self.cache.batch, *shape), generator=generator), self.wan.device)

    def _denoise(self, index: int) -> Tensor:
        """Denoises block `index` to normalised latents [B, 16, T, h, w]."""
        generator = noise_generator(self.sampling.seed, index)
        levels = sigmas(self.sampling.steps, self.sampling.shift)
        x = self._noise(generator)
        for step, (sigma, next_sigma) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
            self.on_step(index, step)
            velocity = self.wan.denoise(x, sigma, self.text, self.cache)
            if next_sigma == 0:
                x = predicted_x0(x, velocity, sigma)
            elif self.sampling.update == "few-step":
                x = few_step_update(x, velocity, sigma, next_sigma, self._noise(generator))
            else:
                x = euler_update(x, velocity, sigma, next_sigma)
        return x

    def _select_only(self, index: int, latents: Tensor) -> None:
        """Selects mid blocks as the denoising of block `index` would have: by the queries of its first step."""
        self.on_step(index, 0)
        mids = len(self.cache.partition.mid)
        if self.cache.config.selection == "affinity" and mids > self.cache.config.attended_mids(index) > 0:
            noise = self._noise(noise_generator(self.sampling.seed, index))
            self.wan.denoise(noise, sigmas(self.sampling.steps, self.sampling.shift)[0], self.text, self.cache)

    def _check_finite(self, index: int, latents: Tensor) -> None:
        if not torch.isfinite(latents).all():
            raise PackForcingError(
                f"Block {index} came out with NaN or infinite values, so the run stopped there: load the model in "
                f"bfloat16 or float32 (it ran in {self.record.dtype}), or check the checkpoint and its LoRAs."
            )

    @torch.no_grad()
    def _clean_pass(self) -> None:
        """The clean pass of the newest block, with its compressed form or, where that is deferred, the one before's."""
        block = self._awaiting_clean_pass
        if block is None:
            return
        record = self.record.blocks[block.index]
        self.on_step(block.index, self.sampling.steps)
        source = self._before if self._deferred else block
        compressed = None if source is None else self._compressed(source)
        with self._stopwatch.stretch(record.seconds, "clean_pass"):
            self.wan.clean_pass(block.latents, self.text, self.cache, compressed)
            self.cache.end()
        if block.index == 0:
            self.record.rounding_error = self.cache.rounding_error
        self._awaiting_clean_pass = None  # only now: a run that was stopped before this must still do it
        self._before = block if self._deferred else None
        self._fill(record)

    def _compressed(self, block: _Made) -> Tensor | None:
        """Hidden tokens [B, N_c, d] of a block; None if it never becomes a mid block."""
        if not self.layout.config.becomes_mid(block.index):
            return None
        frames = block.frames()
        with self._stopwatch.stretch(self.record.blocks[block.index].seconds, "compression"):
            return self.compressor(block.latents, frames, self.layout, self.vae, self.wan.patch_tokens)

    def _fill(self, record: BlockRecord) -> None:
        record.selected = [list(chosen or ()) for chosen in self.cache.selected]
        record.mid_slots_written = self.cache.mid_slots_written
        record.recent_rotated = self.cache.recent_rotated
        record.bytes = self.cache.bytes()
