"""python -m packforcing evaluate: policies, prefixes of runs, the file of results, statistics, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from packforcing.cli.main import main, parser
from packforcing.config import CacheConfig, FrameSize
from packforcing.demo.models import COMPRESSOR_NAME
from packforcing.errors import PackForcingError
from packforcing.evaluation import models as models_module
from packforcing.evaluation import run as command
from packforcing.evaluation.metrics import evaluate_video, not_asked
from packforcing.evaluation.models import Models, Sources, compressor_choice, digest
from packforcing.evaluation.plots import points
from packforcing.evaluation.policies import POLICIES, policy
from packforcing.evaluation.processes import made
from packforcing.evaluation.runs import MEASURES, Result, Run, Settings, fingerprint, make, make_video, measure
from packforcing.evaluation.summary import compared, statistics, summarise, table
from packforcing.files.compressor_file import CompressorMetadata, save_compressor
from packforcing.generate.sampling import Sampling
from packforcing.model.compressor import HRBranch
from packforcing.world.captions import parse
from packforcing.world.drawing import render_uint8
from packforcing.world.scenes import compose, evaluation_prompts

REPO = Path(__file__).resolve().parents[2]
SQUARES = "two red squares bounce on a blue background"


def settings(*names: str, seconds: tuple[float, ...] = (1.0, 2.0), **changes: object) -> Settings:
    chosen = tuple(policy(name) for name in names or ("packforcing",))
    tiny = {"size": FrameSize(64, 64), "sampling": Sampling(steps=1), "prompts": 1}
    return Settings(chosen, seconds, **(tiny | changes))


def evaluate(folder: Path, *options: str) -> dict:
    """Runs the command with few and small runs; returns the JSON that it leaves in the folder."""
    tiny = ["--seconds", "1,2", "--size", "64x64", "--steps", "1", "--prompts", "1", "--device", "cpu"]
    assert main(["evaluate", "--output", str(folder), *tiny, *options]) == 0
    return json.loads((folder / "evaluation.json").read_text())


# --- policies --------------------------------------------------------------------------------------------------

CONFIGS = {
    "full": CacheConfig(sink_frames=4 * 30, recent_frames=0, top_k=0),
    "window": CacheConfig(sink_frames=0, recent_frames=16, top_k=0),
    "sink-recent": CacheConfig(sink_frames=8, recent_frames=4, top_k=0),
    "packforcing": CacheConfig(),
    "packforcing-recency": CacheConfig(selection="recency"),
    "packforcing-no-rope": CacheConfig(rope_adjustment=False),
    "packforcing-lr": CacheConfig(),
    "sink-0": CacheConfig(sink_frames=0),
    "sink-4": CacheConfig(sink_frames=4),
    "sink-16": CacheConfig(sink_frames=16),
    "range-24": CacheConfig(position_range=24),
    "top-4": CacheConfig(top_k=4),
}


@pytest.mark.parametrize(("name", "config"), CONFIGS.items(), ids=CONFIGS)
def test_a_policy_is_a_cache_configuration(name: str, config: CacheConfig) -> None:
    assert policy(name).config(blocks=30) == config
    assert policy(name).name == name
    assert policy(name).compressor == {"packforcing-lr": "lr"}.get(name, "trained" if config.top_k else "none")


def test_all_named_policies_are_known() -> None:
    numbered = ("sink-0", "sink-4", "sink-1", "range", "top-")
    assert set(POLICIES) == {name for name in CONFIGS if not name.startswith(numbered)}


def test_full_sees_every_block_and_the_window_only_the_last_ones() -> None:
    for blocks in (1, 7, 30):
        partition = POLICIES["full"].config(blocks).partition(blocks - 1)
        assert [*partition.sink, *partition.mid, *partition.recent] == list(range(blocks - 1))
        assert list(partition.sink) == list(range(blocks - 1))
    window = POLICIES["window"].config(30).partition(29)
    assert (list(window.sink), list(window.recent)) == ([], [25, 26, 27, 28])
    assert POLICIES["window"].config(30).attended_mids(29) == 0


def test_a_policy_is_run_no_longer_than_it_may() -> None:
    some = settings("full", "packforcing", "sink-0@5", "window@30.5", seconds=(5.0, 30.0, 60.0))
    assert [some.durations(each) for each in some.policies] == [(5.0, 30.0), (5.0, 30.0, 60.0), (5.0,), (5.0, 30.0)]
    assert [each.name for each in some.policies] == ["full", "packforcing", "sink-0", "window"]
    assert policy("full@60") == replace(policy("full"), longest=60.0)
    assert len(settings("full@4", "packforcing", seconds=(5.0,)).runs()) == 1


def test_a_shorter_limit_asks_for_no_other_runs(models: Models) -> None:
    long, short = (settings(name, seconds=(1.0, 2.0)) for name in ("sink-4", "sink-4@1"))
    result = fake("sink-4", _1=0.0, _2=0.0)
    mine = fingerprint(long.runs()[0], long, models)
    assert mine == fingerprint(short.runs()[0], short, models)
    done = replace(result, prompt=long.runs()[0].prompt, seed=0, fingerprint=mine)
    assert done.covers(long.runs()[0], mine)
    assert done.covers(short.runs()[0], mine)


def test_open_prompts_leave_colours_out() -> None:
    some = settings("packforcing", prompts=4, open_prompts=True)
    assert [one.prompt for one in some.runs()] == evaluation_prompts(4, is_open=True)
    assert all(not_asked(parse(one.prompt)) for one in some.runs())
    options = parser().parse_args(["evaluate", "--open-prompts"])
    assert command.settings_of(options).open_prompts


# --- one run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "short", "long"), [("packforcing", 5.0, 10.0), ("full", 2.0, 4.0)])
def test_a_runs_prefix_is_the_shorter_run(models: Models, name: str, short: float, long: float) -> None:
    alone, whole = settings(name, seconds=(short,)), settings(name, seconds=(short, long))
    first, both = (make(each.runs()[0], each, models).measures for each in (alone, whole))
    assert both[f"{short:g}"] == first[f"{short:g}"]
    assert both[f"{long:g}"] != first[f"{short:g}"]
    assert set(both[f"{long:g}"]) == set(MEASURES)


def test_a_run_is_as_long_as_generates_video_and_follows_prompt_and_seed(models: Models) -> None:
    some = settings(seconds=(0.5, 1.5))
    run = some.runs()[0]
    video = make_video(run, some, models)
    assert (video.shape, video.dtype) == ((29, 64, 64, 3), np.uint8)  # two blocks of 16, less the 3 of the very first
    assert np.array_equal(video, make_video(run, some, models))
    assert not np.array_equal(video, make_video(replace(run, seed=1), some, models))
    assert not np.array_equal(video, make_video(replace(run, prompt=SQUARES), some, models))


@pytest.fixture(scope="module")
def spoiled() -> np.ndarray:
    """20 s of two squares, which turn green after 10 s."""
    asked = parse(SQUARES)
    video = render_uint8(compose(asked, 3), 320)
    video[157:] = render_uint8(compose(replace(asked, colour="green"), 3), 163, start=157)
    return video


def test_measures_are_of_the_last_five_seconds(spoiled: np.ndarray) -> None:
    before, after = measure(spoiled, SQUARES, 10), measure(spoiled, SQUARES, 20)
    assert (before["attribute_accuracy"], before["drift"]) == (1, 0)
    assert after["attribute_accuracy"] == pytest.approx(0.75, abs=0.01)  # of count, colour, shape and background
    assert after["drift"] == pytest.approx(0.25, abs=0.01)
    assert measure(spoiled, SQUARES, 5)["revisit_similarity"] == measure(spoiled[:77], SQUARES, 5)["revisit_similarity"]
    only_end = evaluate_video(spoiled[:317], SQUARES, windows=[(317 / 16 - 5, 317 / 16)])["windows"][0]
    assert after["border_jump"] == only_end["border_jump"]
    assert after["dynamic_degree"] == only_end["dynamic_degree"]


def test_revisit_similarity_is_the_whole_videos(spoiled: np.ndarray) -> None:
    changed = spoiled.copy()
    changed[200:] = 255 - changed[200:]  # from 12.5 s on the background is another
    end = len(changed[:317]) / 16
    late, whole = evaluate_video(changed[:317], SQUARES, windows=[(end - 5, end), (0, end)])["windows"]
    assert measure(changed, SQUARES, 20)["revisit_similarity"] == whole["revisit_similarity"]
    assert whole["revisit_similarity"] > late["revisit_similarity"] + 0.1


def test_what_is_not_defined_is_none() -> None:
    grey = np.full((13, 64, 64, 3), 128, np.uint8)
    found = measure(grey, SQUARES, 1)
    assert found["border_jump"] is None  # one block has no border
    assert found["revisit_similarity"] is None
    assert found["dynamic_degree"] == 0


# --- models ----------------------------------------------------------------------------------------------------


def compressor_file(path: Path, dim: int = 256, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    branch = HRBranch((16, 4, 4, 4, 4, dim), temporal_stride=2)
    torch.nn.init.normal_(branch[-1].weight, std=0.1)
    state = {f"hr.{name}": tensor for name, tensor in branch.state_dict().items()}
    facts = CompressorMetadata(model_dim=dim, temporal_stride=2, hidden_channels=(4, 4, 4, 4), block_frames=4)
    save_compressor(path, state, facts)
    return path


def test_the_compressor_is_the_files_else_the_demos_else_training_free(tmp_path: Path) -> None:
    other = compressor_file(tmp_path / "mine.safetensors", seed=1)
    assert compressor_choice(Sources()).name == COMPRESSOR_NAME
    assert compressor_choice(Sources(compressor=str(other))).name == "mine.safetensors"
    assert compressor_choice(Sources(model="x.safetensors")) is models_module.TRAINING_FREE  # not made for that one
    assert digest(compressor_choice(Sources()).state_dict) != digest(
        compressor_choice(Sources(compressor=str(other))).state_dict
    )


def test_policies_take_the_trained_compressor_or_the_training_free_one(models: Models, tmp_path: Path) -> None:
    file = str(compressor_file(tmp_path / "mine.safetensors"))
    trained = replace(models, trained=compressor_choice(Sources(compressor=file)))
    assert trained.compressor("trained", 4).hr is not None
    assert trained.compressor("lr", 4).hr is None
    assert trained.compressor("none", 4) is None
    some = settings("sink-0", seconds=(3.0,))  # without sinks, the first block is a mid block two blocks later
    lr = replace(policy("sink-0"), compressor="lr")
    videos = [make_video(replace(some.runs()[0], policy=each), some, trained) for each in (*some.policies, lr)]
    assert np.array_equal(videos[0][:29], videos[1][:29])
    assert not np.array_equal(videos[0], videos[1])


def test_a_fingerprint_changes_with_all_that_the_numbers_depend_on(models: Models, tmp_path: Path) -> None:
    def of(one: Settings = settings(), using: Models = models) -> str:  # noqa: B008
        return fingerprint(one.runs()[0], one, using)

    others = [
        of(settings(size=FrameSize(64, 80))),
        of(settings(sampling=Sampling(steps=2))),
        of(settings(sampling=Sampling(steps=1, shift=3))),
        of(settings(sampling=Sampling(steps=1, update="euler"))),
        of(settings("packforcing-no-rope")),
        of(
            using=replace(
                models, trained=compressor_choice(Sources(compressor=str(compressor_file(tmp_path / "c.safetensors"))))
            )
        ),
    ]
    weights = models.wan.modules.head.head.bias
    with torch.no_grad():
        weights += 1
        others.append(of(using=replace(models)))
        weights -= 1
    assert len({of(), *others}) == 1 + len(others)
    # Durations and numbers of runs change no run.
    assert of(settings(seconds=(1.0, 4.0), prompts=3, seeds=2)) == of()


# --- statistics ------------------------------------------------------------------------------------------------


def test_statistics_are_of_what_is_defined() -> None:
    found = statistics([1.0, None, 2.0, 4.0])
    values = np.array([1.0, 2.0, 4.0])
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(values.mean())
    assert found["spread"] == pytest.approx(values.std(ddof=1))
    assert found["standard_error"] == pytest.approx(values.std(ddof=1) / 3**0.5)
    assert statistics([3.0, None]) == {"mean": 3.0, "spread": None, "standard_error": None, "n": 1}
    assert statistics([None]) == {"mean": None, "spread": None, "standard_error": None, "n": 0}


def fake(policy_name: str, elapsed: float = 1.0, **measures: dict) -> Result:
    return Result(
        policy_name, "p", 0, "f", elapsed, {key[1:]: dict.fromkeys(MEASURES, v) for key, v in measures.items()}
    )


def test_a_table_has_a_row_a_policy_and_dashes_where_nothing_was_run() -> None:
    some = settings("full", "packforcing", seconds=(5.0, 60.0))
    results = [fake("full", _5=0.5), fake("packforcing", _5=0.25, _60=1.0), fake("packforcing", _5=0.75, _60=None)]
    summary = summarise(some, results)
    assert summary["full"]["60"] is None
    assert summary["packforcing"]["60"]["drift"]["n"] == 1
    lines = table(summary, ["A remark."]).splitlines()
    rows = [line for line in lines if line.startswith(("| full", "| packforcing"))]
    assert [row.count("|") for row in rows] == [len(MEASURES) + 3] * 4
    assert rows[0] == "| full | " + "0.500 | " * len(MEASURES) + "1 |"
    assert rows[1] == "| packforcing | " + "0.500 ± 0.250 | " * len(MEASURES) + "2 |"
    assert rows[2] == "| full | " + "– | " * len(MEASURES) + "– |"
    assert lines[-1] == "A remark."
    assert points(summary["packforcing"], "drift") == ([5.0, 60.0], [0.5, 1.0], [0.25, 0.0])
    assert points(summary["full"], "drift") == ([5.0], [0.5], [0.0])


def test_policies_are_compared_pair_by_pair() -> None:
    def made(name: str, prompt: str, **measures: float | None) -> Result:
        return Result(name, prompt, 0, "f", 1.0, {"5": dict.fromkeys(MEASURES) | measures})

    some = settings("packforcing", "window", "full", seconds=(5.0, 60.0))
    values = {"a": (0.9, 0.5), "b": (0.1, 0.0), "c": (0.5, None)}
    results = [made("packforcing", prompt, memory=ours) for prompt, (ours, _) in values.items()]
    results += [made("window", prompt, memory=theirs) for prompt, (_, theirs) in values.items()]
    results += [made("window", "not of ours", memory=1.0)]
    found = compared(some, results)
    assert list(found) == ["window", "full"]
    assert found["window"]["5"]["memory"] == pytest.approx(
        {"mean": -0.25, "spread": 0.3 / 2**0.5, "standard_error": 0.15, "n": 2}
    )
    assert (
        found["window"]["5"]["drift"]["n"]
        == found["window"]["60"]["memory"]["n"]
        == found["full"]["5"]["memory"]["n"]
        == 0
    )
    lines = table(summarise(some, results), [], compared(some, [r for r in results if r.policy != "full"])).splitlines()
    assert lines[-2].startswith("| window | – |")
    assert lines[-2].endswith("| 60 s |")
    only_five = settings("packforcing", "window", seconds=(5.0,))
    line = table(summarise(only_five, results), [], compared(only_five, results)).splitlines()[-1]
    assert line == "| window | – | -0.250 ± 0.150 | " + "– | " * (len(MEASURES) - 2) + "5 s |"
    assert compared(some, [result for result in results if result.policy == "window"]) == {}


def test_the_time_left_follows_each_policys_own_pace() -> None:
    done = [fake("slow", elapsed=20.0, _10=0.0), fake("fast", elapsed=5.0, _5=0.0, _10=0.0)]
    slow, fast, new = (Run(replace(policy("full"), name=name), "p", 1, (5.0,)) for name in ("slow", "fast", "new"))
    assert command.time_left(done, [slow, slow, fast], jobs=1) == pytest.approx(10 + 10 + 2.5)
    assert command.time_left(done, [slow, fast], jobs=2) == pytest.approx(6.25)
    assert command.time_left(done, [new], jobs=1) == pytest.approx(1.25 * 5)
    assert command.time_left(done, [], jobs=1) == 0


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_writes_a_table_a_plot_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "new" / "folder", tmp_path / "result.json"
    found = evaluate(folder, "--policies", "packforcing,full@1", "--prompts", "2", "--json", str(file))
    out, err = capsys.readouterr()
    assert out.strip() == (folder / "table.md").read_text().strip()
    assert "Not run for longer than: full 1 s." in out
    assert "4 of 4: full, seed 0, 1 s in" in err
    assert json.loads(file.read_text()) == found
    assert set(found) == {"settings", "versions", "policies", "differences", "cost"}
    assert found["settings"]["prompts"] == evaluation_prompts(2)
    assert found["settings"]["policies"]["packforcing"]["cache"]["top_k"] == 16
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["policies"]) == ["packforcing", "full"]
    assert list(found["policies"]["packforcing"]) == ["1", "2"]
    assert found["policies"]["full"]["2"] is None
    assert set(found["cost"]["seconds_a_video_second"]) == {"packforcing", "full"}
    with Image.open(folder / "quality.png") as image:
        assert image.width > 1000

    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    values = [line["measures"]["2"]["dynamic_degree"] for line in lines if line["policy"] == "packforcing"]
    statistic = found["policies"]["packforcing"]["2"]["dynamic_degree"]
    assert set(statistic) == {"mean", "spread", "standard_error", "n"}
    assert statistic["n"] == len(values) == 2
    assert statistic["mean"] == pytest.approx(np.mean(values))
    assert statistic["spread"] == pytest.approx(np.std(values, ddof=1))
    assert set(found["policies"]["packforcing"]["2"]) == set(MEASURES)


def test_json_on_standard_output_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(tmp_path, "--policies", "window", "--seconds", "1", "--json")
    out, _ = capsys.readouterr()
    assert json.loads(out) == found


def test_an_evaluation_goes_on_where_it_was_interrupted(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = []
    monkeypatch.setattr(command, "make", lambda *given: count.append(given[0].key) or make(*given))

    def made(seconds: tuple[float, ...] = (0.5, 1.0), **changes: object) -> tuple[list[Result], list]:
        count.clear()
        wanted = settings("window", "sink-recent", seconds=seconds, **changes)
        return command.evaluate(wanted, models, tmp_path, jobs=1, threads=1, tell=lambda _: None), list(count)

    whole, runs = made(prompts=2)
    assert runs == [result.key for result in whole]
    assert len(runs) == 4
    assert made(prompts=2) == (whole, [])

    file = tmp_path / "runs.jsonl"
    text = file.read_text()
    file.write_text(text[:-40])  # the last line was not finished
    again, redone = made(prompts=2)
    assert redone == runs[-1:]
    assert again[:-1] == whole[:-1]
    assert (again[-1].key, again[-1].measures) == (whole[-1].key, whole[-1].measures)

    assert [key[2] for key in made(prompts=2, seeds=2)[1]] == [1] * 4  # only the new seed's
    assert made(seconds=(1.0,), prompts=2)[1] == []  # fewer durations
    assert len(made(seconds=(1.0, 2.0))[1]) == 2  # longer ones
    assert len(made(sampling=Sampling(steps=2))[1]) == 2  # other settings
    assert made(prompts=2) == (again, [])  # the first ones are still there


def test_what_was_done_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(one: Run, *given: object) -> Result:
        if one.policy.name == "window":
            raise PackForcingError("Block 3 came out with NaN.")
        return make(one, *given)

    monkeypatch.setattr(command, "make", failing)
    options = ["--seconds", "1", "--size", "64x64", "--steps", "1", "--prompts", "1", "--output", str(tmp_path)]
    assert main(["evaluate", "--policies", "sink-recent,window", *options]) == 1
    assert [json.loads(line)["policy"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()] == [
        "sink-recent"
    ]


ORPHAN = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from packforcing.evaluation.processes import start_worker

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), start_worker, (1,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(REPO)}
    )
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it is there
    parent.kill()
    try:
        parent.communicate(timeout=60)  # reads until nobody holds the pipe any more
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker went on")


def test_several_processes_find_what_one_finds(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO)  # the path that the processes start with
    some = settings("packforcing", seconds=(1.0,), prompts=2)
    models = replace(models, trained=compressor_choice(some.sources))  # what the processes load
    there, here = (
        {result.key: result for result in made(make, some.runs(), some, models, jobs, threads=1)} for jobs in (2, 1)
    )
    assert there.keys() == here.keys()
    for key, result in here.items():
        # Not bit by bit: the last bits of a matrix product may depend on where in memory its operands lie, and with
        # them whether a pixel counts as moving. 20 of a frame's 4,096 may; other prompts' videos are farther apart.
        for duration, measures in result.measures.items():
            assert there[key].measures[duration] == pytest.approx(measures, abs=20 / 64**2)
            others = [each.measures[duration] for other, each in there.items() if other != key]
            assert others
            assert all(other != pytest.approx(measures, abs=20 / 64**2) for other in others)
        assert there[key].fingerprint == result.fingerprint


# --- mistakes --------------------------------------------------------------------------------------------------

MISTAKES = {
    "policy": (
        ["--policies", "full,half"],
        "no cache policy 'half': choose from full, window, sink-recent, packforcing,",
    ),
    "no policy": (["--policies", ","], "at least one policy, but none is given"),
    "sinks": (["--policies", "sink-6"], "sink_frames must be whole blocks of 4 latent frames, but it is 6"),
    "range": (["--policies", "range-3"], "position_range must be 0 (off) or at least 17"),
    "seconds": (["--seconds", "5,long"], "--seconds takes numbers with commas between, such as 5,30,60, not '5,long'"),
    "no seconds": (["--seconds", ""], "at least one duration, but none is given"),
    "negative seconds": (["--seconds", "5,-1"], "must be above 0 and at most 10,000,000 seconds, but it is -1"),
    "no end": (["--seconds", "nan"], "must be above 0 and at most 10,000,000 seconds, but it is nan"),
    "no limit": (["--policies", "full@0"], "'full@0' should end with a number of seconds above 0, as full@30 does"),
    "limit of words": (["--policies", "full@long"], "'full@long' should end with a number of seconds above 0"),
    "endless limit": (["--policies", "full@inf"], "'full@inf' should end with a number of seconds above 0"),
    "limited nothing": (["--policies", "half@30"], "no cache policy 'half'"),
    "twice": (["--policies", "full@30,full@60"], "The policy 'full' is asked for twice"),
    "prompts": (["--prompts", "0"], "at least one of its prompts, but 0 are asked for"),
    "too many prompts": (["--prompts", "100000"], "There are 96 prompts to choose from, but 100000"),
    "seeds": (["--seeds", "-2"], "at least one of its seeds, but -2 are asked for"),
    "size": (["--size", "128"], "--size takes a width and a height, such as 128x128, not '128'"),
    "odd size": (["--size", "100x128"], "The width must be a positive multiple of 16 pixels, but it is 100"),
    "small size": (["--size", "48x64"], "at least 64x64 pixels, but the video is 48x64"),
    "jobs": (["--jobs", "0"], "--jobs must be at least 1, but it is 0"),
    "threads": (["--threads", "0"], "--threads must be at least 1, but it is 0"),
    "steps": (["--steps", "0"], "at least 1 step"),
    "device": (["--device", "toaster"], "toaster"),
    "model": (["--model", "gone.safetensors"], "gone.safetensors does not exist"),
    "VAE": (["--vae", "gone.safetensors"], "gone.safetensors does not exist"),
    "compressor": (["--compressor", "gone.safetensors"], "gone.safetensors does not exist"),
    "no folder for the JSON": (["--json", "no/such/result.json"], "the folder no/such does not exist"),
}


@pytest.mark.parametrize(("options", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(
    options: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_compressor_of_another_model_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = compressor_file(tmp_path / "wide.safetensors", dim=512)
    assert main(["evaluate", "--compressor", str(file), "--output", str(tmp_path / "out")]) == 1
    assert "trained for a model 512 wide" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["evaluate", "--output", str(tmp_path / "taken")]) == 1
    assert "Results cannot be written to" in capsys.readouterr().err
