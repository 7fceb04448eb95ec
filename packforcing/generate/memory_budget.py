"""Whether a run fits the device's memory, asked before it starts; and if not, what would fit.

This is a count of tensors, not a measurement: what PyTorch's allocator, cuDNN and other programs take comes on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..byte_units import readable_bytes
from ..config import LATENT_CHANNELS, PIXELS_PER_TOKEN, TEXT_TOKENS, CacheConfig, FrameSize, Layout, ModelShape
from ..errors import PackForcingError

# What a layer holds of each token, in widths of the model: hidden states, their normed copy, queries, keys, values,
# attention's output, and the feed-forward layer's hidden states before and after its activation.
HIDDEN_WIDTHS = 18
WHOLE_WIDTHS = 3  # of these, what no process has a part of: hidden states, their normed copy, and a sum of all parts
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class DecoderMemory:
    """The memory of a VAE's streaming decoder.

    Its numbers count frames at the VAE's width. They come from a run on tensors without data, which a test repeats.
    """

    dim: int  # the VAE's width
    itemsize: int  # bytes of a value
    copies: bool = False  # whether convolutions copy what they read and write: cuDNN, where channels do not lie last

    def remembered(self, size: FrameSize) -> int:
        """Bytes that it holds between blocks."""
        return int(24.7 * self._frame(size))

    def peak(self, size: FrameSize, frames: int) -> int:
        """Most bytes that it holds while `frames` latent frames go through; what it remembers is included."""
        return int((24.7 + (26.1 if self.copies else 14.1) * frames) * self._frame(size))

    def _frame(self, size: FrameSize) -> int:
        return size.width * size.height * self.dim * self.itemsize


@dataclass(frozen=True)
class MemoryDemand:
    """What decides how much device memory a run takes."""

    model: ModelShape  # the transformer's sizes, or those of the part that this process has of it
    itemsize: int  # bytes of a value of the type that it runs in
    layout: Layout  # partitions and frame size
    blocks: int  # length of the video
    vae: DecoderMemory | None = None  # None: nothing is decoded
    prompts: int = 1  # of its story
    processes: int = 1  # that share the heads out; `model` is what one of them has

    def bytes(self, frames_per_pass: int, overlap: bool = False) -> int:
        """Device bytes beside the weights.

        Args:
            frames_per_pass: latent frames that the VAE decodes at a time.
            overlap: whether it does so beside the model's passes.
        """
        config, size = self.layout.config, self.layout.size
        kept = config.bytes_per_value(self.itemsize)
        held = self.model.kv_bytes(self.layout.context_tokens, kept)
        held += self.model.kv_bytes(self.prompts * TEXT_TOKENS, self.itemsize)
        if kept < self.itemsize:  # one layer's is widened to be attended
            held += self.model.kv_bytes(self.layout.context_tokens, self.itemsize) // self.model.layers
        held += int(min(self.archive_bytes, config.archive_budget))
        rows = self.layout.tokens_per_block + (self.layout.compressed_tokens_per_block if config.top_k else 0)
        widths = HIDDEN_WIDTHS + WHOLE_WIDTHS * (self.processes - 1)
        hidden = widths * rows * self.model.dim * self.itemsize
        if self.vae is None:
            return held + hidden
        decoding = self.vae.peak(size, frames_per_pass)
        if not overlap:
            return held + max(hidden + self.vae.remembered(size), decoding)
        return held + self.model.kv_bytes(self.layout.aside_tokens, kept) + hidden + decoding

    @property
    def archive_bytes(self) -> int:
        """Bytes of the archive at the video's end, wherever they lie."""
        archived = self.layout.config.archived_blocks(self.blocks) * self.layout.compressed_tokens_per_block
        return self.model.kv_bytes(archived, self.layout.config.bytes_per_value(self.itemsize))

    @property
    def host_bytes(self) -> int:
        """Bytes of the machine's own memory: all latents, and of the archive what is neither on device nor on disk."""
        size, frames = self.layout.size, self.blocks * self.layout.config.block_frames
        latents = LATENT_CHANNELS * frames * size.latent_height * size.latent_width * FLOAT32_BYTES
        return latents + int(max(0, self.archive_bytes - self.disk_bytes - self.layout.config.archive_budget))

    @property
    def disk_bytes(self) -> int:
        """Bytes of the archive's file."""
        return self.archive_bytes if self.layout.config.archive_device == "disk" else 0

    def passes(self) -> list[int]:
        """Numbers of latent frames that can be decoded at a time, most first: a block, its halves, down to one."""
        frames = self.layout.config.block_frames
        return sorted({frames, max(1, frames // 2), 1}, reverse=True)

    @property
    def least(self) -> int:
        """Bytes with the smallest pass of the decoder."""
        return self.bytes(self.passes()[-1])

    def with_config(self, **changes: Any) -> MemoryDemand:
        """The same run with other fields of its cache configuration."""
        return replace(self, layout=replace(self.layout, config=replace(self.layout.config, **changes)))


@dataclass(frozen=True)
class DecodePlan:
    """How a run decodes; the video is the same to rounding."""

    frames: int  # latent frames that the VAE decodes at a time
    overlap: bool  # whether it does so beside the next block's denoising


def decode_plan(
    demand: MemoryDemand, available: int | None, device: str, movable: int = 0, overlap: bool = True
) -> DecodePlan:
    """The fastest way of decoding that fits.

    That is whole blocks, each beside the denoising of the next. If there is no room for both at once, decoding and
    denoising take turns, and as many latent frames as fit are decoded at a time.

    Args:
        available: bytes of the device that the run can have; None if that is not known.
        device: its name, for the message.
        movable: bytes of weights that lie there too. They had better stay, but can be moved out of the way.
        overlap: whether decoding beside the denoising is wanted.

    Raises PackForcingError, with what would fit, when the run does not fit.
    """
    sizes = demand.passes()
    overlap = overlap and demand.vae is not None
    if available is None:
        return DecodePlan(sizes[0], overlap)
    if demand.least > available:
        size = demand.layout.size
        raise PackForcingError(
            f"A video of {size.width}x{size.height} needs about {readable_bytes(demand.least)} beside the model's "
            f"weights, but {device} has {readable_bytes(available)} for it: {advice(demand, available)}."
        )
    if overlap and demand.bytes(sizes[0], overlap=True) + movable <= available:
        return DecodePlan(sizes[0], overlap=True)
    frames = next((frames for frames in sizes if demand.bytes(frames) + movable <= available), sizes[-1])
    return DecodePlan(frames, overlap=False)


def check_host(demand: MemoryDemand, available: int | None, shared: bool) -> None:
    """Raises PackForcingError when a run takes more of the machine's own memory than there is.

    Args:
        available: bytes of it that the run can have; None if that is not known.
        shared: whether it is the device's memory too.
    """
    needed = demand.host_bytes + (demand.least if shared else 0)
    if available is None or needed <= available:
        return
    size = demand.layout.size
    config = demand.layout.config
    saving = "" if config.kv_dtype == "fp8_e4m3" or not demand.archive_bytes else ", kv_dtype fp8_e4m3"
    on_disk = demand.with_config(archive_device="disk")
    if on_disk.host_bytes + (on_disk.least if shared else 0) <= available and config.archive_device != "disk":
        saving = ", archive_device disk" + saving
    raise PackForcingError(
        f"A video of {size.width}x{size.height} and {demand.blocks} blocks needs about {readable_bytes(needed)} of the "
        f"machine's own memory, which holds its archive ({readable_bytes(demand.archive_bytes)}) and latents, but "
        f"{readable_bytes(available)} are free: choose a shorter video, a smaller frame{saving}, or top_k 0."
    )


def check_disk(demand: MemoryDemand, free: int | None) -> None:
    """Raises PackForcingError when the archive's file will not fit.

    Args:
        free: bytes that are free where it would lie; None if that is not known.
    """
    if free is not None and demand.disk_bytes > free:
        raise PackForcingError(
            f"The archive of {demand.blocks} blocks takes a file of {readable_bytes(demand.disk_bytes)}, but "
            f"{readable_bytes(free)} are free there: free some space, choose another folder for it, a shorter video, "
            "or archive_device host."
        )


def advice(demand: MemoryDemand, available: int) -> str:
    """What would make a run fit: other settings, or else a smaller frame with them."""
    savings = list(_savings(demand.layout.config))
    for changes in savings:
        found = demand.with_config(**changes)
        if found.least <= available:
            return f"set {_told(changes)}, which takes {readable_bytes(found.least)}"
    most = savings[-1] if savings else {}
    frugal = demand.with_config(**most)
    also = f" with {_told(most)}" if most else ""
    for size in smaller_sizes(demand.layout.size):
        try:
            found = replace(frugal, layout=replace(frugal.layout, size=size))
        except PackForcingError:  # too small to be compressed
            break
        if found.least <= available:
            return f"{size.width}x{size.height}{also} takes {readable_bytes(found.least)}"
    return "no size fits with this cache config, so choose fewer sink_frames and recent_frames, or another device"


def _savings(config: CacheConfig) -> Iterator[dict[str, str]]:
    """Changes of a cache configuration that save device memory, the least harmful first."""
    changes: dict[str, str] = {}
    if config.top_k and config.archive_budget > 0:
        changes["archive_device"] = "host"
        yield dict(changes)
    if config.kv_dtype == "model":
        yield {"kv_dtype": "fp8_e4m3"}
        if changes:
            yield {**changes, "kv_dtype": "fp8_e4m3"}


def _told(changes: dict[str, str]) -> str:
    return " and ".join(f"{name} {value}" for name, value in changes.items())


def smaller_sizes(size: FrameSize) -> Iterator[FrameSize]:
    """Frames of the same shape, as far as multiples of 16 allow, from the next smaller one down."""
    for columns in range(size.columns - 1, 0, -1):
        rows = max(1, round(columns * size.rows / size.columns))
        yield FrameSize(columns * PIXELS_PER_TOKEN, rows * PIXELS_PER_TOKEN)
