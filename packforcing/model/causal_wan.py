"""The causal forward pass of one block over a Wan 2.1 module tree (docs/method.md, sections 3, 5 and 7).

Runs over any module tree with Wan's sub-module names: ComfyUI's, or the library's own `wan_modules.WanModules`.
Sub-modules are called, and their weights are never read. So LoRA patches, fp8 and GGUF operations, offloading and lazy
loading keep working. `modulation` is the exception: it belongs to no sub-module, and is cast at use (`_modulation_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..cache.cache import Cache
from ..cache.head_share import WHOLE, HeadShare
from ..cache.rope import EAGER_ROTARY, compiled_rotary
from ..config import PATCH, ModelShape
from ..devices import to_device
from ..errors import PackForcingError
from ..known_models import text_len_of
from .attention import Attention, fast_attention
from .read_ahead import AtHand, Weights
from .wan_protocol import BlockModules, HeadModules, as_wan


class Text(Protocol):
    """What a pass runs under: a prompt, or what is made of several."""

    def attend(self, layer: int, queries: Tensor, attention: Attention) -> Tensor:
        """The attention of queries [B, L, H, D] to the prompt at one layer, [B, L, H, D]."""


@dataclass(frozen=True)
class TextKV:
    """Keys and values [B, L, H, D] of the prompt at each layer: the same in every pass, so made once a run."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    def attend(self, layer: int, queries: Tensor, attention: Attention) -> Tensor:
        return attention(queries, *self.layers[layer])


@dataclass(frozen=True)
class BlendedText:
    """Two prompts at once: what the attention to each gives is mixed, so they may have different numbers of tokens."""

    old: Text
    new: Text
    weight: float  # of the new one, in [0, 1]

    def attend(self, layer: int, queries: Tensor, attention: Attention) -> Tensor:
        old, new = (text.attend(layer, queries, attention) for text in (self.old, self.new))
        return torch.lerp(old, new, self.weight)


@dataclass(frozen=True)
class SplitText:
    """One prompt for the first `full` tokens, another for the others.

    All tokens attend to both prompts, and what is not theirs is dropped. So shapes are those of a pass under one
    prompt, and a token's bits as well. It is needed in one pass a switch, and costs about 1% of that.
    """

    first: Text
    rest: Text
    full: int

    def attend(self, layer: int, queries: Tensor, attention: Attention) -> Tensor:
        first, rest = (text.attend(layer, queries, attention) for text in (self.first, self.rest))
        return torch.cat((first[:, : self.full], rest[:, self.full :]), dim=1)


