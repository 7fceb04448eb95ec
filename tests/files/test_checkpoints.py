"""Every flavour of causal-Wan file is read to the same names, and every wrong file gets one clear sentence."""

import argparse
import json
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from packforcing.errors import PackForcingError
from packforcing.files.compressor_file import COMPRESSOR_KEY, CompressorMetadata, load_compressor, save_compressor
from packforcing.files.wan_checkpoint import (
    WanShape,
    check_wan,
    describe_wan,
    from_diffusers,
    load_wan,
    pick_weight_set,
    strip_prefixes,
)
from packforcing.files.weights import read_state_dict

TINY = WanShape(
    dim=128,
    layers=2,
    ffn_dim=8,
    in_channels=16,
    out_channels=16,
    text_dim=4,
    freq_dim=6,
    heads=1,
    patch_size=(1, 2, 2),
    has_image_branch=False,
)


def tiny_wan(layers=2, in_channels=16, out_channels=16, dtype=torch.bfloat16, fill=0.0):
    """A Wan's tensors, named here once more on purpose: the names are the checkpoints' contract."""
    d, ffn = TINY.dim, TINY.ffn_dim
    sizes = {
        "patch_embedding.weight": (d, in_channels, 1, 2, 2),
        "patch_embedding.bias": (d,),
        "text_embedding.0.weight": (d, TINY.text_dim),
        "text_embedding.0.bias": (d,),
        "text_embedding.2.weight": (d, d),
        "text_embedding.2.bias": (d,),
        "time_embedding.0.weight": (d, TINY.freq_dim),
        "time_embedding.0.bias": (d,),
        "time_embedding.2.weight": (d, d),
        "time_embedding.2.bias": (d,),
        "time_projection.1.weight": (6 * d, d),
        "time_projection.1.bias": (6 * d,),
        "head.head.weight": (4 * out_channels, d),
        "head.head.bias": (4 * out_channels,),
        "head.modulation": (1, 2, d),
    }
    for i in range(layers):
        block = {"modulation": (1, 6, d), "norm3.weight": (d,), "norm3.bias": (d,)}
        for attention in ("self_attn", "cross_attn"):
            for part in ("q", "k", "v", "o"):
                block |= {f"{attention}.{part}.weight": (d, d), f"{attention}.{part}.bias": (d,)}
            block |= {f"{attention}.norm_q.weight": (d,), f"{attention}.norm_k.weight": (d,)}
        block |= {"ffn.0.weight": (ffn, d), "ffn.0.bias": (ffn,), "ffn.2.weight": (d, ffn), "ffn.2.bias": (d,)}
        sizes |= {f"blocks.{i}.{name}": size for name, size in block.items()}
    return {name: torch.full(size, fill, dtype=dtype) for name, size in sizes.items()}


