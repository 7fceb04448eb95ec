"""The result of a benchmark as one JSON object. docs/performance.md says what its keys mean."""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config import CacheConfig
from ..devices import fast_dtype
from .measure import Measurement
from .prepare import memory_demand
from .rates import Rates
from .settings import Settings
from .stages import PASSES, MeasuredBlock, StageTime, first_full, growth

REPORTED_BLOCKS = 200  # blocks listed at most


def json_result(measured: Measurement) -> dict[str, Any]:
    """The whole object; the order of its keys is part of the format."""
    settings, run, stages, blocks = measured.settings, measured.run, measured.stages, measured.steady_blocks
    config = settings.layout.config
    return {
        **conditions(settings),
        "notes": measured.notes,
        "blocks_made": len(run.blocks),
        "measured_blocks": {
            "first": blocks[0].index,
            "count": len(blocks),
            "full_cache": blocks[0].index >= first_full(config),
        },
        **preparation(measured),
        **speed(stages, blocks, settings.frames_per_block),
        "peak_memory_bytes": run.peak_bytes,
        "memory": measured.memory,
        **growths(run.blocks, config),
        "stages": {name: asdict(stage) for name, stage in stages.items()},
        "floor": floor_report(measured.rates, measured.floors, stages),
        "overlap": measured.overlap,
        "baselines": measured.baselines,
        "blocks": listed(run.blocks),
    }


def conditions(settings: Settings) -> dict[str, Any]:
    """What the numbers hold for."""
    model, layout, device = settings.model, settings.layout, settings.device
    return {
        **machine(device),
        "model": model.name,
        "size": [layout.size.width, layout.size.height],
        "dtype": type_name(model.dtype),
        "linear_dtype": model.linear_dtype,
        "weights_device": model.weights_device,
        "compiled": model.compiled,
        "vae_dtype": type_name(fast_dtype(device)) if model.vae else None,
        "steps": settings.sampling.steps,
        "repeats": settings.repeats,
        "config": asdict(layout.config),
        "frames_per_block": settings.frames_per_block,
        "tokens_per_block": layout.tokens_per_block,
        "context_tokens": layout.context_tokens,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Where and when something is measured."""
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
    }


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The name that the GPU or the processor gives itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def preparation(measured: Measurement) -> dict[str, Any]:
    """What the run was expected to hold, and what was chosen for it."""
    settings, prepared = measured.settings, measured.prepared
    model, layout = settings.model, settings.layout
    decode_frames = prepared.decoding.decode_frames or layout.config.block_frames
    kv_itemsize = layout.config.bytes_per_value(model.dtype.itemsize)
    return {
        "cached_kv_bytes": model.sizes.shape.kv_bytes(layout.cached_tokens, kv_itemsize),
        "cache_bytes": measured.memory["kv_buffers"],
        "attention": getattr(prepared.models.wan.attention, "backend", "default"),
        "vae_channels_last": prepared.channels_last,
        "decode_frames": decode_frames if model.vae else None,
        "demanded_bytes": memory_demand(settings).bytes(decode_frames),
    }


def speed(stages: Mapping[str, StageTime], blocks: Sequence[MeasuredBlock], frames: int) -> dict[str, float]:
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


def growths(blocks: Sequence[MeasuredBlock], config: CacheConfig) -> dict[str, float | None]:
    """How much the last blocks with a full cache took and held, compared with the first ones."""
    full = [block for block in blocks if block.index >= first_full(config)]
    held = [block.memory_bytes for block in full if block.memory_bytes is not None]
    return {"block_time_ratio": growth([block.ms for block in full]), "memory_ratio": growth(held)}


def floor_report(rates: Rates, floors: Mapping[str, float], stages: Mapping[str, StageTime]) -> dict[str, Any]:
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


def listed(blocks: Sequence[MeasuredBlock]) -> list[dict[str, Any]]:
    """At most 200 of the blocks, evenly spread, the last one included."""
    stride = -(-len(blocks) // REPORTED_BLOCKS)
    return [asdict(block) for block in reversed(blocks[::-1][::stride])]
