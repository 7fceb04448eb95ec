"""Small videos that one process makes, or several together under `torchrun`:

    torchrun --nproc-per-node 2 tests/references/shared_videos.py FOLDER

In float64, so that what differs is an error and not rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_videos import CELLS, CONFIG, SAMPLING, SIZE, SIZES, ToyVAE, weights
from wan_reference import DIM, TEXT_DIM, TEXT_LENGTH, seeded

from packforcing.cache.head_share import HeadShare
from packforcing.config import CacheConfig, Layout
from packforcing.devices import usable_device
from packforcing.errors import PackForcingError
from packforcing.generate.long_video import LongVideo, VideoModels, VideoSettings
from packforcing.generate.start import Start, started_blocks
from packforcing.generate.story import Story, Stretch
from packforcing.generate.together import SharedCompressor, shared_start
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import Compressor, HRBranch, LatentCompressor
from packforcing.model.tensor_parallel import cut, shared_wan
from packforcing.model.wan_modules import build_wan_modules
from packforcing.processes import any_process, check_same, from_main, in_all, is_main, joined, process_count, rank

BLOCKS = 8  # the last three choose among their mid blocks
EXACT = torch.float64


@dataclass(frozen=True)
class Case:
    """How a video is made."""

    config: CacheConfig = CONFIG
    compressor: Callable[[], Compressor] = lambda: Compressor(1)
    switch: str = ""  # of a story of two prompts; "" for one prompt
    overlap: bool = False
    started: int = 0  # latent frames that the video starts with


def dual() -> Compressor:
    """Both branches; the HR branch's last layer is not zero."""
    branch = HRBranch((16, 4, 8, 8, 16, DIM), temporal_stride=1).requires_grad_(False)
    for number, parameter in enumerate(branch.parameters()):
        parameter.copy_(0.3 * seeded(*parameter.shape, seed=100 + number))
    return Compressor(1, branch.to(EXACT))


def direct() -> Compressor:
    compressor = LatentCompressor((16, 4, 8, 8, DIM), "direct").requires_grad_(False)
    for number, parameter in enumerate(compressor.parameters()):
        parameter.copy_(0.3 * seeded(*parameter.shape, seed=200 + number))
    return compressor.to(EXACT)


CASES = {
    # Of two heads one is scored: the second process has none of what is summed.
    "packforcing": Case(compressor=dual),
    "story": Case(replace(CONFIG, head_fraction=1.0, archive_device="host"), switch="refresh", overlap=True),
    "direct": Case(compressor=direct, switch="blend", started=3),
    "fp8": Case(replace(CONFIG, kv_dtype="fp8_e4m3"), overlap=True),
}


def exact_vae() -> ToyVAE:
    vae = ToyVAE()
    vae.colours, vae.dtype = vae.colours.to(EXACT), EXACT
    return vae


def wan(share: HeadShare) -> CausalWan:
    """The whole model, or this process's share of it."""
    modules = build_wan_modules(SIZES, {name: tensor.to(EXACT) for name, tensor in weights().items()})
    if share.count == 1:
        return CausalWan(modules, dtype=EXACT, text_len=0)
    model = shared_wan(modules, "cpu", EXACT, share)
    model.text_len = 0
    return model


class ExactVideo(LongVideo):
    """A video whose noise, and so everything that comes of it, is float64."""

    def _noise(self, generator: torch.Generator) -> Tensor:
        return super()._noise(generator).to(EXACT)


def video(case: Case, model: CausalWan) -> tuple[LongVideo, Start | None]:
    compressor = case.compressor()
    layout = Layout(case.config, SIZE, 1, compressor.direct)
    vae = exact_vae() if is_main() else None
    shared = model.share.count > 1
    models = VideoModels(model, vae, SharedCompressor(compressor, model) if shared else compressor)
    texts = [model.embed_text(seeded(1, TEXT_LENGTH, TEXT_DIM, seed=seed).to(EXACT)) for seed in (2, 3)]
    story = Story((Stretch(0, texts[0]), Stretch(5, texts[1])), case.switch or "keep", 2)
    settings = VideoSettings(layout, SAMPLING, overlap=case.overlap)
    start = None
    if case.started:
        start = Start("The start", case.started, lambda vae: seeded(1, 16, case.started, *CELLS, seed=5))
        start = shared_start(start, SIZE, model.device) if shared else start
    return ExactVideo(models, story if case.switch else texts[0], settings), start


