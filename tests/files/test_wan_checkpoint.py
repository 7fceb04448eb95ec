"""Every flavour of causal-Wan file is read to the same names, and every other model is refused by its name."""

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from wan_files import EMA, RAW, TINY, fsdp, sentence, tiny_wan, with_prefix

from packforcing.files.wan_checkpoint import check_wan, describe_wan, load_wan

FLAVOURS = {  # what the trainers' save() write: (checkpoint, the set that auto picks)
    "Self-Forcing, published": ({"generator_ema": fsdp(EMA)}, "generator_ema"),
    "Self-Forcing, trained": (
        {"generator": with_prefix(RAW, "model."), "critic": with_prefix(RAW, "model."), "generator_ema": fsdp(EMA)},
        "generator_ema",
    ),
    "Self-Forcing, before EMA": (
        {"generator": with_prefix(RAW, "model."), "critic": with_prefix(RAW, "model.")},
        "generator",
    ),
    "Causal-Forcing, ODE": ({"generator": fsdp(RAW)}, "generator"),
    "CausVid": ({"generator": OrderedDict(with_prefix(RAW, "model.")), "critic": RAW}, "generator"),
    "LongLive, merged LoRA": (
        {"generator": with_prefix(RAW, "model."), "checkpoint_format": "longlive_generator_merged_lora"},
        "generator",
    ),
    "LongLive, model": ({"model": with_prefix(RAW, "model."), "step": 700}, "model"),
    "an EMA that is still empty": ({"generator": RAW, "generator_ema": {}}, "generator"),
    "a fork's state_dict": ({"state_dict": with_prefix(RAW, "module.")}, "state_dict"),
    "Rolling-Forcing": ({"generator": with_prefix(RAW, "model."), "generator_ema": fsdp(EMA)}, "generator_ema"),
    "Reward-Forcing": (with_prefix(RAW, "model."), ""),
    "PackForcing-Unofficial": (
        {"generator": with_prefix(RAW | {"pack_compressor.net.0.weight": torch.ones(64, 16, 1, 3, 3)}, "model.")},
        "generator",
    ),
    "flat": (RAW, ""),
    "flat, ComfyUI's prefix": (with_prefix(RAW, "model.diffusion_model."), ""),
}


@pytest.mark.parametrize("name", FLAVOURS)
@pytest.mark.parametrize("zip_format", [True, False])
def test_torch_flavours_load_to_wan_names(tmp_path, name, zip_format):
    checkpoint, weight_set = FLAVOURS[name]
    path = tmp_path / "model.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zip_format)
    loaded = load_wan(path)
    assert loaded.weight_set == weight_set
    assert loaded.shape == TINY
    assert set(loaded.state_dict) == set(RAW)
    expected = EMA if weight_set == "generator_ema" else RAW
    for key, tensor in loaded.state_dict.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])  # the last: Krea
def test_safetensors_flavours_and_metadata(tmp_path, prefix):
    path = tmp_path / "wan.safetensors"
    save_file(with_prefix(RAW, prefix), path, metadata={"format": "pt"})
    loaded = load_wan(path)
    assert set(loaded.state_dict) == set(RAW)
    assert loaded.metadata == {"format": "pt"}


def test_of_a_whole_checkpoint_the_transformer_is_read(tmp_path):
    """As ComfyUI's CheckpointSave writes them: text encoder and VAE lie beside it."""
    beside = {"text_encoders.umt5xxl.shared.weight": torch.ones(1), "vae.decoder.conv1.weight": torch.ones(1)}
    save_file(with_prefix(RAW, "model.diffusion_model.") | beside, tmp_path / "all.safetensors")
    assert set(load_wan(tmp_path / "all.safetensors").state_dict) == set(RAW)


def test_fp8_scales_are_kept(tmp_path):
    weights = dict(RAW)
    weights["blocks.0.self_attn.q.weight"] = weights["blocks.0.self_attn.q.weight"].to(torch.float8_e4m3fn)
    weights["blocks.0.self_attn.q.scale_weight"] = torch.ones(())
    weights["scaled_fp8"] = torch.ones(2)
    save_file(weights, tmp_path / "fp8.safetensors")
    assert set(load_wan(tmp_path / "fp8.safetensors").state_dict) == set(weights)


