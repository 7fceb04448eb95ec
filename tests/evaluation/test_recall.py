"""python -m packforcing evaluate --recall: distances of hand-made videos, what layers took up, the world's floor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from packforcing.cli.main import main
from packforcing.config import CacheConfig, FrameSize
from packforcing.errors import PackForcingError
from packforcing.evaluation import recall_command as command
from packforcing.evaluation.models import Models
from packforcing.evaluation.policies import policy
from packforcing.evaluation.recall import (
    FIRST,
    SELECTION_MEASURES,
    VIDEO_MEASURES,
    detail_distances,
    looked_at,
    measure_recall,
    measure_selection,
    recall_way,
    returned,
)
from packforcing.evaluation.recall_runs import (
    SHAPES,
    WORLD,
    RecallResult,
    RecallRun,
    RecallSettings,
    captions_of,
    drawn,
    make_recall,
    pack,
    recall_fingerprint,
    story_of_captions,
    tour_of,
)
from packforcing.evaluation.recall_summary import compared_recall, jackknife, recall_table, summarise_recall
from packforcing.evaluation.summary import statistics
from packforcing.generate.record import BlockRecord, CacheRecord, PromptRecord
from packforcing.generate.sampling import Sampling
from packforcing.pixels import to_uint8
from packforcing.world.places import Tour

TINY = ["--size", "64x64", "--steps", "1", "--device", "cpu"]


def settings(*names: str, gaps: tuple[int, ...] = (1,), **changes: object) -> RecallSettings:
    chosen = tuple(policy(name) for name in names or ("sink-recent",))
    tiny = {"size": FrameSize(64, 64), "sampling": Sampling(steps=1), "videos": 1}
    return RecallSettings(chosen, gaps, **(tiny | changes))


# --- the story -------------------------------------------------------------------------------------------------


def test_the_way_leaves_places_and_comes_back() -> None:
    assert recall_way(3) == (0, 0, 1, 1, 2, 2, 0, 0, 0, 1, 1, 0, 2, 2)
    for gap in (1, 3, 60):
        way = recall_way(gap)
        assert [{way[block] for block in pair} for pair in FIRST] == [{0}, {1}, {2}]
        for place, pair in returned(gap).items():
            assert [way[block] for block in pair] == [place, place]
            assert way[pair[0] - 1] != place
            assert pair[0] > FIRST[place][1]
        assert looked_at(gap) == {0, 1, 2, 3, 4, 5, gap + 6, gap + 7, gap + 9, gap + 10}


def test_captions_describe_a_place_once_or_never(models: Models) -> None:
    run = RecallRun(WORLD, 0, 2)
    scenes = [place.scene.caption for place in tour_of(run).places]
    said = captions_of(run, unsaid=False)
    assert said[2] == said[3] == f"place two: {scenes[1]}"
    assert said[8:] == ["place two", "place two", "place one", "place three", "place three"]
    assert captions_of(run, unsaid=True)[:6] == [
        f"place {name}" for name in ("one", "one", "two", "two", "three", "three")
    ]
    story = story_of_captions(said, models.wan)
    assert [stretch.start for stretch in story.stretches] == [0, 2, 4, 6, 8, 10, 11]
    assert [stretch.prompt for stretch in story.stretches] == [said[i] for i in (0, 2, 4, 6, 8, 10, 11)]
    assert story.stretches[3].text is story.stretches[5].text


# --- distances -------------------------------------------------------------------------------------------------


def plain(values: Mapping[int, int], gap: int = 1) -> dict[int, np.ndarray]:
    """Blocks of plain grey frames of these values, 0 to 255; all others are black."""
    return {block: np.full((16, 64, 64, 3), values.get(block, 0), np.uint8) for block in looked_at(gap)}


@pytest.fixture(scope="module")
def tour() -> Tour:
    return tour_of(RecallRun(WORLD, 0, 1))


def test_the_revisit_distance_is_taken_block_by_block_in_order(tour: Tour) -> None:
    # place two: 0.2, 0.4 -> 0.4, 0.2; place three: 0, 0 -> 0.2, 0
    frames = plain({2: 51, 3: 102, 7: 102, 8: 51, 10: 51})
    found, shown = measure_recall(frames, tour, 1, unsaid=True)
    assert found["revisit_distance"] == pytest.approx((0.2 + 0.2 + 0.2 + 0) / 4, abs=1e-6)
    assert shown.first[1, 0].mean() == pytest.approx(0.2)
    assert found["detail_distance"] == pytest.approx(0, abs=1e-6)  # plain frames have no details
    assert found["attributes_returned"] is None  # nobody has described anything


def test_a_returning_block_is_nearest_to_its_own_place_or_to_another(tour: Tour) -> None:
    # Places: 0, 100, 200. Two comes back as 90 and 160: nearer to two, to three. Three as 10 and 210: to one, to three.
    frames = plain({2: 100, 3: 100, 4: 200, 5: 200, 7: 90, 8: 160, 10: 10, 11: 210})
    found, _ = measure_recall(frames, tour, 1, unsaid=True)
    assert found["nearest_right"] == pytest.approx(2 / 4)
    assert found["revisit_distance"] == pytest.approx((10 + 60 + 190 + 10) / 255 / 4, abs=1e-6)


def test_a_blocks_frames_are_averaged_over_time(tour: Tour) -> None:
    frames = plain({})
    frames[2][::2] = 204  # half of the frames at 0.8: 0.4 in the mean; place three keeps still
    assert measure_recall(frames, tour, 1, unsaid=True)[0]["revisit_distance"] == pytest.approx(0.4 / 4, abs=1e-6)


def dotted(*places: tuple[int, int], grey: float = 0.0) -> np.ndarray:
    """A picture [64, 64, 3] with white dots of one pixel on black or grey."""
    picture = np.full((64, 64, 3), grey, np.float32)
    for place in places:
        picture[place] = 1
    return picture


def test_the_distance_of_details_is_that_of_small_things() -> None:
    """A dot less its square's mean: 288/289 at the dot, -1/289 at each of the 288 pixels around it."""
    dot = 2 * (288 / 289) / 56**2
    one = dotted((30, 30))[None]
    assert detail_distances(one, dotted()[None]) == pytest.approx(dot, rel=1e-5)
    assert detail_distances(one, dotted((34, 26))[None]) == pytest.approx(0, abs=1e-7)  # it may move by 4
    apart = detail_distances(one, dotted((30, 50))[None])[0, 0]
    assert apart > 1.9 * dot
    darker, brighter = dotted(grey=0.1)[None], dotted(grey=0.9)[None]
    assert detail_distances(darker, brighter) == pytest.approx(0, abs=1e-5)


