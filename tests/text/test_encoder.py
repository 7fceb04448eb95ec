"""UMT5's encoder against ComfyUI's own and against transformers', its three kinds of file, and every mistake."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import tiny_umt5 as tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from packforcing.errors import PackForcingError
from packforcing.text.encoder import TextEncoder, open_text_encoder
from packforcing.text.tokenizer import Tokenizer, cleaned
from packforcing.text.umt5 import distance_buckets

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "the camera pans over a small blue lake, then it starts to rain; " * 3, "")


def opened(path: Path, **options: object) -> TextEncoder:
    return open_text_encoder(str(path), None, CPU, **options)


@pytest.fixture(scope="module")
def umt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.comfyui_file(tmp_path_factory.mktemp("umt5"), tiny.random_umt5())


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same but for rounding: where a file's bytes lie in memory decides how a product is summed up."""
    for context, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(context, wanted, rtol=1e-5, atol=1e-5)


def comfyui_clip(comfy: ModuleType, state: dict[str, Tensor]) -> tuple[object, object]:
    """ComfyUI's text encoder of Wan and its tokenizer, as its loader makes them of a file."""
    wan = importlib.import_module("comfy.text_encoders.wan")
    fp8 = state["scaled_fp8"].dtype if "scaled_fp8" in state else None
    # Its sizes are read from a file of its own; options of this name replace them.
    sizes = {**tiny.CONFIG, "vocab_size": len(state["shared.weight"])}
    options = {"umt5xxl_model_config": sizes, "clip_l_model_config": sizes, "model_name": "umt5xxl"}
    model = wan.te(torch.float32, fp8)(model_options=options)
    missing, _ = model.umt5xxl.load_sd(state)
    assert not missing
    spiece = torch.frombuffer(bytearray(tiny.spiece_model()), dtype=torch.uint8)
    return model, wan.WanT5Tokenizer(tokenizer_data={"spiece_model": spiece})


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "scaled fp8"])
def test_embeddings_are_those_of_comfyui(comfy: ModuleType, tmp_path: Path, fp8: bool):
    """Core's CLIPTextEncode gives 512 rows, of which those after a prompt's end are 0: ours, padded."""
    state = tiny.random_umt5()
    if fp8:
        state, _ = tiny.scaled_to_fp8(state)
    model, tokenizer = comfyui_clip(comfy, state)
    found = opened(tiny.comfyui_file(tmp_path, state)).encode(PROMPTS)
    for prompt, context in zip(PROMPTS, found, strict=True):
        expected, _ = model.encode_token_weights(tokenizer.tokenize_with_weights(prompt))
        assert expected.shape == (1, 512, tiny.WIDTH)
        assert context.abs().max() > 1
        torch.testing.assert_close(context, expected[0, : len(context)], rtol=1e-4, atol=1e-4)
        assert not expected[0, len(context) :].any()


def test_embeddings_are_those_of_transformers(comfy: ModuleType, umt5: Path):
    transformers = importlib.import_module("transformers")
    state = tiny.random_umt5()
    config = transformers.UMT5Config(**tiny.CONFIG, vocab_size=len(state["shared.weight"]))
    model = transformers.UMT5EncoderModel(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"encoder.embed_tokens.weight"}
    model.tie_weights()
    for prompt, context in zip(PROMPTS, opened(umt5).encode(PROMPTS), strict=True):
        ids = torch.tensor([[*tiny.pieces().encode(" ".join(prompt.split())), 1]])
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0]
        torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_all_layouts_give_the_same_embeddings(umt5: Path, tmp_path: Path, layout: str):
    path = tiny.LAYOUTS[layout](tmp_path, tiny.random_umt5())
    assert_alike(opened(path).encode(PROMPTS), opened(umt5).encode(PROMPTS))


def test_a_repository_s_folder_will_do(umt5: Path, tmp_path: Path):
    """The Wan authors' folder, and a Diffusers pipeline's: the encoder and its tokenizer are found in it."""
    tiny.hugging_face_folder(tmp_path / "diffusers", tiny.random_umt5())
    (tmp_path / "wan").mkdir()
    tiny.wan_file(tmp_path / "wan", tiny.random_umt5())
    expected = opened(umt5).encode(PROMPTS)
    for folder in ("diffusers", "wan"):
        assert_alike(opened(tmp_path / folder).encode(PROMPTS), expected)


