"""The causal forward pass: ComfyUI's own Wan where there is no history, over ComfyUI's tree or the library's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from wan_reference import DIM, FFN_DIM, HEADS, TEXT_DIM, TEXT_LENGTH, assert_close, comfy_wan, seeded

from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape
from packforcing.errors import PackForcingError
from packforcing.known_models import SIZES as KNOWN_SIZES
from packforcing.known_models import text_len_of
from packforcing.model.attention import Attention, fast_attention, sdpa
from packforcing.model.causal_wan import CausalWan
from packforcing.model.wan_modules import WanModules, WanSizes, build_wan_modules, random_state_dict
from packforcing.model.wan_protocol import as_wan

SIZES = WanSizes(dim=DIM, ffn_dim=FFN_DIM, layers=3, heads=HEADS, text_dim=TEXT_DIM)
SIGMAS = (1.0, 0.9375, 5 / 6, 0.625, 0.1, 0.0)


@pytest.fixture(scope="module")
def model(comfy) -> nn.Module:
    return comfy_wan(comfy)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return seeded(2, TEXT_LENGTH, TEXT_DIM, seed=2)


def layout(frames: int, width: int, height: int, **config: int) -> Layout:
    config = {"sink_frames": 0, "recent_frames": 0, "top_k": 0, **config}
    return Layout(CacheConfig(block_frames=frames, **config), FrameSize(width, height), temporal_stride=1)


def unpadded(modules: nn.Module, attention: Attention = fast_attention) -> CausalWan:
    """A Wan that takes prompts as they are, as ComfyUI's model does."""
    return CausalWan(modules, attention, text_len=0)


def first_block(wan: CausalWan, x: Tensor, sigma: float, text: Tensor) -> Tensor:
    batch, _, frames, height, width = x.shape
    cache = Cache(layout(frames, 8 * width, 8 * height), wan.shape, dtype=wan.dtype, batch=batch)
    cache.begin(0)
    return wan.denoise(x, sigma, wan.embed_text(text), cache)


# --- against ComfyUI ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("cells", [(2, 2), (8, 8), (8, 12), (14, 10)], ids=str)
def test_a_block_without_history_is_comfyuis_own_forward(model, text, frames, cells):
    x = seeded(2, 16, frames, *cells)
    expected = model(x, torch.full((2,), 625.0), text)
    assert_close(first_block(unpadded(model), x, 0.625, text), expected)


def test_a_prompt_is_padded_to_512_tokens_as_comfyuis_encoder_pads_it(model, text):
    """Its encoder gives a Wan 512 tokens, with zeros after the prompt's; a longer prompt stays as it is."""
    x, t = seeded(2, 16, 1, 8, 8), torch.full((2,), 625.0)
    zeros = torch.zeros(2, 512, TEXT_DIM)
    zeros[:, :TEXT_LENGTH] = text
    padded = first_block(CausalWan(model), x, 0.625, text)
    assert_close(padded, model(x, t, zeros))
    assert (padded - model(x, t, text)).abs().max() > 1e-3
    long = seeded(2, 600, TEXT_DIM, seed=3)
    assert_close(first_block(CausalWan(model), x, 0.625, long), model(x, t, long))


def test_the_demos_prompts_are_not_padded():
    """Whichever file its weights are from; the published models' are."""
    assert {name: text_len_of(sizes.shape) for name, sizes in KNOWN_SIZES.items()} == {
        "wan2.1-1.3b": 512,
        "wan2.1-14b": 512,
        "tiny": 0,
    }
    with torch.device("meta"):
        assert CausalWan(WanModules(KNOWN_SIZES["tiny"])).padded(torch.zeros(1, 3, 4096)).shape == (1, 3, 4096)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_noise_level_is_comfyuis(model, text, sigma):
    x = seeded(2, 16, 3, 8, 12)
    assert_close(first_block(unpadded(model), x, sigma, text), model(x, torch.full((2,), 1000 * sigma), text))


def test_the_noise_level_and_the_prompt_matter(model, text):
    """So that the comparisons above could fail."""
    x = seeded(2, 16, 3, 8, 12)
    wan = unpadded(model)
    out = first_block(wan, x, 1.0, text)
    for other in (first_block(wan, x, 0.9375, text), first_block(wan, x, 1.0, text.flip(0))):
        assert (out - other).abs().max() > 0.05 * out.abs().max()


def three_blocks(wan: CausalWan, text: Tensor) -> list[Tensor]:
    """Velocities, and at last the keys and values, of three blocks with a compressed form."""
    cache = Cache(layout(2, 64, 96, recent_frames=2, top_k=2), wan.shape, batch=2)
    prompt = wan.embed_text(text)
    found = []
    for block in range(3):
        cache.begin(block)
        found.append(wan.denoise(seeded(2, 16, 2, 12, 8, seed=block), 0.9375, prompt, cache))
        compressed = seeded(2, cache.layout.compressed_tokens_per_block, DIM, seed=10 + block)
        wan.clean_pass(seeded(2, 16, 2, 12, 8, seed=20 + block), prompt, cache, compressed)
        cache.end()
    return found + [x for layer in range(SIZES.layers) for x in cache.context(layer)]


@pytest.mark.parametrize("operations", ["disable_weight_init", "manual_cast"])
def test_the_librarys_tree_gives_the_bits_of_comfyuis_tree(comfy, model, text, operations):
    import comfy.ops

    theirs = comfy_wan(comfy, operations=getattr(comfy.ops, operations))
    ours = build_wan_modules(SIZES, model.state_dict())
    for found, expected in zip(three_blocks(unpadded(ours), text), three_blocks(unpadded(theirs), text), strict=True):
        assert torch.equal(found, expected)