def sentence(function, *args, **kwargs):
    """The error's text, which is one line that ends in a full stop."""
    with pytest.raises(PackForcingError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 700
    return text


def with_prefix(state_dict, prefix):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def fsdp(state_dict):
    """The names of an EMA that was made over FSDP-wrapped modules (Self-Forcing, Causal-Forcing)."""
    return {
        "model._fsdp_wrapped_module." + re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", name): tensor
        for name, tensor in state_dict.items()
    }


# ------------------------------------------------------------------------------------------------ flavours

RAW, EMA = tiny_wan(fill=1.0), tiny_wan(fill=2.0, dtype=torch.float32)

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


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_safetensors_flavours_and_metadata(tmp_path, prefix):
    path = tmp_path / "wan.safetensors"
    save_file(with_prefix(RAW, prefix), path, metadata={"format": "pt"})
    loaded = load_wan(path)
    assert set(loaded.state_dict) == set(RAW)
    assert loaded.metadata == {"format": "pt"}


def test_torch_metadata_is_the_plain_values(tmp_path):
    torch.save({"generator": RAW, "step": 3, "lr": [1]}, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt")[1] == {"step": "3"}


def test_fp8_scales_are_kept(tmp_path):
    weights = dict(RAW)
    weights["blocks.0.self_attn.q.weight"] = weights["blocks.0.self_attn.q.weight"].to(torch.float8_e4m3fn)
    weights["blocks.0.self_attn.q.scale_weight"] = torch.ones(())
    weights["scaled_fp8"] = torch.ones(2)
    save_file(weights, tmp_path / "fp8.safetensors")
    assert set(load_wan(tmp_path / "fp8.safetensors").state_dict) == set(weights)


def test_reading_does_not_load_the_file(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    sets = {"generator": {"a": torch.ones(8 << 20)}, "generator_ema": {"a": torch.ones(8 << 20)}}  # 2 x 32 MiB
    torch.save(sets, tmp_path / "big.pt")
    save_file({"a": sets["generator"]["a"]}, tmp_path / "big.safetensors")
    del sets
    for name in ("big.pt", "big.safetensors"):
        before = resident()
        held = read_state_dict(tmp_path / name)
        assert resident() - before < 16 << 20
        del held


wrappers = st.lists(st.sampled_from(["_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"]), max_size=3)
outer = st.lists(
    st.sampled_from(
        ["model", "module", "_fsdp_wrapped_module", "diffusion_model", "model.diffusion_model", "_orig_mod"]
    ),
    max_size=5,
)


@given(outer, st.data())
@settings(max_examples=60, deadline=None)
def test_any_chain_of_wrappers_is_stripped(front, data):
    names = ["patch_embedding.weight", "blocks.0.self_attn.q.weight", "blocks.11.modulation", "head.modulation"]
    wrapped = {}
    for name in names:
        parts = list(front)
        for part in name.split("."):
            parts += [part, *data.draw(wrappers)]
        while parts[-1].startswith("_"):
            parts.pop()
        wrapped[".".join(parts)] = torch.zeros(1)
    assert list(strip_prefixes(wrapped)) == names


def test_two_tensors_of_one_name_are_refused():
    text = sentence(strip_prefixes, {"model.a": torch.zeros(1), "module.a": torch.zeros(1)}, "x.pt")
    assert "'a'" in text
    assert "x.pt" in text


# --------------------------------------------------------------------------------------------- weight sets


def test_which_set_is_picked():
    both = {"generator": RAW, "generator_ema": EMA, "critic": RAW}
    assert pick_weight_set(both)["head.modulation"].mean() == 2
    assert pick_weight_set(both, "ema")["head.modulation"].mean() == 2
    assert pick_weight_set(both, "raw")["head.modulation"].mean() == 1
    assert pick_weight_set(RAW, "raw").keys() == RAW.keys()


@pytest.mark.parametrize(
    ("checkpoint", "which", "says"),
    [
        ({"generator": RAW}, "ema", "'generator'"),
        ({"generator_ema": EMA}, "raw", "'generator_ema'"),
        (RAW, "ema", "one set"),
        ({"critic": RAW}, "auto", "'critic'"),
        ({"generator_lora": {"a": torch.ones(1)}, "critic_lora": {"a": torch.ones(1)}, "step": 1}, "auto", "LoRA"),
        ({"generator_lora": {"a": torch.ones(1)}, "step": torch.tensor(1)}, "auto", "LoRA"),
        ({"step": 3}, "auto", "'step'"),
        ({}, "auto", "nothing"),
        ({"generator": RAW}, "best", "'best'"),
    ],
)
def test_sets_that_are_not_there(checkpoint, which, says):
    assert says in sentence(pick_weight_set, checkpoint, which)


# ------------------------------------------------------------------------------------- files that are no weights


def test_missing_folder_and_empty(tmp_path):
    assert "does not exist" in sentence(read_state_dict, tmp_path / "no.pt")
    (tmp_path / "folder.pt").mkdir()
    assert "folder" in sentence(read_state_dict, tmp_path / "folder.pt")
    (tmp_path / "empty.pt").touch()
    assert "empty" in sentence(read_state_dict, tmp_path / "empty.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070424\n", "git-lfs"),
        (b'{"error":"Repository not found"}', "JSON"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"Entry not found", "download the file again"),
        (b"\x00", "download the file again"),
        (bytes(range(200, 256)), "download the file again"),
    ],
)
def test_other_things_saved_as_weights(tmp_path, suffix, content, says):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    text = sentence(read_state_dict, path)
    assert says in text
    assert str(path) in text


def test_suffixes(tmp_path):
    torch.save(RAW, tmp_path / "a.safetensors")
    assert "rename it so that it ends in .pt" in sentence(read_state_dict, tmp_path / "a.safetensors")
    save_file(RAW, tmp_path / "a.pt")
    assert "ends in .safetensors" in sentence(read_state_dict, tmp_path / "a.pt")
    save_file(RAW, tmp_path / "a.sft")
    assert read_state_dict(tmp_path / "a.sft")[0].keys() == RAW.keys()
    (tmp_path / "a.json").write_text("[]")
    assert "'.json'" in sentence(read_state_dict, tmp_path / "a.json")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "'readme.txt'" in sentence(read_state_dict, tmp_path / "a.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "b.pt")
    assert "TorchScript" in sentence(read_state_dict, tmp_path / "b.pt")
    with tarfile.open(tmp_path / "c.pt", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("\x80storages"))  # a tar that starts as a pickle does
    assert "tar archive" in sentence(read_state_dict, tmp_path / "c.pt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zip_format):
    mark = tmp_path / "was-run"
    torch.save({"generator": RAW, "x": Bomb(mark)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    text = sentence(read_state_dict, tmp_path / "a.pt")
    assert "mkdir" in text
    assert "nothing of it was run" in text
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_not_run(tmp_path, protocol):
    mark = tmp_path / "was-run"
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"x": Bomb(mark)}, protocol))
    sentence(read_state_dict, tmp_path / "a.pt")
    assert not mark.exists()


def test_objects_beside_the_weights_are_named(tmp_path):
    torch.save({"generator": RAW, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    assert "argparse.Namespace" in sentence(read_state_dict, tmp_path / "a.pt")
    torch.save([torch.ones(1)], tmp_path / "b.pt")
    assert "list" in sentence(read_state_dict, tmp_path / "b.pt")


SMALL = {"a": torch.arange(300.0), "b": torch.ones(3)}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_short_anywhere(tmp_path, kind, where):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(SMALL, path)
    else:
        torch.save({"generator": SMALL}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * where)])
    sentence(read_state_dict, path)


# ---------------------------------------------------------------------------------------------- what is a Wan


def test_shape_is_read():
    assert describe_wan(RAW) == TINY
    assert check_wan(RAW) == TINY
    with_image = RAW | {"img_emb.proj.0.bias": torch.zeros(1)}
    assert describe_wan(with_image).has_image_branch
    assert "'patch_embedding.weight'" in sentence(describe_wan, {})


def diffusers_name(name):
    """Wan's name to diffusers', by the table of its scripts/convert_wan_to_diffusers.py."""
    table = {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
        "modulation": "scale_shift_table",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "norm3": "norm2",
        "self_attn.": "attn1.",
        "cross_attn.": "attn2.",
        ".o.": ".to_out.0.",
        ".q.": ".to_q.",
        ".k.": ".to_k.",
        ".v.": ".to_v.",
    }
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def test_diffusers_names_are_converted(tmp_path):
    theirs = {diffusers_name(name): torch.full_like(t, i) for i, (name, t) in enumerate(RAW.items())}
    assert "blocks.0.attn2.to_out.0.bias" in theirs
    ours = from_diffusers(theirs)
    assert list(ours) == list(RAW)
    assert all(tensor.float().mean() == i for i, tensor in enumerate(ours.values()))
    save_file(theirs, tmp_path / "diffusers.safetensors")
    assert load_wan(tmp_path / "diffusers.safetensors").shape == TINY
    assert from_diffusers(RAW) == RAW


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


# --------------------------------------------------------------------------------------------- compressor files

METADATA = CompressorMetadata(
    model_dim=12, temporal_stride=2, hidden_channels=(2, 3, 4, 5), block_frames=4, base_model="tiny Wan"
)


def compressor_weights(metadata=METADATA):
    weights = {}
    for i, (before, after) in enumerate(pairwise(metadata.channels)):
        weights |= {f"hr.{i}.weight": torch.randn(after, before, 3, 2, 2), f"hr.{i}.bias": torch.randn(after)}
    return weights


def write_header(path, header, weights=None):
    save_file(weights or compressor_weights(), path, metadata={COMPRESSOR_KEY: header})


def test_compressor_round_trip(tmp_path):
    weights = compressor_weights()
    assert len(weights) == 10
    save_compressor(tmp_path / "c.safetensors", weights, METADATA)
    loaded, metadata = load_compressor(tmp_path / "c.safetensors")
    assert metadata == METADATA
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert os.listdir(tmp_path) == ["c.safetensors"]  # no partial file is left


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"model_dim": 0}, "model_dim is 0"),
        ({"model_dim": "12"}, "model_dim"),
        ({"temporal_stride": 3}, "temporal_stride is 3"),
        ({"block_frames": 3}, "does not divide its block_frames 3"),
        ({"hidden_channels": [2, -1]}, "hidden_channels[1] is -1"),
        ({"hidden_channels": None}, "damaged compressor metadata"),
        ({"hidden_channels": [2, 3, 4]}, "unexpected 'hr.4.bias', 'hr.4.weight'"),
        ({"model_dim": 13}, "'hr.4' has weight [12, 5, 3, 2, 2]"),
    ],
)
def test_compressor_metadata_is_checked(tmp_path, fields, says):
    path = tmp_path / "c.safetensors"
    write_header(path, json.dumps(asdict(METADATA) | fields))
    text = sentence(load_compressor, path)
    assert says in text
    assert str(path) in text


