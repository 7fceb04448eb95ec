"""Every kind of file that the pack reads: a small whole one, and the reading of it as the pack does it."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import tiny_umt5
import torch
from PIL import Image
from safetensors.torch import save_file
from small_state import small_state
from wan_files import tiny_wan, with_prefix

from packforcing.cli.inspect import read_record
from packforcing.cli.start import latent_start, read_picture, video_start
from packforcing.cli.text import text_file
from packforcing.config import CacheConfig, FrameSize
from packforcing.evaluation.recall_runs import SHAPES, RecallResult, pack
from packforcing.evaluation.runs import Result, read_results
from packforcing.evaluation.switches import SwitchResult
from packforcing.files.compressor_file import (
    CompressorMetadata,
    has_compressor_inside,
    load_compressor,
    save_compressor,
)
from packforcing.files.encoded_prompts import read_prompt, read_prompts
from packforcing.files.latent_file import load_latents, save_latents
from packforcing.files.lora import load_lora, with_loras
from packforcing.files.state_file import load_state, save_state
from packforcing.files.state_journal import StateJournal, load_journal
from packforcing.files.video import VideoWriter, read_video
from packforcing.files.wan_checkpoint import load_wan
from packforcing.files.weights import read_state_dict
from packforcing.generate.record import BlockRecord, CacheRecord, PromptRecord
from packforcing.generate.sampling import Sampling
from packforcing.generate.story import parse_story
from packforcing.inspector import overview, report
from packforcing.known_models import ModelShape
from packforcing.model.load import load_wan_modules
from packforcing.model.vae import load_vae
from packforcing.model.vae_weights import init_vae
from packforcing.text.tokenizer import read_tokenizer
from packforcing.text.umt5_files import read_umt5
from packforcing.training.checkpoints import FORMAT, Checkpoints
from packforcing.training.clips import ClipSet, LatentClips, shard_path
from packforcing.training.learner import Learner
from packforcing.training.log import Log, read_log
from packforcing.training.loop import _resume
from packforcing.training.rollouts import Rollouts, RolloutShape, rollout_path

SIZE = FrameSize(64, 64)


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    `form` says how it is built, for damage that keeps the form: "safetensors", "torch", "json", "lines" (of JSON),
    "journal" (entries of safetensors), or "bytes".
    """

    name: str
    file: str  # its name
    form: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]


# --- weights --------------------------------------------------------------------------------------------------------


@cache
def small_wan(fill: float = 1.0) -> dict[str, torch.Tensor]:
    return tiny_wan(layers=1, fill=fill)


