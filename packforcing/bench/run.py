"""The command `python -m packforcing bench`: measures, compares with baselines and floors, and reports."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import plots
from ..byte_units import readable_bytes
from ..config import (
    TEXT_TOKENS,
    VAE_DIMS,
    VAE_TIME_STRIDE,
    CacheConfig,
    FrameSize,
    Layout,
    Length,
    ModelShape,
    default_temporal_stride,
)
from ..devices import memory_of
from ..errors import PackForcingError
from ..generate.autotune import tune_vae_layout, tuned_attention
from ..generate.long_video import LongVideo, VideoModels, VideoSettings
from ..generate.memory_budget import DecoderMemory, MemoryDemand, decode_plan
from ..generate.sampling import Sampling
from ..model.compressor import Compressor
from ..model.load import check_speed
from ..model.wan_modules import SIZES
from .baselines import comparison, contest
from .floors import Rates, best_of, measure_rates, stage_floors
from .models import MODELS, VAE_DTYPE, NoVAE, PooledLatents, random_text, random_vae, random_wan, weight_bytes
from .overlap import blocks_to_make, overlap_report, run_overlapped
from .stages import (
    PASSES,
    MeasuredBlock,
    Run,
    StageTime,
    first_full,
    growth,
    memory_by_owner,
    run_video,
    stage_times,
    steady,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_SIZES = {"wan2.1-1.3b": "832x480", "tiny": "128x128"}
FPS = 16.0
SLOW_SECONDS = 600  # from here on the estimate is a warning
REPORTED_BLOCKS = 200  # blocks listed in the JSON at most


def add_arguments(command: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    command.add_argument("--device", default="cuda" if cuda else "cpu")
    command.add_argument("--model", default="wan2.1-1.3b" if cuda else "tiny", choices=MODELS, help="its sizes")
    command.add_argument("--seconds", type=float, default=60.0, help="of video; a thousand make a soak test")
    command.add_argument("--size", help="WIDTHxHEIGHT, multiples of 16; default 832x480, for tiny 128x128")
    command.add_argument("--steps", type=int, default=4, help="denoising steps a block")
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    command.add_argument("--repeats", type=int, default=3, help="of each block of the comparison, and of each floor")
    command.add_argument("--no-vae", action="store_true", help="no decoding, no file; compression by a stand-in")
    command.add_argument("--no-baselines", action="store_true", help="leave the comparison with other caches out")
    command.add_argument("--baseline-blocks", default="60,120", help="block indices at which caches are compared")
    command.add_argument("--threads", type=int, help="CPU threads")
    command.add_argument("--memory-gb", type=float, help="use no more device memory than this, as on a smaller card")
    command.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write one JSON object; default: print it"
    )
    command.add_argument("--plot", help="a PNG of time and memory over the blocks")


@dataclass(frozen=True)
class Settings:
    """The checked options of one benchmark."""

    device: torch.device
    dtype: torch.dtype
    model: str
    layout: Layout
    blocks: int
    sampling: Sampling
    repeats: int
    vae: bool
    linear_dtype: str
    compiled: bool
    overlap: bool
    memory_bytes: int | None
    baseline_blocks: tuple[int, ...]

    @property
    def frames_per_block(self) -> int:
        """Video frames of a block (the first of a video has three fewer)."""
        return VAE_TIME_STRIDE * self.layout.config.block_frames


def checked(options: argparse.Namespace, config: CacheConfig, device: torch.device) -> Settings:
    """The settings that the options ask for. Raises PackForcingError when they are impossible."""
    if options.repeats < 1:
        raise PackForcingError(f"--repeats must be at least 1, but it is {options.repeats}.")
    if options.memory_gb is not None and not options.memory_gb > 0:
        raise PackForcingError(f"--memory-gb must be above 0, but it is {options.memory_gb}.")
    if options.threads is not None and options.threads < 1:
        raise PackForcingError(f"--threads must be at least 1, but it is {options.threads}.")
    if device.type not in ("cuda", "cpu"):
        raise PackForcingError(f"The benchmark knows the clocks of cuda and cpu, but --device is {device}.")
    if options.plot and not plots.available():
        raise PackForcingError("--plot needs matplotlib, which is not installed: pip install matplotlib, or drop it.")
    check_speed(device, options.linear_dtype, options.compile)
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    size = parsed_size(options.size or DEFAULT_SIZES[options.model])
    return Settings(
        device=device,
        dtype=dtype,
        model=options.model,
        layout=Layout(config, size, default_temporal_stride(config.block_frames)),
        blocks=Length(options.seconds, FPS, config.block_frames).blocks,
        sampling=Sampling(steps=options.steps),
        repeats=options.repeats,
        vae=not options.no_vae,
        linear_dtype=options.linear_dtype,
        compiled=options.compile,
        overlap=options.overlap != "off" and not options.no_vae,
        memory_bytes=None if options.memory_gb is None else int(1e9 * options.memory_gb),
        baseline_blocks=() if options.no_baselines else parsed_blocks(options.baseline_blocks),
    )


def parsed_size(text: str) -> FrameSize:
    """'832x480' -> its FrameSize. Raises PackForcingError when it is none."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise PackForcingError(f"--size is WIDTHxHEIGHT in pixels, such as 832x480, but it is '{text}'.")
    return FrameSize(int(width), int(height))


