"""A LoRA under any of its names changes exactly the weights W + s * alpha / rank * B @ A, or is refused."""

import pytest
import torch
from safetensors.torch import save_file
from wan_files import RAW, sentence

from packforcing.files.lora import LayerChange, Lora, comfy_lora, given_lora, load_lora, merged, wan_layers
from packforcing.known_models import WanSizes
from packforcing.model.load import load_wan_modules
from packforcing.model.wan_modules import random_state_dict

SIZES = WanSizes(dim=128, ffn_dim=32, layers=2, heads=1, text_dim=8, freq_dim=6)
WAN = random_state_dict(SIZES, seed=1)
LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0", "blocks.1.ffn.2")
RANK, ALPHA, STRENGTH = 4, 6.0, 0.75
DIFFUSERS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2")


def pairs():
    generator = torch.Generator().manual_seed(5)
    return {
        layer: (
            torch.randn(RANK, WAN[f"{layer}.weight"].shape[1], generator=generator),
            torch.randn(len(WAN[f"{layer}.weight"]), RANK, generator=generator),
        )
        for layer in LAYERS
    }


def named(form, names=LAYERS, alpha=None):
    """The pairs under the names of a form: the layer's, then those of the matrices A and B."""
    prefix, a, b = form
    tensors = {}
    for name, (down, up) in zip(names, pairs().values(), strict=True):
        tensors |= {f"{prefix}{name}.{a}": down, f"{prefix}{name}.{b}": up}
        if alpha is not None:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return tensors


PEFT = ("base_model.model.", "lora_A.weight", "lora_B.weight")
COMFY = ("diffusion_model.", "lora_down.weight", "lora_up.weight")
KOHYA = tuple(layer.replace(".", "_") for layer in LAYERS)
FILES = {  # what a file holds, and its alpha
    "peft": (named(PEFT), None),
    "peft with the adapter's name": (
        named(("base_model.model._fsdp_wrapped_module.", "lora_A.default.weight", "lora_B.default.weight")),
        None,
    ),
    "diffusers": (named(("transformer.", "lora_A.weight", "lora_B.weight"), DIFFUSERS), None),
    "older diffusers": (named(("transformer.", "lora.down.weight", "lora.up.weight"), DIFFUSERS), None),
    "ComfyUI": (named(COMFY, alpha=ALPHA), ALPHA),
    "kohya": (named(("lora_unet_", "lora_down.weight", "lora_up.weight"), KOHYA, alpha=ALPHA), ALPHA),
}


def expected(alpha):
    """Direct products, in float64."""
    scale = STRENGTH * (1.0 if alpha is None else alpha / RANK)
    changed = {
        f"{layer}.weight": WAN[f"{layer}.weight"].double() + scale * up.double() @ down.double()
        for layer, (down, up) in pairs().items()
    }
    return {name: tensor.double() for name, tensor in WAN.items()} | changed


def assert_merged(found, alpha):
    for name, tensor in expected(alpha).items():
        if name.removesuffix(".weight") in LAYERS:
            assert not torch.allclose(WAN[name].double(), tensor, atol=0.1)
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found[name].double(), tensor)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_merged_weights_are_the_direct_product(tmp_path, name, suffix):
    tensors, alpha = FILES[name]
    path = tmp_path / f"lora{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert_merged(merged(WAN, load_lora(path), STRENGTH, torch.float32), alpha)


def test_longlives_file(tmp_path):
    """`trainer/distillation.py` of NVlabs/LongLive saves both adapters and the step."""
    other = {name: torch.full_like(tensor, 9.0) for name, tensor in named(PEFT).items()}
    torch.save({"generator_lora": named(PEFT), "critic_lora": other, "step": 3000}, tmp_path / "lora.pt")
    save_file(WAN, tmp_path / "base.safetensors")
    lora = load_lora(tmp_path / "lora.pt")
    assert_merged(load_wan_modules(tmp_path / "base.safetensors", loras=[(lora, STRENGTH)]).state_dict(), None)


def test_two_loras_add_up(tmp_path):
    save_file(named(PEFT), tmp_path / "a.safetensors")
    save_file(WAN, tmp_path / "base.safetensors")
    lora = load_lora(tmp_path / "a.safetensors")
    loras = [(lora, 0.5), (lora, STRENGTH - 0.5)]
    assert_merged(load_wan_modules(tmp_path / "base.safetensors", loras=loras).state_dict(), None)


