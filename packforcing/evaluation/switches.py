"""`evaluate --switches`: how soon a change of the prompt is seen, and what it leaves as it was.

Each video has a prompt and, from block `BEFORE` on, a twin of it that asks for another background (or sky) and is the
same in all else. The video is made with each way of switching, and under either prompt alone: the two show how often
the model does what it is asked for, and how much that varies by itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_whole
from ..config import FrameSize, Layout, block_lengths, default_temporal_stride
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..generate.sampling import Sampling
from ..generate.story import SWITCHES, Story, Stretch
from ..pixels import to_uint8
from ..telling import tell
from ..world.captions import COLOURS, SKIES, TOO_CLOSE, Attributes, ObjectAttributes, parse
from ..world.scenes import FPS, evaluation_prompts
from .metrics import evaluate_video
from .models import Models, Sources, load
from .policies import Policy
from .processes import made
from .reporting import (
    Report,
    Tell,
    described_conditions,
    described_policies,
    ready_folder,
    resumed,
    versions,
    write_report,
)
from .runs import BLOCK_FRAMES, MOST_PROMPTS, facts_of, hash_of, new_video
from .summary import Statistics, cell, row, statistics

RESULTS, SUMMARY, TABLE, PLOT = "switches.jsonl", "switches.json", "switches.md", "switches.png"
SWITCHES_MEASUREMENT = 1  # raised whenever results of an older version of this code are no longer comparable
BEFORE, AFTER = 6, 6  # blocks
ALONE = ("first prompt", "second prompt")  # for the whole video
WAYS = (*ALONE, *SWITCHES)


def twin(asked: Attributes, number: int) -> tuple[str, Attributes]:
    """Which attribute changes, and what is asked for after the change; the new colour is drawn by the number."""
    rng = np.random.default_rng(number)
    if isinstance(asked, ObjectAttributes):
        taken = {asked.colour, asked.background}
        free = [c for c in COLOURS if c not in taken and not any({c, other} in TOO_CLOSE for other in taken)]
        return "background", replace(asked, background=str(rng.choice(free)))
    return "sky", replace(asked, sky=str(rng.choice([sky for sky in SKIES if sky != asked.sky])))


@dataclass(frozen=True)
class SwitchSettings:
    """What is evaluated. Raises PackForcingError when that is nothing, or not possible.

    Attributes:
        policies: how the history is kept.
        videos: how many of the world's held-out captions; video number v has seed v.
        sampling: how blocks are denoised; its seed is not used.
    """

    policies: tuple[Policy, ...]
    videos: int = 8
    size: FrameSize = field(default_factory=lambda: FrameSize(128, 128))
    sampling: Sampling = field(default_factory=Sampling)
    sources: Sources = field(default_factory=Sources)

    def __post_init__(self) -> None:
        if not self.policies:
            raise PackForcingError("An evaluation needs at least one policy, but none is given.")
        check_whole("--videos", self.videos)
        if not 1 <= self.videos <= MOST_PROMPTS:
            raise PackForcingError(f"--videos must be 1 to {MOST_PROMPTS}, but it is {self.videos}.")
        for policy in self.policies:
            Layout(policy.config(blocks=1), self.size, default_temporal_stride(BLOCK_FRAMES))

    def runs(self) -> list[SwitchRun]:
        """All runs, video by video, so that what is done at any time compares ways on the same videos."""
        prompts = evaluation_prompts(self.videos)
        return [
            SwitchRun(policy, way, number, prompt)
            for number, prompt in enumerate(prompts)
            for policy in self.policies
            for way in WAYS
        ]


@dataclass(frozen=True)
class SwitchRun:
    """One video to be made and measured."""

    policy: Policy
    way: str  # one of WAYS
    number: int  # of the video, and the seed
    prompt: str  # the first one

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the other runs of an evaluation."""
        return self.policy.name, self.way, self.number

    @property
    def prompts(self) -> tuple[str, str]:
        """The prompts before and after the switch."""
        first, second = self.prompt, twin(parse(self.prompt), self.number)[1].caption(phrasing=0)
        return {ALONE[0]: (first, first), ALONE[1]: (second, second)}.get(self.way, (first, second))


@dataclass(frozen=True)
class SwitchResult:
    """A run that is done, and the seconds that it took.

    Of each block from the last one before the switch on: how much of what the second prompt changes is seen, and of
    all else that it asks for, each in [0, 1].
    """

    policy: str
    way: str
    number: int
    fingerprint: str
    elapsed: float
    changed: list[float]
    others: list[float]

    @property
    def key(self) -> tuple[str, str, int]:
        """Its run's."""
        return self.policy, self.way, self.number


def switch_fingerprint(run: SwitchRun, settings: SwitchSettings, models: Models) -> str:
    """What a result depends on besides its key: two runs of one key and fingerprint are the same."""
    facts = facts_of(run.policy, replace(settings.sampling, seed=run.number), settings.size, models)
    blocks = [BEFORE, AFTER]
    return hash_of({"switches": SWITCHES_MEASUREMENT, "prompts": run.prompts, "blocks": blocks, **facts})


# --- one run ----------------------------------------------------------------------------------------------------------


