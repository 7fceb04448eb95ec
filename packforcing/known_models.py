"""The models that this project knows by name: their sizes, the VAE that goes with each, and the usual frame.

Everything else that is said of a named model is derived from `KNOWN_MODELS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_count

TEXT_TOKENS = 512  # Wan pads every prompt to as many, and cuts longer ones


@dataclass(frozen=True)
class ModelShape:
    """What the cache needs to know of a transformer. Raises PackForcingError for sizes that none has."""

    layers: int
    dim: int  # width of the hidden states, over all heads
    heads: int

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads"):
            check_count(f"A model's {name}", getattr(self, name), 1)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def kv_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of K and V of `tokens` tokens over all layers."""
        return tokens * self.layers * 2 * self.dim * bytes_per_value


@dataclass(frozen=True)
class WanSizes:
    """Sizes of a Wan text-to-video transformer. Heads are 128 wide in every published one."""

    dim: int  # width of the hidden states
    ffn_dim: int  # width of the feed-forward layers
    layers: int
    heads: int
    channels: int = 16  # of the latents
    text_dim: int = 4096  # width of the text embedding
    freq_dim: int = 256  # width of the time step's sinusoidal embedding

    @property
    def shape(self) -> ModelShape:
        return ModelShape(layers=self.layers, dim=self.dim, heads=self.heads)


@dataclass(frozen=True)
class KnownModel:
    """A model with a name."""

    sizes: WanSizes
    vae_dim: int  # width of the VAE that goes with it
    width: int  # pixels of the frame that it usually makes
    height: int
    text_len: int = TEXT_TOKENS  # tokens to which its prompts are padded with zeros; 0: not at all


TINY = "tiny"  # the demo model
KNOWN_MODELS = {
    "wan2.1-1.3b": KnownModel(WanSizes(dim=1536, ffn_dim=8960, layers=30, heads=12), 96, 832, 480),
    "wan2.1-14b": KnownModel(WanSizes(dim=5120, ffn_dim=13824, layers=40, heads=40), 96, 832, 480),
    TINY: KnownModel(WanSizes(dim=256, ffn_dim=512, layers=4, heads=2), 8, 128, 128, text_len=0),
}

SIZES = {name: model.sizes for name, model in KNOWN_MODELS.items()}
MODELS = {name: model.sizes.shape for name, model in KNOWN_MODELS.items()}
VAE_DIMS = {name: model.vae_dim for name, model in KNOWN_MODELS.items()}


def text_len_of(shape: ModelShape) -> int:
    """Tokens to which the prompts of a model are padded with zeros; 0 where they are not.

    Wan 2.1 was trained with such prompts, and attends to the zeros as it does to words: without them it makes another
    video. So do all models that come from it. The demo model was trained without; it is known by its shape, so that one
    trained anew is known, too.
    """
    return next((model.text_len for model in KNOWN_MODELS.values() if model.sizes.shape == shape), TEXT_TOKENS)