def scaled(name: str, beside: Callable[[str], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A Wan with one layer in fp8, with what stands beside its weight."""
    layer = "blocks.0.self_attn.q"
    weights = dict(small_wan()) | {f"{layer}.weight": small_wan()[f"{layer}.weight"].to(torch.float8_e4m3fn)}
    return weights | {f"{layer}.{name}": torch.tensor(0.5)} | beside(layer)


def described(layer: str) -> dict[str, torch.Tensor]:
    text = json.dumps({"format": "float8_e4m3fn"}).encode()
    return {f"{layer}.comfy_quant": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def header_described(path: Path) -> None:
    quantised = {"layers": {"blocks.0.self_attn.q": {"format": "float8_e4m3fn"}}}
    save_file(scaled("weight_scale", lambda layer: {}), path, {"_quantization_metadata": json.dumps(quantised)})


def read_wan(path: Path) -> object:
    """As the command line reads it, and as the node's loader does."""
    return load_wan_modules(path), load_wan(path, "ema" if "sets" in path.name else "auto"), has_compressor_inside(path)


def lora() -> dict[str, torch.Tensor]:
    layer = "blocks.0.self_attn.q"
    return {
        f"diffusion_model.{layer}.lora_A.weight": torch.ones(4, 128),
        f"diffusion_model.{layer}.lora_B.weight": torch.ones(128, 4),
        f"diffusion_model.{layer}.alpha": torch.tensor(4.0),
    }


def read_lora(path: Path) -> object:
    return with_loras(small_wan(), [(load_lora(path), 1.0)], torch.float32)


def compressor(path: Path) -> None:
    metadata = CompressorMetadata(model_dim=16, temporal_stride=2, hidden_channels=(8,), block_frames=4)
    weights = {f"hr.{i}.{p}": t for i in range(2) for p, t in (("weight", None), ("bias", None)) for _ in ()}
    for i, (before, after) in enumerate([(16, 8), (8, 16)]):
        weights |= {f"hr.{i}.weight": torch.ones(after, before, 1, 2, 2), f"hr.{i}.bias": torch.ones(after)}
    save_compressor(path, weights, metadata)


def unofficial(path: Path) -> None:
    """A generator with a compressor inside."""
    sizes = {0: (8, 16, 1, 3, 3), 2: (8, 8, 1, 3, 3), 4: (8, 8, 1, 3, 3), 6: (128, 8, 1, 1, 1)}
    net = {f"pack_compressor.net.{i}.weight": torch.ones(size) for i, size in sizes.items()}
    net |= {f"pack_compressor.net.{i}.bias": torch.ones(size[0]) for i, size in sizes.items()}
    torch.save({"generator_ema": with_prefix(small_wan() | net, "model.")}, path)


# --- videos and prompts ---------------------------------------------------------------------------------------------


def state(path: Path) -> None:
    torch.manual_seed(0)
    save_state(path, small_state())


def journal(path: Path) -> None:
    torch.manual_seed(0)
    whole = small_state()
    first = replace(whole, latents=whole.latents[:, :, :2].clone(), selected=whole.selected[:1].clone())
    writer = StateJournal(path)
    writer.begin(first)
    for block in (1, 2, 3):
        prompts = whole.prompts[: 1 + (block > 1)]
        writer.add(whole.latents[:, :, 2 * block : 2 * block + 2], whole.selected[block : block + 1], prompts)
    writer.close()


def prompts(path: Path) -> None:
    save_file({"a": torch.ones(3, 16), "b": torch.ones(5, 16)}, path, {"a": "a cat", "encoder": "umt5"})


def video(path: Path) -> None:
    with VideoWriter(path, 16, 64, 64) as writer:
        writer.write(torch.linspace(-1, 1, 3 * 9 * 64 * 64).reshape(3, 9, 64, 64))


def record(path: Path) -> None:
    config = CacheConfig(block_frames=1, sink_frames=1, recent_frames=1, top_k=2)
    blocks = [
        BlockRecord(i, [list(range(1, i - 1))[-2:]] * 2, bytes={"sink": 8}, seconds={"denoise": 0.5}) for i in range(5)
    ]
    prompts = [PromptRecord(0, "a cat"), PromptRecord(3, "")]
    found = CacheRecord(ModelShape(2, 256, 2), config, SIZE, 16.0, 1, "x", "float32", "cpu", 0.1, blocks, prompts)
    path.write_text(json.dumps(found.as_dict()))


def read_report(path: Path) -> object:
    found = read_record(str(path))
    return report(found), overview(found)


# --- text encoders --------------------------------------------------------------------------------------------------


def umt5(layout: str, file: str) -> Callable[[Path], object]:
    """Writes one layout's files; `file` is the one to damage, within its folder."""

    def write(path: Path) -> None:
        folder = path.parents[len(Path(file).parts) - 1]
        if path.parent != folder:
            path.parent.rmdir()  # which the layout makes itself
        with patch.object(tiny_umt5, "WIDTH", 16):  # the readers take any width
            tiny_umt5.LAYOUTS[layout](folder, tiny_umt5.random_umt5())
        assert path.exists(), path

    return write


# --- training and evaluation ----------------------------------------------------------------------------------------


def learner() -> Learner[torch.nn.Module]:
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)
    found = Learner(module, torch.optim.AdamW(module.parameters(), lr=0.1), ema=0.9)
    module(torch.ones(2, 4)).sum().backward()
    found.update(1.0, 1.0)
    return found


IDENTITY = {"steps": 10, "seed": 0, "kind": "base", "sizes": [1, 2]}


def checkpoint(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    learners = {"base": learner().state()}
    torch.save({"format": FORMAT, "identity": IDENTITY, "minutes": 1.5, "learners": learners, "step": 7}, path)


def read_checkpoint(path: Path) -> object:
    return _resume(SimpleNamespace(learners={"base": learner()}), Checkpoints(path.parent), IDENTITY)  # type: ignore[arg-type]


CLIPS = ClipSet(2, latent_frames=8, size=16, places=False)
PLACES = ClipSet(2, latent_frames=20, size=16, places=True)
ROLLOUT = RolloutShape(2, SIZE, CacheConfig(), Sampling())


def clips(kind: ClipSet) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        caption: Any = {"short": kind.blocks * ["a"], "long": kind.blocks * ["b"]} if kind.places else "a red circle"
        tensors = {
            "latents": torch.ones(kind.count, 16, kind.latent_frames, 2, 2).half(),
            "reduced": torch.ones(kind.count, kind.blocks, 16, 2, 1, 1).half(),
        }
        save_file(tensors, path, {"captions": json.dumps(kind.count * [caption]), "vae": "0123"})

    return write


def read_clips(kind: ClipSet) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        found = LatentClips(path.parent, kind)
        return [found[number] for number in range(len(found))]

    return read


def rollout(path: Path) -> None:
    tensors = {"latents": (16, 8, 8, 8), "reduced": (2, 16, 2, 4, 4), "context": (3, 16)}
    save_file({name: torch.ones(size).half() for name, size in tensors.items()}, path)


def read_rollouts(path: Path) -> object:
    return Rollouts(path.parent, 1, ROLLOUT)[0]


def log(path: Path) -> None:
    lines = [{"step": step, "minutes": 0.5, "loss": 1.5, "gradient": 0.1, "lr": 1e-3} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_log_twice(path: Path) -> object:
    Log(path.parent, 2, 9)
    found = read_log(path)
    assert all(entry["step"] <= 2 for entry in found)
    return found


def results(kind: type, *values: Any) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.write_text(2 * (json.dumps(asdict(kind(*values))) + "\n"))

    return write


def read_results_of(kind: type) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        found = read_results(path, kind)
        by_key = {(result.key, result.fingerprint): result for result in found}
        used = [getattr(result, name, None) for result in found for name in ("video_seconds", "views")]
        return by_key, used

    return read


def shown() -> dict[str, str]:
    import numpy as np

    return {name: pack(np.zeros(shape, np.float32)) for name, shape in SHAPES.items()}


KINDS = (
    Kind("Wan, safetensors", "wan.safetensors", "safetensors", lambda path: save_file(small_wan(), path), read_wan),
    Kind(
        "Wan, trainer's .pt of two sets",
        "sets.pt",
        "torch",
        lambda path: torch.save({"generator": small_wan(), "generator_ema": small_wan(2.0), "step": 3}, path),
        read_wan,
    ),
    Kind(
        "Wan, fp8 with scale_weight",
        "scaled.safetensors",
        "safetensors",
        lambda path: save_file(scaled("scale_weight", lambda layer: {}), path),
        read_wan,
    ),
    Kind(
        "Wan, fp8 with comfy_quant",
        "quant.safetensors",
        "safetensors",
        lambda path: save_file(scaled("weight_scale", described), path),
        read_wan,
    ),
    Kind("Wan, fp8 told in the header", "header.safetensors", "safetensors", header_described, read_wan),
    Kind("LoRA, safetensors", "lora.safetensors", "safetensors", lambda path: save_file(lora(), path), read_lora),
    Kind("LoRA, .pt", "lora.pt", "torch", lambda path: torch.save({"generator_lora": lora()}, path), read_lora),
    Kind(
        "VAE",
        "vae.safetensors",
        "safetensors",
        lambda path: save_file(init_vae(2).state_dict(), path),
        lambda path: load_vae(read_state_dict(path)[0]),
    ),
    Kind("compressor", "compressor.safetensors", "safetensors", compressor, load_compressor),
    Kind(
        "compressor in a generator", "unofficial.pt", "torch", unofficial, lambda p: (load_compressor(p), read_wan(p))
    ),
    Kind("state", "state.safetensors", "safetensors", state, load_state),
    Kind("unfinished state", "state.safetensors.unfinished", "journal", journal, load_journal),
    Kind(
        "latents",
        "video.latent",
        "safetensors",
        lambda path: save_latents(path, torch.ones(1, 16, 3, 8, 8)),
        lambda path: (load_latents(path), latent_start(str(path), SIZE)),
    ),
    Kind(
        "encoded prompts",
        "prompts.safetensors",
        "safetensors",
        prompts,
        lambda p: (read_prompts(p), read_prompt(f"{p}:a")),
    ),
    Kind(
        "story",
        "story.txt",
        "bytes",
        lambda path: path.write_text("0:00 a cat\n# later\n0:20 it rains\n1:02:03.5 ünd sun\n"),
        lambda path: parse_story(text_file(str(path), "story")),
    ),
    Kind("report", "report.json", "json", record, read_report),
    Kind(
        "start picture",
        "start.png",
        "bytes",
        lambda p: Image.new("RGB", (20, 10)).save(p),
        lambda p: read_picture(str(p)),
    ),
    Kind("start video", "start.mp4", "bytes", video, lambda p: (read_video(p), video_start(str(p), SIZE, 16).frames)),
    Kind(
        "UMT5, ComfyUI's", "umt5_xxl_fp16.safetensors", "safetensors", umt5("comfyui", "f"), lambda p: read_umt5(str(p))
    ),
    Kind(
        "UMT5, the authors'", "models_t5_umt5-xxl-enc-bf16.pth", "torch", umt5("wan", "f"), lambda p: read_umt5(str(p))
    ),
    Kind(
        "UMT5, an index of shards",
        "text_encoder/model.safetensors.index.json",
        "json",
        umt5("hugging-face", "a/b"),
        lambda p: read_umt5(str(p.parent)),
    ),
    Kind(
        "tokenizer",
        "spiece.model",
        "bytes",
        lambda path: path.write_bytes(tiny_umt5.spiece_model()),
        lambda path: read_tokenizer(path).ids("a red circle"),
    ),
    Kind("training checkpoint", "checkpoints/step-00000007.pt", "torch", checkpoint, read_checkpoint),
    Kind("clips", shard_path(Path(), CLIPS, 0).name, "safetensors", clips(CLIPS), read_clips(CLIPS)),
    Kind("clips of places", shard_path(Path(), PLACES, 0).name, "safetensors", clips(PLACES), read_clips(PLACES)),
    Kind("rollout", rollout_path(Path(), 0).name, "safetensors", rollout, read_rollouts),
    Kind("training log", "log.jsonl", "lines", log, read_log_twice),
    Kind(
        "results",
        "results.jsonl",
        "lines",
        results(Result, "full", "a cat", 0, "abc", 1.5, {"5": {"memory": 0.5, "drift": None}}),
        read_results_of(Result),
    ),
    Kind(
        "results of recall",
        "recall.jsonl",
        "lines",
        lambda p: results(RecallResult, "full", 0, 2, "abc", 1.5, {"a": 0.5}, {"b": [0.5]}, shown())(p),
        read_results_of(RecallResult),
    ),
    Kind(
        "results of switches",
        "switches.jsonl",
        "lines",
        results(SwitchResult, "full", "keep", 0, "abc", 1.5, [0.5, 1.0], [0.0]),
        read_results_of(SwitchResult),
    ),
)


# --- entries of a journal -------------------------------------------------------------------------------------------

ENTRY = struct.Struct("<4sIQ")  # mark, CRC-32, bytes; as docs of `files/state_journal.py` say


def entries_of(content: bytes) -> list[bytes]:
    """The safetensors files in a journal."""
    found = []
    while content:
        _, _, length = ENTRY.unpack(content[: ENTRY.size])
        found.append(content[ENTRY.size : ENTRY.size + length])
        content = content[ENTRY.size + length :]
    return found


def journal_with(entries: list[bytes]) -> bytes:
    """A journal of these files, with good checksums."""
    return b"".join(ENTRY.pack(b"PFJ1", zlib.crc32(entry), len(entry)) + entry for entry in entries)
