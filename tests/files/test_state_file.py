"""State files that are none, or damaged, or made to do harm: each is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_state import SELECTED, small_state
from torch import Tensor

from packforcing.errors import PackForcingError
from packforcing.files.state_file import (
    STATE_KEY,
    is_state,
    load_state,
    save_state,
)
from packforcing.files.weights import read_state_dict


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_state(tmp_path / "a.safetensors", small_state())
    return tmp_path / "a.safetensors"


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Changes a state's tensors and header in place."""
    mapped, metadata = read_state_dict(path)
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    header = json.loads(metadata[STATE_KEY])
    change(tensors, header)
    save_file(tensors, path, metadata={STATE_KEY: json.dumps(header)})


def test_a_whole_state_comes_back(path):
    assert torch.equal(load_state(path).selected, SELECTED)
    assert is_state(path)


HEADERS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], object], str]] = {
    "version": (lambda t, h: h.update(format_version=2), "has the state format version 2, and this PackForcing knows"),
    "no version": (lambda t, h: h.pop("format_version"), "damaged or of another version"),
    "a field less": (lambda t, h: h.pop("digest"), "damaged or of another version"),
    "a field more": (lambda t, h: h.update(colour=1), "damaged or of another version"),
    "an option more": (lambda t, h: h["config"].update(colour=1), "damaged or of another version"),
    "a bad option": (
        lambda t, h: h["config"].update(sink_frames=3),
        "cannot be used: sink_frames must be whole blocks",
    ),
    "a list": (
        lambda t, h: h["config"].update(top_k=[1]),
        r"cannot be used: top_k must be a whole number, but it is \[1",
    ),
    "size": (lambda t, h: h["size"].update(width=1e300), "cannot be used: The width must be a whole number"),
    "other size": (
        lambda t, h: h["size"].update(width=128),
        "cannot be used: A state's latents must be whole blocks of 2",
    ),
    "model": (lambda t, h: h["model"].update(dim="x"), "cannot be used: A model's dim must be a whole number"),
    "stride": (lambda t, h: h.update(temporal_stride=None), "The state's temporal stride must be a whole number"),
    "prompts": (lambda t, h: h.update(prompts=[]), "damaged or of another version"),
    "starts": (lambda t, h: h["prompts"][1].update(start=0), "must start at block 0 and rise, but they start at"),
    "text start": (
        lambda t, h: h["prompts"][0].update(start="0"),
        "The start of a state's prompt must be a whole number",
    ),
    "no selection": (lambda t, h: t.pop("selected"), "damaged or of another version"),
    "selection's shape": (lambda t, h: t.update(selected=t["selected"][:2].clone()), r"must be \[4, 2, 3\] in int32"),
    "selection's type": (lambda t, h: t.update(selected=t["selected"].long()), "in int64"),
    "a sink selected": (lambda t, h: t["selected"][3, 1, :1].fill_(0), "block 3 attended to mid blocks that cannot be"),
    "the future selected": (lambda t, h: t["selected"][3, 0, :1].fill_(2**30), "block 3 attended to mid blocks that"),
    "one too many": (lambda t, h: t["selected"][2, 0, :1].fill_(1), "block 2 attended to mid blocks that cannot be"),
    "one too few": (lambda t, h: t["selected"].fill_(-1), "block 3 attended to mid blocks that cannot be"),
    "no latents": (lambda t, h: t.pop("latents"), "damaged or of another version"),
    "a tensor more": (lambda t, h: t.update(more=torch.zeros(1)), "damaged or of another version"),
    "broken block": (lambda t, h: t.update(latents=torch.zeros(1, 16, 3, 8, 8)), "whole blocks of 2 frames in float32"),
    "no block": (lambda t, h: t.update(latents=torch.zeros(1, 16, 0, 8, 8)), "whole blocks of 2 frames in float32"),
    "flat": (lambda t, h: t.update(latents=torch.zeros(4)), "whole blocks of 2 frames in float32"),
    "type": (lambda t, h: t.update(latents=t["latents"].half()), r"\[1, 16, 8, 8, 8\] in float16"),
    "NaN": (lambda t, h: t["latents"].view(-1)[5:6].fill_(float("nan")), "latents that are not finite numbers"),
}


@pytest.mark.parametrize(("change", "sentence"), HEADERS.values(), ids=HEADERS)
def test_a_header_or_tensor_that_is_wrong_is_refused(path, change, sentence):
    rewrite(path, change)
    with pytest.raises(PackForcingError, match=sentence) as error:
        load_state(path)
    assert "\n" not in str(error.value)
    assert "a.safetensors" in str(error.value)


@pytest.mark.parametrize("header", ["", "[]", "3", "{", '"x"', "[" * 100_000], ids=lambda text: text[:3] or "empty")
def test_a_header_that_is_no_object_is_refused(path, header):
    save_file({"latents": torch.zeros(1)}, path, metadata={STATE_KEY: header})
    with pytest.raises(PackForcingError, match="damaged or of another version"):
        load_state(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(PackForcingError, match=r"is empty|is damaged, incomplete"):
        load_state(path)


def test_another_file_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(PackForcingError, match="is not the state of a PackForcing video"):
        load_state(tmp_path / "b.safetensors")
    assert not is_state(tmp_path / "b.safetensors")
    torch.save({"latents": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(PackForcingError, match="is not the state of a PackForcing video"):
        load_state(tmp_path / "b.pt")


@pytest.mark.parametrize("name", ["a.mp4", "no/such/a.safetensors", "folder.safetensors"])
def test_a_place_where_no_state_can_be_is_refused(tmp_path, name):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(PackForcingError, match=r"must end in \.safetensors and lie in a folder that exists"):
        save_state(tmp_path / name, small_state())


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(path, monkeypatch):
    """The older file stays."""
    before = path.read_bytes()

    def full(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("packforcing.files.writing.save_file", full)
    with pytest.raises(PackForcingError, match=r"The state cannot be written to .*No space left on device"):
        save_state(path, small_state())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_same_prompt_may_come_twice(tmp_path):
    state = small_state()
    prompt = state.prompts[0]
    save_state(tmp_path / "a.safetensors", replace(state, prompts=(prompt, replace(prompt, start=2))))
    assert [prompt.start for prompt in load_state(tmp_path / "a.safetensors").prompts] == [0, 2]
