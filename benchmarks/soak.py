"""Does anything grow that should not? One very long video, and many videos of changing size, each in one process.

    python benchmarks/soak.py blocks [--blocks 5000] [--json FILE]     # one video of the tiny model, file included
    python benchmarks/soak.py prompts [--prompts 100] [--json FILE]    # videos of changing size, one after another
    python benchmarks/soak.py server [--cancels 30] [--json FILE]      # Cancels, unloaded models, in a ComfyUI server

Every few blocks or prompts it takes a sample: time, resident memory, open files and threads. Of one video it also
counts what may grow (archive, key sums, record), and compares where keys stand with an independent computation in
float64. At the end the C library gives back what it holds free (malloc_trim), which tells a leak from an allocator.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "references"))  # an independent RoPE

import torch
from wan_reference import rotate

from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.demo.models import demo_transformer, demo_vae
from packforcing.demo.text import encode_prompt
from packforcing.files.video import VideoWriter
from packforcing.generate.long_video import LongVideo, VideoModels, VideoSettings
from packforcing.generate.record import BlockRecord
from packforcing.generate.sampling import Sampling
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import Compressor
from packforcing.model.vae import load_vae
from packforcing.model.wan_modules import SIZES, build_wan_modules

SAMPLES = 20  # of a run
SIDES = ((64, 64), (96, 64), (64, 128), (128, 96), (112, 80))  # of the videos of changing size, in pixels
CONFIG = CacheConfig(block_frames=1, sink_frames=1, recent_frames=1, top_k=4, archive_device="host")


@dataclass(frozen=True)
class Process:
    """What a process holds."""

    resident_mb: float
    files: int
    threads: int


def process(number: int | str = "self") -> Process:
    """Of a process, by its number (Linux)."""
    root = Path("/proc") / str(number)
    pages = int((root / "statm").read_text().split()[1])
    return Process(
        round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1), *(len(os.listdir(root / name)) for name in ("fd", "task"))
    )


def trimmed() -> Process:
    """This process, after the C library has given back to the system what it holds free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return process()


def models() -> VideoModels:
    """The tiny model with a VAE in float32, which any CPU multiplies fast."""
    wan = CausalWan(build_wan_modules(SIZES["tiny"], demo_transformer()), device="cpu")
    vae = load_vae({name: tensor.float() for name, tensor in demo_vae().items()}, torch.float32, "cpu")
    return VideoModels(wan, vae, Compressor(1))


def new_video(networks: VideoModels, size: FrameSize, seed: int = 0) -> LongVideo:
    settings = VideoSettings(Layout(CONFIG, size, 1), Sampling(seed, steps=1))
    return LongVideo(networks, networks.wan.embed_text(encode_prompt("a red circle")), settings)


def written(video: LongVideo, blocks: int, path: Path) -> Iterator[int]:
    """Makes a video's file, and gives the number of blocks that are made after each."""
    size = video.layout.size
    with VideoWriter(path, 16, size.width, size.height) as writer:
        for block in video.blocks(blocks):
            writer.write(block.decoded)
            yield block.index + 1


# --- one long video ------------------------------------------------------------------------------------------------