def parsed_blocks(text: str) -> tuple[int, ...]:
    """'60,120' -> (60, 120). Raises PackForcingError when these are not positive numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise PackForcingError(f"--baseline-blocks are positive numbers such as 60,120, but they are '{text}'.")
    return tuple(sorted({int(part) for part in parts}))


# ---------------------------------------------------------------------- measuring


def run(options: argparse.Namespace, config: CacheConfig, device: torch.device) -> None:
    """Runs the benchmark and reports. Raises PackForcingError before anything is computed."""
    settings = checked(options, config, device)
    if options.threads:
        torch.set_num_threads(options.threads)
    result, run = measure(settings)
    if options.plot:
        draw(run, options.plot)
    if options.json == "-":
        print(json.dumps(result))
        return
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print(text_report(result))


def measure(settings: Settings) -> tuple[dict[str, Any], Run]:
    """All measurements, as the JSON object, and the run itself."""
    layout, device, dtype, config = settings.layout, settings.device, settings.dtype, settings.layout.config
    sizes = SIZES[settings.model]
    notes = ["weights are random: time and memory are those of a trained model of these sizes, the picture is noise"]

    demand = demanded(settings)
    available = limited_memory(settings)
    room = available and max(0, available - weight_bytes(settings.model, dtype, settings.linear_dtype))
    decoding = decode_plan(demand, room, str(device), overlap=settings.overlap)

    say("measuring this machine's rates")
    attention = tuned_attention(model_shape(settings), layout, device, dtype)
    vae_dtype = VAE_DTYPE if settings.vae else None
    rates_now = partial(
        measure_rates,
        sizes,
        layout,
        TEXT_TOKENS,
        device,
        dtype,
        vae_dtype,
        settings.repeats,
        fp8=settings.linear_dtype != "model",
        attend=attention,
    )
    rates = rates_now()
    vae_dim = VAE_DIMS[settings.model] if settings.vae else None
    floors_at = partial(stage_floors, sizes, layout, settings.sampling.steps, TEXT_TOKENS, dtype.itemsize, vae_dim)
    estimate = floors_at(rates, settings.blocks, slots_written=0, archive_on_host=False)
    warn_if_slow(settings, sum(estimate.values()))

    say("making random weights")
    wan = random_wan(settings.model, device, dtype, settings.linear_dtype, settings.compiled)
    wan.attention = attention
    text = random_text(wan)
    channels_last = None
    if settings.vae:
        vae, compressor = random_vae(settings.model, device), Compressor(layout.temporal_stride)
        channels_last = tune_vae_layout(vae, layout.size)
        if settings.compiled:
            vae.compile_norms()
    else:
        vae, compressor = NoVAE(device), PooledLatents(layout.temporal_stride)
        notes.append("--no-vae: nothing is decoded or written, and compression is a stand-in that pools latents")
    models = VideoModels(wan, vae, compressor)
    made_as = VideoSettings(layout, settings.sampling, FPS, decode=settings.vae, decode_frames=decoding.frames)
    video = LongVideo(models, text, made_as)
    with frame_writer(settings, notes) as write:
        run = run_video(video, settings.blocks, write, show_progress)
    blocks = steady(run.blocks, config)
    stages = stage_times(blocks)
    written = [run.record.blocks[block.index].mid_slots_written for block in blocks]
    rates = best_of(rates, rates_now())
    floors = floors_at(
        rates,
        blocks[-1].index,
        slots_written=sum(written) / len(written),
        archive_on_host=video.cache.archive.host_bytes > 0,
    )
    memory = memory_by_owner(video, run.peak_bytes)
    result = {
        **conditions(settings),
        "notes": notes,
        "blocks_made": len(run.blocks),
        "measured_blocks": {
            "first": blocks[0].index,
            "count": len(blocks),
            "full_cache": blocks[0].index >= first_full(config),
        },
        "cached_kv_bytes": model_shape(settings).kv_bytes(layout.cached_tokens, config.bytes_per_value(dtype.itemsize)),
        "cache_bytes": memory["kv_buffers"],
        "attention": getattr(attention, "backend", "default"),
        "vae_channels_last": channels_last,
        "decode_frames": decoding.frames if settings.vae else None,
        "demanded_bytes": demand.bytes(decoding.frames),
        **speed(stages, blocks, settings.frames_per_block),
        "peak_memory_bytes": run.peak_bytes,
        "memory": memory,
        **growths(run.blocks, config),
        "stages": {name: asdict(stage) for name, stage in stages.items()},
        "floor": floor_report(rates, floors, stages),
        "overlap": None,
        "baselines": [],
        "blocks": listed(run.blocks),
    }
    del video  # its cache makes room for the others
    if decoding.overlap:
        result["overlap"] = overlapped(LongVideo(models, text, replace(made_as, overlap=True)), settings, run, notes)
    elif settings.overlap:
        notes.append("decoding beside the denoising was not measured: it would not fit into memory")
    if settings.baseline_blocks:
        compression = stages["compression"].median_ms if settings.vae and "compression" in stages else 0.0
        contests = {
            index: contest(wan, text, layout, settings.sampling, index, settings.repeats, compression, say)
            for index in settings.baseline_blocks
        }
        result["baselines"] = comparison(contests, settings.frames_per_block)
        if any(at["layers_share_a_buffer"] for entry in result["baselines"] for at in entry["blocks"]):
            notes.append(
                "the unbounded cache did not fit: its layers shared one buffer, so its times are those of a device "
                "with room for the complete cache (kv_bytes)"
            )
    return result, run


def overlapped(video: LongVideo, settings: Settings, apart: Run, notes: list[str]) -> dict[str, Any]:
    """The part about decoding beside the denoising."""
    say("the same with each block decoded beside the denoising of the next")
    with frame_writer(settings, notes) as write:
        blocks, peak = run_overlapped(video, blocks_to_make(video, settings.blocks), write, show_progress)
    return overlap_report(video, blocks, peak, apart.blocks, settings.frames_per_block)


def limited_memory(settings: Settings) -> int | None:
    """Bytes of the device that the benchmark may take; PyTorch is told where there is a limit."""
    available, limit = memory_of(settings.device), settings.memory_bytes
    if limit is None:
        return available
    if settings.device.type == "cuda":
        whole = torch.cuda.get_device_properties(settings.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), settings.device)
    return limit if available is None else min(limit, available)


def model_shape(settings: Settings) -> ModelShape:
    sizes = SIZES[settings.model]
    return ModelShape(sizes.layers, sizes.dim, sizes.heads)


def demanded(settings: Settings) -> MemoryDemand:
    """What the run takes beside the weights, by count."""
    decoding = DecoderMemory(VAE_DIMS[settings.model], VAE_DTYPE.itemsize) if settings.vae else None
    return MemoryDemand(model_shape(settings), settings.dtype.itemsize, settings.layout, settings.blocks, decoding)


@contextmanager
def frame_writer(settings: Settings, notes: list[str]) -> Iterator[Any]:
    """What takes a block's frames: a video file in a folder that is removed afterwards; None where there is none."""
    if not settings.vae:
        with nullcontext() as nothing:
            yield nothing
        return
    if importlib.util.find_spec("av") is None:
        notes.append("no file was written: av is not installed")
        yield None
        return
    from ..files.video import VideoWriter  # needs av, which a bare checkout on a rented GPU may lack

    size = settings.layout.size
    with (
        tempfile.TemporaryDirectory() as folder,
        VideoWriter(Path(folder) / "bench.mp4", FPS, size.width, size.height) as writer,
    ):
        yield writer.write