def make_switch(run: SwitchRun, settings: SwitchSettings, models: Models) -> SwitchResult:
    """Makes a video and measures it. Raises PackForcingError when it cannot be made."""
    start = time.perf_counter()
    first, second = (models.wan.embed_text(encode_prompt(prompt)) for prompt in run.prompts)
    switched = run.way in SWITCHES
    stretches = (Stretch(0, first, run.prompts[0]), Stretch(BEFORE, second, run.prompts[1]))
    story = Story(stretches, run.way) if switched else Story(stretches[:1])
    sampling = replace(settings.sampling, seed=run.number)
    video = new_video(run.policy, BEFORE + AFTER, story, sampling, settings.size, models)
    blocks = [to_uint8(block.decoded[0]).cpu().numpy() for block in video.blocks(BEFORE + AFTER)]
    key, asked = twin(parse(run.prompt), run.number)
    changed, others = measured(np.concatenate(blocks), asked.caption(), key)
    elapsed = time.perf_counter() - start
    return SwitchResult(*run.key, switch_fingerprint(run, settings, models), elapsed, changed, others)


def measured(video: np.ndarray, caption: str, changed: str) -> tuple[list[float], list[float]]:
    """Of each block from the last one before the switch on, in [0, 1]: how much of the attribute `changed` is seen as
    the caption says, and how much of all others."""
    borders = np.cumsum([0, *block_lengths(BEFORE + AFTER, BLOCK_FRAMES)]) / FPS
    windows = [(float(borders[i]), float(borders[i + 1])) for i in range(BEFORE - 1, BEFORE + AFTER)]
    found = [each["attributes"] for each in evaluate_video(video, caption, BLOCK_FRAMES, FPS, windows)["windows"]]
    others = [float(np.nanmean([value for key, value in each.items() if key != changed])) for each in found]
    return [float(each[changed]) for each in found], others


# --- together ---------------------------------------------------------------------------------------------------------

Summary = dict[str, dict[str, dict[str, list[Statistics]]]]  # policy -> way -> "changed" or "others" -> by block


def summarise_switches(settings: SwitchSettings, results: Sequence[SwitchResult]) -> Summary:
    """Statistics over videos, block by block from the last one before the switch on."""

    def of(policy: str, way: str, name: str) -> list[Statistics]:
        own = [getattr(result, name) for result in results if (result.policy, result.way) == (policy, way)]
        return [statistics(list(values)) for values in zip(*own, strict=True)]

    return {
        policy.name: {way: {name: of(policy.name, way, name) for name in ("changed", "others")} for way in WAYS}
        for policy in settings.policies
    }


def switch_table(summary: Summary) -> str:
    """Markdown tables: ways down, blocks across, means ± standard errors."""
    parts = [
        "Means ± standard errors over videos. Block -1 is the last one before the switch; the second prompt rules from "
        "block 0 on, and asks for another background or sky than the first."
    ]
    titles = {"changed": "what the second prompt changes", "others": "all else that it asks for"}
    for policy, ways in summary.items():
        for name, title in titles.items():
            head = ["way", *map(str, range(-1, AFTER))]
            lines = [f"## {policy}: {title}", "", row(head), row(["---", *["---:"] * (len(head) - 1)])]
            lines += [row([way, *map(cell, found[name])]) for way, found in ways.items()]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw_switches(summary: Summary, path: Path) -> None:
    """Draws a PNG: for each policy, what is changed and all else, over blocks, one line a way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..plots import save_figure

    figure = Figure(figsize=(9.6, 3.4 * len(summary)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(summary), 2, squeeze=False)
    for panel_row, (policy, ways) in zip(panels, summary.items(), strict=True):
        for panel, name in zip(panel_row, ("changed", "others"), strict=True):
            for way, found in ways.items():
                means = [each["mean"] for each in found[name]]
                errors = [each["standard_error"] or 0.0 for each in found[name]]
                style = "--" if way in ALONE else "o-"
                panel.errorbar(range(-1, AFTER), means, errors, fmt=style, ms=3, linewidth=1.2, capsize=2, label=way)
            panel.axvline(-0.5, color="grey", linewidth=0.8)
            panel.set_title(f"{policy}: {name}", fontsize=10)
            panel.set_xlabel("blocks since the switch", fontsize=8)
            panel.set_ylim(0, 1.05)
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    save_figure(figure, path)


def evaluate_switches(
    settings: SwitchSettings, models: Models, folder: Path, jobs: int, threads: int, tell: Tell
) -> list[SwitchResult]:
    """All results in the order of the runs; what the folder does not have yet is made and added."""

    def told(result: SwitchResult, done: list[SwitchResult], missing: list[SwitchRun]) -> str:
        return f"{result.policy}, {result.way}, video {result.number} in {result.elapsed:.1f} s"

    return resumed(
        settings.runs(),
        folder / RESULTS,
        SwitchResult,
        lambda run: switch_fingerprint(run, settings, models),
        lambda missing: made(make_switch, missing, settings, models, jobs, threads),
        told,
        tell,
    )


def run_switches(settings: SwitchSettings, options: argparse.Namespace) -> None:
    """Evaluates, writes table, plot and JSON, and prints the table (or the JSON)."""
    models = load(settings.sources)
    folder = ready_folder(settings, models, options, RESULTS)
    results = evaluate_switches(settings, models, folder, options.jobs, options.threads, tell)
    summary = summarise_switches(settings, results)
    facts: dict[str, Any] = {
        "settings": {
            "policies": described_policies(settings, models, lambda policy: BEFORE + AFTER),
            "prompts": [run.prompts for run in settings.runs() if run.way == SWITCHES[0]],
            "blocks_before": BEFORE,
            "blocks_after": AFTER,
            **described_conditions(settings, models, options),
        },
        "versions": versions(),
        "policies": summary,
    }
    report = Report(facts, switch_table(summary), lambda path: draw_switches(summary, path))
    write_report(report, folder, (SUMMARY, TABLE, PLOT), options.json)
