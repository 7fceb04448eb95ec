"""Tours for evaluation: scenes that training never sees, and that differ from each other."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from packforcing.world.captions import LandscapeAttributes, is_held_out, parse
from packforcing.world.places import NAMES, Tour, alike, held_out_tours, look

WAY = (0, 0, 1, 1, 2, 2, 0, 1, 1, 0, 2, 2)


@pytest.fixture(scope="module")
def tours() -> list[Tour]:
    return held_out_tours(5, WAY)


def test_places_are_held_out_of_training_and_named_in_order(tours: list[Tour]) -> None:
    for tour in tours:
        assert tour.way == WAY
        assert [place.name for place in tour.places] == list(NAMES[:3])
        assert all(is_held_out(parse(place.scene.caption)) for place in tour.places)


def test_a_longer_list_begins_with_the_shorter_one(tours: list[Tour]) -> None:
    assert held_out_tours(2, WAY) == tours[:2]


def test_no_two_places_of_a_tour_look_alike(tours: list[Tour]) -> None:
    for tour in tours:
        asked = [parse(place.scene.caption) for place in tour.places]
        for one, other in combinations(asked, 2):
            if isinstance(one, LandscapeAttributes) and isinstance(other, LandscapeAttributes):
                assert one.sky != other.sky
                assert one.ground != other.ground
            elif type(one) is type(other):
                assert one.background != other.background
    assert alike(("red",), ("orange",))
    assert alike(("blue", "green"), ("orange", "green"))
    assert alike(("blue", "green"), ("purple", "red"))
    assert not alike(("blue", "green"), ("orange", "red"))
    assert not alike(("blue",), ("blue", "green"))


def test_looks_are_spread_over_tours(tours: list[Tour]) -> None:
    """There are 17 looks: 8 backgrounds, and 3 skies over 3 grounds."""
    counts = Counter(look(place.scene) for tour in tours for place in tour.places)
    assert len(counts) >= 13
    assert max(counts.values()) <= 2


def test_landscapes_say_their_sky_and_their_ground(tours: list[Tour]) -> None:
    landscapes = [
        p.scene for tour in tours for p in tour.places if isinstance(parse(p.scene.caption), LandscapeAttributes)
    ]
    assert landscapes
    for scene in landscapes:
        assert f"{scene.attributes.ground} landscape" in scene.caption
        assert f"{scene.attributes.sky} sky" in scene.caption