def test_the_librarys_tree_has_the_checkpoints_keys_and_shapes(model):
    ours = build_wan_modules(SIZES, model.state_dict()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}


# --- contracts ----------------------------------------------------------------------------------------


class OnlyForward(nn.Module):
    """Stands in for a quantised, patched or lazily loaded layer: it can be called, and has no weight to read."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._hidden = [layer]
        self.in_features = layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self._hidden[0](x)


def test_layers_are_called_and_their_weights_never_read(model, text):
    wrapped = build_wan_modules(SIZES, model.state_dict())
    for module in list(wrapped.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, OnlyForward(child))
    assert sum(isinstance(module, OnlyForward) for module in wrapped.modules()) == 6 + SIZES.layers * 10
    plain = build_wan_modules(SIZES, model.state_dict())
    for found, expected in zip(
        three_blocks(unpadded(wrapped), text),
        three_blocks(unpadded(plain), text),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_attention_is_a_function_passed_in(model, text):
    seen = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return sdpa(q, k, v)

    first_block(unpadded(model, attention), seeded(2, 16, 2, 8, 8), 1.0, text)
    assert seen == SIZES.layers * [(32, 32), (32, TEXT_LENGTH)]


def test_the_patch_embedding_crops_an_odd_row_and_column(model):
    x = seeded(1, 16, 2, 9, 5)
    wan = unpadded(model)
    assert torch.equal(wan.patch_tokens(x), wan.patch_tokens(x[..., :8, :4]))


def test_the_prompts_batch_may_be_one(model, text):
    """One prompt for two videos is that prompt twice."""
    x = seeded(2, 16, 2, 8, 8)
    wan = unpadded(model)
    assert_close(first_block(wan, x, 1.0, text[:1]), first_block(wan, x, 1.0, text[:1].expand(2, -1, -1)), 1e-6)


# --- refusals -----------------------------------------------------------------------------------------


def one_sentence(error: pytest.ExceptionInfo) -> str:
    """The message, once it is known to be a single sentence that says what to do."""
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message
    assert ":" in message or ";" in message, "what is wrong, then what to do"
    return message


def test_a_tree_that_is_not_wan_is_refused():
    with pytest.raises(PackForcingError) as error:
        CausalWan(nn.Linear(2, 2))
    assert "Linear has no patch_embedding" in one_sentence(error)


def test_a_tree_without_a_head_is_refused(model):
    modules = build_wan_modules(SIZES, model.state_dict())
    del modules.head
    with pytest.raises(PackForcingError) as error:
        as_wan(modules)
    assert "has no head" in one_sentence(error)


@pytest.mark.parametrize(
    ("sizes", "channels", "image_branch"),
    [
        ({"model_type": "i2v", "in_dim": 36}, 36, True),  # Wan 2.1 image to video
        ({"in_dim": 36}, 36, False),  # Wan 2.2 image to video, which has no image branch
        ({"in_dim": 48, "out_dim": 48}, 48, False),  # Wan 2.2 5B
    ],
    ids=["i2v", "i2v-2.2", "5b"],
)
def test_image_to_video_models_are_refused(comfy, sizes, channels, image_branch):
    with pytest.raises(PackForcingError) as error:
        CausalWan(comfy_wan(comfy, layers=1, **sizes))
    message = one_sentence(error)
    assert f"{channels} channels" in message
    assert ("image branch" in message) == image_branch


@pytest.mark.parametrize("width", [768, 4096])
def test_text_of_another_width_is_refused(model, width):
    with pytest.raises(PackForcingError) as error:
        unpadded(model).embed_text(torch.zeros(1, 3, width))
    message = one_sentence(error)
    assert f"{width} wide" in message
    assert f"{TEXT_DIM} wide" in message
    assert "UMT5" in message


def test_the_shape_of_a_model_is_read_from_its_tree(model):
    assert unpadded(model).shape == ModelShape(layers=3, dim=DIM, heads=HEADS)


# ---------------------------------------------------------------------- compiled


def test_layers_are_compiled_once_for_each_number_of_tokens(compiled_graphs):
    """The same velocities and cache; one graph a part, whatever the number of layers, and no breaks (fullgraph)."""
    sizes = WanSizes(dim=256, ffn_dim=512, layers=5, heads=2)
    modules = build_wan_modules(sizes, random_state_dict(sizes, seed=0))
    layout = Layout(CacheConfig(sink_frames=4, recent_frames=4, top_k=1), FrameSize(64, 64), 2)
    made = []
    with torch.no_grad():
        for compiled in (False, True):
            wan = CausalWan(modules, compiled=compiled)
            text = wan.embed_text(seeded(1, 6, 4096))
            cache = Cache(layout, wan.shape, rotary=wan.rotary)
            velocities = []
            for block in range(4):
                cache.begin(block)
                velocities.append(wan.denoise(seeded(1, 16, 4, 8, 8, seed=block), 0.6, text, cache))
                compressed = wan.patch_tokens(seeded(1, 16, 2, 2, 2, seed=block)) if block else None
                wan.clean_pass(seeded(1, 16, 4, 8, 8, seed=9 + block), text, cache, compressed)
                cache.end()
            made.append(torch.cat(velocities))
    assert_close(made[1], made[0])
    # Once for 64 tokens, and once for 64 + 2; placing for the 2; queries only for the 64, whatever they are a slice of.
    parts = ["project", "after_attention", "after_prompt", "place_in_reals"]
    assert sorted(compiled_graphs) == sorted([*parts, *parts, "rotate_in_reals"])