def warn_if_slow(settings: Settings, block_ms: float) -> None:
    """Says how long the run takes at the very least, and warns when that is long."""
    blocks = settings.blocks + 3 * len(settings.baseline_blocks) * (settings.repeats + 1)
    seconds = blocks * block_ms / 1000
    line = f"about {block_ms:,.0f} ms a block and {seconds:,.0f} s in all, at the very least"
    if seconds > SLOW_SECONDS:
        line = f"warning: this takes {line}: choose --model tiny, a smaller --size, or fewer --seconds"
    say(line)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show_progress(done: int, blocks: int) -> None:
    print(f"\rblock {done} of {blocks}", end="\n" if done == blocks else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- the result


def conditions(settings: Settings) -> dict[str, Any]:
    """What the numbers hold for."""
    layout, device = settings.layout, settings.device
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": settings.model,
        "size": [layout.size.width, layout.size.height],
        "dtype": str(settings.dtype).removeprefix("torch."),
        "linear_dtype": settings.linear_dtype,
        "compiled": settings.compiled,
        "vae_dtype": str(VAE_DTYPE).removeprefix("torch.") if settings.vae else None,
        "steps": settings.sampling.steps,
        "repeats": settings.repeats,
        "config": asdict(layout.config),
        "frames_per_block": settings.frames_per_block,
        "tokens_per_block": layout.tokens_per_block,
        "context_tokens": layout.context_tokens,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def speed(stages: dict[str, StageTime], blocks: list[MeasuredBlock], frames: int) -> dict[str, float]:
    """Frames a second: of the model passes alone, with the compression, and of everything."""
    passes = sum(stages[name].median_ms for name in PASSES if name in stages)
    compression = stages["compression"].median_ms if "compression" in stages else 0.0
    whole = statistics.median(block.ms for block in blocks)
    return {
        "fps_denoise": 1000 * frames / passes,
        "fps_denoise_and_compression": 1000 * frames / (passes + compression),
        "fps_end_to_end": 1000 * frames / whole,
        "block_ms": whole,
    }


def growths(blocks: list[MeasuredBlock], config: CacheConfig) -> dict[str, float | None]:
    """How much the last blocks with a full cache took and held, compared with the first ones."""
    full = [block for block in blocks if block.index >= first_full(config)]
    held = [block.memory_bytes for block in full if block.memory_bytes is not None]
    return {"block_time_ratio": growth([block.ms for block in full]), "memory_ratio": growth(held)}


def floor_report(rates: Rates, floors: dict[str, float], stages: dict[str, StageTime]) -> dict[str, Any]:
    """The rates, and each stage's floor beside its ratio to what was measured; a block is the sum of its stages."""
    compared = {name: floor for name, floor in floors.items() if name in stages}
    block_ms = sum(compared.values())
    return {
        "gemm_tflops": rates.gemm / 1e12,
        "vae_gemm_tflops": rates.vae_gemm / 1e12,
        "attention_tflops": rates.attention / 1e12,
        "cross_attention_tflops": rates.cross_attention / 1e12,
        "copy_gb_s": rates.copy / 1e9,
        "host_copy_gb_s": rates.host_copy / 1e9,
        "block_ms": block_ms,
        "ratio": sum(stages[name].median_ms for name in compared) / block_ms,
        "stages": {
            name: {"floor_ms": floor, "ratio": stages[name].median_ms / floor if floor else None}
            for name, floor in compared.items()
        },
    }


def listed(blocks: list[MeasuredBlock]) -> list[dict[str, Any]]:
    """At most 200 of the blocks, evenly spread, the last one included."""
    stride = -(-len(blocks) // REPORTED_BLOCKS)
    return [asdict(block) for block in reversed(blocks[::-1][::stride])]


def draw(run: Run, path: str) -> None:
    """Time and memory of every block over its index, as a PNG."""
    log = [
        {"step": block.index, "block time, ms": block.ms}
        | ({} if block.memory_bytes is None else {"memory, MB": block.memory_bytes / 1e6})
        for block in run.blocks
    ]
    plots.curves(log, path, from_zero=True)


# ---------------------------------------------------------------------- for people


def text_report(result: dict[str, Any]) -> str:
    """The result, a few aligned lines."""
    width, height = result["size"]
    measured, floor = result["measured_blocks"], result["floor"]
    lines = [
        f"{result['model']}, {width}x{height}, {result['dtype']}, {result['steps']} steps, {result['device']}, "
        f"torch {result['versions']['torch']}",
        f"{result['blocks_made']:,} blocks of {result['frames_per_block']} frames; medians over {measured['count']:,} "
        f"from block {measured['first']} on" + ("" if measured["full_cache"] else " (the cache is not full yet)"),
        f"context {result['context_tokens']:,} tokens; attention by {result['attention']}"
        + ("" if result["vae_channels_last"] is None else f", VAE channels last: {result['vae_channels_last']}"),
        "",
        f"{'stage':<13}{'median':>12}{'spread':>12}{'share':>8}{'floor':>12}{'ratio':>8}",
    ]
    for name, stage in result["stages"].items():
        at_least = floor["stages"].get(name, {"floor_ms": None, "ratio": None})
        lines.append(
            f"{name:<13}{_ms(stage['median_ms'])}{_ms(stage['spread_ms'])}{stage['share']:>8.1%}"
            f"{_ms(at_least['floor_ms'])}{_number(at_least['ratio'])}"
        )
    lines += [
        f"{'block':<13}{_ms(result['block_ms'])}{'':>20}{_ms(floor['block_ms'])}{_number(floor['ratio'])}",
        "",
        f"frames/s      {result['fps_denoise']:.2f} model passes, {result['fps_denoise_and_compression']:.2f} with "
        f"compression, {result['fps_end_to_end']:.2f} end to end",
        *overlap_lines(result["overlap"]),
        f"growth        time x{_number(result['block_time_ratio']).strip()}, memory "
        f"x{_number(result['memory_ratio']).strip()} (last ten blocks over the first ten with a full cache)",
        f"peak memory   {_bytes(result['peak_memory_bytes'])}: "
        + ", ".join(f"{name} {_bytes(size)}" for name, size in result["memory"].items()),
        f"rates         {floor['gemm_tflops']:.3g} TFLOP/s GEMM, {floor['attention_tflops']:.3g} attention, "
        f"{floor['cross_attention_tflops']:.3g} cross-attention, {floor['copy_gb_s']:.3g} GB/s copy",
    ]
    for entry in result["baselines"]:
        for at in entry["blocks"]:
            lines.append(
                f"baseline      {entry['name']} at block {at['block']}: {at['ms']:,.1f} ms, "
                f"ours {at['ours_ms']:,.1f} ms: x{at['speedup']:.2f}; "
                f"{_bytes(at['kv_bytes'])} of KV, ours {_bytes(at['ours_kv_bytes'])}"
            )
    lines += [f"note          {note}" for note in result["notes"]]
    return "\n".join(lines)


def overlap_lines(overlap: dict[str, Any] | None) -> list[str]:
    if overlap is None:
        return []
    return [
        f"overlap       {overlap['fps_end_to_end']:.2f} frames/s end to end with each block decoded beside the next: "
        f"{overlap['block_ms']:,.1f} ms a block, without {overlap['apart_ms']:,.1f}: x{overlap['speedup']:.2f}; peak "
        f"{_bytes(overlap['peak_memory_bytes'])}"
    ]


def _ms(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:>9,.2f} ms"


def _number(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:>8.3f}"


def _bytes(size: int | None) -> str:
    return "unknown" if size is None else readable_bytes(size)
