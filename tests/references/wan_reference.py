"""What the model is compared with: ComfyUI's own Wan, and the method by the letter. Nothing of `packforcing` is used.

`DenseWan` is ComfyUI's `WanModel` over a whole sequence under an attention mask. `ExplicitWan` is a slow second
implementation of the method over a state dict: nothing is kept rotated, nothing is summed ahead, every position is
written out, and the compressed tokens take a pass of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

DIM, HEADS, FFN_DIM, TEXT_DIM, TEXT_LENGTH, FREQ_DIM = 256, 2, 256, 64, 5, 256


def seeded(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to rounding: within `tolerance` of the expected tensor's scale."""
    assert found.shape == expected.shape
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    assert error < tolerance * scale, f"{error:.2e} off at a scale of {scale:.2e}"


def comfy_wan(comfy: ModuleType, layers: int = 3, operations: Any = None, **sizes: Any) -> torch.nn.Module:
    """ComfyUI's own Wan, small, with random weights of which every one matters."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    model = WanModel(
        **{"dim": DIM, "ffn_dim": FFN_DIM, "num_heads": HEADS, "text_dim": TEXT_DIM, "freq_dim": FREQ_DIM, **sizes},
        num_layers=layers,
        dtype=torch.float32,
        device="cpu",
        operations=operations or comfy.ops.disable_weight_init,
    )
    model.load_state_dict(random_weights(model.state_dict()))
    return model.eval().requires_grad_(False)


def random_weights(like: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep activations near unit size: norms away from 1, biases away from 0, sharp attention."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in like.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("modulation"):
            state[name] = 0.4 * noise
        elif tensor.ndim > 1:
            state[name] = noise / tensor[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            state[name] = 1.4 + 0.2 * noise
        else:
            state[name] = 0.1 * noise
    return state


# --- one dense pass over the whole sequence -----------------------------------------------------------


@dataclass
class DenseWan:
    """ComfyUI's `WanModel` in which self-attention is masked, and its keys and values are captured layer by layer."""

    model: torch.nn.Module
    mask: Tensor  # [L, L], True where a query (row) may see a key (column)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
        own = k.shape[2] == len(self.mask)
        if own:
            self.layers.append(tuple(rearrange(x, "b h l d -> b l h d") for x in (k, v)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask if own else None)
        return rearrange(out, "b h l d -> b l (h d)")

    def __call__(self, monkeypatch: Any, x: Tensor, sigmas: Tensor, text: Tensor, times: Tensor) -> Tensor:
        """Velocity of latents [B, 16, T, h, w] whose frames have noise levels and temporal positions of their own.

        Frames with equal times, such as a noisy and a clean copy of a block, share their place in the video.
        """
        assert text.shape[1] != len(self.mask), "the mask tells self-attention from cross-attention by its length"
        monkeypatch.setattr("comfy.ldm.wan.model.optimized_attention", self.attention)
        frames, height, width = x.shape[2:]
        whole = self.model.rope_encode(int(times.max()) + 1, height, width, device=x.device, dtype=torch.float32)
        by_frame = rearrange(whole, "b (t l) ... -> t b l ...", l=height * width // 4)
        freqs = torch.cat([by_frame[int(t)] for t in times], dim=1)
        timesteps = (1000 * sigmas).expand(x.shape[0], frames)
        return self.model.forward_orig(x, timesteps, text, freqs=freqs)


def frame_mask(visible: Tensor, tokens_per_frame: int) -> Tensor:
    """A mask over frames [T, T] as one over their tokens."""
    return visible.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


# --- the method by the letter -------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """The method's numbers, in blocks and tokens."""

    rows: int
    columns: int
    block_frames: int = 2
    temporal_stride: int = 2
    sink_blocks: int = 1
    recent_blocks: int = 1
    top_k: int = 2
    query_fraction: float = 1.0
    head_fraction: float = 0.5
    position_range: int = 0
    rope_adjustment: bool = True

    def sinks(self, block: int) -> list[int]:
        return [b for b in range(block) if b < self.sink_blocks]

    def recents(self, block: int) -> list[int]:
        return [b for b in range(block) if b >= self.sink_blocks and b >= block - self.recent_blocks]

    def mids(self, block: int) -> list[int]:
        return [b for b in range(block) if b not in self.sinks(block) and b not in self.recents(block)]

    @property
    def compressed_tokens(self) -> int:
        return (self.block_frames // self.temporal_stride) * (self.rows // 4) * (self.columns // 4)

    def full_positions(self, start: float) -> Tensor:
        return torch.tensor(
            [
                (start + t, row, column)
                for t in range(self.block_frames)
                for row in range(self.rows)
                for column in range(self.columns)
            ],
            dtype=torch.float64,
        )

    def compressed_positions(self, start: float, scale: float = 1.0) -> Tensor:
        """A compressed token stands at the centre of what it covers."""
        covered = [range(self.temporal_stride * t, self.temporal_stride * (t + 1)) for t in range(self.block_frames)]
        times = [start + scale * sum(c) / len(c) for c in covered[: self.block_frames // self.temporal_stride]]
        return torch.tensor(
            [
                (t, 4 * row + 1.5, 4 * column + 1.5)
                for t in times
                for row in range(self.rows // 4)
                for column in range(self.columns // 4)
            ],
            dtype=torch.float64,
        ).reshape(-1, 3)

    def starts(self, block: int) -> tuple[dict[int, float], list[float], float]:
        """The paper's form of temporal RoPE adjustment: the current and the recent blocks keep their true times, and
        the older history moves forward until it is continuous with them (without adjustment it stays, gaps and all).

        Returns the start of each full-resolution block, the starts of the mid slots, and the mids' scale.
        """
        frames = self.block_frames
        sinks, recents = self.sinks(block), self.recents(block)
        slots = min(self.top_k, len(self.mids(block)))
        scale = 1.0
        if self.position_range and slots:
            room = self.position_range - frames * (self.sink_blocks + self.recent_blocks + 1)
            scale = min(1.0, room / (slots * frames))
        before_recent = (block - len(recents)) * frames
        first_slot = before_recent - slots * frames * scale
        full = {b: float(b * frames) for b in [*recents, block]}
        full |= {
            b: first_slot - (len(sinks) - b) * frames if self.rope_adjustment else float(b * frames) for b in sinks
        }
        return full, [first_slot + j * frames * scale for j in range(slots)], scale


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """3D RoPE on x [B, L, H, D]: of 128 channels 44 for time, 42 for height, 42 for width, theta 10000."""
    head_dim = x.shape[-1]
    side = 2 * (head_dim // 6)
    angles = torch.cat(
        [
            positions[:, axis, None] / 10_000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for axis, dim in enumerate((head_dim - 2 * side, side, side))
        ],
        dim=-1,
    )
    rotary = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(rearrange(x.double(), "b l h (p two) -> b l h p two", two=2).contiguous())
    return rearrange(torch.view_as_real(pairs * rotary), "b l h p two -> b l h (p two)").to(x.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / queries.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values).flatten(2)


class ExplicitWan:
    """A Wan over a state dict (of any floating type) that runs the method block by block."""

    def __init__(self, state: dict[str, Tensor], method: Method, text: Tensor, heads: int = HEADS) -> None:
        self.state = state
        self.method = method
        self.heads = heads
        self.layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        self.dtype = state["head.head.weight"].dtype
        hidden = self.mlp("text_embedding", text.to(self.dtype), lambda x: F.gelu(x, approximate="tanh"))
        self.text = [self.keys_values(f"blocks.{i}.cross_attn", hidden) for i in range(self.layers)]
        self.block = 0
        # For each block that had its clean pass, its keys (without any rotation) and values, layer by layer.
        self.full: list[list[tuple[Tensor, Tensor]]] = []
        self.compressed: list[list[tuple[Tensor, Tensor]] | None] = []
        self.selected: list[list[int] | None] = [None] * self.layers
        self.chosen: list[list[list[int]]] = []  # of each such block, by layer

    # the transformer

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def mlp(self, name: str, x: Tensor, activation: Any) -> Tensor:
        return self.linear(f"{name}.2", activation(self.linear(f"{name}.0", x)))

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b l h d", h=self.heads)

    def queries(self, name: str, x: Tensor) -> Tensor:
        return self.split(self.rms_norm(f"{name}.norm_q", self.linear(f"{name}.q", x)))

    def keys_values(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.split(self.rms_norm(f"{name}.norm_k", self.linear(f"{name}.k", x)))
        return keys, self.split(self.linear(f"{name}.v", x))

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.state[f"{name}.weight"]

    @staticmethod
    def layer_norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def tokens(self, latents: Tensor) -> Tensor:
        patches = rearrange(latents.to(self.dtype), "b c t (h p) (w q) -> b (t h w) (c p q)", p=2, q=2)
        weight = self.state["patch_embedding.weight"].flatten(1)
        return F.linear(patches, weight, self.state["patch_embedding.bias"])

    def time(self, sigma: float) -> tuple[Tensor, Tensor]:
        half = FREQ_DIM // 2
        angles = 1000 * sigma / 10_000 ** (torch.arange(half, dtype=torch.float64) / half)
        features = torch.cat((angles.cos(), angles.sin()))[None].to(self.dtype)
        embedding = self.mlp("time_embedding", features, F.silu)
        projected = self.linear("time_projection.1", F.silu(embedding))
        return embedding, rearrange(projected, "1 (six d) -> six 1 1 d", six=6)

    def layer(self, i: int, x: Tensor, modulations: Tensor, self_attention: Any) -> Tensor:
        name = f"blocks.{i}"
        table = rearrange(self.state[f"{name}.modulation"], "1 six d -> six 1 1 d") + modulations
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table
        out = self_attention(i, self.layer_norm(x) * (1 + scale) + shift)
        x = x + gate * self.linear(f"{name}.self_attn.o", out)
        normed = self.layer_norm(x) * self.state[f"{name}.norm3.weight"] + self.state[f"{name}.norm3.bias"]
        prompt = attend(self.queries(f"{name}.cross_attn", normed), *self.text[i])
        x = x + self.linear(f"{name}.cross_attn.o", prompt)
        fed = self.layer_norm(x) * (1 + ffn_scale) + ffn_shift
        return x + ffn_gate * self.mlp(f"{name}.ffn", fed, lambda y: F.gelu(y, approximate="tanh"))

    # the history

    def history(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Rotated keys, and values, of [sink | selected mid | recent] at layer i."""
        full, slots, scale = self.method.starts(self.block)
        if not self.method.rope_adjustment:
            slots = [block * self.method.block_frames for block in self.selected[i]]
        keys, values = [], []
        for block in [*self.method.sinks(self.block), *self.method.recents(self.block)]:
            k, v = self.full[block][i]
            keys.append(rotate(k, self.method.full_positions(full[block])))
            values.append(v)
        for block, start in zip(self.selected[i], slots, strict=True):
            k, v = self.compressed[block][i]
            keys.append(rotate(k, self.method.compressed_positions(start, scale)))
            values.append(v)
        return keys, values

    def affinity(self, i: int, queries: Tensor, block: int) -> float:
        """The double sum of docs/method.md, section 5, term by term; neither side is rotated in time."""
        method = self.method
        n_opt = max(1, int(self.heads * method.head_fraction))
        count = max(1, round(queries.shape[1] * method.query_fraction))
        sampled = [n * queries.shape[1] // count for n in range(count)]
        queries = rotate(queries, method.full_positions(0) * torch.tensor([0, 1, 1]))[:, sampled, :n_opt]
        keys = rotate(self.compressed[block][i][0], method.compressed_positions(0) * torch.tensor([0, 1, 1]))[
            :, :, :n_opt
        ]
        products = torch.einsum("bihd,bjhd->bhij", queries, keys) / queries.shape[-1] ** 0.5
        return (products.sum((2, 3)).double().sum() / (queries.shape[0] * n_opt)).item()

    def select(self, i: int, queries: Tensor) -> None:
        mids = self.method.mids(self.block) if self.method.top_k else []
        best = sorted(mids, key=lambda m: self.affinity(i, queries, m), reverse=True)[: self.method.top_k]
        self.selected[i] = sorted(best)

    # the passes of one block

    def full_pass(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Full tokens see the history and themselves. Returns hidden tokens, the time embedding, and K, V by layer."""
        embedding, modulations = self.time(sigma)
        positions = self.method.full_positions(self.method.starts(self.block)[0][self.block])
        cached = []

        def self_attention(i: int, hidden: Tensor) -> Tensor:
            queries = self.queries(f"blocks.{i}.self_attn", hidden)
            keys, values = self.keys_values(f"blocks.{i}.self_attn", hidden)
            cached.append((keys, values))
            if self.selected[i] is None:
                self.select(i, queries)
            old_keys, old_values = self.history(i)
            keys = torch.cat([*old_keys, rotate(keys, positions)], dim=1)
            return attend(rotate(queries, positions), keys, torch.cat([*old_values, values], dim=1))

        hidden = self.tokens(x)
        for i in range(self.layers):
            hidden = self.layer(i, hidden, modulations, self_attention)
        return hidden, embedding, cached

    def compressed_pass(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compressed tokens see the history without the current block, and themselves."""
        _, modulations = self.time(0.0)
        positions = self.method.compressed_positions(self.method.starts(self.block)[0][self.block])
        cached = []

        def self_attention(i: int, hidden: Tensor) -> Tensor:
            queries = rotate(self.queries(f"blocks.{i}.self_attn", hidden), positions)
            keys, values = self.keys_values(f"blocks.{i}.self_attn", hidden)
            cached.append((keys, values))
            old_keys, old_values = self.history(i)
            keys = torch.cat([*old_keys, rotate(keys, positions)], dim=1)
            return attend(queries, keys, torch.cat([*old_values, values], dim=1))

        hidden = tokens.to(self.dtype)
        for i in range(self.layers):
            hidden = self.layer(i, hidden, modulations, self_attention)
        return cached

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        hidden, embedding, _ = self.full_pass(x, sigma)
        shift, scale = rearrange(self.state["head.modulation"] + embedding, "1 two d -> two 1 1 d")
        out = self.linear("head.head", self.layer_norm(hidden) * (1 + scale) + shift)
        _, _, t, h, w = x.shape
        return rearrange(out, "b (t h w) (p q c) -> b c t (h p) (w q)", t=t, h=h // 2, w=w // 2, p=2, q=2)

    def clean_pass(self, x0: Tensor, compressed: Tensor | None) -> None:
        _, _, cached = self.full_pass(x0, 0.0)
        self.full.append(cached)
        self.compressed.append(None if compressed is None else self.compressed_pass(compressed))
        self.chosen.append(self.selected)
        self.selected = [None] * self.layers
        self.block += 1
