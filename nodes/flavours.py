"""A MODEL's flavour: the loader notes what its file's name tells, and the sampler says what departs from it."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..packforcing.config import CacheConfig
from ..packforcing.flavours import flavour_named, flavour_of
from ..packforcing.generate.sampling import Sampling, departures

FLAVOUR = "packforcing_flavour"  # a key of the patcher's options, which LoRA loaders and other patches keep


def note_flavour(model: ModelPatcher, file: str) -> ModelPatcher:
    """The model, with the flavour that its file's name tells for sure, if it does."""
    flavour = flavour_of(file)
    if flavour is not None:
        model.model_options[FLAVOUR] = flavour.name
    return model


def departing(model: ModelPatcher, sampling: Sampling, config: CacheConfig) -> list[str]:
    """A sentence for each setting that is not what the model was trained with; none where its flavour is unknown."""
    name = model.model_options.get(FLAVOUR)
    if name is None:
        return []
    return [
        f"The model's file is one of {name}, but {each}." for each in departures(flavour_named(name), sampling, config)
    ]
