"""What fits a card: the settings named are enough, fewer are not, and the table in the documents is the command's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packforcing.cli.main import main, parser
from packforcing.command_options import cache_config
from packforcing.config import CacheConfig, FrameSize
from packforcing.errors import PackForcingError
from packforcing.generate.fit import ARCHIVE, KV, OPTIONS, STREAMED, WEIGHTS, Wish, card_bytes, fit_text, fitting, need

REPO = Path(__file__).resolve().parents[2]
WISH = Wish("wan2.1-1.3b", CacheConfig(), FrameSize(832, 480), 120)


def test_a_card_counts_in_powers_of_two_less_what_others_take():
    assert card_bytes("8GB") == card_bytes("8") == card_bytes(" 8 GiB ") == 8 * 1024**3 - 490_000_000


@pytest.mark.parametrize("text", ["", "GB", "-8GB", "0", "nan", "8 TB", "99999"])
def test_what_is_no_card_is_told(text: str):
    with pytest.raises(PackForcingError, match="a number of gigabytes such as 8GB"):
        card_bytes(text)


@pytest.mark.parametrize("model", ["wan2.1-1.3b", "wan2.1-14b"])
@pytest.mark.parametrize("gigabytes", [6, 8, 10, 12, 16, 24, 48])
def test_what_is_named_fits_and_with_fewer_options_it_would_not(model: str, gigabytes: int):
    card = card_bytes(f"{gigabytes}GB")
    found = fitting(Wish(model, CacheConfig(), WISH.size, 120), card)
    assert found
    harms = [sum(option.harm for option in needed.options) for needed in found]
    assert harms == sorted(harms)
    for needed in found:
        assert needed.weights + needed.demand.least <= card
        assert needed.decoding(card) is not None
        for option in needed.options:
            assert need(needed.wish, needed.options - {option}).least > card or needed.wish.size != WISH.size
    if found[0].wish.size != WISH.size:
        assert need(Wish(model, CacheConfig(), WISH.size, 120), OPTIONS).least > card


def test_each_option_saves_what_it_is_about():
    plain = need(WISH)
    assert plain.demand.least - need(WISH, [ARCHIVE]).demand.least == 1e9  # the budget of archive_device auto
    assert need(WISH, [ARCHIVE]).weights == plain.weights
    context = plain.demand.layout.context_tokens
    per_layer = 2 * 1536 * 2 * context
    kept = need(WISH, [ARCHIVE]).demand.least - need(WISH, [ARCHIVE, KV]).demand.least
    assert kept == 30 * per_layer // 2 - per_layer  # half of all layers, less one that is widened
    assert 0.5 < need(WISH, [WEIGHTS]).weights / plain.weights < 0.6
    assert need(WISH, [STREAMED]).weights < 0.2 * plain.weights


def test_options_that_are_set_already_are_not_proposed():
    config = CacheConfig(archive_device="host", kv_dtype="fp8_e4m3")
    for needed in fitting(Wish("wan2.1-1.3b", config, WISH.size, 120), card_bytes("8GB")):
        assert not {ARCHIVE, KV} & needed.options


def test_what_fits_nowhere_is_told():
    with pytest.raises(PackForcingError, match=r"No frame of wan2\.1-14b fits a card of 1GB"):
        fit_text(Wish("wan2.1-14b", CacheConfig(), WISH.size, 120), "1GB")


def test_the_command_that_is_printed_is_understood_and_asks_for_what_was_counted(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--fit", "8GB", "--json"]) == 0
    best, *others = json.loads(capsys.readouterr().out)
    assert best["options"] == ["archive on host", "fp8 KV", "fp8 weights"]
    for entry in (best, *others):
        given = parser().parse_args(entry["command"].split()[3:])
        assert (given.width, given.height) == (832, 480)
        config = cache_config(given)
        assert (config.archive_device == "host") == ("archive on host" in entry["options"])
        assert (config.kv_dtype == "fp8_e4m3") == ("fp8 KV" in entry["options"])
        assert (given.linear_dtype == "fp8_e4m3") == ("fp8 weights" in entry["options"])
        assert (given.weights_device == "host") == ("weights on host" in entry["options"])


def test_people_are_told_the_same(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--fit", "8GB", "--model", "wan2.1-14b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wan2.1-14b on a card of 8GB: 8.10 GB for a run (counted, not measured)."
    assert lines[1] == "832x480 does not fit; 528x304 does."
    assert any(
        line.startswith("nodes    Sampler: width 528, height 304; Cache Config: archive_device host") for line in lines
    )


def test_the_table_in_the_documents_is_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--cards"]) == 0
    assert capsys.readouterr().out in (REPO / "docs" / "performance.md").read_text(encoding="utf-8")
