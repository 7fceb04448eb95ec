"""A server that is killed in a run, and files that others delete: what is left, and how it goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui import Client, Event, Preview, Server
from graphs import Prompt, executed, make_latents, output_file

from packforcing.files.state_journal import read_state
from packforcing.files.video import probe, read_video


def test_a_killed_server_loses_nothing_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Server(tmp_path).start() as server, server.client() as client:

        def kill_in_the_sixth_block(event: Event | Preview) -> None:
            if isinstance(event, Event) and event.type == "progress" and event.data["value"] >= 5 * 3 + 1:
                os.killpg(server._process.pid, signal.SIGKILL)
                raise InterruptedError

        prompt = Prompt()
        sampler = prompt.sampler(seconds=600)
        prompt.save_latent(sampler[0])
        prompt.save_video(sampler[1])
        with pytest.raises(InterruptedError):
            client.run(prompt.nodes, on_event=kill_in_the_sixth_block)
    with Server(tmp_path).start() as server, server.client() as client:
        [journal] = (tmp_path / "output" / "packforcing_states").iterdir()
        assert journal.name.startswith("interrupted ")
        made = read_state(journal)
        assert made.blocks >= 5
        [video] = (tmp_path / "output" / "packforcing_interrupted").iterdir()
        waiting = 4 + 5  # in the encoder, and for the fragment's end
        assert probe(video).frames >= 4 * made.blocks - 3 - 4 - waiting
        name = f"{journal.name} [output]"
        assert name in client.object_info()["PackForcingLoadState"]["input"]["required"]["file"][1]["options"]
        seconds = (made.blocks + 2) / 4
        prompt = Prompt()
        state = prompt.add("PackForcingLoadState", file=name)[0]
        resumed = make_latents(server, client, prompt, prompt.sampler(state=state, seconds=seconds))
        assert journal.exists()
        prompt = Prompt()
        assert torch.equal(resumed, make_latents(server, client, prompt, prompt.sampler(seconds=seconds)))
        assert list((tmp_path / "output" / "packforcing_interrupted").iterdir()) == [video]


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
        [shown] = result.outputs[saved.id]["images"]
        return read_video(output_file(server, shown))[0], executed(result, sampler)

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
