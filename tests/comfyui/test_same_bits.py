"""Two servers make the same file of the same graph, and the file says how it was made."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui import Client, Server
from graphs import Prompt, output_file

from packforcing.cli.again import record_of
from packforcing.generate.made_with import versions


def saved_video(server: Server, client: Client) -> Path:
    prompt = Prompt()
    saved = prompt.save_video(prompt.sampler(seed=31)[1])
    [shown] = client.run(prompt.nodes).raise_for_status().outputs[saved.id]["images"]
    return output_file(server, shown)


def test_two_servers_make_the_same_bytes(server: Server, client: Client, tmp_path: Path):
    one = saved_video(server, client)
    with Server(tmp_path).start() as second, second.client() as its_client:
        other = saved_video(second, its_client)
    assert one.read_bytes() == other.read_bytes()
    made_with = record_of(str(one)).made_with
    assert made_with["seed"] == 31
    assert made_with["sigmas"] == pytest.approx([1.0, 5 / 6])  # two steps with shift 5
    assert {"model", "vae"} <= set(made_with["digests"])
    assert made_with["versions"] == versions()
    assert made_with["machine"]["threads"] == 1
