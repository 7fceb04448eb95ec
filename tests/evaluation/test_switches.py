"""python -m packforcing evaluate --switches: twins of prompts, drawn switches, the command."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from packforcing.cli.main import main
from packforcing.config import FrameSize
from packforcing.evaluation.models import Models, Sources, load
from packforcing.evaluation.policies import policy
from packforcing.evaluation.switches import (
    AFTER,
    ALONE,
    BEFORE,
    WAYS,
    SwitchSettings,
    make_switch,
    measured,
    twin,
)
from packforcing.generate.sampling import Sampling
from packforcing.generate.story import SWITCHES
from packforcing.world.captions import parse
from packforcing.world.drawing import render_uint8
from packforcing.world.scenes import compose, evaluation_prompts


@pytest.fixture(scope="module")
def demo() -> Models:
    return load(Sources())


def settings(**changes: object) -> SwitchSettings:
    tiny = {"size": FrameSize(64, 64), "sampling": Sampling(steps=1), "videos": 1}
    return SwitchSettings((policy("packforcing"),), **(tiny | changes))


def test_a_twin_asks_for_another_background_or_sky_and_for_nothing_else() -> None:
    for number, prompt in enumerate(evaluation_prompts(32)):
        before = parse(prompt)
        name, after = twin(before, number)
        differing = [
            field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)
        ]
        assert differing == [name]
        assert parse(after.caption()) == after
        assert getattr(after, "colour", None) != getattr(after, "background", "")


@pytest.mark.parametrize("number", [0, 1])  # an object scene and a landscape
def test_a_drawn_switch_is_seen_in_its_block_and_changes_nothing_else(number: int) -> None:
    before = parse(evaluation_prompts(2)[number])
    name, after = twin(before, number)
    first, second = (
        render_uint8(compose(each, np.random.default_rng(3)), 16 * (BEFORE + AFTER) - 3) for each in (before, after)
    )
    border = 16 * BEFORE - 3
    video = np.concatenate([first[:border], second[border:]])
    changed, others = measured(video, after.caption(), name)
    assert changed == [0.0, *[1.0] * AFTER]
    assert others[1:] == measured(second, after.caption(), name)[1][1:]
    assert np.mean(others) > 0.6  # a landscape's camera leaves its landmarks now and then

    late = np.concatenate([first[: border + 32], second[border + 32 :]])
    assert measured(late, after.caption(), name)[0] == [0.0, 0.0, 0.0, *[1.0] * (AFTER - 2)]


def test_until_the_switch_all_ways_make_the_first_prompts_video(demo: Models) -> None:
    chosen = settings(sampling=Sampling(steps=2))
    runs = {run.way: run for run in chosen.runs()}
    assert tuple(runs) == WAYS
    assert len({run.prompts for run in runs.values()}) == 3
    found = {way: make_switch(runs[way], chosen, demo) for way in (ALONE[0], ALONE[1], SWITCHES[1])}
    assert found[SWITCHES[1]].changed[0] == found[ALONE[0]].changed[0]
    assert found[SWITCHES[1]].others[0] == found[ALONE[0]].others[0]
    assert len({result.fingerprint for result in found.values()}) == 3


def test_the_command_writes_its_results_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", "--switches", "--videos", "1", "--size", "64x64", "--steps", "1", "--device", "cpu"]
    command += ["--output", str(tmp_path)]
    assert main(command) == 0
    facts = json.loads((tmp_path / "switches.json").read_text())
    ways = facts["policies"]["packforcing"]
    assert list(ways) == list(WAYS)
    assert all(len(found["changed"]) == len(found["others"]) == 1 + AFTER for found in ways.values())
    first, second = facts["settings"]["prompts"][0]
    assert parse(first) != parse(second)
    assert (tmp_path / "switches.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()

    monkeypatch.setattr("packforcing.evaluation.switches.make_switch", None)  # nothing is made again
    assert main(command) == 0
    assert "5 runs, 5 of them done before" in capsys.readouterr().err
    assert json.loads((tmp_path / "switches.json").read_text())["policies"] == facts["policies"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--recall"], "--recall and --switches"),
        (["--videos", "0"], "--videos must be 1 to"),
        (["--seconds", "5"], "--seconds"),
        (["--gaps", "3"], "--gaps"),
    ],
)
def test_mistakes_are_told(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--switches", *options]) == 1
    assert told in capsys.readouterr().err
