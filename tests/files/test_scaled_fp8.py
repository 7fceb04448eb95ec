"""fp8 weights with scales, in the two layouts that are published, become the weights that they stand for."""

import json

import pytest
import torch
from safetensors.torch import save_file
from wan_files import RAW, sentence, tiny_wan, with_prefix

from packforcing.files.wan_checkpoint import load_wan
from packforcing.known_models import WanSizes
from packforcing.model.load import load_wan_modules
from packforcing.model.wan_modules import random_state_dict

SIZES = WanSizes(dim=128, ffn_dim=32, layers=2, heads=1, text_dim=8, freq_dim=6)
FP8 = torch.float8_e4m3fn
LINEARS = [f"blocks.{i}.{part}" for i in range(2) for part in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")]


def scaled(layout, by_row=False, dtype=FP8):
    """A Wan's tensors with some layers in scaled fp8; the weights that they stand for; and the file's header."""
    plain = random_state_dict(SIZES, seed=3)
    tensors, meant = dict(plain), dict(plain)
    for layer in LINEARS:
        weight = plain[f"{layer}.weight"]
        largest = weight.abs().amax(dim=1, keepdim=True) if by_row else weight.abs().max()
        scale = largest / torch.finfo(dtype).max
        rounded = (weight / scale).to(dtype)
        tensors[f"{layer}.weight"] = rounded
        meant[f"{layer}.weight"] = rounded.double().mul(scale.double()).float()
        tensors[f"{layer}.{'scale_weight' if layout == 'marker' else 'weight_scale'}"] = scale
        tensors[f"{layer}.{'scale_input' if layout == 'marker' else 'input_scale'}"] = torch.tensor(0.5)
        if layout == "tensors":
            text = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if layout == "marker":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    layers = {layer: {"format": str(dtype).removeprefix("torch.")} for layer in LINEARS}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return tensors, meant, header if layout == "header" else None


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", ["marker", "header", "tensors", "bare"])
def test_a_module_tree_has_the_weights_that_the_file_stands_for(tmp_path, layout, prefix):
    tensors, meant, header = scaled(layout)
    path = tmp_path / "scaled.safetensors"
    save_file(with_prefix(tensors, prefix), path, metadata=header)
    found = load_wan_modules(path).state_dict()
    assert found.keys() == meant.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), meant[name]), name


def test_scales_by_row_and_other_types(tmp_path):
    tensors, meant, _ = scaled("bare", by_row=True, dtype=torch.float8_e5m2)
    save_file(tensors, tmp_path / "rows.safetensors")
    found = load_wan_modules(tmp_path / "rows.safetensors", dtype=torch.bfloat16).state_dict()
    for layer in LINEARS:
        assert torch.equal(found[f"{layer}.weight"], meant[f"{layer}.weight"].bfloat16())
    assert found["blocks.0.self_attn.k.weight"].dtype == torch.float32, "only what has a scale is changed"


def test_formats_are_told_under_wans_names(tmp_path):
    for layout in ("header", "tensors", "bare"):
        tensors, _, header = scaled(layout)
        save_file(with_prefix(tensors, "diffusion_model."), tmp_path / "a.safetensors", metadata=header)
        loaded = load_wan(tmp_path / "a.safetensors")
        assert loaded.formats == {layer: {"format": "float8_e4m3fn"} for layer in LINEARS}
        assert not any(name.endswith("comfy_quant") for name in loaded.state_dict)


def test_a_missing_marker_is_set(tmp_path):
    tensors, _, _ = scaled("marker")
    del tensors["scaled_fp8"]
    save_file(tensors, tmp_path / "a.safetensors")
    assert load_wan(tmp_path / "a.safetensors").state_dict["scaled_fp8"].dtype == FP8


Q = "blocks.0.self_attn.q"


def described(**layers):
    return {"_quantization_metadata": json.dumps({"layers": layers or {Q: {"format": "nvfp4"}}})}


@pytest.mark.parametrize(
    ("extra", "header", "says"),
    [
        ({}, described(), "quantised as 'nvfp4'"),
        ({}, described(**{Q: {"format": "mxfp8"}}), "quantised as 'mxfp8'"),
        ({}, described(**{Q: {"format": "int8_tensorwise"}}), "quantised as 'int8_tensorwise'"),
        ({}, described(**{Q: "nf4"}), "quantised as 'nf4'"),
        ({}, described(**{Q: {}}), "names no format"),
        ({}, {"_quantization_metadata": "{"}, "cannot be read"),
        ({}, {"_quantization_metadata": "3"}, "cannot be read"),
        ({}, {"_quantization_metadata": "[" * 100_000}, "cannot be read"),
        ({f"{Q}.comfy_quant": torch.tensor([255, 7], dtype=torch.uint8)}, None, f"'{Q}.comfy_quant' cannot be read"),
        ({f"{Q}.weight": torch.zeros(128, 128, dtype=torch.int8)}, None, "a tensor of int8"),
        ({f"{Q}.weight": torch.zeros(128, 64, dtype=torch.uint8)}, None, "packed 4-bit"),
        ({f"{Q}.weight_scale": torch.ones(128, 4)}, None, "the shape [128, 4]"),
        ({f"{Q}x.scale_weight": torch.ones(())}, None, "without that layer's weight"),
    ],
)
def test_other_quantised_files_are_refused(tmp_path, extra, header, says):
    save_file(RAW | extra, tmp_path / "q.safetensors", metadata=header)
    text = sentence(load_wan, tmp_path / "q.safetensors")
    assert says in text
    assert str(tmp_path / "q.safetensors") in text


def test_plain_fp8_stays_as_it_is(tmp_path):
    save_file(tiny_wan(dtype=FP8), tmp_path / "a.safetensors")
    assert load_wan(tmp_path / "a.safetensors").formats == {}
    assert load_wan_modules(tmp_path / "a.safetensors").state_dict()["head.head.bias"].dtype == FP8
