"""What makes a run fit a card: the settings to choose, by count, and a table of cards and settings.

Nothing is measured here. A card is taken at its nominal size, less `RESERVED` for CUDA itself and the desktop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from ..byte_units import readable_bytes
from ..config import CacheConfig, FrameSize, Layout, Length, default_temporal_stride
from ..errors import PackForcingError
from ..known_models import KNOWN_MODELS, TINY
from ..model.weight_count import weight_count
from .memory_budget import DecodePlan, DecoderMemory, MemoryDemand, decode_plan, smaller_sizes

GIBI = 1024**3
RESERVED = 490_000_000  # bytes of a card: CUDA's own, and a desktop's
ITEMSIZE = 2  # bfloat16, on every card that runs this at all


@dataclass(frozen=True)
class Option:
    """A setting that saves device memory, and how it is chosen on the command line and in ComfyUI."""

    name: str
    harm: int  # how late it is taken: first what costs nothing, then rounding, then time
    command: str
    node: str


ARCHIVE = Option("archive on host", 1, "--archive-device host", "Cache Config: archive_device host")
KV = Option("fp8 KV", 2, "--kv-dtype fp8_e4m3", "Cache Config: kv_dtype fp8_e4m3")
WEIGHTS = Option("fp8 weights", 4, "--linear-dtype fp8_e4m3", "Model Loader: dtype fp8_e4m3fn_fast")
STREAMED = Option(
    "weights on host",
    8,
    "--weights-device host",
    "weights on host: nothing to set, ComfyUI keeps there what does not fit",
)
OPTIONS = (ARCHIVE, KV, WEIGHTS, STREAMED)

Chosen = frozenset[Option]


@dataclass(frozen=True)
class Wish:
    """The video that is to fit."""

    model: str  # one of KNOWN_MODELS
    config: CacheConfig
    size: FrameSize
    seconds: float
    fps: float = 16.0


@dataclass(frozen=True)
class Need:
    """What a video takes of a device with some options."""

    wish: Wish
    options: Chosen
    weights: int  # bytes
    demand: MemoryDemand

    @property
    def least(self) -> int:
        """Bytes in all, when one latent frame is decoded at a time."""
        return self.weights + self.demand.least

    def decoding(self, card: int) -> DecodePlan | None:
        """The fastest way of decoding on a card of so many bytes; None when not even the slowest fits."""
        if self.least > card:
            return None
        return decode_plan(self.demand, card - self.weights, "the card")


def card_bytes(text: str) -> int:
    """'8GB' -> the bytes that a run can have of such a card. Raises PackForcingError for what is no size.

    Cards count in powers of two: one of 8 GB has 8 GiB.
    """
    number = text.strip().lower().removesuffix("b").removesuffix("i").removesuffix("g").strip()
    try:
        size = float(number)
    except ValueError:
        size = float("nan")
    if not 0 < size < 10_000:
        raise PackForcingError(f"The size of a card is a number of gigabytes such as 8GB, but it is '{text}'.")
    return max(0, int(size * GIBI) - RESERVED)


def need(wish: Wish, options: Iterable[Option] = ()) -> Need:
    """What a video takes with these options, in bfloat16."""
    chosen = frozenset(options)
    config = replace(
        wish.config,
        archive_device="host" if ARCHIVE in chosen else wish.config.archive_device,
        kv_dtype="fp8_e4m3" if KV in chosen else wish.config.kv_dtype,
    )
    model = KNOWN_MODELS[wish.model]
    layout = Layout(config, wish.size, default_temporal_stride(config.block_frames))
    blocks = Length(wish.seconds, wish.fps, config.block_frames).blocks
    decoder = DecoderMemory(model.vae_dim, ITEMSIZE)
    weights = weight_count(model).bytes(ITEMSIZE, ITEMSIZE, fp8=WEIGHTS in chosen, streamed=STREAMED in chosen)
    return Need(wish, chosen, weights, MemoryDemand(model.sizes.shape, ITEMSIZE, layout, blocks, decoder))


def _sets(config: CacheConfig) -> Iterator[Chosen]:
    """All sets of options that change something, the least harmful first."""
    idle = {ARCHIVE} if not config.top_k or config.archive_device == "host" else set()
    idle |= {KV} if config.kv_dtype == "fp8_e4m3" else set()
    usable = [option for option in OPTIONS if option not in idle]
    sets = [frozenset(some) for count in range(len(usable) + 1) for some in combinations(usable, count)]
    yield from sorted(sets, key=lambda some: sum(option.harm for option in some))


def fitting(wish: Wish, card: int) -> list[Need]:
    """The ways in which a video fits a card of so many bytes, the least harmful first.

    Only those that could not do with fewer options. If there is none, a smaller frame of the same shape with all
    options, if one fits: then that is the only one.
    """
    found: list[Need] = []
    for options in _sets(wish.config):
        if not any(other.options <= options for other in found):
            needed = need(wish, options)
            found += [needed] if needed.least <= card else []
    if found:
        return found
    most = list(_sets(wish.config))[-1]
    for size in smaller_sizes(wish.size):
        try:
            needed = need(replace(wish, size=size), most)
        except PackForcingError:  # too small to be compressed
            break
        if needed.least <= card:
            return [needed]
    return []


# ---------------------------------------------------------------------- for people


def decoding_told(plan: DecodePlan | None, block_frames: int) -> str:
    """How a run decodes on a card, in few words."""
    if plan is None:
        return "–"
    if plan.overlap:
        return "overlapped"
    return "whole blocks" if plan.frames == block_frames else f"{plan.frames} of {block_frames} frames"


def named(options: Chosen) -> str:
    return ", ".join(option.name for option in OPTIONS if option in options) or "none"


def _fitting_told(wish: Wish, card: str) -> list[Need]:
    """`fitting`. Raises PackForcingError when nothing fits."""
    found = fitting(wish, card_bytes(card))
    if not found:
        raise PackForcingError(
            f"No frame of {wish.model} fits a card of {card} with this cache config, weights in host memory and all: "
            "choose fewer sink_frames and recent_frames, or a larger card."
        )
    return found


def fit_json(wish: Wish, card: str) -> list[dict[str, object]]:
    """The settings with which a video fits a card, the best first. Raises what `fit_text` raises."""
    return [
        {
            "options": [option.name for option in OPTIONS if option in needed.options],
            "width": needed.wish.size.width,
            "height": needed.wish.size.height,
            "weights_bytes": needed.weights,
            "least_bytes_beside": needed.demand.least,
            "decoding": decoding_told(needed.decoding(card_bytes(card)), wish.config.block_frames),
            "command": _command(needed),
            "nodes": _nodes(needed),
        }
        for needed in _fitting_told(wish, card)
    ]


def fit_text(wish: Wish, card: str) -> str:
    """The settings with which a video fits a card, one paragraph each. Raises PackForcingError when none do."""
    found = _fitting_told(wish, card)
    size = found[0].wish.size
    lines = [f"{wish.model} on a card of {card}: {readable_bytes(card_bytes(card))} for a run (counted, not measured)."]
    if size != wish.size:
        lines.append(f"{wish.size.width}x{wish.size.height} does not fit; {size.width}x{size.height} does.")
    for number, needed in enumerate(found):
        lines += ["", *_paragraph(needed, card_bytes(card), "best" if number == 0 else "or")]
    return "\n".join(lines)


def _paragraph(needed: Need, card: int, title: str) -> list[str]:
    decoding = decoding_told(needed.decoding(card), needed.wish.config.block_frames)
    return [
        f"{title:<9}{named(needed.options)}",
        f"takes    {readable_bytes(needed.weights)} of weights, and {readable_bytes(needed.demand.least)} at least "
        f"beside them; decoding: {decoding}",
        f"command  {_command(needed)}",
        f"nodes    {_nodes(needed)}",
    ]


def _command(needed: Need) -> str:
    size = needed.wish.size
    networks = "--model tiny" if needed.wish.model == TINY else "--model CHECKPOINT --vae VAE"
    given = [f"python -m packforcing generate {networks} --width {size.width} --height {size.height}"]
    return " ".join([*given, *(option.command for option in OPTIONS if option in needed.options)])


def _nodes(needed: Need) -> str:
    size = needed.wish.size
    return "; ".join(
        [f"Sampler: width {size.width}, height {size.height}", *(o.node for o in OPTIONS if o in needed.options)]
    )


TABLE_CARDS = ("8GB", "12GB", "16GB", "24GB")
TABLE_MODELS = ("wan2.1-1.3b", "wan2.1-14b")
TABLE_SIZES = (FrameSize(832, 480), FrameSize(480, 272))
TABLE_OPTIONS: tuple[tuple[Option, ...], ...] = (
    (),
    (ARCHIVE,),
    (KV,),
    (WEIGHTS,),
    (STREAMED,),
    (ARCHIVE, KV),
    (ARCHIVE, KV, WEIGHTS),
    (ARCHIVE, KV, STREAMED),
    OPTIONS,
)


def card_table(config: CacheConfig, seconds: float, cards: Sequence[str] = TABLE_CARDS) -> str:
    """A Markdown table: what each model, frame and set of options takes, and how it decodes on each card."""
    heads = ["model, frame", "options", "weights", "beside, least", *(card.replace("GB", " GB") for card in cards)]
    rows = [heads, ["---"] * len(heads)]
    for model in TABLE_MODELS:
        for size in TABLE_SIZES:
            for options in TABLE_OPTIONS:
                rows.append(_row(need(Wish(model, config, size, seconds), options), cards))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(needed: Need, cards: Sequence[str]) -> list[str]:
    size, frames = needed.wish.size, needed.wish.config.block_frames
    return [
        f"{needed.wish.model}, {size.width}x{size.height}",
        named(needed.options),
        f"{needed.weights / 1e9:.1f}",
        f"{needed.demand.least / 1e9:.1f}",
        *(decoding_told(needed.decoding(card_bytes(card)), frames) for card in cards),
    ]
