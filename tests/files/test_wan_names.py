"""Sets of weights are chosen, and trainers' and diffusers' names become Wan's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from wan_files import EMA, RAW, TINY, sentence

from packforcing.files.wan_checkpoint import load_wan
from packforcing.files.wan_names import from_diffusers, pick_weight_set, strip_prefixes

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