def test_details_are_those_of_the_last_frame_and_of_the_fifth_one_back(tour: Tour) -> None:
    frames = plain({})
    dot = (dotted((30, 30)) * 255).astype(np.uint8)
    frames[3][-1] = dot
    frames[7][4] = dot
    still = measure_recall(frames, tour, 1, unsaid=True)[0]["detail_distance"]
    assert still == pytest.approx(0, abs=1e-7)
    frames[7][4] = 0
    lost = measure_recall(frames, tour, 1, unsaid=True)[0]["detail_distance"]
    assert lost == pytest.approx(2 * (288 / 289) / 56**2 / 2, rel=1e-5)  # of one of two places


def test_attributes_are_those_of_the_description(tour: Tour) -> None:
    frames = dict(enumerate(raw(tour)))
    found, _ = measure_recall(frames, tour, 1, unsaid=False)
    assert found["attributes_first"] > 0.95
    assert found["attributes_returned"] > 0.95
    assert found["attributes_other"] < 0.6
    forgot = frames | {block: frames[block - 3] for block in (10, 11)} | {block: frames[block + 3] for block in (7, 8)}
    assert measure_recall(forgot, tour, 1, unsaid=False)[0]["attributes_returned"] == pytest.approx(
        found["attributes_other"], abs=0.15
    )


# --- statistics ------------------------------------------------------------------------------------------------


