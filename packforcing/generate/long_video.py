"""The long-video loop: one block after another over a bounded cache (docs/method.md, section 7).

noise -> denoising steps (the first selects mid blocks) -> x0 -> caller -> compressor -> clean pass -> next block

With `overlap`, a block is decoded while its clean pass and the denoising of the next block run. It then reaches the
caller, and the compressor, one block late:

    main   clean pass i-1 (with i-2 compressed) | denoise i   | clean pass i (with i-1 compressed) | denoise i+1 ...
    side     decode i-1 ......................               decode i .........................
    caller                                     i-1                                             i
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..cache.archive_file import Folder
from ..cache.cache import Cache
from ..cache.deferred import DeferredCache
from ..config import LATENT_CHANNELS, Layout
from ..devices import to_device
from ..errors import PackForcingError
from ..model.causal_wan import TextKV
from .decoding import BlockDecoder, Decoding
from .made_with import made_with
from .record import BlockRecord, CacheRecord, PromptRecord
from .sampling import Sampling, noise_generator
from .schedule import denoising_step
from .side_stream import SideStream
from .stopwatch import Stopwatch
from .story import Story, Stretch, as_story
from .video_models import VideoModels as VideoModels
from .video_models import check_complete, needs_frames

Selected = list[list[int]]  # of a block: for each layer the mid blocks that it attended to, oldest first


@dataclass(frozen=True)
class VideoSettings:
    """How a video is made, apart from its prompt and its length."""

    layout: Layout  # partitions, frame size and token counts
    sampling: Sampling
    fps: float = 16.0  # for the record only
    batch: int = 1  # videos made at once
    decode: bool = True  # blocks come with frames, even where the compressor does not need them
    decode_frames: int | None = None  # latent frames that the VAE decodes at a time; None: a whole block
    overlap: bool = False  # decode a block beside the next one's denoising: faster, more memory, the same video
    archive_folder: Folder = None  # where the archive's file lies, should there be one (`Archive`)


@dataclass(frozen=True)
class Block:
    """A finished block."""

    index: int  # from 0
    latents: Tensor  # [B, 16, T, h, w], normalised, float32
    frames: Tensor | None  # [B, 3, F, H, W] in [-1, 1]; None without a VAE

    @property
    def decoded(self) -> Tensor:
        """`frames`, for those who know that there are some."""
        assert self.frames is not None, "the video was made without a VAE, or not decoded"
        return self.frames


@dataclass(frozen=True)
class _Made:
    """A block whose latents are final; its frames may have to be waited for."""

    index: int
    latents: Tensor  # as in Block
    decoding: Decoding | None  # of its frames; None without a VAE


def no_callback(block: int, step: int) -> None:
    """The default `on_step`."""


def no_listener(block: int) -> None:
    """The default `on_block`."""


def new_record(models: VideoModels, settings: VideoSettings, story: Story) -> CacheRecord:
    """The record of a run that has made no block yet."""
    wan, layout = models.wan, settings.layout
    compressor = models.compressor if layout.config.top_k else None
    return CacheRecord(
        model=wan.shape,
        config=layout.config,
        size=layout.size,
        fps=settings.fps,
        temporal_stride=layout.temporal_stride,
        compressor="none" if compressor is None else compressor.name,
        dtype=str(wan.dtype).removeprefix("torch."),
        device=str(wan.device),
        prompts=[PromptRecord(stretch.start, stretch.prompt) for stretch in story.stretches],
        prompt_switch=story.switch,
        blend_blocks=story.blend_blocks,
        update=settings.sampling.update,
        timesteps=settings.sampling.timesteps_of(1),
        first_timesteps=settings.sampling.timesteps_of(0),
        made_with=made_with(models, settings.sampling, uses_compressor=bool(layout.config.top_k)),
    )


class LongVideo:
    """A video in the making. `blocks(n)` yields the next n blocks; calling it again goes on where the last call ended.

    A block is yielded as soon as it is final. Only the next block needs its clean pass, so that runs when the next
    block is asked for. A caller that stops has therefore lost nothing, and the last block costs no clean pass. When a
    run ends by an exception, all blocks that were made are yielded before it is raised.

    Args:
        models: the transformer, the VAE and the compressor.
        text: the prompt's `TextKV`, or a story of several.
        settings: partitions, sizes, denoising and decoding.
        on_step: called as on_step(block, step) before each model pass (the clean pass, and each refreshed block's, has
            step = that block's number of steps); an exception that it raises ends the run.

    Attributes:
        on_block: called as on_block(block) before a block is begun that will be denoised. It may call `tell`; an
            exception that it raises ends the run.

    Raises PackForcingError when something is missing, before anything is computed.
    """

    def __init__(
        self,
        models: VideoModels,
        text: TextKV | Story,
        settings: VideoSettings,
        on_step: Callable[[int, int], None] = no_callback,
    ) -> None:
        check_complete(models, settings.layout)
        wan, vae, layout, batch = models.wan, models.vae, settings.layout, settings.batch
        config = layout.config
        self.wan = wan
        self.story = as_story(text)
        self.layout = layout
        self.sampling = settings.sampling
        self.compressor = models.compressor
        self.vae = vae
        self._stopwatch = Stopwatch(wan.device)
        self.decoder: BlockDecoder | None = None
        if vae is not None and (settings.decode or needs_frames(models, layout)):
            side = SideStream(wan.device) if settings.overlap else None
            self.decoder = BlockDecoder(vae, settings.decode_frames, config.block_frames, side, self._stopwatch)
        self.encode_frames: int | None = None
        self.on_step = on_step
        self.on_block: Callable[[int], None] = no_listener
        beside = self._beside or (settings.overlap and models.decoded_elsewhere)
        self._deferred = beside and config.can_defer
        kind, folder = DeferredCache if self._deferred else Cache, settings.archive_folder
        self.cache = kind(layout, wan.shape, wan.device, wan.dtype, batch, wan.rotary, wan.share, folder)
        self.record = new_record(models, settings, self.story)
        self._awaiting_clean_pass: _Made | None = None  # the newest block
        self._before: _Made | None = None  # the one before, where compressed blocks are late
        self._recent: deque[Tensor] = deque(maxlen=config.recent_blocks)  # latents of the last blocks
        self._unfinished: list[_Made] = []  # made, but not yielded

    @property
    def made_blocks(self) -> int:
        """How many blocks are made. The newest of them may not be yielded yet."""
        return len(self.record.blocks)

    @property
    def next_block(self) -> int:
        """Index of the block that is yielded next."""
        return self.made_blocks - len(self._unfinished)

    def blocks(self, count: int) -> Iterator[Block]:
        """Makes the next `count` blocks.

        Raises PackForcingError when a block's latents are not finite.
        """
        yield from islice(self._each([None] * (count - len(self._unfinished))), count)

    def replay(self, latents: Tensor, selected: Sequence[Selected] | None = None) -> Iterator[Block]:
        """Takes the next blocks from latents [B, 16, t, h, w], t > 0, instead of denoising them.

        The cache ends up as if they had been made here, so a run goes on exactly where an earlier one ended. That takes
        a model pass a block instead of all of them. If the latents end within a block, the model makes the rest of that
        block after them (`_denoise_rest`).

        Args:
            selected: of each whole block, the mid blocks that it attended to. Without them, blocks that had to choose
                take a second pass: they choose as if this run's seed had made them.

        Raises PackForcingError for latents of another size.
        """
        size = self.layout.size
        wanted = (LATENT_CHANNELS, size.latent_height, size.latent_width)
        found = (latents.shape[1], *latents.shape[3:])
        if found != wanted:
            raise PackForcingError(
                f"The latents to go on from must have (channels, height, width) {wanted}, but they have {found}."
            )
        blocks = latents.split(self.layout.config.block_frames, dim=2)
        yield from self._each(blocks, selected)

    def tell(self, text: TextKV, prompt: str = "") -> None:
        """Lets another prompt rule from the next block to make on; `prompt` is its words, for the record.

        The video becomes that of the story with this prompt in it, to the bit. For `on_block`, or between blocks.
        Prompts that no pass needs any more are let go, so memory does not grow with what is told.
        """
        block = len(self.record.blocks)
        # The clean pass of the block before may be to come, and in it the compressed form of the one before that.
        self.story = self.story.since(block - 2).then(Stretch(block, text, prompt))
        told = (each for each in self.record.prompts if each.start != block)
        self.record.prompts = sorted((*told, PromptRecord(block, prompt)), key=lambda each: each.start)

    def finish_decoding(self) -> None:
        """Waits until no block is being decoded, for a caller that moves weights."""
        for made in self._unfinished:
            with self._stopwatch.stretch(self.record.blocks[made.index].seconds, "wait"):
                self._frames(made)

    @property
    def _beside(self) -> bool:
        """Whether blocks are decoded beside the denoising of the next."""
        return self.decoder is not None and self.decoder.beside

    def _each(
        self, given: Sequence[Tensor | None], selected: Sequence[Selected | None] | None = None
    ) -> Iterator[Block]:
        """A block for each item of `given`: from latents [B, 16, <= T, h, w], or by denoising where that is None."""
        yield from self._finish(keep=1 if self._beside else 0)  # of a run that was stopped
        for latents, chosen in zip(given, selected or [None] * len(given), strict=True):
            try:
                self._next(latents, chosen)
            except BaseException:
                yield from self._finish(keep=0)
                raise
            yield from self._finish(keep=1 if self._beside else 0)
        yield from self._finish(keep=0)

    def _finish(self, keep: int) -> Iterator[Block]:
        """Yields blocks that were made, as soon as their frames are there, until `keep` of them are left."""
        while len(self._unfinished) > keep:
            made = self._unfinished[0]
            if self._beside:
                with self._stopwatch.stretch(self.record.blocks[made.index].seconds, "wait"):
                    frames = self._frames(made)
            else:
                frames = self._frames(made)
            self._unfinished.pop(0)
            self._stopwatch.settle()
            yield Block(made.index, made.latents, frames)

    @torch.no_grad()
    def _next(self, given: Tensor | None, chosen: Selected | None) -> None:
        """Makes a block, or takes it as given."""
        self._clean_pass()
        index = len(self.record.blocks)
        if given is None:
            self.on_block(index)
        if self.cache.block < index:  # else a run that was stopped within this block goes on
            self.cache.begin(index)
        record = BlockRecord(index, selected=[])
        if self.story.refreshes(index):
            with self._stopwatch.stretch(record.seconds, "refresh"):
                self._refresh(index)
        with self._stopwatch.stretch(record.seconds, "denoise"):
            latents = self._denoise(index) if given is None else self._taken(index, given, chosen)
        self._check_finite(index, latents)
        decoding = None if self.decoder is None else self.decoder.begin(latents, record.seconds)
        made = _Made(index, latents, decoding)
        self._fill(record)
        self.record.blocks.append(record)
        self._awaiting_clean_pass = made
        self._unfinished.append(made)
        self._recent.append(latents)

    def _refresh(self, index: int) -> None:
        """Computes the recent blocks' keys and values again, oldest first, under the prompt of block `index`.

        The result does not depend on what they were, so a run that is stopped in here can begin it again.
        """
        blocks, text = self.cache.partition.recent, self.story.text(index)
        for block, latents in zip(blocks, list(self._recent)[len(self._recent) - len(blocks) :], strict=True):
            self.on_step(block, len(self.sampling.steps_of(block)))
            self.cache.refresh(block)
            self.wan.clean_pass(latents, text, self.cache, None)
        self.cache.refreshed()

    def _frames(self, made: _Made) -> Tensor | None:
        """The frames of a block that was made; waits for them."""
        return None if self.decoder is None or made.decoding is None else self.decoder.frames(made.decoding)

    def _noise(self, generator: torch.Generator) -> Tensor:
        """The next noise [B, 16, T, h, w] of a block, float32."""
        size = self.layout.size
        shape = (LATENT_CHANNELS, self.layout.config.block_frames, size.latent_height, size.latent_width)
        return to_device(torch.randn((self.cache.batch, *shape), generator=generator), self.wan.device)

    def _taken(self, index: int, given: Tensor, chosen: Selected | None) -> Tensor:
        """Block `index` from its latents, or from those of its first frames: [B, 16, T, h, w]."""
        latents = to_device(given, self.wan.device, torch.float32)
        self.on_step(index, 0)
        if chosen is None:
            self._select_only(index)
        for layer, mids in enumerate(chosen or ()):
            self.cache.choose(layer, mids)
        whole = latents.shape[2] == self.layout.config.block_frames
        return latents if whole else torch.cat((latents, self._denoise_rest(index, latents)), dim=2)

    def _denoise_rest(self, index: int, held: Tensor) -> Tensor:
        """The frames of block `index` that follow those that are held, [B, 16, t, h, w] -> [B, 16, T - t, h, w].

        The held ones stay as they are. They pass through the model clean, so the others meet them as they meet all
        history: a model knows no block of two noise levels. Then the others are denoised as a shorter block.
        """
        frames, per_frame = held.shape[2], self.layout.size.tokens_per_frame
        self.on_step(index, 0)
        try:
            self.cache.narrow(slice(0, frames * per_frame))
            self.wan.clean_pass(held, self.story.text(index), self.cache, None)
            self.cache.narrow(slice(frames * per_frame, self.layout.tokens_per_block))
            return self._denoise(index, frames)
        finally:
            self.cache.widen()

    def _denoise(self, index: int, first: int = 0) -> Tensor:
        """Denoises the frames of block `index` from `first` on to normalised latents [B, 16, T - first, h, w]."""
        generator = noise_generator(self.sampling.seed, index)

        def noise() -> Tensor:
            return self._noise(generator)[:, :, first:]

        text, x = self.story.text(index), noise()
        for number, step in enumerate(self.sampling.steps_of(index)):
            self.on_step(index, number)
            velocity = self.wan.denoise(x, step.told, text, self.cache)
            x = denoising_step(x, velocity, step, self.sampling.update, noise)
        return x

    def _select_only(self, index: int) -> None:
        """Selects mid blocks for block `index` as its denoising would have done: by the queries of the first step."""
        mids = len(self.cache.partition.mid)
        if self.cache.config.selection == "affinity" and mids > self.cache.config.attended_mids(index) > 0:
            noise, text = self._noise(noise_generator(self.sampling.seed, index)), self.story.text(index)
            self.wan.denoise(noise, self.sampling.steps_of(index)[0].told, text, self.cache)

    def _check_finite(self, index: int, latents: Tensor) -> None:
        if not torch.isfinite(latents).all():
            raise PackForcingError(
                f"Block {index} came out with NaN or infinite values, so the run stopped there: load the model in "
                f"bfloat16 or float32 (it ran in {self.record.dtype}), or check the checkpoint and its LoRAs."
            )

    @torch.no_grad()
    def _clean_pass(self) -> None:
        """The clean pass of the newest block. It also writes a compressed block: the newest, or if deferred, the one
        before it."""
        block = self._awaiting_clean_pass
        if block is None:
            return
        record = self.record.blocks[block.index]
        self.on_step(block.index, len(self.sampling.steps_of(block.index)))
        source = self._before if self._deferred else block
        compressed = None if source is None else self._compressed(source)
        text = self.story.text(block.index)
        compressed_text = text if source is None else self.story.text(source.index)
        with self._stopwatch.stretch(record.seconds, "clean_pass"):
            self.wan.clean_pass(block.latents, text, self.cache, compressed, compressed_text)
            if block.index == 0:
                self.record.rounding_error = self.cache.rounding_error
            self.cache.end()
        self._awaiting_clean_pass = None  # only now: a run that was stopped before this must still do it
        self._before = block if self._deferred else None
        self._fill(record)

    def _compressed(self, block: _Made) -> Tensor | None:
        """Hidden tokens [B, N_c, d] of a block; None if it never becomes a mid block."""
        if not self.layout.config.becomes_mid(block.index):
            return None
        frames = self._frames(block)
        assert self.compressor is not None, "see check_complete"
        assert frames is not None or not self.compressor.needs_vae, "with a VAE and mid blocks there is a decoder"
        with self._stopwatch.stretch(self.record.blocks[block.index].seconds, "compression"):
            tokens: Tensor = self.compressor(
                block.latents, frames, self.layout, self.vae, self.wan.patch_tokens, self.encode_frames
            )
        return tokens

    def _fill(self, record: BlockRecord) -> None:
        """Notes in a record what the cache has done for its block."""
        record.selected = [list(chosen or ()) for chosen in self.cache.selected]
        record.affinity = self.cache.affinities
        record.mid_slots_written = self.cache.mid_slots_written
        record.recent_rotated = self.cache.recent_rotated
        record.bytes = self.cache.bytes()
