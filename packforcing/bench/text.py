"""A benchmark's lines for people: its report, and on standard error what it is doing."""

from __future__ import annotations

from typing import Any

from ..byte_units import readable_bytes
from ..telling import tell
from .baselines import BASELINES
from .settings import Settings

SLOW_SECONDS = 600  # from here on the estimate is a warning


def say(line: str) -> None:
    tell(line)


def show_progress(done: int, blocks: int) -> None:
    tell(f"\rblock {done} of {blocks}", end="\n" if done == blocks else "")


def estimate_line(settings: Settings, block_ms: float) -> str:
    """How long the run takes at the very least, when a block takes `block_ms`; a warning when that is long."""
    contestants = 1 + len(BASELINES)
    blocks = settings.blocks + contestants * len(settings.baseline_blocks) * (settings.repeats + 1)
    seconds = blocks * block_ms / 1000
    line = f"about {block_ms:,.0f} ms a block and {seconds:,.0f} s in all, at the very least"
    if seconds > SLOW_SECONDS:
        line = f"warning: this takes {line}: choose --model tiny, a smaller --size, or fewer --seconds"
    return line


# ---------------------------------------------------------------------- the report


def text_report(result: dict[str, Any]) -> str:
    """The JSON object, as a few aligned lines."""
    lines = [
        *_conditions(result),
        "",
        *_stages(result),
        "",
        *_totals(result),
        *_baselines(result["baselines"]),
        *(f"note          {note}" for note in result["notes"]),
    ]
    return "\n".join(lines)


def _conditions(result: dict[str, Any]) -> list[str]:
    width, height = result["size"]
    measured = result["measured_blocks"]
    return [
        f"{result['model']}, {width}x{height}, {result['dtype']}, {result['steps']} steps, {result['device']}, "
        f"torch {result['versions']['torch']}",
        f"{result['blocks_made']:,} blocks of {result['frames_per_block']} frames; medians over {measured['count']:,} "
        f"from block {measured['first']} on" + ("" if measured["full_cache"] else " (the cache is not full yet)"),
        f"context {result['context_tokens']:,} tokens; attention by {result['attention']}"
        + ("" if result["vae_channels_last"] is None else f", VAE channels last: {result['vae_channels_last']}"),
    ]


def _stages(result: dict[str, Any]) -> list[str]:
    """A table: a line for each stage, and one for the block."""
    floor = result["floor"]
    lines = [f"{'stage':<13}{'median':>12}{'spread':>12}{'share':>8}{'floor':>12}{'ratio':>8}"]
    for name, stage in result["stages"].items():
        at_least = floor["stages"].get(name, {"floor_ms": None, "ratio": None})
        lines.append(
            f"{name:<13}{_ms(stage['median_ms'])}{_ms(stage['spread_ms'])}{stage['share']:>8.1%}"
            f"{_ms(at_least['floor_ms'])}{_number(at_least['ratio'])}"
        )
    lines.append(f"{'block':<13}{_ms(result['block_ms'])}{'':>20}{_ms(floor['block_ms'])}{_number(floor['ratio'])}")
    return lines


def _totals(result: dict[str, Any]) -> list[str]:
    floor = result["floor"]
    return [
        f"frames/s      {result['fps_denoise']:.2f} model passes, {result['fps_denoise_and_compression']:.2f} with "
        f"compression, {result['fps_end_to_end']:.2f} end to end",
        *_overlap(result["overlap"]),
        f"growth        time x{_number(result['block_time_ratio']).strip()}, memory "
        f"x{_number(result['memory_ratio']).strip()} (last ten blocks over the first ten with a full cache)",
        f"peak memory   {_bytes(result['peak_memory_bytes'])}: "
        + ", ".join(f"{name} {_bytes(size)}" for name, size in result["memory"].items()),
        f"rates         {floor['gemm_tflops']:.3g} TFLOP/s GEMM, {floor['attention_tflops']:.3g} attention, "
        f"{floor['cross_attention_tflops']:.3g} cross-attention, {floor['copy_gb_s']:.3g} GB/s copy",
    ]


def _overlap(overlap: dict[str, Any] | None) -> list[str]:
    if overlap is None:
        return []
    return [
        f"overlap       {overlap['fps_end_to_end']:.2f} frames/s end to end with each block decoded beside the next: "
        f"{overlap['block_ms']:,.1f} ms a block, without {overlap['apart_ms']:,.1f}: x{overlap['speedup']:.2f}; peak "
        f"{_bytes(overlap['peak_memory_bytes'])}"
    ]


def _baselines(baselines: list[dict[str, Any]]) -> list[str]:
    return [
        f"baseline      {entry['name']} at block {at['block']}: {at['ms']:,.1f} ms, "
        f"ours {at['ours_ms']:,.1f} ms: x{at['speedup']:.2f}; "
        f"{_bytes(at['kv_bytes'])} of KV, ours {_bytes(at['ours_kv_bytes'])}"
        for entry in baselines
        for at in entry["blocks"]
    ]


def _ms(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:>9,.2f} ms"


def _number(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:>8.3f}"


def _bytes(size: int | None) -> str:
    return "unknown" if size is None else readable_bytes(size)
