"""What a block's compressed tokens hold of its details: how well a linear map makes the block of them again.

    python benchmarks/details.py --clip-folder out/clips [--clips 992] [--compressor FILE] [--json FILE]

The clips are those that `train base` encodes. For each of their blocks there are the latents, the compressor's LR
latents, and the tokens of its HR branch. A ridge regression is fitted from the one to the other on most of the clips,
its penalty is chosen on some, and the errors are those of the last ones. They are comparable with the errors of returns
in the log of `train base`: a generator that read all that the tokens hold would come as near.

It takes a minute or two on one core of a CPU, and 2 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from packforcing.demo.models import WEIGHTS
from packforcing.files.compressor_file import load_compressor
from packforcing.model.compressor import HRBranch, hr_branch
from packforcing.training.clips import ClipSet, LatentClips, loudness

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
HELD_OUT = 0.1  # of the clips
LARGE = 4  # what is larger than so many latent pixels is no detail: a quarter of a frame of 16


@dataclass(frozen=True)
class Blocks:
    """N blocks of T latent frames, clip after clip."""

    latents: Tensor  # [N, 16, T, h, w]
    forms: dict[str, Tensor]  # name -> compressed form [N, features]
    loudness: Tensor  # [16], the weights of the channels' errors, as in `train base`
    held_out: int  # the last blocks, which measure, and as many before them, which choose the penalty


def blocks_of(clips: LatentClips, hr: HRBranch) -> Blocks:
    """All blocks of the clips, and what the compressor makes of them."""
    count = clips.clips.blocks
    latents = clips.latents.float().unflatten(2, (count, -1)).movedim(2, 1).flatten(0, 1)
    lr = clips.compressed.float().flatten(0, 1).flatten(1)
    with torch.no_grad():
        tokens = torch.cat([hr(part) for part in latents.split(256)]).flatten(1)
    # Of one size, so that one penalty is as strict with both. A branch that was not trained gives zeros.
    tokens = tokens * (lr.std() / tokens.std().clamp_min(1e-12))
    forms = {"LR": lr, "HR": tokens, "LR and HR": torch.cat([lr, tokens], dim=1)}
    held_out = count * max(1, round(len(clips) * HELD_OUT))  # no clip is in two parts
    return Blocks(latents, forms, loudness(clips.latents), held_out)


def ridge(inputs: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Weights [features + 1, outputs], of which the last row is added, that take inputs to targets [N, outputs]."""
    rows = with_one(inputs)
    return torch.linalg.solve(rows.T @ rows + penalty * torch.eye(rows.shape[1]), rows.T @ targets)


def with_one(inputs: Tensor) -> Tensor:
    """Inputs [N, features] with a 1 after each."""
    return F.pad(inputs, (0, 1), value=1.0)


def details(latents: Tensor) -> Tensor:
    """Latents [N, 16, T, h, w] without what is large: each less the mean of the square of LARGE pixels it lies in."""
    large = F.avg_pool3d(latents, (1, LARGE, LARGE))
    return latents - large.repeat_interleave(LARGE, dim=-1).repeat_interleave(LARGE, dim=-2)


def measured(blocks: Blocks) -> dict[str, dict[str, float]]:
    """For each compressed form: the error of the latents, and the share of the details' variance that is kept."""
    count, held_out = len(blocks.latents), blocks.held_out
    train, choose, test = torch.arange(count).split([count - 2 * held_out, held_out, held_out])
    flat, weights = blocks.latents.flatten(1), blocks.loudness.view(-1, 1, 1, 1)

    def error(found: Tensor, true: Tensor) -> float:
        return float(((found - true).square() * weights).mean())

    def made(form: Tensor, fitted: Tensor, which: Tensor) -> Tensor:
        return (with_one(form[which]) @ fitted).view(len(which), *blocks.latents.shape[1:])

    results = {}
    fine = details(blocks.latents[test])
    for name, form in blocks.forms.items():
        fits = {penalty: ridge(form[train], flat[train], penalty) for penalty in PENALTIES}
        errors = {penalty: error(made(form, fit, choose), blocks.latents[choose]) for penalty, fit in fits.items()}
        penalty = min(errors, key=errors.__getitem__)
        again = made(form, fits[penalty], test)
        results[name] = {
            "numbers": form.shape[1],
            "penalty": penalty,
            "error": error(again, blocks.latents[test]),
            "details_kept": 1 - error(details(again), fine) / error(fine, torch.zeros(())),
        }
    mean = flat[train].mean(dim=0).view(blocks.latents.shape[1:])
    results["nothing"] = {"numbers": 0, "error": error(mean, blocks.latents[test]), "details_kept": 0.0}
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clip-folder", required=True, help="where `train base` has encoded them")
    options.add_argument("--clips", type=int, default=992)
    options.add_argument("--compressor", default=str(WEIGHTS / "demo_compressor.safetensors"), help="its file")
    options.add_argument("--json", help="a file for the results")
    chosen = options.parse_args(arguments)
    state, metadata = load_compressor(chosen.compressor)
    hr = hr_branch(state, metadata.temporal_stride).float()
    clips = ClipSet(chosen.clips, temporal_stride=metadata.temporal_stride)
    results = measured(blocks_of(LatentClips(chosen.clip_folder, clips), hr))
    for name, result in results.items():
        print(
            f"{name:10s} {result['numbers']:5d} numbers a block: error {result['error']:.4f}, "
            f"{result['details_kept']:.3f} of the details' variance"
        )
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"clips": chosen.clips, "forms": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