@pytest.mark.parametrize("header", ["", "{", "[]", "3", '{"format_version": 1}'])
def test_damaged_compressor_metadata(tmp_path, header):
    write_header(tmp_path / "c.safetensors", header)
    assert "damaged compressor metadata" in sentence(load_compressor, tmp_path / "c.safetensors")


def test_compressor_weights_are_checked(tmp_path):
    path = tmp_path / "c.safetensors"
    broken = compressor_weights()
    broken["hr.2.bias"][0] = float("nan")
    write_header(path, json.dumps(asdict(METADATA)), broken)
    assert "'hr.2.bias'" in sentence(load_compressor, path)
    assert "'hr.2.bias'" in sentence(save_compressor, path, broken, METADATA)
    assert "'lr.weight'" in sentence(
        save_compressor, path, compressor_weights() | {"lr.weight": torch.ones(1)}, METADATA
    )
    assert "model_dim" in sentence(replace, METADATA, model_dim=-1)
    assert ".safetensors" in sentence(save_compressor, tmp_path / "c.pt", compressor_weights(), METADATA)
    assert "folder" in sentence(save_compressor, tmp_path / "no" / "c.sft", compressor_weights(), METADATA)


def test_other_files_given_as_compressor(tmp_path):
    save_file(RAW, tmp_path / "wan.safetensors")
    assert "which is a Wan diffusion model" in sentence(load_compressor, tmp_path / "wan.safetensors")
    torch.save({"generator_ema": fsdp(EMA)}, tmp_path / "wan.pt")
    assert "which is a Wan diffusion model" in sentence(load_compressor, tmp_path / "wan.pt")
    save_file(compressor_weights(), tmp_path / "bare.safetensors")
    assert COMPRESSOR_KEY in sentence(load_compressor, tmp_path / "bare.safetensors")
    assert "does not exist" in sentence(load_compressor, tmp_path / "no.safetensors")