def long_video(blocks: int) -> dict[str, Any]:
    """Makes it; returns the samples and what they say."""
    video = new_video(models(), FrameSize(64, 64))
    keys = RawKeys(video.cache)
    samples: list[dict[str, Any]] = []
    every, start, last = max(1, blocks // SAMPLES), time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        for made in written(video, blocks, Path(folder) / "video.mp4"):
            if made % every:
                continue
            now, held = time.perf_counter(), video.record.blocks[-1].bytes
            owners = {
                "archive_mb": held["archive_host"] / 1e6,
                "key_sums_mb": held["key_sums"] / 1e6,
                "record_mb": record_bytes(video.record.blocks) / 1e6,
            }
            sample = {
                "blocks": made,
                "ms_a_block": 1e3 * (now - start) / (made - last),
                **asdict(process()),
                **owners,
                "rest_mb": process().resident_mb - sum(owners.values()),
                "context_tokens": video.cache._valid,
                "position_error": keys.error(video.cache),
            }
            samples.append(sample)
            print(line(sample), flush=True)
            start, last = time.perf_counter(), made
    return {"samples": samples, "trimmed": asdict(trimmed()), "growth": growth(samples)}


def growth(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Of a run from its first quarter on, when all is warm, to its end: in MB, and as a ratio of times."""
    first, last = samples[len(samples) // 4], samples[-1]
    names = ("resident_mb", "archive_mb", "key_sums_mb", "record_mb", "rest_mb")
    quarter = max(1, len(samples) // 4)
    times = [sample["ms_a_block"] for sample in samples]
    ratio = sum(times[-quarter:]) / sum(times[quarter : 2 * quarter])
    return {name: last[name] - first[name] for name in names} | {"time_ratio": ratio}


def record_bytes(blocks: list[BlockRecord]) -> int:
    """Bytes of the objects of a record; small whole numbers are shared by all, and not counted."""
    return sum(map(object_bytes, blocks)) + sys.getsizeof(blocks)


def object_bytes(value: Any) -> int:
    """Bytes of an object and of what it holds."""
    size = sys.getsizeof(value) if not isinstance(value, (str, type(None), bool)) else 0
    if isinstance(value, int) and value < 257:
        return 0
    if isinstance(value, dict):
        return size + sum(map(object_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return size + sum(map(object_bytes, value))
    inside = getattr(value, "__dict__", None)
    return size + (0 if inside is None else object_bytes(inside))


class RawKeys:
    """The first layer's unrotated keys of the blocks that a cache holds at full resolution, [B, N, H, D] each."""

    def __init__(self, cache: Cache) -> None:
        self._raw: dict[int, torch.Tensor] = {}
        write = cache.write

        def noted(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            if layer == 0:
                kept = {*cache.partition.sink, *cache.partition.recent}
                self._raw = {block: raw for block, raw in self._raw.items() if block in kept}
                self._raw[cache.block] = keys.double()
            write(layer, keys, values)

        cache.write = noted  # type: ignore[method-assign]

    def error(self, cache: Cache) -> float:
        """The largest distance of a key from where it must stand: sinks from 0 on, then mid blocks, recent, current."""
        mids = min(CONFIG.top_k, len(cache.partition.mid))
        order = [*cache.partition.sink, *(None for _ in range(mids)), *cache.partition.recent, cache.block]
        found = 0.0
        for position, block in enumerate(order):
            if block is not None:
                wanted = turned(self._raw[block], position * CONFIG.block_frames, cache.layout.size)
                keys = cache.layers[0].kv.keys[:, cache.block_tokens(block)].double()
                found = max(found, float((keys - wanted).abs().max()))
        return found


def turned(keys: torch.Tensor, start: int, size: FrameSize) -> torch.Tensor:
    """Keys [B, N, H, D] in float64, rotated by the tests' own RoPE, their first frame at `start`."""
    rows, columns = size.height // 16, size.width // 16
    grid = torch.cartesian_prod(*(torch.arange(n).double() for n in (CONFIG.block_frames, rows, columns)))
    grid[:, 0] += start
    return rotate(keys, grid)


# --- many videos ---------------------------------------------------------------------------------------------------


def many_videos(prompts: int) -> dict[str, Any]:
    """Videos of six blocks, each of another size than the one before; the models stay."""
    networks, samples = models(), []
    every = max(1, prompts // SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        for prompt in range(prompts):
            video = new_video(networks, FrameSize(*SIDES[prompt % len(SIDES)]), seed=prompt)
            for _ in written(video, 6, Path(folder) / "video.mp4"):
                pass
            del video
            if (prompt + 1) % every == 0:
                before = process()
                sample = {"prompts": prompt + 1, **asdict(before), "objects": len(gc.get_objects())}
                samples.append(sample)
                print(line(sample), flush=True)
    return {"samples": samples, "trimmed": asdict(trimmed())}


# --- a server ------------------------------------------------------------------------------------------------------


def size_of(number: int) -> dict[str, int]:
    """The inputs of a sampler, each time others than the time before."""
    return dict(zip(("width", "height"), SIDES[number % len(SIDES)], strict=True))


def in_server(cancels: int) -> dict[str, Any]:
    """Cancels, each within a video of another size; every fifth time all models are unloaded by force.

    Every third graph has a second sampler over the same models.
    """
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root / "scripts"), str(root / "tests" / "comfyui")]
    from comfyui import Event, Preview, Server
    from graphs import Prompt, tiny_latents

    os.environ["OMP_NUM_THREADS"] = "1"
    with Server().start() as server, server.client() as client:
        first, samples = tiny_latents(server, client), []

        for number in range(cancels):
            prompt = Prompt()
            long = prompt.sampler(seconds=600, seed=number, **size_of(number))
            prompt.save_video(long[1])
            if number % 3 == 2:  # ComfyUI runs either first: the short one ends well, or never begins
                short = prompt.sampler_beside(long, seconds=1.5, **size_of(number + 1))
                prompt.save_video(short[1])

            def cancel(event: Event | Preview, node: str = long.id) -> None:
                told = event.data if isinstance(event, Event) and event.type == "progress" else {}
                if told.get("node") == node and told["value"] >= 6:
                    client.interrupt()

            status = client.run(prompt.nodes, on_event=cancel).status
            if number % 5 == 4:
                client.free()
            sample = {"cancels": number + 1, "status": status, **asdict(process(server._process.pid))}
            samples.append(sample)
            print(line(sample), flush=True)
        last = tiny_latents(server, client, seconds=1.75)
        kept = {path.name: len(list(path.iterdir())) for path in (server.base_dir / "output").glob("packforcing_*")}
        return {"samples": samples, "kept": kept, "the_same_after": torch.equal(first, last[:, :, : first.shape[2]])}


# --- the command ---------------------------------------------------------------------------------------------------


def line(sample: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in sample.items()
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("blocks", "prompts", "server"))
    options.add_argument("--blocks", type=int, default=5000)
    options.add_argument("--prompts", type=int, default=100)
    options.add_argument("--cancels", type=int, default=30)
    options.add_argument("--json", metavar="FILE", help="write the result as JSON")
    chosen = options.parse_args()
    result = {
        "blocks": lambda: long_video(chosen.blocks),
        "prompts": lambda: many_videos(chosen.prompts),
        "server": lambda: in_server(chosen.cancels),
    }[chosen.what]()
    result |= {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "arenas": os.environ.get("MALLOC_ARENA_MAX", "default"),
    }
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}))
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
