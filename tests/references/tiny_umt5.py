"""A UMT5 encoder small enough for a test, as wide as the real one, in the layouts of the published files."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, HEADS, HEAD, FFN, LAYERS, BUCKETS = 4096, 4, 8, 24, 3, 32
CONFIG = {
    "model_type": "umt5",
    "d_model": WIDTH,
    "d_kv": HEAD,
    "d_ff": FFN,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": BUCKETS,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dense_act_fn": "gelu_pytorch_tanh",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dropout_rate": 0.0,
}  # of Hugging Face's config.json; ComfyUI's has the same names

# The names of the Wan authors' file: "their name": "Hugging Face's"
WAN_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}

SENTENCES = (
    "a red circle moves to the left, then it starts to rain.",
    "the camera pans over a small blue lake; trees stand on a hill",
    "two yellow stars swing on an orange background, slowly and silently!",
    'it\'s "cold" & windy <here>',
)


@functools.cache
def spiece_model() -> bytes:
    """A sentencepiece model with UMT5's special tokens, trained on a few sentences."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(20 * SENTENCES),
        model_writer=model,
        vocab_size=160,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=spiece_model())


def random_umt5(seed: int = 0) -> dict[str, Tensor]:
    """Weights under Hugging Face's names, of sizes that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    inner = HEADS * HEAD
    state = {"shared.weight": normal(pieces().get_piece_size() + 8, WIDTH, std=1.0)}
    for number in range(LAYERS):
        block = f"encoder.block.{number}."
        attention, ffn = f"{block}layer.0.SelfAttention.", f"{block}layer.1.DenseReluDense."
        state |= {f"{attention}{name}.weight": normal(inner, WIDTH, std=0.6 * WIDTH**-0.5) for name in "qkv"}
        state[f"{attention}o.weight"] = normal(WIDTH, inner, std=inner**-0.5)
        state[f"{attention}relative_attention_bias.weight"] = normal(BUCKETS, HEADS, std=1.0)
        state |= {f"{ffn}{name}.weight": normal(FFN, WIDTH, std=WIDTH**-0.5) for name in ("wi_0", "wi_1")}
        state[f"{ffn}wo.weight"] = normal(WIDTH, FFN, std=FFN**-0.5)
        state |= {f"{block}layer.{part}.layer_norm.weight": 1 + normal(WIDTH, std=0.1) for part in (0, 1)}
    state["encoder.final_layer_norm.weight"] = 1 + normal(WIDTH, std=0.1)
    return state


def scaled_to_fp8(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The linear layers in fp8 with a factor each, as a file has them; and the same values in float32."""
    written, exact = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or "bias" in name or name == "shared.weight":
            written[name] = exact[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        written[name] = (tensor / scale).to(torch.float8_e4m3fn)
        written[name.replace("weight", "scale_weight")] = scale
        exact[name] = written[name].float() * scale
    return written, exact


# --- files ------------------------------------------------------------------------------------------------------------


def comfyui_file(folder: Path, state: dict[str, Tensor]) -> Path:
    """As ComfyUI's `umt5_xxl_fp16.safetensors`: the tokenizer is one of the tensors."""
    spiece = torch.frombuffer(bytearray(spiece_model()), dtype=torch.uint8)
    save_file({**state, "spiece_model": spiece}, folder / "umt5_xxl_fp16.safetensors")
    return folder / "umt5_xxl_fp16.safetensors"


def wan_file(folder: Path, state: dict[str, Tensor]) -> Path:
    """As the Wan authors' repository: their names, saved by torch, with the tokenizer in google/umt5-xxl."""
    named = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for number in range(LAYERS):
        for theirs, ours in WAN_NAMES.items():
            named[f"blocks.{number}.{theirs}.weight"] = state[f"encoder.block.{number}.{ours}.weight"]
    assert len(named) == len(state)
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(named, path)
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece_model())
    return path


def hugging_face_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    """As a Diffusers pipeline's folder text_encoder: two shards with an index; the tokenizer in a folder beside it."""
    own = folder / "text_encoder"
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps(CONFIG))
    shards: list[dict[str, Tensor]] = [{}, {}]
    where = {}
    for number, (name, tensor) in enumerate(state.items()):
        shards[number % 2][name] = tensor
        where[name] = f"model-0000{number % 2 + 1}-of-00002.safetensors"
    shards[0]["encoder.embed_tokens.weight"] = shards[0]["shared.weight"].clone()
    for number, shard in enumerate(shards):
        save_file(shard, own / f"model-0000{number + 1}-of-00002.safetensors")
    (own / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece_model())
    return own


LAYOUTS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "comfyui": comfyui_file,
    "wan": wan_file,
    "hugging-face": hugging_face_folder,
}
