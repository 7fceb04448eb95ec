"""Loaders: a causal Wan checkpoint, a compressor, and the tiny demo models."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ..packforcing.checks import shown
from ..packforcing.demo.models import COMPRESSOR_NAME, demo_compressor, demo_transformer, demo_vae
from ..packforcing.devices import fast_dtype
from ..packforcing.errors import PackForcingError
from ..packforcing.files.compressor_file import has_compressor_inside, load_compressor
from ..packforcing.files.lora import comfy_lora, load_lora, wan_layers
from ..packforcing.files.scaled_fp8 import LayerFormats
from ..packforcing.files.wan_checkpoint import load_wan
from ..packforcing.model.compressor import TRAINING_FREE, TRAINING_FREE_NAME, CompressorChoice
from . import adapter, types
from .demo_clip import DemoClip
from .flavours import note_flavour

MODEL_FOLDER = "diffusion_models"
COMPRESSOR_FOLDER = "packforcing"
LORA_FOLDER = "loras"
NO_LORA = "none"

WEIGHT_SETS = ["auto", "ema", "raw"]
DTYPES = {
    "default": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}

folder_paths.add_model_folder_path(COMPRESSOR_FOLDER, f"{folder_paths.models_dir}/{COMPRESSOR_FOLDER}")


def comfy_model(state_dict: dict[str, torch.Tensor], dtype: str, source: str, formats: LayerFormats | None = None):
    """A ComfyUI MODEL of a Wan state dict, of which layers may be quantised."""
    model = adapter.load_diffusion_model(state_dict, DTYPES[dtype], formats or {})
    if model is None:
        raise PackForcingError(
            f"{source} is a Wan checkpoint that this version of ComfyUI does not know: update ComfyUI, or load the "
            "file with another loader and connect its MODEL to the sampler."
        )
    return model


def check_choice(kind: str, name: str, listed: Iterable[str], advice: str) -> None:
    """Raises PackForcingError for a choice that is not listed: some versions of ComfyUI do not check that.

    By an exception, since ComfyUI repeats an error that is returned for each input that the check takes.
    """
    if not isinstance(name, str) or name not in listed:
        plain = isinstance(name, str) and len(name) <= 255 and name.isprintable()
        told = f"'{name}'" if plain else shown(name)  # as it was written: a backslash is no escape
        raise PackForcingError(f"There is no {kind} {told}{advice}.")


def check_file(folder: str, name: str) -> None:
    advice = f" in models/{folder}: choose one of the list, or put it there and press R to refresh"
    check_choice("file", name, folder_paths.get_filename_list(folder), advice)


class ModelLoaderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingModelLoader",
            display_name="PackForcing Model Loader",
            category=types.CATEGORY,
            description="Loads a causal Wan 2.1 checkpoint (Self-Forcing, Causal-Forcing, CausVid, LongLive, ...), "
            "also from the .pt files that their authors publish. The result is an ordinary MODEL: LoRA loaders apply.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(MODEL_FOLDER),
                    tooltip="A file in models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weights",
                    options=WEIGHT_SETS,
                    default="auto",
                    tooltip="Which weights of a training checkpoint: the averaged ones (ema), the raw ones, or the "
                    "averaged ones where there are any (auto).",
                ),
                io.Combo.Input(
                    "dtype", options=list(DTYPES), default="default", tooltip="What the weights are kept in."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *folder_paths.get_filename_list(LORA_FOLDER)],
                    default=NO_LORA,
                    optional=True,
                    tooltip="A LoRA in models/loras that belongs to the checkpoint, such as LongLive's lora.pt, which "
                    "other LoRA loaders do not read.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="How much of the LoRA is added; 1 is what it was trained for.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def validate_inputs(cls, model_name=None, dtype=None, lora_name=None) -> bool | str:
        if dtype is not None:
            check_choice("dtype", dtype, DTYPES, f": choose one of {', '.join(DTYPES)}")
        if model_name is not None:
            check_file(MODEL_FOLDER, model_name)
        if lora_name not in (None, NO_LORA):
            check_file(LORA_FOLDER, lora_name)
        return True

    @classmethod
    def execute(
        cls, model_name: str, weights: str, dtype: str, lora_name: str = NO_LORA, lora_strength: float = 1.0
    ) -> io.NodeOutput:
        loaded = load_wan(folder_paths.get_full_path_or_raise(MODEL_FOLDER, model_name), weights)
        lora = {}
        if lora_name != NO_LORA:  # read and checked before ComfyUI builds the model, which empties the state dict
            file = load_lora(folder_paths.get_full_path_or_raise(LORA_FOLDER, lora_name))
            lora = comfy_lora(wan_layers(file, loaded.state_dict))
        model = comfy_model(loaded.state_dict, dtype, model_name, loaded.formats)
        if lora:
            model = adapter.with_lora(model, lora, lora_strength)
        return io.NodeOutput(note_flavour(model, model_name))


def compressor_files() -> list[str]:
    """Files of models/packforcing, and those checkpoints in models/diffusion_models that bring a compressor."""
    names = folder_paths.get_filename_list(COMPRESSOR_FOLDER)
    checkpoints = folder_paths.get_filename_list(MODEL_FOLDER)
    own = [name for name in names if name.endswith((".safetensors", ".sft"))]
    return own + [name for name in checkpoints if name not in own and brings_compressor(name)]


def brings_compressor(checkpoint: str) -> bool:
    """Whether a checkpoint of models/diffusion_models brings a compressor. Each file is looked into once."""
    path = folder_paths.get_full_path(MODEL_FOLDER, checkpoint)
    if path is None or not os.path.exists(path):
        return False
    stat = os.stat(path)
    return looked_into(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def looked_into(path: str, modified: int, size: int) -> bool:
    return has_compressor_inside(Path(path))


def compressor_path(name: str) -> str:
    """The file that the list means by a name."""
    path = folder_paths.get_full_path(COMPRESSOR_FOLDER, name)
    return path or folder_paths.get_full_path_or_raise(MODEL_FOLDER, name)


class CompressorLoaderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingCompressorLoader",
            display_name="PackForcing Compressor Loader",
            category=types.CATEGORY,
            description="Chooses how blocks are compressed. Training-free needs no file: it encodes a pooled copy of "
            "the video. A trained dual-branch compressor is a safetensors file in models/packforcing; the demo models "
            "and checkpoints of PackForcing-Unofficial bring theirs.",
            inputs=[
                io.Combo.Input(
                    "compressor_name",
                    options=[TRAINING_FREE_NAME, COMPRESSOR_NAME, *compressor_files()],
                    default=TRAINING_FREE_NAME,
                    tooltip="The training-free form, the demo models' own, a file in models/packforcing, or a "
                    "checkpoint in models/diffusion_models that brings one.",
                )
            ],
            outputs=[types.Compressor.Output(display_name="compressor")],
        )

    @classmethod
    def validate_inputs(cls, compressor_name=None) -> bool | str:
        if compressor_name not in (None, TRAINING_FREE_NAME, COMPRESSOR_NAME, *compressor_files()):
            check_file(COMPRESSOR_FOLDER, compressor_name)
        return True

    @classmethod
    def execute(cls, compressor_name: str) -> io.NodeOutput:
        if compressor_name == TRAINING_FREE_NAME:
            return io.NodeOutput(TRAINING_FREE)
        if compressor_name == COMPRESSOR_NAME:
            return io.NodeOutput(demo_compressor())
        return io.NodeOutput(CompressorChoice(compressor_name, *load_compressor(compressor_path(compressor_name))))


class DemoModelsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingDemoModels",
            display_name="PackForcing Demo Models",
            category=types.CATEGORY,
            description="Tiny Wan-shaped models that run on any machine without a download. They were trained on a "
            "small synthetic world: 'a red circle bounces on a blue background', 'the camera pans over a landscape "
            "with a red house and comes back'. Choose their own compressor beside them.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model = comfy_model(demo_transformer(), "default", "The demo model")
        device = comfy.model_management.vae_device()
        return io.NodeOutput(model, DemoClip(), adapter.demo_vae(demo_vae(device), fast_dtype(device)))
