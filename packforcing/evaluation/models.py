"""The models that an evaluation runs, and what tells one set of weights from another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .. import command_options
from ..demo.models import demo_compressor, demo_transformer, demo_vae
from ..devices import fast_dtype, usable_device
from ..files.compressor_file import load_compressor
from ..files.weights import read_state_dict
from ..generate.autotune import use_usual_vae_layout
from ..model.causal_wan import CausalWan
from ..model.compressor import TRAINING_FREE, Compressor, CompressorChoice
from ..model.load import digest, load_wan_modules
from ..model.vae import WanVAE, load_vae
from ..model.wan_modules import SIZES, build_wan_modules

DTYPES = {name: command_options.DTYPES[name] for name in ("float32", "bfloat16")}


@dataclass(frozen=True)
class Sources:
    """Files of the networks ("": the demo's own), and how the transformer runs."""

    model: str = ""  # the transformer's file
    vae: str = ""
    compressor: str = ""
    device: str = "cpu"
    dtype: str = "float32"  # one of DTYPES


@dataclass(frozen=True)
class Models:
    """What `load` makes of `Sources`, on one device."""

    wan: CausalWan
    vae: WanVAE
    trained: CompressorChoice

    def choice(self, wanted: str) -> CompressorChoice | None:
        """What a policy's compressor is here."""
        return {"trained": self.trained, "lr": TRAINING_FREE, "none": None}[wanted]

    def compressor(self, wanted: str, block_frames: int) -> Compressor | None:
        """Raises PackForcingError when the compressor was made for another model."""
        choice = self.choice(wanted)
        return None if choice is None else choice.build(block_frames, self.wan.shape.dim, self.wan.device)

    @cached_property
    def digests(self) -> dict[str, str]:
        """A hash of each part's weights; "" for a compressor without any."""
        return {
            "model": digest(self.wan.modules.state_dict()),
            "vae": digest(self.vae.state_dict()),
            "compressor": digest(self.trained.state_dict or {}),
        }


def load(sources: Sources) -> Models:
    """Raises PackForcingError for a file that is missing, damaged or another kind of weights, and for a device that
    cannot be used here."""
    device = usable_device(sources.device)
    dtype = DTYPES[sources.dtype]
    modules = load_wan_modules(sources.model) if sources.model else build_wan_modules(SIZES["tiny"], demo_transformer())
    vae = load_vae(read_state_dict(sources.vae)[0] if sources.vae else demo_vae(), fast_dtype(device), device)
    use_usual_vae_layout(vae)
    wan = CausalWan(modules.to(device, dtype), dtype=dtype, device=device)
    return Models(wan, vae, compressor_choice(sources))


def compressor_choice(sources: Sources) -> CompressorChoice:
    """The compressor of a file; else the demo model's trained one, if there is one; else the training-free one."""
    if sources.compressor:
        return CompressorChoice(Path(sources.compressor).name, *load_compressor(sources.compressor))
    return TRAINING_FREE if sources.model else demo_compressor()  # which fits the demo's transformer only
