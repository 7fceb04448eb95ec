"""Sizes, partitions and the arithmetic that follows from them (docs/method.md, sections 2 and 3).

Everything here is plain integers: no tensor is made, so a plan for a ten-minute video costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from .checks import check_choice, check_count, check_kind, check_number, check_whole, shown
from .errors import PackForcingError
from .known_models import MODELS as MODELS
from .known_models import TEXT_TOKENS as TEXT_TOKENS
from .known_models import VAE_DIMS as VAE_DIMS
from .known_models import ModelShape as ModelShape

LATENT_CHANNELS = 16
VAE_TIME_STRIDE = 4  # video frames a latent frame (the first latent frame of a video holds a single one)
VAE_SPACE_STRIDE = 8  # pixels a latent row or column
PATCH = 2  # latent rows or columns a token (Wan's patch is 1x2x2)
PIXELS_PER_TOKEN = VAE_SPACE_STRIDE * PATCH  # 16
COMPRESSED_SPACE_STRIDE = 4  # full-resolution tokens a compressed token, in each space axis

LARGEST_SIDE = 16_384  # pixels; the same for everybody who sets a size
SLOWEST_FPS, FASTEST_FPS = 0.01, 1000  # likewise for frame rates
MOST_FRAMES = 1_000_000_000  # latent frames of a partition, and mid blocks: likewise
LONGEST_SECONDS = 10_000_000  # the method has no limit; whoever asks for more than months has mistyped
SELECTIONS = ("affinity", "recency")
ARCHIVE_DEVICES = ("auto", "device", "host", "disk")
KV_DTYPES = ("model", "fp8_e4m3")


@dataclass(frozen=True)
class FrameSize:
    """Pixel size of the video, and the grids that follow from it.

    Raises PackForcingError when a side is not a positive multiple of 16, or above LARGEST_SIDE.
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            check_whole(f"The {name}", value)
            if value > LARGEST_SIDE:
                raise PackForcingError(f"The {name} can be at most {LARGEST_SIDE:,} pixels, but it is {value:,}.")
            if value < PIXELS_PER_TOKEN or value % PIXELS_PER_TOKEN:
                nearest = max(1, round(value / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN
                raise PackForcingError(
                    f"The {name} must be a positive multiple of {PIXELS_PER_TOKEN} pixels, but it is {value}: "
                    f"set it to {nearest}, say."
                )

    @property
    def latent_height(self) -> int:
        return self.height // VAE_SPACE_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // VAE_SPACE_STRIDE

    @property
    def rows(self) -> int:
        """Token rows of a latent frame."""
        return self.latent_height // PATCH

    @property
    def columns(self) -> int:
        """Token columns of a latent frame."""
        return self.latent_width // PATCH

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.columns

    @property
    def compressed_rows(self) -> int:
        return self.rows // COMPRESSED_SPACE_STRIDE

    @property
    def compressed_columns(self) -> int:
        return self.columns // COMPRESSED_SPACE_STRIDE


@dataclass(frozen=True)
class Partition:
    """Where each block of the history is while one block is being made: block indices, oldest first."""

    sink: range
    mid: range
    recent: range


@dataclass(frozen=True)
class CacheConfig:
    """The three partitions and how mid blocks are selected (docs/method.md, sections 3, 5 and 6).

    Attributes:
        block_frames: latent frames a block, a property of the checkpoint (4 in the paper, 3 or 1 elsewhere).
        sink_frames: latent frames at the start of the video that are kept at full resolution for ever.
        recent_frames: latent frames before the current block that are kept at full resolution.
        top_k: compressed mid blocks attended at most; 0 turns the mid partition off.
        selection: "affinity" (paper, eq. of section 3.4) or "recency" (the newest mid blocks).
        query_fraction: share of the current block's queries that the affinity samples, in (0, 1].
        head_fraction: share of the heads that the affinity sums over, in (0, 1] (paper: one half).
        position_range: 0 keeps the paper's spacing; N > 0 squeezes the mid blocks so that the whole context lies in N
            latent frames.
        rope_adjustment: whether the context is laid out without gaps in time. Without, every block stands where it was
            made, and positions grow with the video: for comparison only.
        archive_device: "device", "host" (in host memory), "disk" (in a file), or "auto" (on the device up to
            `archive_budget_gb`, then in host memory).
        archive_budget_gb: device memory for the archive of compressed blocks, in 10^9 bytes.
        kv_dtype: what keys and values are kept in, buffers and archive: "model" is the type that the model runs in,
            "fp8_e4m3" a byte a value (the current block's own are exact in its passes).
        repeat_mids: for training on short clips: while there are fewer mid blocks than `top_k`, they are attended
            several times, side by side, so that the context is as long as it is late in a video.

    Raises PackForcingError when the partitions are not whole blocks or a value is out of its range.
    """

    block_frames: int = 4
    sink_frames: int = 8
    recent_frames: int = 4
    top_k: int = 16
    selection: str = "affinity"
    query_fraction: float = 0.25
    head_fraction: float = 0.5
    position_range: int = 0
    rope_adjustment: bool = True
    archive_device: str = "auto"
    archive_budget_gb: float = 1.0
    kv_dtype: str = "model"
    repeat_mids: bool = False

    def __post_init__(self) -> None:
        for name in ("block_frames", "sink_frames", "recent_frames", "top_k", "position_range"):
            check_whole(name, getattr(self, name))
            if getattr(self, name) > MOST_FRAMES:
                raise PackForcingError(f"{name} can be at most {MOST_FRAMES:,}, but it is {getattr(self, name):,}.")
        for name in ("query_fraction", "head_fraction", "archive_budget_gb"):
            check_number(name, getattr(self, name))
        if self.block_frames < 1:
            raise PackForcingError(f"A block needs at least 1 latent frame, but block_frames is {self.block_frames}.")
        for name in ("sink_frames", "recent_frames"):
            frames = getattr(self, name)
            if frames < 0 or frames % self.block_frames:
                below = max(0, frames // self.block_frames) * self.block_frames
                raise PackForcingError(
                    f"{name} must be whole blocks of {self.block_frames} latent frames, but it is {frames}: "
                    f"set it to {below} or {below + self.block_frames}."
                )
        if self.top_k < 0:
            raise PackForcingError(f"top_k counts mid blocks and cannot be negative, but it is {self.top_k}.")
        check_choice("selection", self.selection, SELECTIONS)
        check_choice("archive_device", self.archive_device, ARCHIVE_DEVICES)
        check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        for name in ("query_fraction", "head_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise PackForcingError(f"{name} must be above 0 and at most 1, but it is {getattr(self, name)}.")
        if not 0 <= self.archive_budget_gb < float("inf"):
            raise PackForcingError(
                f"archive_budget_gb must be a number from 0 up, but it is {self.archive_budget_gb}: set "
                "archive_device to device for an archive without a limit."
            )
        smallest = self.sink_frames + self.recent_frames + self.block_frames + (1 if self.top_k else 0)
        if self.position_range and self.position_range < smallest:
            raise PackForcingError(
                f"position_range must be 0 (off) or at least {smallest} latent frames (sink, recent and current block"
                f"{', and one for the mid blocks' if self.top_k else ''}), but it is {self.position_range}."
            )
        if self.position_range and not self.rope_adjustment:
            raise PackForcingError(
                f"position_range moves blocks in time, which rope_adjustment forbids, but it is {self.position_range}: "
                "set it to 0, or leave rope_adjustment on."
            )

    @property
    def sink_blocks(self) -> int:
        return self.sink_frames // self.block_frames

    @property
    def recent_blocks(self) -> int:
        return self.recent_frames // self.block_frames

    @property
    def archive_budget(self) -> float:
        """Device bytes that the archive may take."""
        budgets = {"device": float("inf"), "host": 0.0, "disk": 0.0, "auto": self.archive_budget_gb * 1e9}
        return budgets[self.archive_device]

    def bytes_per_value(self, model: int) -> int:
        """Bytes of a cached key's or value's number, for a model that runs in a type of `model` bytes."""
        return 1 if self.kv_dtype == "fp8_e4m3" else model

    def partition(self, block: int) -> Partition:
        """Where the blocks 0..block-1 are while block `block` is being made."""
        first_recent = max(self.sink_blocks, block - self.recent_blocks)
        return Partition(
            sink=range(min(self.sink_blocks, block)),
            mid=range(self.sink_blocks, first_recent),
            recent=range(first_recent, max(first_recent, block)),
        )

    def attended_mids(self, block: int) -> int:
        """How many mid blocks block `block` attends to."""
        mids = len(self.partition(block).mid)
        return self.top_k if self.repeat_mids and mids else min(self.top_k, mids)

    def archived_blocks(self, blocks: int) -> int:
        """How many compressed blocks a video of `blocks` blocks archives: no sinks, and not the last block."""
        return max(0, blocks - 1 - self.sink_blocks) if self.top_k else 0

    def becomes_mid(self, block: int) -> bool:
        """Whether block `block` will ever be read in its compressed form (sink blocks never are)."""
        return self.top_k > 0 and block >= self.sink_blocks

    @property
    def can_defer(self) -> bool:
        """Whether the compressed form of a block is read, but not before the block after the next (`DeferredCache`)."""
        return self.top_k > 0 and self.recent_blocks > 0


def default_temporal_stride(block_frames: int) -> int:
    """Latent frames a compressed token spans in time: the paper's 2 where it divides a block, else 1."""
    return 2 if block_frames % 2 == 0 else 1


@dataclass(frozen=True)
class Layout:
    """Token counts of one run: a cache configuration at a frame size, with a compressor's temporal stride.

    Attributes:
        temporal_stride: latent frames that a compressed token spans.
        direct: how the compressor's tokens enter the cache. If not, they pass through the transformer's layers beside
            the block, and stand at the centres of what they cover. If so, every layer takes its keys and values
            straight from them, and they stand at rows and columns 0, 1, 2, ... (`model.compressor.LatentCompressor`).

    Raises PackForcingError when the frame is too small, or the block too short, to have a compressed token.
    """

    config: CacheConfig
    size: FrameSize
    temporal_stride: int
    direct: bool = False

    def __post_init__(self) -> None:
        check_kind("A layout's config", self.config, CacheConfig)
        check_kind("A layout's size", self.size, FrameSize)
        if self.temporal_stride not in (1, 2) or isinstance(self.temporal_stride, bool):
            raise PackForcingError(
                f"A compressor's temporal stride is 1 or 2, but this one's is {shown(self.temporal_stride)}."
            )
        if self.config.top_k == 0:
            return
        if self.compressed_frames < 1:
            raise PackForcingError(
                f"A compressor with a temporal stride of {self.temporal_stride} needs blocks of at least that many "
                f"latent frames, but a block has {self.config.block_frames}: use a compressor with stride 1."
            )
        if self.size.compressed_rows < 1 or self.size.compressed_columns < 1:
            raise PackForcingError(
                f"A compressed block needs a frame of at least 64x64 pixels, but the video is {self.size.width}x"
                f"{self.size.height}: enlarge it, or set top_k to 0 to run without mid blocks."
            )

    @property
    def tokens_per_block(self) -> int:
        return self.config.block_frames * self.size.tokens_per_frame

    @property
    def compressed_frames(self) -> int:
        """Token frames of a compressed block."""
        return self.config.block_frames // self.temporal_stride

    @property
    def compressed_tokens_per_block(self) -> int:
        """N_c = floor(B_f / stride) * floor(h / 4) * floor(w / 4)."""
        return self.compressed_frames * self.size.compressed_rows * self.size.compressed_columns

    @property
    def sink_tokens(self) -> int:
        return self.config.sink_frames * self.size.tokens_per_frame

    @property
    def recent_tokens(self) -> int:
        return self.config.recent_frames * self.size.tokens_per_frame

    @property
    def mid_tokens(self) -> int:
        return self.config.top_k * self.compressed_tokens_per_block

    @property
    def cached_tokens(self) -> int:
        """Tokens of history that are attended at most."""
        return self.sink_tokens + self.mid_tokens + self.recent_tokens

    @property
    def aside_tokens(self) -> int:
        """Tokens that `DeferredCache` sets aside: what a block attended to, and the next one overwrites or rotates."""
        return self.recent_tokens + self.mid_tokens if self.config.can_defer else 0

    @property
    def context_tokens(self) -> int:
        """`cached_tokens` and the current block."""
        return self.cached_tokens + self.tokens_per_block


@dataclass(frozen=True)
class Length:
    """How many blocks a wanted duration takes. Raises PackForcingError when there is nothing to make."""

    seconds: float
    fps: float
    block_frames: int

    def __post_init__(self) -> None:
        check_count("A block's number of latent frames", self.block_frames, 1)
        check_number("The frame rate", self.fps)
        check_number("The video's length in seconds", self.seconds)
        if not 0 < self.fps < float("inf"):
            raise PackForcingError(f"The frame rate must be above 0, but it is {self.fps}.")
        if not SLOWEST_FPS <= self.fps <= FASTEST_FPS:
            raise PackForcingError(
                f"The frame rate must be from {SLOWEST_FPS} to {FASTEST_FPS:,} a second, but it is {self.fps}."
            )
        if not 0 < self.seconds <= LONGEST_SECONDS:
            raise PackForcingError(
                f"The video's length must be above 0 and at most {LONGEST_SECONDS:,} seconds, but it is {self.seconds}."
            )

    @property
    def blocks(self) -> int:
        # Rounded first, so that 0.1 s * 160 fps = 16.000000000000004 frames is still one block.
        return max(1, ceil(round(self.seconds * self.fps / (VAE_TIME_STRIDE * self.block_frames), 9)))

    @property
    def latent_frames(self) -> int:
        return self.blocks * self.block_frames

    @property
    def video_frames(self) -> int:
        """Frames of the decoded video: the first latent frame holds one frame, the others four."""
        return video_frames(self.latent_frames)


def block_lengths(blocks: int, block_frames: int) -> list[int]:
    """Video frames of each block of `block_frames` latent frames: the first is three short."""
    whole = VAE_TIME_STRIDE * block_frames
    return [video_frames(block_frames), *(blocks - 1) * [whole]]


def video_frames(latent_frames: int) -> int:
    """Frames that the causal VAE makes of the first `latent_frames` latent frames of a video."""
    return max(0, VAE_TIME_STRIDE * latent_frames - (VAE_TIME_STRIDE - 1))