def result(
    name: str, number: int, values: Sequence[float], revisit: float, gap: int = 1, **shown: np.ndarray
) -> RecallResult:
    """A result whose places are plain frames of these three values."""
    first = np.zeros(SHAPES["first"]) + np.array(values).reshape(3, 1, 1, 1, 1)
    pictures = {"first": first, "again": first[1:], "last": np.zeros(SHAPES["last"]), "back": np.zeros(SHAPES["back"])}
    # So that details differ, and no scale is 0.
    pictures["last"][:] = [dotted((20 + 10 * i, 20 + 7 * number)) for i in range(3)]
    packed = {key: pack(each) for key, each in (pictures | shown).items()}
    measures = dict.fromkeys(VIDEO_MEASURES) | {"revisit_distance": revisit, "detail_distance": 0.5}
    return RecallResult(name, number, gap, "f", 1.0, measures, {}, packed)


PLACES = [(0.0, 0.2, 1.0), (0.4, 0.4, 0.8), (1.0, 0.6, 0.2)]  # of three videos


def world_results() -> list[RecallResult]:
    return [result("world", number, places, 0.0) for number, places in enumerate(PLACES)]


def mean_distance(videos: Sequence[Sequence[float]]) -> float:
    """Of all pairs of different places, also of two videos."""
    values = [value for places in videos for value in places]
    return float(np.mean([abs(a - b) for a, b in combinations(values, 2)]))


def test_recall_is_one_less_the_ratio_and_its_error_is_by_videos() -> None:
    revisits = [0.1, 0.2, 0.06]
    own = [result("sink-recent", i, PLACES[i], revisits[i]) for i in range(3)]
    found = summarise_recall(settings(videos=3), [*own, *world_results()])["sink-recent"]["1"]
    assert found["other_distance"]["mean"] == pytest.approx(mean_distance(PLACES), abs=1e-5)
    assert found["recall"]["mean"] == pytest.approx(1 - 0.12 / mean_distance(PLACES), abs=1e-5)
    without = []
    for i in range(3):
        kept = [j for j in range(3) if j != i]
        without.append(1 - np.mean([revisits[j] for j in kept]) / mean_distance([PLACES[j] for j in kept]))
    error = np.sqrt(2 / 3 * np.square(np.array(without) - np.mean(without)).sum())
    assert found["recall"]["standard_error"] == pytest.approx(error, abs=1e-5)
    assert found["recall"]["n"] == 3
    assert found["revisit_distance"]["standard_error"] == pytest.approx(np.std(revisits, ddof=1) / 3**0.5)


def test_a_blend_of_all_places_has_no_matched_recall() -> None:
    """Places of 0, 0.4 and 1 come back as 0.6: 0.2 and 0.4 away, where two places are 2/3 apart on average."""
    grey = np.zeros(SHAPES["again"]) + 0.6
    own = result("sink-recent", 0, (0.0, 0.4, 1.0), 0.3, again=grey)
    found = summarise_recall(settings(), [own, *world_results()[:1]])["sink-recent"]["1"]
    assert found["recall"]["mean"] == pytest.approx(1 - 0.3 / (2 / 3), abs=1e-5)
    # Two's return to one and three, three's to one and two.
    assert found["return_other_distance"]["mean"] == pytest.approx((0.6 + 0.4 + 0.6 + 0.2) / 4, abs=1e-5)
    assert found["matched_recall"]["mean"] == pytest.approx(1 - 0.3 / 0.45, abs=1e-5)
    alike = [result("sink-recent", i, PLACES[i], 0.3, again=grey) for i in range(2)]
    found = summarise_recall(settings(videos=2), [*alike, *world_results()])["sink-recent"]["1"]
    away = [[abs(value - 0.6) for value in places] for places in PLACES[:2]]
    pairs = [away[v][p] for v in range(2) for p in range(3) for w in range(2) for q in (1, 2) if (v, p) != (w, q)]
    assert found["return_other_distance"]["mean"] == pytest.approx(np.mean(pairs), abs=1e-5)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = [0.3, 0.9, 0.1, 0.7]
    mean = jackknife(lambda chosen: float(np.mean([values[i] for i in chosen])), 4)
    usual = statistics(values)
    assert (mean["mean"], mean["standard_error"]) == pytest.approx((usual["mean"], usual["standard_error"]))
    assert jackknife(lambda chosen: 0.5, 1) == {"mean": 0.5, "spread": None, "standard_error": None, "n": 1}