def made(case: Case, model: CausalWan, count: Counted | None = None) -> dict[str, Any]:
    """The latents of all blocks, and what the cache did."""
    film, start = video(case, model)
    latents: list[Tensor] = []
    exchanged = []
    for block in started_blocks(film, start, BLOCKS):
        latents.append(block.latents)
        exchanged.append(None if count is None else count.taken())
    blocks = film.record.blocks
    return {
        "latents": torch.cat(latents, dim=2),
        "selected": [block.selected for block in blocks],
        "bytes": blocks[-1].bytes,
        "rounding": film.record.rounding_error,
        "exchanged": exchanged,
    }


class Counted(TorchDispatchMode):
    """Counts what collective operations are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {"sums": 0, "summed_bytes": 0, "sent_bytes": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented  # until it is plain tensors
        name = str(func)
        given = args[0][0] if args and isinstance(args[0], list | tuple) else args[0] if args else None
        if "allreduce" in name or "all_reduce" in name:
            self.found["sums"] += 1
            self.found["summed_bytes"] += given.nbytes
        elif "broadcast_" in name and "c10d" in name:
            self.found["sent_bytes"] += given.nbytes
        return func(*args, **(kwargs or {}))

    def taken(self) -> dict[str, int]:
        found, self.found = self.found, {"sums": 0, "summed_bytes": 0, "sent_bytes": 0}
        return found


def main(folder: str) -> None:
    with joined("cpu"), torch.no_grad():
        model = wan(HeadShare(rank(), process_count()))
        counted = Counted()
        with counted:
            found = {name: made(case, model, counted) for name, case in CASES.items()}
        first = model.modules.blocks[0]
        assert isinstance(first, nn.Module)
        found["weights"] = {name: tensor.shape for name, tensor in first.named_parameters()}
        found["styles"] = by_styles(first)
        found["said"] = agreements()
        torch.save(found, Path(folder) / f"{rank()}.pt")


def agreements() -> dict[str, Any]:
    """What the processes say of what they agree on, and of what they do not."""

    def fails() -> int:
        if rank() == 1:
            raise PackForcingError("Only this one.")
        return 0

    def other_weights() -> None:
        modules = build_wan_modules(SIZES, {name: tensor + rank() for name, tensor in weights().items()})
        shared_wan(modules, "cpu", EXACT, HeadShare(rank(), process_count()))

    calls = {
        "all": lambda: in_all(rank),
        "main": lambda: from_main(rank),
        "one fails": lambda: in_all(fails),
        "main fails": lambda: from_main(lambda: usable_device("nonsense")),
        "same": lambda: check_same("options", 1),
        "not the same": lambda: check_same("options", rank()),
        "weights": other_weights,
        "flag": lambda: any_process(rank() == 1),
    }
    return {name: said(call) for name, call in calls.items()}


def said(call: Callable[[], Any]) -> Any:
    """What a call gives, or the message of its error."""
    try:
        return call()
    except PackForcingError as error:
        return f"{type(error).__name__}: {error}"


def by_styles(part: nn.Module) -> float:
    """The largest difference between a layer's parts and PyTorch's own parallel styles, through DTensors."""
    whole = build_wan_modules(SIZES, {name: tensor.to(EXACT) for name, tensor in weights().items()}).blocks[0]
    cut(whole, HeadShare(rank(), process_count()), torch.device("cpu"))
    x = seeded(1, 6, DIM, seed=7).to(EXACT)
    wide, narrow = (part.ffn(x), whole.ffn(x)), (part.self_attn.q(x), whole.self_attn.q(x))
    rows = part.self_attn.o(narrow[0]), whole.self_attn.o(narrow[0])
    return max((a - b).abs().max().item() for a, b in (wide, narrow, rows))


if __name__ == "__main__":
    main(sys.argv[1])
