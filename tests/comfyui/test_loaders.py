"""The pack's loaders in this process: what ComfyUI makes of their files, against its own loaders. No server runs."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from wan_reference import assert_close, comfy_wan, seeded

from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.demo.models import demo_transformer
from packforcing.errors import PackForcingError
from packforcing.model.causal_wan import CausalWan
from packforcing.model.load import load_wan_modules, make_causal_wan

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def loaders(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.nodes.loaders")


@pytest.fixture
def folders(comfy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A folder of this test's own for a kind of model."""
    import folder_paths

    def folder(kind: str) -> Path:
        path = tmp_path / kind
        if not path.is_dir():
            path.mkdir()
            known = folder_paths.folder_names_and_paths[kind]
            monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(path)], known[1]))
            folder_paths.filename_list_cache.pop(kind, None)
        return path

    yield folder
    folder_paths.filename_list_cache.clear()


def velocity(model: Any) -> Tensor:
    """What a MODEL's own forward makes of a fixed input, in float32."""
    x, text = seeded(1, 16, 2, 8, 8), seeded(1, 5, 4096, seed=2)
    with torch.no_grad():
        return model.model.diffusion_model(x, torch.tensor([625.0]), text).float()


def block_velocity(wan: CausalWan) -> Tensor:
    """What the library's forward makes of the same."""
    layout = Layout(CacheConfig(block_frames=2, sink_frames=0, recent_frames=0, top_k=0), FrameSize(64, 64), 1)
    cache = Cache(layout, wan.shape, dtype=wan.dtype)
    cache.begin(0)
    with torch.no_grad():
        return wan.denoise(seeded(1, 16, 2, 8, 8), 0.625, wan.embed_text(seeded(1, 5, 4096, seed=2)), cache).float()