def test_a_return_without_any_details_remembers_none() -> None:
    """All places have one dot each, returns show none: each is as far from its own place as from any other."""
    own = result("sink-recent", 0, PLACES[0], 0.1)
    distance = float(detail_distances(own.views.back[:1], own.views.last[:1])[0, 0])
    own = replace(own, measures=own.measures | {"detail_distance": distance})
    found = summarise_recall(settings(), [own, *world_results()[:1]])["sink-recent"]["1"]
    assert found["detail_recall"]["mean"] == pytest.approx(0, abs=1e-5)
    assert found["detail_other_distance"]["mean"] == pytest.approx(distance, rel=1e-5)


def test_policies_are_compared_with_packforcing_on_the_same_video() -> None:
    some = settings("packforcing", "window", videos=2)
    results = [result("packforcing", 0, PLACES[0], 0.1), result("packforcing", 1, PLACES[1], 0.3)]
    results += [result("window", 1, PLACES[1], 0.6), result("window", 0, PLACES[0], 0.5)]
    difference = compared_recall(some, results)["window"]["1"]["revisit_distance"]
    assert difference["mean"] == pytest.approx(0.35)
    assert difference["standard_error"] == pytest.approx(0.05)
    assert compared_recall(some, results[2:]) == {}


# --- what layers took up ---------------------------------------------------------------------------------------


def record(selected: Mapping[int, list[list[int]]], top_k: int = 4) -> CacheRecord:
    """The record of a story with a gap of 16: what two layers took up, by block."""
    blocks = [BlockRecord(i, selected.get(i, [[], []])) for i in range(27)]
    told = [PromptRecord(0, "place one")]
    return CacheRecord(
        None, CacheConfig(top_k=top_k), FrameSize(64, 64), 16.0, 2, "x", "float32", "cpu", blocks=blocks, prompts=told
    )


def test_the_share_that_is_right_is_counted_beside_chance() -> None:
    # Block 22 may choose of 2..20 (19 blocks), 23 of 2..21; place two is 2 and 3. 25 of 2..23, 26 of 2..24; 4 and 5.
    chosen = {
        22: [[2, 3, 9, 10], [3, 7, 8, 9]],
        23: [[2, 3, 9, 10], [2, 3, 8, 9]],
        25: [[2, 3, 9, 10], [2, 3, 8, 9]],
        26: [[4, 6, 9, 10], [4, 5, 8, 9]],
    }
    found, layers = measure_selection(record(chosen), gap=16)
    assert found["selected_right"] == pytest.approx((3 / 8 + 0) / 2)
    assert found["selected_right_chance"] == pytest.approx((2 / 19 + 2 / 22) / 2)
    assert found["right_taken_up"] == pytest.approx((3 / 4 + 0) / 2)
    assert found["right_taken_up_chance"] == pytest.approx((4 / 19 + 4 / 22) / 2)
    assert found["selected_right_second"] == pytest.approx((4 / 8 + 3 / 8) / 2)
    assert found["selected_right_chance_second"] == pytest.approx((2 / 20 + 2 / 23) / 2)
    assert layers["right_taken_up"] == pytest.approx([1 / 2, 1 / 4])
    assert layers["selected_right_second"] == pytest.approx([(2 / 4 + 1 / 4) / 2, (2 / 4 + 2 / 4) / 2])


def test_without_mid_blocks_nothing_is_taken_up() -> None:
    found, layers = measure_selection(record({}, top_k=0), gap=16)
    assert found == dict.fromkeys(SELECTION_MEASURES)
    assert layers == {}


# --- the world's floor -----------------------------------------------------------------------------------------


def raw(tour: Tour) -> list[np.ndarray]:
    """The drawn blocks of a tour of a gap of 1, without a VAE: uint8 [F, 64, 64, 3] each."""
    lengths = [13, *[16] * 11]
    return np.split(to_uint8(tour.pixels(lengths, 64)).numpy(), np.cumsum(lengths)[:-1])


