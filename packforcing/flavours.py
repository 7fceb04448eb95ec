"""The published flavours of causal Wan 2.1: how each was trained, and by which file name it is known.

Every row was read from the repository that `source` names, at the commit behind the @. docs/presets.md has the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .checks import shown
from .errors import PackForcingError
from .known_models import TINY

NO_FLAVOUR = "none"


@dataclass(frozen=True)
class Flavour:
    """How a published checkpoint was trained to sample. Lengths are in latent frames."""

    name: str
    files: str  # a pattern: files of this flavour have it in the last parts of their path, in small letters
    source: str  # what the row was read from
    block_frames: int = 3
    timesteps: tuple[float, ...] = (1000, 750, 500, 250)  # of 1000, falling; () for `steps` even ones
    first_timesteps: tuple[float, ...] = ()  # of the video's first block, where it has its own
    shift: float = 5.0  # flow shift
    warp: bool = True  # whether the shift warps the timesteps
    update: str = "few-step"
    steps: int = 4  # even steps, where there are no timesteps
    trained_frames: int = 21  # the longest video in training
    window_frames: int = 0  # local attention: how many are attended at most, with the current block; 0: all of them
    sink_frames: int = 0  # how many of those are the video's first
    preset: str = "training-free"  # the cache that goes with it (packforcing/presets.py)
    note: str = ""


_SELF_FORCING = "guandeh17/Self-Forcing@33593df"
_CAUSAL_FORCING = "thu-ml/Causal-Forcing@1fc7bbc"
_FOUR_STEPS = (1000, 750, 500, 250)
_SEP = "[-_. ]?"  # between the words of a file's name

FLAVOURS = (
    Flavour(
        "self-forcing",
        rf"self{_SEP}forcing{_SEP}(dmd|sid|gan)",
        f"{_SELF_FORCING}, configs/self_forcing_dmd.yaml, self_forcing_sid.yaml, default_config.yaml",
        note="No configuration of the GAN checkpoint is published; it is taken to be that of the other two.",
    ),
    Flavour(
        "causal-forcing",
        rf"causal{_SEP}forcing.*chunk{_SEP}wise|chunk{_SEP}wise.*causal{_SEP}forcing",
        f"{_CAUSAL_FORCING}, configs/causal_forcing_dmd_chunkwise.yaml, default_config.yaml",
    ),
    Flavour(
        "causal-forcing-framewise",
        rf"causal{_SEP}forcing.*frame{_SEP}wise(?!{_SEP}[12]{_SEP}step)|frame{_SEP}wise.*causal{_SEP}forcing",
        f"{_CAUSAL_FORCING}, configs/causal_forcing_dmd_framewise.yaml, default_config.yaml",
        block_frames=1,
        preset="frame-wise",
    ),
    Flavour(
        "causal-forcing-2step",
        rf"frame{_SEP}wise{_SEP}2{_SEP}step",
        f"{_CAUSAL_FORCING}, configs/causal_forcing_dmd_framewise_2step.yaml (Causal-Forcing++)",
        block_frames=1,
        timesteps=(1000, 500),
        first_timesteps=_FOUR_STEPS,
        preset="frame-wise",
    ),
    Flavour(
        "causal-forcing-1step",
        rf"frame{_SEP}wise{_SEP}1{_SEP}step",
        f"{_CAUSAL_FORCING}, configs/causal_forcing_dmd_framewise_1step.yaml (Causal-Forcing++)",
        block_frames=1,
        timesteps=(1000,),
        first_timesteps=_FOUR_STEPS,
        preset="frame-wise",
    ),
    Flavour(
        "causal-forcing-long",
        rf"chunk{_SEP}wise{_SEP}/?long{_SEP}video|causal{_SEP}forcing.*long{_SEP}video",
        f"{_CAUSAL_FORCING}, long_video/configs/rolling_forcing_dmd.yaml, default_config.yaml",
        trained_frames=27,
        note="Trained for Rolling-Forcing's sampler as well, which denoises several blocks together; here it is one "
        "block after another, which its training has, too.",
    ),
    Flavour(
        "causvid",
        r"autoregressive_checkpoint/|causvid.*(autoregressive|causal)(?!.*warp)",
        "tianweiy/CausVid@ca21150, configs/wan_causal_dmd.yaml, causvid/models/wan/wan_wrapper.py (shift, levels)",
        timesteps=(1000, 757, 522),
        shift=8.0,
        warp=False,
    ),
    Flavour(
        "causvid-warp",
        rf"autoregressive_checkpoint_warp|causvid.*warp{_SEP}4{_SEP}step",
        "tianweiy/CausVid@ca21150, configs/wan_causal_dmd_warp_4step_cfg2.yaml",
        shift=8.0,
    ),
    Flavour(
        "longlive",
        rf"longlive(?!{_SEP}(v?2|rag))",
        "NVlabs/LongLive@e52d9ef (branch v1.0), configs/longlive_train_long.yaml, longlive_inference.yaml",
        trained_frames=240,
        window_frames=12,
        sink_frames=3,
        preset="longlive",
        note="Its published weights are a base and a LoRA, which belongs to it.",
    ),
    Flavour(
        "rolling-forcing",
        rf"rolling{_SEP}forcing",
        "TencentARC/RollingForcing@a1477d0, configs/rolling_forcing_dmd.yaml, default_config.yaml, "
        "wan/modules/causal_model.py (window, sink)",
        timesteps=(1000, 800, 600, 400, 200),
        trained_frames=27,
        window_frames=21,
        sink_frames=3,
        note="Its own sampler denoises five blocks together, at five noise levels; here it is one block after another, "
        "which its training has, too (pipeline/rolling_forcing_training.py).",
    ),
    Flavour(
        "reward-forcing",
        rf"reward{_SEP}forcing",
        "JaydenLyh/Reward-Forcing@4317f5a, configs/reward_forcing.yaml, default_config.yaml",
        window_frames=9,
        sink_frames=3,
        preset="reward-forcing",
        note="Its sink is a moving average of what leaves the window; here it is the video's first frames.",
    ),
    Flavour(
        "krea-realtime",
        rf"krea{_SEP}realtime",
        "krea-ai/realtime-video@acf4b7b, configs/self_forcing_server_14b.yaml, default_config.yaml",
        timesteps=(1000, 937, 833, 625),
        warp=False,
        note="14B. Its server warps 1000, 750, 500, 250 instead (v2v.py), which is the same to one timestep, and keeps "
        "3 to 6 recent frames that it computes anew for each block.",
    ),
    Flavour(
        "packforcing",
        rf"pack{_SEP}forcing(?!.*(unofficial|compressor))[^/]*$",
        "arXiv 2603.25730 (docs/method.md, section 2); no weights were published",
        block_frames=4,
        trained_frames=20,
        preset="packforcing",
    ),
    Flavour(
        "packforcing-unofficial",
        rf"pack{_SEP}forcing.*unofficial",
        "AshadowZ/PackForcing-Unofficial@e688827, configs/packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml",
        sink_frames=9,
        note="No weights were published. Trained with top_k 16, of which clips of 21 latent frames have one.",
    ),
    Flavour(
        "demo",
        rf"^{TINY}$",
        "packforcing/demo/models.py, docs/demo-models.md",
        block_frames=4,
        timesteps=(),
        steps=8,
        shift=3.0,
        update="euler",
        trained_frames=20,
        preset="demo",
    ),
)
FLAVOUR_NAMES = tuple(flavour.name for flavour in FLAVOURS)

# Names under which flavours are published in another form: a LoRA alone, a model of both directions, other sizes.
_ANOTHER_FORM = re.compile(r"lora|bidirect|vace|i2v|_10s|ode_init|causal_ode|causal_cd|ar_diffusion")


def flavour_named(name: str) -> Flavour:
    """The flavour of a name. Raises PackForcingError when there is none."""
    for flavour in FLAVOURS:
        if flavour.name == name:
            return flavour
    raise PackForcingError(
        f"There is no flavour {shown(name)}: choose one of {', '.join(FLAVOUR_NAMES)}, or {NO_FLAVOUR}."
    )


def flavour_of(path: str | Path) -> Flavour | None:
    """The flavour of a checkpoint by its file's name, or by that and up to two folders; None where that is not sure."""
    parts = Path(path).parts[-3:]
    for start in reversed(range(len(parts))):
        name = "/".join(parts[start:]).lower()
        if _ANOTHER_FORM.search(name):
            return None
        found = [flavour for flavour in FLAVOURS if re.search(flavour.files, name)]
        if found:
            fits = len(found) == 1 and ("14b" not in name or found[0].name == "krea-realtime")
            return found[0] if fits else None
    return None