def test_shape_is_read():
    assert describe_wan(RAW) == TINY
    assert check_wan(RAW) == TINY
    with_image = RAW | {"img_emb.proj.0.bias": torch.zeros(1)}
    assert describe_wan(with_image).has_image_branch
    assert "'patch_embedding.weight'" in sentence(describe_wan, {})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("encoder.downsamples.0.residual.0.gamma", "a Wan VAE"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "a diffusers-format VAE"),
        ("first_stage_model.decoder.up.0.block.0.conv1.weight", "an image VAE"),
        ("token_embedding.weight", "a UMT5 text encoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a UMT5 text encoder"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "a CLIP vision encoder"),
        ("visual.transformer.0.attn.proj.weight", "a CLIP vision encoder"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "a LoRA"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "a LoRA"),
        ("base_model.model.blocks.0.self_attn.q.lora_B.default.weight", "a LoRA"),
        ("diffusion_model.blocks.0.norm3.diff", "a LoRA"),
        ("model.diffusion_model.label_emb.0.0.weight", "an SDXL UNet"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion UNet"),
        ("double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 model"),
        ("transformer_blocks.0.attn1.to_q.weight", "another model's diffusion transformer"),
        ("hr.0.weight", "a PackForcing compressor"),
        ("something.else", "no model that PackForcing knows"),
    ],
)
def test_other_models_are_named(tmp_path, name, says):
    path = tmp_path / "foo.safetensors"
    save_file({"aaa.weight": torch.zeros(1), name: torch.zeros(1)}, path)
    text = sentence(load_wan, path)
    assert f"{path} is not a Wan 2.1 text-to-video model: found 2 tensors such as" in text
    assert f"which is {says};" in text
    assert "LoRA loader" in text or "compressor loader" in text or "choose a causal Wan" in text


@pytest.mark.parametrize(
    ("state_dict", "says"),
    [
        (tiny_wan(in_channels=48, out_channels=48), "a Wan 2.2 5B model with 48 latent channels"),
        (tiny_wan(in_channels=36), "an image-to-video Wan with 36 input channels"),
        (RAW | {"img_emb.proj.0.bias": torch.zeros(1)}, "an image-to-video Wan"),
        (tiny_wan(in_channels=32), "32 input and 16 output channels"),
        (tiny_wan(in_channels=4, out_channels=4), "4 latent channels"),
        (RAW | {"vace_patch_embedding.weight": torch.zeros(1)}, "VACE"),
        (RAW | {"blocks.0.ffn.0.quantized_weight_values": torch.zeros(1)}, "NVFP4"),
        (RAW | {"blocks.0.self_attn.q.weight": torch.zeros(128, 64, dtype=torch.uint8)}, "packed 4-bit"),
        (
            RAW | {"blocks.1.ffn.0.weight": torch.zeros(9, 128)},
            "'blocks.1.ffn.0.weight' is [9, 128] instead of [8, 128]",
        ),
        (RAW | {"patch_embedding.weight": torch.zeros(128, 64)}, "'patch_embedding.weight' has shape [128, 64]"),
        (
            {k: v for k, v in RAW.items() if k != "blocks.1.norm3.bias"},
            "it lacks 'blocks.1.norm3.bias';",
        ),
        ({k: v for k, v in tiny_wan(layers=3).items() if "blocks.1." not in k}, "block 1 is missing"),
        ({"blocks.9999999999.self_attn.q.weight": torch.zeros(1)}, "a Wan diffusion model"),
        ({}, "0 tensors"),
        (
            RAW | {"blocks.0.gate.weight": torch.ones(1), "extra": torch.ones(1)},
            "it has 2 tensors such as 'blocks.0.gate.weight' that Wan 2.1 has not",
        ),
        (RAW | {"blocks.0.ffn.0.weight": torch.zeros(8, 128).int()}, "'blocks.0.ffn.0.weight' is a tensor of int32"),
        (RAW | {"head.modulation": torch.zeros(1, 2, 128).bool()}, "'head.modulation' is a tensor of bool"),
        (RAW | {"head.modulation": torch.zeros(1, 2, 128) + 0j}, "'head.modulation' is a tensor of complex64"),
        (RAW | {"blocks.1.ffn.2.bias": torch.full((128,), float("nan"))}, "'blocks.1.ffn.2.bias' holds values that"),
        (RAW | {"blocks.1.norm3.weight": torch.full((128,), float("inf"))}, "'blocks.1.norm3.weight' holds values"),
    ],
)
def test_other_wans_are_named(state_dict, says):
    text = sentence(check_wan, state_dict, "foo.safetensors")
    assert says in text
    assert text.startswith("foo.safetensors ")


def test_one_part_of_several_is_named():
    part = {name: tensor for name, tensor in RAW.items() if name.startswith("blocks.")}
    text = sentence(check_wan, part, "diffusion_pytorch_model-00001-of-00007.safetensors")
    assert "one part of a model in several files" in text