def test_the_drawn_world_remembers_all_but_what_moves() -> None:
    results = []
    for number in range(4):
        tour = tour_of(RecallRun(WORLD, number, 1))
        measures, shown = measure_recall(dict(enumerate(raw(tour))), tour, 1, unsaid=True)
        packed = {name: pack(getattr(shown, name)) for name in SHAPES}
        results.append(RecallResult("world", number, 1, "f", 1.0, measures, {}, packed))
    found = summarise_recall(
        settings(videos=4, gaps=(5,)), [*results, *(replace(r, policy="sink-recent", gap=5) for r in results)]
    )
    world = found["world"]["5"]  # a gap of any length is the same to a world whose clocks stand still
    assert world["recall"]["mean"] > 0.7
    assert world["detail_recall"]["mean"] > 0.7
    assert world["recall"]["mean"] < 1
    assert world["nearest_right"]["mean"] == 1
    assert found["sink-recent"]["5"]["recall"] == world["recall"]


def test_the_world_goes_through_the_vae(models: Models, tour: Tour) -> None:
    blocks, exact = list(drawn(replace(tour, way=(0, 1, 1)), 64, models)), raw(tour)
    assert [len(block) for block in blocks] == [13, 16, 16]
    assert 0 < np.abs(blocks[0].astype(int) - exact[0]).mean() < 16


# --- runs ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_what_a_run_depends_on(models: Models) -> None:
    def of(one: RecallSettings, index: int = 1) -> str:
        return recall_fingerprint(one.runs()[index], one, models)

    usual = settings()
    others = [of(settings("window")), of(settings(unsaid=True)), of(settings(sampling=Sampling(steps=2)))]
    others.append(of(settings(size=FrameSize(80, 80))))
    assert len({of(usual), *others}) == 1 + len(others)
    assert of(settings(videos=3, gaps=(1, 4))) == of(usual)
    world = of(usual, 0)
    assert of(settings(unsaid=True, sampling=Sampling(steps=2)), 0) == world  # drawn all the same
    assert of(settings(size=FrameSize(80, 80)), 0) != world