def time_features(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal features [B, dim] of timesteps [B] on the CPU: cosines, then sines; in the timesteps' precision."""
    half = dim // 2
    frequencies = 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(timestep.double(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(timestep.dtype)


# ---------------------------------------------------------------------- what a layer does between its attentions


def _split(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


def project(block: BlockModules, hidden: Tensor, modulation: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, L, H, D] of the self-attention of hidden tokens [B, L, d].

    Here and below, `modulation` [B, 6, d] is the layer's shift, scale and gate, twice.
    """
    shift, scale = modulation.chunk(6, dim=1)[:2]
    x, attn = torch.addcmul(shift, block.norm1(hidden), 1 + scale), block.self_attn
    queries, keys = attn.norm_q(attn.q(x)), attn.norm_k(attn.k(x))
    return _split(queries, head_dim), _split(keys, head_dim), _split(attn.v(x), head_dim)


def after_attention(
    block: BlockModules, hidden: Tensor, attended: Tensor, modulation: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Adds the self-attention [B, L, H, D] to the hidden tokens [B, L, d]; with the queries to the prompt."""
    gate = modulation.chunk(6, dim=1)[2]
    hidden = torch.addcmul(hidden, block.self_attn.o(attended.flatten(2)), gate)
    cross = block.cross_attn
    return hidden, _split(cross.norm_q(cross.q(block.norm3(hidden))), head_dim)


def after_prompt(block: BlockModules, hidden: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
    """Adds the attention to the prompt [B, L, H, D], and the feed-forward layer, to the hidden tokens [B, L, d]."""
    shift, scale, gate = modulation.chunk(6, dim=1)[3:]
    hidden = hidden + block.cross_attn.o(attended.flatten(2))
    return torch.addcmul(hidden, block.ffn(torch.addcmul(shift, block.norm2(hidden), 1 + scale)), gate)


@dataclass(frozen=True)
class LayerParts:
    """The three functions above, as they are or compiled."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]] = project
    after_attention: Callable[..., tuple[Tensor, Tensor]] = after_attention
    after_prompt: Callable[..., Tensor] = after_prompt

    def compiled(self) -> LayerParts:
        """By torch.compile, once for all layers and once more for each number of tokens, of which a run has three."""
        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        return LayerParts(compiled(self.project), compiled(self.after_attention), compiled(self.after_prompt))


class CausalWan:
    """A Wan transformer run block by block over a `Cache`.

    Args:
        modules: the module tree; raises PackForcingError when it is not Wan 2.1's.
        attention: the attention function.
        dtype: what the hidden states are computed in.
        device: where they are computed.
        compiled: whether what a layer does between its attentions, and the rotations of a cache that takes `turns`, are
            compiled, which takes a minute at first.
        text_len: tokens to which prompts are padded; None: as its shape says (`known_models.text_len_of`).
        share: which heads the module tree has; `shape` is that of the whole model.

    Attributes:
        weights: what brings the layers' weights to the device, where they do not lie there (`read_ahead`).
    """

    def __init__(
        self,
        modules: nn.Module,
        attention: Attention = fast_attention,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
        text_len: int | None = None,
        share: HeadShare = WHOLE,
    ) -> None:
        self.modules = as_wan(modules)
        self.share = share
        self.attention = attention
        self.dtype = dtype
        self.device = torch.device(device)
        self.heads = self.modules.blocks[0].self_attn.num_heads
        self.head_dim = self.shape.head_dim
        self._parts = LayerParts().compiled() if compiled else LayerParts()
        self.rotary = compiled_rotary() if compiled else EAGER_ROTARY  # for its caches
        self.text_len = text_len_of(self.shape) if text_len is None else text_len
        self.weights: Weights = AtHand()
        # In training: keep only the layers' inputs for the backward pass of `denoise`, and compute the rest again.
        # Nothing may be written into the cache in between.
        self.recompute = False
        self._sent: dict[Tensor, Tensor] = {}  # modulations that lie on another device, and their copies on this one

    @property
    def shape(self) -> ModelShape:
        return ModelShape(len(self.modules.blocks), self.modules.patch_embedding.out_channels, self.heads)

    # ------------------------------------------------------------------ embeddings

    def patch_tokens(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 16, T, h, w] -> hidden tokens [B, T * h/2 * w/2, d]; an odd last row is cropped."""
        embed = self.modules.patch_embedding
        # ComfyUI keeps this layer in float32 in some versions, and in the model's own type in others.
        native = embed.weight.dtype if embed.weight.dtype in (torch.float32, torch.float64) else self.dtype
        grid = embed(latents.to(self.device, native)).to(self.dtype)
        return rearrange(grid, "b d t h w -> b (t h w) d")

    def padded(self, context: Tensor) -> Tensor:
        """Text embeddings [B, L, 4096] with zeros up to the length that the model was trained with.

        A longer one stays as it is, as in ComfyUI's own sampler: there, prompts can be joined.
        """
        return F.pad(context, (0, 0, 0, max(0, self.text_len - context.shape[-2])))

    def embed_text(self, context: Tensor) -> TextKV:
        """Text embeddings [B, L, 4096], padded where they should be -> their keys and values at each layer.

        Raises PackForcingError when they are not as wide as the model expects.
        """
        width = self.modules.text_embedding[0].in_features
        if context.ndim != 3:
            raise PackForcingError(
                f"An encoded prompt has the shape [batch, tokens, width], not {list(context.shape)}: encode "
                "it with the model's own text encoder (UMT5-XXL for Wan 2.1)."
            )
        if context.shape[-1] != width:
            raise PackForcingError(
                f"The prompt was encoded {context.shape[-1]} wide, but the model takes text embeddings {width} wide: "
                "encode it with the model's own text encoder (UMT5-XXL for Wan 2.1)."
            )
        hidden = self.modules.text_embedding(to_device(self.padded(context), self.device, self.dtype))
        layers = []
        for layer, block in enumerate(self.modules.blocks):
            with self.weights.prompt(layer):
                keys = block.cross_attn.norm_k(block.cross_attn.k(hidden))
                values = block.cross_attn.v(hidden)
            layers.append((_split(keys, self.head_dim), _split(values, self.head_dim)))
        return TextKV(tuple(layers))

    def _modulations(self, sigma: float | Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Time embedding of noise levels, one or [B]: [B, 1, d] for the head, [B, 6, d] for the layers."""
        precision = torch.promote_types(self.dtype, torch.float32)
        # Made on the CPU and sent: neither the host nor the device waits for the pass before.
        timestep = torch.as_tensor(1000.0 * sigma, dtype=precision).expand(batch)
        features = to_device(time_features(timestep, self.modules.freq_dim), self.device, self.dtype)
        embedding = self.modules.time_embedding(features)
        return embedding[:, None], rearrange(self.modules.time_projection(embedding), "b (six d) -> b six d", six=6)

    def _modulation_of(self, module: BlockModules | HeadModules, like: Tensor) -> Tensor:
        """The modulation [1, n, d] that a layer or the head learnt, with the type and device of hidden tokens.

        Some versions of ComfyUI leave it on the CPU. It is sent once then: in every pass, the host would wait for it.
        """
        own = module.modulation
        if own.device == like.device or torch.is_grad_enabled():  # in training it changes with every step
            return own.to(like)
        if own not in self._sent:
            self._sent[own] = own.to(like)
        return self._sent[own]

    # ------------------------------------------------------------------ passes

    def denoise(self, x: Tensor, sigma: float | Tensor, text: Text, cache: Cache) -> Tensor:
        """Predicts the velocity of the current block (docs/method.md, section 7, step 2).

        Args:
            x: noisy normalised latents of the block, [B, 16, T, h, w].
            sigma: their noise level, in [0, 1]; in training a level for each sample, [B] on the CPU.

        Returns:
            Velocity noise - x0, shaped like x, float32 at least.
        """
        time, modulations = self._modulations(sigma, x.shape[0])
        hidden = self.patch_tokens(x)
        for layer, block in enumerate(self.modules.blocks):
            attend = partial(self._attend, layer, block, cache=cache, full=hidden.shape[1])
            given = block, hidden, self._modulation_of(block, hidden) + modulations, self._prompt(text, layer), attend
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(self._layer, *given, use_reentrant=False)
                continue
            with self.weights.at(layer):
                hidden = self._layer(*given)
        return self._unpatchify(self._head(hidden, time), x)

    def clean_pass(
        self, x0: Tensor, text: Text, cache: Cache, compressed: Tensor | None, compressed_text: Text | None = None
    ) -> None:
        """The clean pass: writes the block's keys and values, and beside it those of a compressed form.

        Compressed tokens share every linear layer with the full ones but attend on their own, so the full-resolution
        results do not depend on them. Where the cache's layout is `direct`, they pass through no layer.

        Args:
            x0: the finished block, normalised latents [B, 16, T, h, w].
            compressed: the compressor's hidden tokens [B, N_c, d]; None for a block that never becomes a mid block.
            compressed_text: the prompt of the block that they are the compressed form of; None: `text`.
        """
        hidden = self.patch_tokens(x0)
        full = hidden.shape[1]
        own = text if compressed_text is None else compressed_text
        if compressed is None:
            self._clean_pass(hidden, full, text, cache)
        elif cache.layout.direct:
            self._clean_pass(hidden, full, text, cache)
            self._write_directly(compressed.to(hidden), cache)
        elif torch.is_grad_enabled():
            # One after the other: the full tokens of a frozen model then carry no graph, and take no memory for it.
            self._clean_pass(hidden, full, text, cache)
            self._clean_pass(compressed.to(hidden), 0, own, cache)
        else:  # together: the weights are read once
            both = text if own is text else SplitText(text, own, full)
            self._clean_pass(torch.cat((hidden, compressed.to(hidden)), dim=1), full, both, cache)

    def _clean_pass(self, hidden: Tensor, full: int, text: Text, cache: Cache) -> None:
        """The clean pass of hidden tokens [B, L, d]: the first `full` at full resolution, the others compressed."""
        _, modulations = self._modulations(0.0, hidden.shape[0])
        last = len(self.modules.blocks) - 1
        for layer, block in enumerate(self.modules.blocks):
            modulation = self._modulation_of(block, hidden) + modulations
            with self.weights.at(layer):
                if layer == last:  # nothing reads what comes after the last layer's keys and values
                    self._store(layer, block, hidden, modulation, cache, full)
                    return
                attend = partial(self._attend, layer, block, cache=cache, full=full)
                hidden = self._layer(block, hidden, modulation, self._prompt(text, layer), attend)

    def _write_directly(self, compressed: Tensor, cache: Cache) -> None:
        """Each layer's keys and values of a compressed form, straight from its tokens [B, N_c, d]."""
        for layer, block in enumerate(self.modules.blocks):
            attn = block.self_attn
            with self.weights.at(layer):
                keys, values = attn.norm_k(attn.k(compressed)), attn.v(compressed)
            cache.write_compressed(layer, _split(keys, self.head_dim), _split(values, self.head_dim))

    def _prompt(self, text: Text, layer: int) -> Callable[[Tensor], Tensor]:
        """The attention to the prompt at one layer, of queries [B, L, H, D]."""
        return partial(text.attend, layer, attention=self.attention)

    def _attend(
        self, layer: int, block: BlockModules, hidden: Tensor, modulation: Tensor, cache: Cache, full: int
    ) -> Tensor:
        """Self-attention [B, L, H, D] of the current block's tokens, the first `full` of the hidden tokens [B, L, d],
        and, on their own, of a compressed form's, the others."""
        projected = self._parts.project(block, hidden, modulation, self.head_dim)
        out = []
        if full:
            out.append(self.attention(*cache.attend(layer, *(x[:, :full] for x in projected))))
        if full < hidden.shape[1]:
            out.append(self.attention(*cache.attend_compressed(layer, *(x[:, full:] for x in projected))))
        return torch.cat(out, dim=1) if len(out) > 1 else out[0]

    def _store(
        self, layer: int, block: BlockModules, hidden: Tensor, modulation: Tensor, cache: Cache, full: int
    ) -> None:
        """`_attend` in the last layer of a clean pass, after which nothing is computed."""
        projected = self._parts.project(block, hidden, modulation, self.head_dim)
        if full:
            cache.store(layer, *(x[:, :full] for x in projected))
        if full < hidden.shape[1]:
            _, keys, values = projected
            cache.write_compressed(layer, keys[:, full:], values[:, full:])

    def _layer(
        self,
        block: BlockModules,
        hidden: Tensor,
        modulation: Tensor,
        prompt: Callable[[Tensor], Tensor],
        attend: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """One transformer layer: self-attention, cross-attention to the prompt, feed-forward; hidden is [B, L, d]."""
        attended = attend(hidden, modulation)
        hidden, queries = self._parts.after_attention(block, hidden, attended, modulation, self.head_dim)
        return self._parts.after_prompt(block, hidden, prompt(queries), modulation)

    def _head(self, hidden: Tensor, time: Tensor) -> Tensor:
        head = self.modules.head
        shift, scale = (self._modulation_of(head, hidden) + time).chunk(2, dim=1)
        return head.head(torch.addcmul(shift, head.norm(hidden), 1 + scale))

    def _unpatchify(self, tokens: Tensor, like: Tensor) -> Tensor:
        _, _, frames, height, width = like.shape
        return rearrange(
            tokens.to(torch.promote_types(tokens.dtype, torch.float32)),
            "b (t h w) (p q c) -> b c t (h p) (w q)",
            t=frames,
            h=height // PATCH,
            w=width // PATCH,
            p=PATCH,
            q=PATCH,
        )
