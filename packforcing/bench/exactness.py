"""python -m packforcing check: does a device compute what the CPU computes, and do options keep the bits they promise?

Small random models make short videos: in float32 on the CPU, which is the reference, and on the device in several
ways. Nothing about time is measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..command_options import default_device
from ..config import CacheConfig, FrameSize, Layout
from ..devices import fast_dtype, usable_device
from ..errors import PackForcingError
from ..files.writing import check_output_file
from ..generate.long_video import LongVideo, VideoModels, VideoSettings
from ..generate.sampling import Sampling
from ..known_models import SIZES, TINY, VAE_DIMS
from ..model.attention import BACKENDS, Attention, matmul_attention, sdpa_by
from ..model.compressor import Compressor
from ..model.load import check_speed, make_causal_wan
from ..model.vae import init_vae
from ..model.wan_modules import build_wan_modules, random_state_dict
from .models import SEED, random_text
from .result import device_name, machine, type_name

CONFIG = CacheConfig(block_frames=2, sink_frames=2, recent_frames=2, top_k=2)
SIZE = FrameSize(64, 64)
BLOCKS = 6  # in the sixth, mid blocks are chosen
STEPS = 2
IN_FLOAT32, IN_BFLOAT16, OF_FP8, OF_KERNELS = 1e-3, 0.05, 0.1, 2e-2  # relative to the reference, root mean square


@dataclass(frozen=True)
class Way:
    """One way of making the video."""

    device: torch.device
    dtype: torch.dtype
    linear_dtype: str = "model"
    weights_device: str = "device"
    archive_device: str = "device"
    kv_dtype: str = "model"
    overlap: bool = False
    decode_frames: int | None = None


@dataclass(frozen=True)
class Made:
    """A video, on the CPU: latents [1, 16, T, h, w], frames [1, 3, F, H, W], and what each layer chose."""

    latents: Tensor
    frames: Tensor
    selected: list[list[list[int]]]


@dataclass(frozen=True)
class Check:
    """What was found, and the most that it may be."""

    name: str
    found: float | None  # None: it could not be tried, for the reason in `note`
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.found is None or self.found <= self.limit  # NaN fails


def made(way: Way) -> Made:
    """The video, made one way. Weights, prompt and noise are the same in all: they are drawn on the CPU."""
    modules = build_wan_modules(SIZES[TINY], random_state_dict(SIZES[TINY], SEED))
    wan = make_causal_wan(modules, way.device, way.dtype, way.linear_dtype, weights_device=way.weights_device)
    vae = init_vae(VAE_DIMS[TINY], SEED).requires_grad_(False).to(way.device, way.dtype).eval()
    config = replace(CONFIG, archive_device=way.archive_device, kv_dtype=way.kv_dtype)
    layout = Layout(config, SIZE, temporal_stride=2)
    models = VideoModels(wan, vae, Compressor(layout.temporal_stride))
    settings = VideoSettings(
        layout, Sampling(seed=SEED, steps=STEPS), overlap=way.overlap, decode_frames=way.decode_frames
    )
    video = LongVideo(models, random_text(wan), settings)
    blocks = list(video.blocks(BLOCKS))
    return Made(
        torch.cat([block.latents.float().cpu() for block in blocks], dim=2),
        torch.cat([block.decoded.float().cpu() for block in blocks], dim=2),
        [record.selected for record in video.record.blocks],
    )


# ---------------------------------------------------------------------- what is compared


def relative(found: Tensor, wanted: Tensor) -> float:
    """The distance of two tensors over the length of the second."""
    return ((found - wanted).norm() / wanted.norm()).item()


def differing(found: Made, wanted: Made) -> float:
    """How many numbers of the latents and frames are not the same to the bit."""
    pairs = ((found.latents, wanted.latents), (found.frames, wanted.frames))
    return float(sum((ours != theirs).sum().item() for ours, theirs in pairs))


def checks(device: torch.device) -> Iterator[Check]:
    """All checks of a device, the most important first. One that fails with an exception ends no other."""
    reference = made(Way(torch.device("cpu"), torch.float32))
    dtypes = {torch.float32: IN_FLOAT32, torch.bfloat16: IN_BFLOAT16}
    if fast_dtype(device) != torch.bfloat16:  # a CPU without it: it would take minutes, and nobody runs that
        del dtypes[torch.bfloat16]
    plain = {dtype: Way(device, dtype) for dtype in dtypes}
    base: dict[torch.dtype, Made] = {}
    for dtype, limit in dtypes.items():
        name = type_name(dtype)
        try:
            base[dtype] = video = made(plain[dtype])
        except Exception as error:
            yield failed(f"{name}: a video", error)
            continue
        yield Check(f"{name}: latents, against float32 on the CPU", relative(video.latents, reference.latents), limit)
        yield Check(f"{name}: frames, against float32 on the CPU", relative(video.frames, reference.frames), limit)
    if torch.float32 in base:
        other = sum(
            ours != theirs for ours, theirs in zip(base[torch.float32].selected, reference.selected, strict=True)
        )
        yield Check("float32: blocks that chose other mid blocks than on the CPU", float(other), 0)
    same: dict[str, dict[str, Any]] = {
        "decoding beside the next block": {"overlap": True},
        "the archive on the host": {"archive_device": "host"},
        "weights on the host, read ahead": {"weights_device": "host"},
    }
    for dtype, wanted in base.items():
        for name, changes in same.items():
            way = replace(plain[dtype], **changes)
            told = f"{type_name(dtype)}: {name}: numbers that differ"
            yield tried(told, 0, partial(_differing_from, way, wanted))
    for dtype, wanted in base.items():
        way = replace(plain[dtype], decode_frames=1)
        told = f"{type_name(dtype)}: a latent frame decoded at a time: frames"
        yield tried(told, dtypes[dtype], partial(_frames_from, way, wanted))
        way = replace(plain[dtype], kv_dtype="fp8_e4m3")
        yield tried(f"{type_name(dtype)}: fp8 KV: latents", OF_FP8, partial(_latents_from, way, wanted))
    if torch.bfloat16 in base:
        way = replace(plain[torch.bfloat16], linear_dtype="fp8_e4m3")
        yield tried("bfloat16: fp8 products: latents", OF_FP8, partial(_latents_from, way, base[torch.bfloat16]))
    yield from kernels(device)


def _differing_from(way: Way, wanted: Made) -> float:
    return differing(made(way), wanted)


def _frames_from(way: Way, wanted: Made) -> float:
    return relative(made(way).frames, wanted.frames)


def _latents_from(way: Way, wanted: Made) -> float:
    check_speed(way.device, way.linear_dtype, compiled=False)
    return relative(made(way).latents, wanted.latents)


def kernels(device: torch.device) -> Iterator[Check]:
    """PyTorch's attention kernels in bfloat16 at 832x480's width, against plain products in float64."""
    if device.type != "cuda":
        return
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (
        torch.randn((1, length, 12, 128), generator=generator).to(torch.bfloat16) for length in (256, 2048, 2048)
    )
    wanted = matmul_attention(q.double(), k.double(), v.double()).float()
    on_device = [x.to(device) for x in (q, k, v)]
    for name in BACKENDS:
        found = partial(_attended, sdpa_by(name), on_device, wanted)
        yield tried(f"bfloat16: {name}", OF_KERNELS, found, missing=RuntimeError)


def _attended(attention: Attention, qkv: list[Tensor], wanted: Tensor) -> float:
    return relative(attention(*qkv).float().cpu(), wanted)


def tried(name: str, limit: float, find: Callable[[], float], missing: type[Exception] = PackForcingError) -> Check:
    """The check of what `find` finds. An exception of the type `missing` says that the device has no such thing."""
    try:
        return Check(name, find(), limit)
    except missing as error:
        return Check(name, None, limit, first_line(error))
    except Exception as error:
        return failed(name, error)


def failed(name: str, error: Exception) -> Check:
    return Check(name, float("inf"), 0, f"{type(error).__name__}: {first_line(error)}")


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# ---------------------------------------------------------------------- the command


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default=default_device())
    command.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write one JSON object; default: print it"
    )


def run(options: argparse.Namespace) -> None:
    """Tries everything and tells it, line by line. Raises PackForcingError in the end when something failed."""
    device = usable_device(options.device)
    check_output_file(options.json if options.json != "-" else None, "result")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 here; matrix products are so by default
    found: list[Check] = []
    for check in checks(device):
        found.append(check)
        if options.json != "-":
            print(line(check), flush=True)
        if options.json not in (None, "-"):  # as they come: a later one may end the process
            Path(options.json).write_text(json.dumps(result(device, found), indent=1) + "\n")
    if options.json == "-":
        print(json.dumps(result(device, found)))
    wrong = sum(not check.passed for check in found)
    if wrong:
        raise PackForcingError(
            f"{wrong} of {len(found)} checks failed on {device_name(device)}: please report the lines above, with "
            f"torch {torch.__version__}."
        )


def line(check: Check) -> str:
    """A check for people."""
    if check.found is None:
        return f"--    {check.name}: not here ({check.note})"
    verdict = "ok  " if check.passed else "FAIL"
    note = f" ({check.note})" if check.note else ""
    return f"{verdict}  {check.name}: {check.found:.3g}, at most {check.limit:g}{note}"


def result(device: torch.device, found: list[Check]) -> dict[str, Any]:
    """The JSON object. What is not finite is told as text, which JSON has no number for."""
    entries = []
    for check in found:
        finite = check.found is None or math.isfinite(check.found)
        number = check.found if finite else str(check.found)
        entries.append({**asdict(check), "found": number, "passed": check.passed})
    return {**machine(device), "checks": entries, "passed": all(check.passed for check in found)}
