"""The smallest videos (`toy_videos`), on any device, and where their blocks wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from fake_device import FakeDevice
from toy_videos import SIZES, ToyVAE, long_video, prompt, weights
from wan_reference import DIM

from packforcing.generate.long_video import Block, LongVideo
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import Compressor, HRBranch
from packforcing.model.load import make_causal_wan
from packforcing.model.wan_modules import build_wan_modules

# What waits, as a test names it -> where that is.
PLACES = {
    "choice": "packforcing/devices.py:read",
    "finite": "packforcing/generate/long_video.py:_check_finite",
    "decode": "packforcing/generate/stopwatch.py:settle",
    "rounding": "packforcing/cache/fp8_kv.py:rounding_error",
}


class DeviceVAE(ToyVAE):
    """`ToyVAE`, which can be moved to a device."""

    def __init__(self) -> None:
        super().__init__()
        colours = self.colours
        del self.colours
        self.register_buffer("colours", colours)

    device = property(lambda self: self.colours.device)  # type: ignore[assignment]


def toy_wan(device: str, dtype: torch.dtype = torch.float32) -> CausalWan:
    wan = make_causal_wan(build_wan_modules(SIZES, weights()), device, dtype)
    wan.text_len = 0  # as the demo's prompts: not padded
    return wan


def dual(device: str) -> Compressor:
    """A compressor whose HR branch adds something."""
    torch.manual_seed(3)
    branch = HRBranch([16, 4, 4, 4, 4, DIM], 1)
    torch.nn.init.normal_(branch[-1].weight, std=0.1)
    return Compressor(1, branch.to(device).requires_grad_(False), "dual")


def toy_video(device: str, **given: Any) -> LongVideo:
    """`long_video` on a device. Values of `given` that are functions are called with the device or the transformer."""
    wan = given.pop("wan", None) or toy_wan(device)
    networks = {"vae": lambda device: DeviceVAE().to(device), "compressor": lambda device: Compressor(1)}
    for name in networks:
        given[name] = given.get(name, networks[name])(device)
    text = given.pop("text", prompt)(wan)
    return long_video(wan, text=text, **given)


def with_waits(fake: FakeDevice, blocks: Iterator[Block]) -> Iterator[tuple[Block, Counter[str]]]:
    """Each block, and what of this thread waited since the one before, by names of PLACES or where it is."""
    names = {where: name for name, where in PLACES.items()}
    seen = len(fake.waits)
    for block in blocks:
        since, seen = fake.waits[seen:], len(fake.waits)
        yield block, Counter(names.get(wait.where, str(wait)) for wait in since if not wait.beside)