def scaled_fp8(layout: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The demo transformer with its layers' weights in scaled fp8, and the file's header."""
    tensors, layers = dict(demo_transformer()), {}
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        layer, weight = name.removesuffix(".weight"), tensors[name].float()
        scale = weight.abs().max() / 100  # far from 1, so that a scale that is dropped shows
        tensors[name] = (weight / scale).to(FP8)
        tensors[f"{layer}.{'scale_weight' if layout == 'marker' else 'weight_scale'}"] = scale
        layers[layer] = {"format": "float8_e4m3fn"}
    if layout == "marker":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=FP8)
        return tensors, None
    return tensors, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


# --- scaled fp8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["marker", "header"])
def test_scaled_fp8_is_loaded_as_the_core_loader_does(loaders, folders, layout: str):
    import comfy.sd

    tensors, header = scaled_fp8(layout)
    path = folders("diffusion_models") / "scaled.safetensors"
    save_file(tensors, path, metadata=header)
    [ours] = loaders.ModelLoaderNode.execute("scaled.safetensors", "auto", "default").args
    theirs = comfy.sd.load_diffusion_model(str(path))
    assert torch.equal(velocity(ours), velocity(theirs))

    adapter = loaders.adapter
    plain = make_causal_wan(load_wan_modules(path), "cpu", torch.float32)
    assert_close(block_velocity(adapter.causal_wan(ours)), block_velocity(plain), 0.02)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("scale") and "scale" not in name}
    unscaled = comfy.sd.load_diffusion_model_state_dict(tensors)
    with pytest.raises(AssertionError):
        assert_close(velocity(unscaled), velocity(ours), 0.1)


def test_scaled_fp8_in_the_newer_layout_loads_from_tensors_too(loaders, folders):
    """ComfyUI 0.3.75 itself reads only the header; newer ones both."""
    tensors, header = scaled_fp8("header")
    folder = folders("diffusion_models")
    save_file(tensors, folder / "header.safetensors", metadata=header)
    for layer, description in json.loads(header["_quantization_metadata"])["layers"].items():
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "tensors.safetensors")
    [expected] = loaders.ModelLoaderNode.execute("header.safetensors", "auto", "default").args
    [found] = loaders.ModelLoaderNode.execute("tensors.safetensors", "auto", "default").args
    assert torch.equal(velocity(found), velocity(expected))


@pytest.mark.parametrize("old", ["no metadata", "no formats"])
def test_a_comfyui_that_cannot_read_the_formats_is_told(loaders, monkeypatch: pytest.MonkeyPatch, old: str):
    import comfy.sd

    if old == "no metadata":
        monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda sd, model_options={}: None)
    else:
        monkeypatch.setattr("comfy.quant_ops.QUANT_ALGOS", {})
    with pytest.raises(PackForcingError) as caught:
        raise_library_error(loaders.adapter.load_diffusion_model, {}, {}, {"a": {"format": "float8_e4m3fn"}})
    assert "quantised as float8_e4m3fn, which this version of ComfyUI does not read: update" in str(caught.value)


def raise_library_error(function: Callable[..., Any], *given: Any) -> None:
    """Calls a function of the pack, whose copy of the library has an error class of its own."""
    try:
        function(*given)
    except ValueError as error:
        raise PackForcingError(str(error)) from error


# --- LoRA ------------------------------------------------------------------------------------------------------------

LAYERS = ("blocks.0.self_attn.q", "blocks.3.ffn.2")


def longlive_lora() -> dict[str, Any]:
    """The layout of LongLive's `lora.pt` (NVlabs/LongLive, trainer/distillation.py and utils/lora_utils.py)."""
    wan, tensors = demo_transformer(), {}
    for i, layer in enumerate(LAYERS):
        out, into = wan[f"{layer}.weight"].shape
        tensors[f"base_model.model.{layer}.lora_A.weight"] = 0.3 * seeded(4, into, seed=10 + i)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = 0.3 * seeded(out, 4, seed=20 + i)
    return {"generator_lora": tensors, "critic_lora": {}, "step": 3000}


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_lora_is_patched_onto_the_model(loaders, folders, strength: float):
    """Against the same model with W + s * B @ A as its weights."""
    base, lora = demo_transformer(), longlive_lora()
    torch.save({"generator": base}, folders("diffusion_models") / "longlive_base.pt")
    torch.save(lora, folders("loras") / "lora.pt")
    [model] = loaders.ModelLoaderNode.execute("longlive_base.pt", "auto", "fp32", "lora.pt", strength).args
    for layer in LAYERS:
        a, b = (lora["generator_lora"][f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
        base[f"{layer}.weight"] = base[f"{layer}.weight"].float() + strength * b @ a
    [plain] = loaders.ModelLoaderNode.execute("longlive_base.pt", "auto", "fp32").args
    before = velocity(plain)
    model.patch_model()
    assert_close(velocity(model), velocity(loaders.comfy_model(base, "fp32", "a direct product")), 1e-4)
    with pytest.raises(AssertionError):
        assert_close(velocity(model), before, 0.05)
    model.unpatch_model()
    assert torch.equal(velocity(model), before)


def test_a_lora_of_another_model_is_refused(loaders, folders):
    save_file(demo_transformer(), folders("diffusion_models") / "tiny.safetensors")
    save_file(
        {
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 64),
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.ones(256, 4),
        },
        folders("loras") / "other.safetensors",
    )
    with pytest.raises(PackForcingError, match=r"other\.safetensors does not fit the model: .* \[256, 64\]"):
        raise_library_error(loaders.ModelLoaderNode.execute, "tiny.safetensors", "auto", "default", "other.safetensors")
    with pytest.raises(PackForcingError, match=r"There is no file 'gone\.safetensors' in models/loras"):
        raise_library_error(loaders.ModelLoaderNode.validate_inputs, None, None, "gone.safetensors")


def test_new_inputs_are_last_and_optional(loaders):
    *old, name, strength = loaders.ModelLoaderNode.define_schema().inputs
    assert [each.id for each in old] == ["model_name", "weights", "dtype"]
    assert (name.id, name.default, name.optional) == ("lora_name", "none", True)
    assert (strength.id, strength.default, strength.optional) == ("lora_strength", 1.0, True)


# --- core's autoregressive nodes -------------------------------------------------------------------------------------


class CausalWanModel(nn.Module):
    """Stands in for ComfyUI's class of this name (comfy/ldm/wan/ar_model.py, comfyanonymous/ComfyUI a41ffd2): its
    sub-modules and attributes, read there, over the layers of the ComfyUI at hand. Its forward pass is not needed."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        names = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head")
        for name in names:
            setattr(self, name, getattr(plain, name))
        for name in ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "out_dim", "num_heads", "num_layers"):
            setattr(self, name, getattr(plain, name))
        self.img_emb = self.ref_conv = None


def test_cores_causal_model_runs_in_the_library(comfy):
    plain = comfy_wan(comfy, text_dim=4096)
    assert torch.equal(block_velocity(CausalWan(CausalWanModel(plain))), block_velocity(CausalWan(plain)))


@pytest.mark.parametrize("newer", [False, True])
def test_models_are_marked_as_causal_where_comfyui_has_a_model_for_that(
    loaders, monkeypatch: pytest.MonkeyPatch, newer: bool
):
    """By the header that core's Sampler AR Video needs a file to have. A ComfyUI without it is not told."""
    import comfy.sd
    import comfy.supported_models

    if newer:
        monkeypatch.setattr(comfy.supported_models, "WAN21_CausalAR_T2V", object, raising=False)
    elif hasattr(comfy.supported_models, "WAN21_CausalAR_T2V"):
        monkeypatch.delattr(comfy.supported_models, "WAN21_CausalAR_T2V")
    seen: list[dict[str, Any]] = []

    def load(sd: dict[str, Tensor], model_options: dict[str, Any], metadata: Any = None) -> SimpleNamespace:
        seen.append({} if metadata is None else metadata)
        return SimpleNamespace()

    assert "metadata" in inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", load)
    loaders.comfy_model({}, "default", "a file")
    [metadata] = seen
    assert {key: json.loads(text) for key, text in metadata.items()} == (
        {"config": {"transformer": {"causal_ar": True}}} if newer else {}
    )


# --- a checkpoint that brings its compressor -------------------------------------------------------------------------


def unofficial_checkpoint(path: Path) -> dict[str, Tensor]:
    """A generator of PackForcing-Unofficial in small: its compressor's tensors, written beside the transformer's."""
    net, widths = {}, (16, 4, 4, 4, 256)
    for i, place in enumerate((0, 2, 4, 6)):
        kernel = (1, 1, 1) if place == 6 else (1, 3, 3)
        net[f"net.{place}.weight"] = seeded(widths[i + 1], widths[i], *kernel, seed=i)
        net[f"net.{place}.bias"] = seeded(widths[i + 1], seed=10 + i)
    inside = {f"model.pack_compressor.{name}": tensor for name, tensor in net.items()}
    torch.save({"generator": {f"model.{k}": v for k, v in demo_transformer().items()} | inside}, path)
    return net


def test_a_checkpoint_brings_its_compressor(loaders, folders):
    """It is listed by the compressor loader, other checkpoints are not, and the transformer loads as any other."""
    folder = folders("diffusion_models")
    net = unofficial_checkpoint(folder / "unofficial.pt")
    torch.save({"generator": demo_transformer()}, folder / "plain.pt")
    names = loaders.compressor_files()
    assert "unofficial.pt" in names
    assert "plain.pt" not in names
    assert loaders.CompressorLoaderNode.validate_inputs("unofficial.pt")
    [choice] = loaders.CompressorLoaderNode.execute("unofficial.pt").args
    assert choice.direct
    assert all(torch.equal(choice.state_dict[name], tensor) for name, tensor in net.items())
    [plain] = loaders.ModelLoaderNode.execute("plain.pt", "auto", "default").args
    [model] = loaders.ModelLoaderNode.execute("unofficial.pt", "auto", "default").args
    assert torch.equal(velocity(model), velocity(plain))
    with pytest.raises(PackForcingError, match=r"There is no file 'plain\.pt' in models/packforcing"):
        raise_library_error(loaders.CompressorLoaderNode.validate_inputs, "plain.pt")