def test_differences_and_convolutions(tmp_path):
    down, up = torch.randn(RANK, 16, 1, 2, 2), torch.randn(128, RANK, 1, 1, 1)
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        "diffusion_model.patch_embedding.diff": torch.ones(128, 16, 1, 2, 2),
        "diffusion_model.blocks.0.norm3.diff": torch.ones(128),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(32),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = merged(WAN, load_lora(tmp_path / "a.safetensors"), 2.0, torch.float32)
    product = torch.einsum("or,ripq->oipq", up[:, :, 0, 0, 0], down[:, :, 0])[:, :, None]
    close = {"rtol": 1e-5, "atol": 1e-5}
    name = "patch_embedding.weight"
    torch.testing.assert_close(found[name], WAN[name] + 2 * (product + 1), **close)
    torch.testing.assert_close(found["blocks.0.norm3.weight"], WAN["blocks.0.norm3.weight"] + 2, **close)
    torch.testing.assert_close(found["blocks.0.ffn.0.bias"], WAN["blocks.0.ffn.0.bias"] + 2, **close)


def test_the_base_may_be_scaled_fp8():
    layer = LAYERS[0]
    base = dict(WAN)
    base[f"{layer}.weight"] = (WAN[f"{layer}.weight"] / 0.01).to(torch.float8_e4m3fn)
    base[f"{layer}.scale_weight"] = torch.tensor(0.01)
    meant = base[f"{layer}.weight"].double() * torch.tensor(0.01).double()
    down, up = pairs()[layer]
    found = merged(base, Lora("a", {layer: LayerChange(down, up)}), STRENGTH, torch.float32)
    assert f"{layer}.scale_weight" not in found
    torch.testing.assert_close(
        found[f"{layer}.weight"].double(), meant + STRENGTH * up.double() @ down.double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({k.replace("blocks.1", "blocks.9"): v for k, v in named(PEFT).items()}, "3 of its 4 layers are not in it"),
        ({f"lora_te_{k}": v for k, v in named(COMFY).items()}, "4 of its 4 layers are not in it"),
        (
            {
                "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(2, 64),
                "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.ones(32, 2),
            },
            "'blocks.0.ffn.0.weight' by [32, 64], which is [32, 128] there",
        ),
        ({"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(31)}, "'blocks.0.ffn.0.bias' by [31], which is [32]"),
        ({"diffusion_model.blocks.0.norm1.diff_b": torch.ones(31)}, "1 of its 1 layers are not in it"),
    ],
)
def test_a_lora_of_another_model_is_refused(tmp_path, tensors, says):
    save_file(tensors, tmp_path / "a.safetensors")
    text = sentence(wan_layers, load_lora(tmp_path / "a.safetensors"), WAN)
    assert says in text
    assert str(tmp_path / "a.safetensors") in text


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (RAW, "is not a LoRA: found 69 tensors such as"),
        (named(PEFT) | {"x.hada_w1_a": torch.ones(2, 2)}, "'x.hada_w1_a', which is not part of a plain LoRA"),
        (named(COMFY) | {f"{LAYERS[0]}.dora_scale": torch.ones(2)}, "dora_scale', which is not part"),
        (dict(list(named(PEFT).items())[:-1]), "'blocks.1.ffn.2' has one of its two matrices only"),
        (named(COMFY) | {f"{LAYERS[0]}.lora_up.weight": torch.ones(2, 2)}, "two tensors for 'blocks.0.self_attn.q'"),
        (named(COMFY) | {f"diffusion_model.{LAYERS[0]}.lora_up.weight": torch.ones(128, 3)}, "no rank in common"),
        (named(COMFY) | {f"diffusion_model.{LAYERS[0]}.alpha": torch.ones(2)}, "is not one number"),
        (named(COMFY) | {f"diffusion_model.{LAYERS[0]}.lora_up.weight": torch.ones(128, 4).int()}, "tensor of int32"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, tensors, says):
    save_file(tensors, tmp_path / "a.safetensors")
    text = sentence(load_lora, tmp_path / "a.safetensors")
    assert says in text
    assert str(tmp_path / "a.safetensors") in text


@pytest.mark.parametrize("name", FILES)
def test_names_for_comfyui(tmp_path, name):
    tensors, alpha = FILES[name]
    save_file(tensors, tmp_path / "a.safetensors")
    found = comfy_lora(wan_layers(load_lora(tmp_path / "a.safetensors"), WAN))
    wanted = named(COMFY, alpha=alpha)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_command_lines_lora(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(named(PEFT), path)
    assert given_lora(str(path))[1] == 1.0
    assert given_lora(f"{path}:-0.25")[1] == -0.25
    assert given_lora(f"{path}:1e-1")[1] == 0.1
    save_file(named(PEFT), tmp_path / "b:2.safetensors")
    assert given_lora(f"{tmp_path}/b:2.safetensors")[1] == 1.0
    assert "finite number, but it is nan" in sentence(given_lora, f"{path}:nan")
    assert "does not exist" in sentence(given_lora, f"{tmp_path}/gone.safetensors:0.5")
    assert "does not exist" in sentence(given_lora, f"{path}:strong")