def test_fp8_with_factors_is_its_values(tmp_path: Path):
    """The factor's two names: ComfyUI's, and the one of newer files."""
    written, exact = tiny.scaled_to_fp8(tiny.random_umt5())
    newer = {name.replace("scale_weight", "weight_scale"): tensor for name, tensor in written.items()}
    (tmp_path / "newer").mkdir()
    (tmp_path / "exact").mkdir()
    expected = opened(tiny.comfyui_file(tmp_path / "exact", exact)).encode(PROMPTS)
    for path in (tiny.comfyui_file(tmp_path, written), tiny.comfyui_file(tmp_path / "newer", newer)):
        assert_alike(opened(path).encode(PROMPTS), expected)


def test_a_plain_fp8_file_is_read(tmp_path: Path):
    """Kijai's kind: everything in fp8, without factors."""
    rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tiny.random_umt5().items()}
    (tmp_path / "exact").mkdir()
    exact = tiny.comfyui_file(tmp_path / "exact", {name: tensor.float() for name, tensor in rounded.items()})
    assert_alike(opened(tiny.comfyui_file(tmp_path, rounded)).encode(PROMPTS), opened(exact).encode(PROMPTS))


def test_bfloat16_is_near(umt5: Path):
    exact = opened(umt5).encode(PROMPTS)
    for found, expected in zip(opened(umt5, dtype=torch.bfloat16).encode(PROMPTS), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert 1e-4 < (found.float() - expected).norm() / expected.norm() < 0.03


def test_prompts_do_not_see_each_other(umt5: Path):
    together = opened(umt5).encode(PROMPTS)
    for prompt, context in zip(PROMPTS, together, strict=True):
        assert torch.equal(opened(umt5).encode([prompt])[0], context)


def test_one_layer_is_what_it_holds(umt5: Path):
    """The bytes that are told are a layer's, counted by hand."""
    layer = 4 * 32 * tiny.WIDTH + 3 * tiny.FFN * tiny.WIDTH + tiny.BUCKETS * tiny.HEADS + 2 * tiny.WIDTH
    assert opened(umt5).needed_bytes == 4 * layer
    assert opened(umt5, dtype=torch.bfloat16).needed_bytes == 2 * layer


def test_distances_have_the_buckets_of_transformers(comfy: ModuleType):
    module = importlib.import_module("transformers.models.umt5.modeling_umt5")
    attention = module.UMT5Attention.__new__(module.UMT5Attention)
    torch.nn.Module.__init__(attention)
    attention.is_decoder = False
    attention.relative_attention_num_buckets, attention.relative_attention_max_distance = 32, 128
    places = torch.arange(512)
    assert torch.equal(distance_buckets(512, 32), attention._relative_position_bucket(places[None] - places[:, None]))


# --- words ------------------------------------------------------------------------------------------------------------


def test_ids_are_the_pieces_and_an_end():
    tokenizer = Tokenizer(tiny.spiece_model(), "here")
    assert tokenizer.ids("a red  circle\n").tolist() == [*tiny.pieces().encode("a red circle"), 1]
    assert tokenizer.ids("").tolist() == [1]


def test_a_long_prompt_is_cut_to_512_tokens_with_its_end():
    tokenizer = Tokenizer(tiny.spiece_model(), "here")
    prompt = "the camera pans over a lake " * 100
    whole = tiny.pieces().encode(prompt.strip())
    assert tokenizer.ids(prompt).tolist() == [*whole[:511], 1]
    assert tokenizer.count(prompt) == len(whole) + 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  a\tred\n\n circle ", "a red circle"),
        ("fish &amp; chips", "fish & chips"),
        ("1 &amp;lt; 2", "1 < 2"),
        ("it’s “red”", 'it\'s "red"'),
        ("&ldquo;red&rdquo;", '"red"'),
        ("画面，宽", "画面，宽"),
    ],
)
def test_a_prompt_is_cleaned_as_wan_does(prompt: str, expected: str):
    """ftfy 6.3.1's `fix_text` and two of `html.unescape` gave these; full width is the tokenizer's to undo."""
    assert cleaned(prompt) == expected


