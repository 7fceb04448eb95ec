"""Tours through places: what is shown when, and under which caption."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from packforcing.errors import PackForcingError
from packforcing.world.captions import is_held_out
from packforcing.world.drawing import render
from packforcing.world.places import NAMES, Place, Tour, parse_place, place_caption, sample_tour, sample_way
from packforcing.world.scenes import sample_scene


def tour(way: tuple[int, ...]) -> Tour:
    scenes = [sample_scene(seed) for seed in range(3)]
    return Tour(tuple(Place(name, scene, 5) for name, scene in zip(NAMES, scenes, strict=False)), way)


def test_a_place_comes_back_as_it_was_left() -> None:
    """The frames of all showings of a place, put together, are one uncut video of its scene."""
    way, frames = (0, 1, 0, 0, 2, 1), (13, 16, 16, 16, 16, 16)
    made = tour(way)
    shown = made.pixels(frames, size=64).split(frames, dim=1)
    for number, place in enumerate(made.places):
        parts = [part for part, shows in zip(shown, way, strict=True) if shows == number]
        together = torch.cat(parts, dim=1)
        assert torch.equal(together, render(place.scene, together.shape[1], size=64, start=5))


def test_only_the_first_stretch_of_a_place_is_described() -> None:
    made = tour((0, 0, 1, 0, 2, 2, 1))
    one, two = (place.scene.caption for place in made.places[:2])
    assert made.captions([True, True, False]) == [
        f"place one: {one}",
        f"place one: {one}",  # the same stretch
        f"place two: {two}",
        "place one",
        "place three",
        "place three",
        "place two",
    ]


def test_returns_are_the_blocks_that_show_a_place_again() -> None:
    assert tour((0, 0, 1, 0, 2, 2, 1)).returns == (3, 6)
    assert tour((0, 0, 1, 2, 2)).returns == ()


def test_every_way_has_two_or_three_places_and_a_return() -> None:
    ways = [sample_way(np.random.default_rng(seed), 5) for seed in range(300)]
    assert {max(way) + 1 for way in ways} == {2, 3}
    assert all(tour(way).returns for way in ways)
    for way in ways:  # places are numbered in the order in which they are shown
        assert list(dict.fromkeys(way)) == list(range(max(way) + 1))
    stays = np.mean([a == b for way in ways for a, b in pairwise(way)])
    assert 0.1 < stays < 0.25  # below STAY, since a way needs a return


def test_a_seed_means_one_tour_of_training_scenes_under_names_of_its_own() -> None:
    assert sample_tour(7, 5) == sample_tour(7, 5) != sample_tour(8, 5)
    tours = [sample_tour(seed, 5) for seed in range(40)]
    assert {place.name for each in tours for place in each.places} == set(NAMES)
    assert all(len({place.name for place in each.places}) == len(each.places) for each in tours)
    assert not any(is_held_out(place.scene.attributes) for each in tours for place in each.places)


def test_a_places_caption_is_read_back() -> None:
    described = place_caption("two", "a red circle swings on a blue background")
    assert described == "place two: a red circle swings on a blue background"
    assert parse_place(f"  {described.capitalize()}. ") == ("two", "a red circle swings on a blue background")
    assert parse_place(place_caption("four")) == ("four", "")


@pytest.mark.parametrize(
    "caption", ["", "place", "place nine", "a place two", "a red circle", "place two a red circle"]
)
def test_a_caption_without_a_place_is_told(caption: str) -> None:
    with pytest.raises(PackForcingError, match="names no place"):
        parse_place(caption)
