"""Does memory grow with the length of the video? Makes a short and a long one and compares what they held.

    python benchmarks/memory.py [--seconds 10 120] [--device cpu|cuda] [--json]

Each length runs in a process of its own, with the tiny model, VAE and file writing included. It prints, for each, the
peak resident memory of the process, the peak of the GPU's memory where there is one, the bytes of the cache, and the
ratio of the longest run to the shortest.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from packforcing.byte_units import readable_bytes
from packforcing.config import CacheConfig, FrameSize, Layout, Length
from packforcing.demo.models import demo_transformer, demo_vae
from packforcing.demo.text import encode_prompt
from packforcing.files.video import VideoWriter
from packforcing.generate.long_video import LongVideo, VideoModels, VideoSettings
from packforcing.generate.sampling import Sampling
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import Compressor
from packforcing.model.vae import load_vae
from packforcing.model.wan_modules import SIZES, build_wan_modules

SIZE = FrameSize(64, 64)  # the ratios are what is measured, and the VAE's decoding takes most of the time
MEASURED = ("peak_resident_bytes", "peak_gpu_bytes", "cache_bytes", "context_tokens")


def measure(seconds: float, device: str) -> dict[str, float]:
    """Makes one video in this process and returns what it held."""
    torch.manual_seed(0)
    config = CacheConfig(archive_device="host")
    layout = Layout(config, SIZE, 2)
    modules = build_wan_modules(SIZES["tiny"], demo_transformer()).to(device)
    vae = load_vae(demo_vae(), torch.bfloat16, device)
    wan = CausalWan(modules, device=device)
    models = VideoModels(wan, vae, Compressor(2))
    video = LongVideo(models, wan.embed_text(encode_prompt("memory")), VideoSettings(layout, Sampling()))
    blocks = Length(seconds, 16, config.block_frames).blocks
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        VideoWriter(Path(folder) / "video.mp4", 16, SIZE.width, SIZE.height) as writer,
    ):
        for block in video.blocks(blocks):
            writer.write(block.decoded)
    held = video.record.blocks[-1].bytes
    return {
        "seconds": seconds,
        "blocks": blocks,
        "elapsed_seconds": time.perf_counter() - start,
        # Linux counts in kilobytes.
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "cache_bytes": video.cache.allocated_bytes,
        "archive_host_bytes": held["archive_host"],
        "context_tokens": layout.context_tokens,
        "full_cache_tokens": blocks * layout.tokens_per_block,
    }


def in_own_process(seconds: float, device: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(seconds), "--device", device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, nargs="+", default=[10.0, 120.0], help="lengths to compare")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--one", type=float, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.one is not None:
        print(json.dumps(measure(chosen.one, chosen.device)))
        return

    runs = [in_own_process(seconds, chosen.device) for seconds in sorted(chosen.seconds)]
    first, last = runs[0], runs[-1]
    ratios = {name: last[name] / first[name] for name in MEASURED if first[name]}
    if chosen.json:
        print(json.dumps({"device": chosen.device, "torch": torch.__version__, "runs": runs, "ratios": ratios}))
        return
    for run in runs:
        print(
            f"{run['seconds']:>7g} s: {run['blocks']:>5} blocks in {run['elapsed_seconds']:.0f} s, "
            f"resident {readable_bytes(run['peak_resident_bytes'])}, GPU {readable_bytes(run['peak_gpu_bytes'])}, "
            f"cache {readable_bytes(run['cache_bytes'])}, host archive {readable_bytes(run['archive_host_bytes'])}, "
            f"context {run['context_tokens']:,} tokens (a full cache: {run['full_cache_tokens']:,})"
        )
    print("ratios, longest to shortest: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