# --- mistakes ---------------------------------------------------------------------------------------------------------


def broken(path: Path, kind: str) -> str:
    """Makes a file that is wrong in one way, and names it."""
    state = tiny.random_umt5()
    if kind == "another model":
        state = {"decoder.upsamples.0.weight": torch.zeros(2)}
    elif kind == "T5":
        state = {n: t for n, t in state.items() if "bias" not in n or "block.0." in n}
    elif kind == "a tensor lacks":
        del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    elif kind == "a shape":
        state["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"] = torch.zeros(3, 3)
    elif kind == "integers":
        state["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"] = torch.zeros(3, 3, dtype=torch.int8)
    elif kind == "few rows":
        state["shared.weight"] = state["shared.weight"][:50].clone()
    elif kind == "not finite":
        state["encoder.final_layer_norm.weight"][7] = torch.inf
    if kind == "no tokenizer":
        save_file(state, path / "umt5.safetensors")
        return str(path / "umt5.safetensors")
    return str(tiny.comfyui_file(path, state))


MISTAKES = {
    "another model": "holds no UMT5 text encoder, but a Wan VAE: give --text-encoder the UMT5-XXL",
    "T5": "is a T5, whose layers share their positions, not a UMT5",
    "a tensor lacks": "lacks 1 tensors of a UMT5 encoder of 3 layers ('encoder.block.1.layer.1.DenseReluDense.wo",
    "a shape": "does not fit together: 'encoder.block.1.layer.1.DenseReluDense.wi_1.weight' has the shape [3, 3]",
    "integers": "is quantized in a way that is not read here",
    "few rows": "has embeddings for 50: take both from the same UMT5",
    "no tokenizer": "comes without a tokenizer, and there is no spiece.model near it: give --tokenizer",
}


@pytest.mark.parametrize(("kind", "told"), MISTAKES.items(), ids=MISTAKES)
def test_a_wrong_file_is_told_when_it_is_opened(tmp_path: Path, kind: str, told: str):
    with pytest.raises(PackForcingError) as error:
        open_text_encoder(broken(tmp_path, kind), None, CPU)
    assert told in str(error.value)


def test_numbers_that_are_not_finite_are_told(tmp_path: Path):
    with pytest.raises(PackForcingError, match="gave numbers that are not finite"):
        open_text_encoder(broken(tmp_path, "not finite"), None, CPU).encode(["a"])


def test_a_folder_without_weights_or_with_some_is_told(tmp_path: Path):
    with pytest.raises(PackForcingError, match="has no weights of a text encoder"):
        opened(tmp_path)
    folder = tiny.hugging_face_folder(tmp_path, tiny.random_umt5())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PackForcingError, match="lacks 1 of the 2 files of its weights"):
        opened(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps([]))
    with pytest.raises(PackForcingError, match="is no index of weights"):
        opened(folder)


def test_a_tokenizer_that_is_none_is_told(umt5: Path, tmp_path: Path):
    (tmp_path / "words.model").write_bytes(b"no model")
    for given, told in (
        (tmp_path / "gone", "cannot be read"),
        (tmp_path, "has no spiece.model"),
        (tmp_path / "words.model", "is no sentencepiece model"),
    ):
        with pytest.raises(PackForcingError, match=told):
            open_text_encoder(str(umt5), str(given), CPU)


def test_a_missing_package_is_told(umt5: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackForcingError, match=r"sentencepiece, which is not installed: pip install"):
        opened(umt5)


def test_nothing_of_a_file_is_run(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    torch.save({"token_embedding.weight": Evil()}, tmp_path / "models_t5.pth")
    with pytest.raises(PackForcingError, match="unpickling it would run"):
        opened(tmp_path / "models_t5.pth")
