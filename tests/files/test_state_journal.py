"""The journal of a run: what is left of it after any end."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_state import small_state

from packforcing.errors import PackForcingError
from packforcing.files.state_file import StatePrompt, VideoState
from packforcing.files.state_journal import StateJournal, journal_of, load_journal, read_state


def first_blocks(state: VideoState, blocks: int) -> VideoState:
    frames = blocks * state.config.block_frames
    return replace(state, latents=state.latents[:, :, :frames].clone(), selected=state.selected[:blocks].clone())


def write(journal: StateJournal, state: VideoState, blocks: int, prompts: tuple[StatePrompt, ...] = ()) -> None:
    journal.begin(first_blocks(state, 1))
    for block, latents in list(enumerate(state.latents.split(state.config.block_frames, dim=2)))[1:blocks]:
        journal.add(latents, state.selected[block : block + 1], prompts or state.prompts)


def assert_same(found: VideoState, expected: VideoState) -> None:
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.selected, expected.selected)
    contexts = [(prompt.start, prompt.prompt, prompt.context.tolist()) for prompt in found.prompts]
    assert contexts == [(prompt.start, prompt.prompt, prompt.context.tolist()) for prompt in expected.prompts]
    plain = {"latents": None, "selected": None, "prompts": ()}
    assert vars(found) | plain == vars(expected) | plain


def test_what_was_written_comes_back_at_every_moment(tmp_path: Path):
    state, path = small_state(), journal_of(tmp_path / "a.safetensors")
    assert path.name == "a.safetensors.unfinished"
    for blocks in range(1, 5):
        journal = StateJournal(path)
        write(journal, state, blocks)
        assert_same(read_state(path), first_blocks(state, blocks))  # it is open still
        journal.close()
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_cut_or_damaged_at_any_byte_it_gives_the_blocks_before(tmp_path: Path):
    state, path = small_state(), tmp_path / "a.unfinished"
    ends = []
    journal = StateJournal(path)
    for blocks in range(1, 5):
        write(StateJournal(path), state, blocks)
        ends.append(path.stat().st_size)
    journal.close()
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(ends[0], len(whole), (30,), generator=generator).tolist()
    for place in [ends[0], ends[1] - 1, ends[1], ends[1] + 15, ends[2] + 1, *places]:
        finished = sum(end <= place for end in ends)
        path.write_bytes(whole[:place])
        assert_same(load_journal(path), first_blocks(state, finished))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        assert_same(load_journal(path), first_blocks(state, finished))
    for content in (b"", whole[: ends[0] - 1], b"x" * 1000, bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(content)
        with pytest.raises(PackForcingError, match="holds no finished block of a video"):
            load_journal(path)
    with pytest.raises(PackForcingError, match="is no state of an unfinished video"):
        load_journal(tmp_path / "missing.unfinished")


def test_an_older_journal_stays_until_this_one_is_as_long(tmp_path: Path):
    state, path = small_state(), tmp_path / "a.unfinished"
    write(StateJournal(path), state, 3)
    other = replace(state, digest="other")
    journal = StateJournal(path, at_least=3)
    write(journal, other, 2)
    assert load_journal(path).digest == state.digest
    journal.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.unfinished"]
    write(StateJournal(path, at_least=3), other, 3)
    assert_same(load_journal(path), first_blocks(other, 3))


def test_prompts_that_change_on_the_way_are_in_it(tmp_path: Path):
    state, path = small_state(), tmp_path / "a.unfinished"
    now = (*state.prompts, StatePrompt(3, "a dog", torch.full((1, 4, 8), 2.0)))
    write(StateJournal(path), state, 4, now)
    assert_same(load_journal(path), replace(state, prompts=now))


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    state, path = small_state(), tmp_path / "a.unfinished"
    journal = StateJournal(path)
    write(journal, state, 2)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for block in (2, 3):
        journal.add(state.latents[:, :, 2 * block : 2 * block + 2], state.selected[block : block + 1], state.prompts)
    assert caplog.text.count("The state so far cannot be written") == 1
    journal.close()
    assert load_journal(path).blocks == 3  # what had reached the file
