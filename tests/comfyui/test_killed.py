"""A server that is killed in a run, and files that others delete: what is left, and how it goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui import Client, Event, Preview, Server
from graphs import Prompt, executed, make_latents, saved_frames, tiny_latents
from torch import Tensor

from packforcing.files.state_journal import read_state
from packforcing.files.video import probe

SIGNALS = (signal.SIGKILL, signal.SIGTERM)  # a crash, a service that restarts
SETTINGS = {"seed": 3}


def test_a_server_that_ends_in_a_run_loses_nothing_of_it(tmp_path: Path):
    """It is ended in each way in turn, and started again over the same folders. Every run then goes on to the bit."""
    output = tmp_path / "output"
    for count, sign in enumerate(SIGNALS, 1):
        end_in_a_run(tmp_path, sign)
        assert len(list((output / "packforcing_states").iterdir())) == count, sign
    journals = sorted((output / "packforcing_states").iterdir())
    videos = sorted((output / "packforcing_interrupted").iterdir())
    made = [read_state(journal).blocks for journal in journals]
    assert min(made) >= 5
    waiting = 4 + 5  # in the encoder, and for the fragment's end
    for journal, video, blocks in zip(journals, videos, made, strict=True):
        assert journal.name == f"interrupted {video.stem}.safetensors.unfinished"
        assert probe(video).frames >= 4 * blocks - 3 - 4 - waiting
    seconds = (max(made) + 2) / 4
    with Server(tmp_path).start() as server, server.client() as client:
        whole = tiny_latents(server, client, seconds=seconds, **SETTINGS)
        for journal in journals:
            assert torch.equal(resumed(server, client, journal, seconds), whole), journal
    assert sorted((output / "packforcing_states").iterdir()) == journals
    assert sorted((output / "packforcing_interrupted").iterdir()) == videos


def end_in_a_run(base_dir: Path, sign: int) -> None:
    """Starts a server, and sends it a signal when a long run is in its sixth block."""
    with Server(base_dir).start() as server, server.client() as client:
        process = server._process

        def end_in_the_sixth_block(event: Event | Preview) -> None:
            if isinstance(event, Event) and event.type == "progress" and event.data["value"] >= 5 * 3 + 1:
                os.killpg(process.pid, sign)
                raise InterruptedError

        prompt = Prompt()
        sampler = prompt.sampler(seconds=600, **SETTINGS)
        prompt.save_latent(sampler[0])
        prompt.save_video(sampler[1])
        with pytest.raises(InterruptedError):
            client.run(prompt.nodes, on_event=end_in_the_sixth_block)
        process.wait(60)  # and not by the signals that stop a server of the tests


def resumed(server: Server, client: Client, journal: Path, seconds: float) -> Tensor:
    """The latents of the same graph with a state that a killed run left."""
    name = f"{journal.name} [output]"
    assert name in client.object_info()["PackForcingLoadState"]["input"]["required"]["file"][1]["options"]
    prompt = Prompt()
    state = prompt.add("PackForcingLoadState", file=name)[0]
    return make_latents(server, client, prompt, prompt.sampler(state=state, seconds=seconds, **SETTINGS))


def test_a_videos_file_goes_with_its_result_and_comes_back_when_deleted(server: Server, client: Client):
    """The sampler's result is kept by the server; its file is deleted by hand, and the graph saves it once more."""

    def files() -> set[Path]:
        return set((server.base_dir / "temp").glob("packforcing_*.mp4"))

    def run(seed: int, prefix: str) -> tuple[np.ndarray, bool]:
        prompt = Prompt()
        sampler = prompt.sampler(seed=seed)
        saved = prompt.save_video(sampler[1])
        prompt.nodes[saved.id]["inputs"]["filename_prefix"] = prefix
        result = client.run(prompt.nodes).raise_for_status()
        return saved_frames(server, result, saved.id), executed(result, sampler)

    before = files()
    first, _ = run(811, "one")
    [made] = files() - before
    made.unlink()
    again, ran = run(811, "two")
    assert not ran
    assert np.array_equal(again, first)
    run(812, "three")
    assert not made.exists()
    assert len(files() - before) == 1