def test_finished_runs_are_taken_up_again(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = []

    def fake(run: RecallRun, some: RecallSettings, models: Models) -> RecallResult:
        count.append(run.key)
        made = result(run.policy.name, run.number, PLACES[run.number], 0.1, run.gap)
        return replace(made, fingerprint=recall_fingerprint(run, some, models))

    monkeypatch.setattr(command, "make_recall", fake)

    def made(*names: str, **changes: object) -> tuple[list[RecallResult], list]:
        count.clear()
        wanted = settings(*names, **changes)
        return command.evaluate_recall(wanted, models, tmp_path, jobs=1, threads=1, tell=lambda _: None), list(count)

    whole, runs = made("window", "sink-recent", videos=2)
    assert runs == [each.key for each in whole]
    assert len(runs) == 2 * 3  # the world is one of them
    assert made("window", "sink-recent", videos=2) == (whole, [])
    file = tmp_path / "recall.jsonl"
    file.write_text(file.read_text()[:-40])  # the last line was not finished
    assert made("window", "sink-recent", videos=2)[1] == runs[-1:]
    assert {key[1] for key in made("window", "sink-recent", videos=3)[1]} == {2}
    assert [key[2] for key in made("window", gaps=(1, 3))[1]] == [3]
    assert made("window", unsaid=True)[1] == [("window", 0, 1)]  # not the world


# --- the command -----------------------------------------------------------------------------------------------


def test_a_small_evaluation_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    options = ["--policies", "top-1,sink-recent", "--gaps", "1", "--videos", "1", "--output", str(tmp_path / "out")]
    assert main(["evaluate", "--recall", *options, *TINY, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == (tmp_path / "out" / "recall.md").read_text().strip()
    assert "3 of 3: sink-recent, video 0, gap 1 in" in err
    found = json.loads(file.read_text())
    assert set(found) == {"settings", "versions", "policies", "differences", "cost"}
    assert found["settings"]["weights"]["model"]
    assert found["settings"]["gaps"] == [1]
    assert [words.split(":")[0] for words in found["settings"]["places"][0]] == [
        "place one",
        "place two",
        "place three",
    ]
    assert list(found["policies"]) == ["world", "top-1", "sink-recent"]
    for by_gap in found["policies"].values():
        measured = by_gap["1"]
        assert measured["recall"]["mean"] == pytest.approx(
            1 - measured["revisit_distance"]["mean"] / measured["other_distance"]["mean"]
        )
        assert measured["attributes_returned"]["n"] == 1
    top, without = (found["policies"][name]["1"] for name in ("top-1", "sink-recent"))
    assert top["selected_right_chance"]["mean"] == pytest.approx((2 / 4 + 2 / 7) / 2)  # of 2..5, and of 2..8
    assert len(top["layers"]["right_taken_up"]) == 4
    assert without["selected_right"]["n"] == 0
    assert without["layers"] == {}
    with Image.open(tmp_path / "out" / "recall.png") as image:
        assert image.width > 600


def test_a_run_follows_its_video_number_and_its_captions(models: Models) -> None:
    some = settings()
    run = some.runs()[1]
    one, again = make_recall(run, some, models), make_recall(run, some, models)
    assert (one.measures, one.shown) == (again.measures, again.shown)
    untold = make_recall(run, replace(some, unsaid=True), models)
    assert untold.shown != one.shown
    assert untold.measures["attributes_first"] is None
    assert make_recall(replace(run, number=1), some, models).shown != one.shown


def test_a_table_has_a_row_a_policy_and_dashes_where_nothing_is_defined() -> None:
    own = [result("sink-recent", i, PLACES[i], 0.1) for i in range(3)]
    text = recall_table(summarise_recall(settings(videos=3), [*own, *world_results()]), ["A remark."])
    rows = [line for line in text.splitlines() if line.startswith(("| world", "| sink-recent"))]
    assert len(rows) == 2  # nobody has mid blocks
    assert rows[1].endswith("| – | – | – | 3 |")
    assert text.endswith("A remark.\n")


def test_the_world_is_always_there_and_full_may_be_as_long_as_it_takes() -> None:
    chosen = command.recall_policies("world,full,top-4")
    assert [each.name for each in chosen] == ["full", "top-4"]
    assert [run.policy.name for run in settings("full", gaps=(60,)).runs()] == ["world", "full"]
    assert chosen[1].config(10).top_k == 4
    assert [each.name for each in command.recall_policies(None)] == command.DEFAULT_POLICIES.split(",")


MISTAKES = {
    "no gap": (["--gaps", ""], "at least one gap, but none is given"),
    "gap of 0": (["--gaps", "16,0"], "A gap must be at least 1 block, but --gaps has 0"),
    "gap of words": (["--gaps", "16,long"], "--gaps takes whole numbers of blocks with commas between, such as 16,60"),
    "endless gap": (["--gaps", "9999999999"], "at most 1,000,000,000 blocks"),
    "videos": (["--videos", "0"], "--videos must be at least 1, but it is 0"),
    "policy": (["--policies", "half"], "There is no cache policy 'half'"),
    "no policy": (["--policies", ","], "at least one policy, but none is given"),
    "limit": (["--policies", "full@30"], "With --recall a policy has no limit in seconds: write 'full'"),
    "no square": (["--size", "64x128"], "frames must be square, because the drawn world is, but --size is 64x128"),
    "seconds": (["--seconds", "5"], "--seconds has no meaning with --recall"),
    "open prompts": (["--open-prompts"], "--open-prompts has no meaning with --recall"),
    "jobs": (["--jobs", "0"], "--jobs must be at least 1, but it is 0"),
    "model": (["--model", "gone.safetensors"], "gone.safetensors does not exist"),
}


@pytest.mark.parametrize(("options", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--recall", *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [["--gaps", "3"], ["--videos", "2"], ["--unsaid"]])
def test_options_of_recall_are_refused_without_it(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *option]) == 1
    assert f"{option[0]} only has a meaning with --recall" in capsys.readouterr().err


def test_a_gap_that_is_none_is_refused_where_it_is_set() -> None:
    with pytest.raises(PackForcingError, match="at least 1 block"):
        settings(gaps=(0,))
