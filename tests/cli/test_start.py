"""python -m packforcing generate: what a video starts from, and how a command goes on after it was stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_options import SMALL_VIDEO

from packforcing.cli.generate import requested
from packforcing.cli.main import main, parser
from packforcing.cli.stopping import Stopping
from packforcing.demo.models import demo_vae
from packforcing.files.latent_file import load_latents
from packforcing.files.state_file import load_state
from packforcing.files.video import VideoWriter, read_video
from packforcing.model.causal_wan import CausalWan
from packforcing.model.vae import StreamingDecoder, load_vae, normalise

COMMAND = ["generate", "--model", "tiny", "--prompt", "a red circle", *SMALL_VIDEO]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(*options: str) -> int:
    return main([*COMMAND, *options])


def signal_in_pass(monkeypatch: pytest.MonkeyPatch, number: int, passes: int) -> None:
    """Sends a signal to this process within its n-th denoising pass."""
    whole, seen = CausalWan.denoise, []

    def denoise(self: CausalWan, *inputs: object) -> torch.Tensor:
        seen.append(None)
        if len(seen) == passes:
            os.kill(os.getpid(), number)
        return whole(self, *inputs)

    monkeypatch.setattr(CausalWan, "denoise", denoise)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_command_that_was_stopped_goes_on_to_the_bit(monkeypatch: pytest.MonkeyPatch, name: str, overlap: str):
    """The same command twice; two steps a block, so the seventh pass is within the fourth block."""
    kept = ["--save-state", "s.safetensors", "--continue-from", "s.safetensors", "--report", "r.json"]
    options = [*kept, "--seconds", "1.5", "--overlap", overlap, "--latents", "l.latent"]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with monkeypatch.context() as patch:
        signal_in_pass(patch, getattr(signal, name), 7)
        assert generate(*options) == 130
    assert {number: signal.getsignal(number) for number in before} == before
    assert load_state("s.safetensors").blocks == 3
    assert len(json.loads(Path("r.json").read_text())["blocks"]) == 3
    assert len(read_video("out.mp4")[0]) == 9
    assert generate(*options) == 0
    assert len(read_video("out.mp4")[0]) == 21
    resumed = load_file("l.latent")["latent_tensor"]
    assert generate("--seconds", "1.5", "--overlap", overlap, "--latents", "whole.latent") == 0
    assert torch.equal(resumed, load_file("whole.latent")["latent_tensor"])


def test_a_second_signal_does_not_wait_and_one_before_the_first_block_neither():
    heard = Stopping()
    with pytest.raises(KeyboardInterrupt):
        heard.hear(signal.SIGTERM, None)
    heard.making = True
    heard.hear(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        heard.on_step(0, 0)
    with pytest.raises(KeyboardInterrupt):
        heard.hear(signal.SIGTERM, None)


def test_a_run_stopped_while_it_takes_old_blocks_again_keeps_the_longer_state(monkeypatch: pytest.MonkeyPatch):
    kept = ["--save-state", "s.safetensors", "--continue-from", "s.safetensors"]
    assert generate(*kept, "--seconds", "1.25") == 0
    signal_in_pass(monkeypatch, signal.SIGTERM, 1)  # the first block that must choose is taken again
    assert generate(*kept, "--seconds", "1.5") == 130
    assert load_state("s.safetensors").blocks == 5


def test_a_report_that_cannot_be_written_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(path: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("packforcing.cli.generate.write_whole", full)
    files = ["--report", "r.json", "--picture", "p.png", "--latents", "l.latent", "--save-state", "s.safetensors"]
    assert generate("--seconds", "0.5", *files) == 1
    assert (
        "error: The report cannot be written (No space left on device): free some space.\n" in capsys.readouterr().err
    )
    assert sorted(path.name for path in Path().iterdir()) == ["l.latent", "out.mp4", "s.safetensors"]


def test_memory_that_runs_out_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def no_memory(self: CausalWan, *inputs: object) -> torch.Tensor:
        return torch.empty(2**60)

    monkeypatch.setattr(CausalWan, "denoise", no_memory)
    assert generate("--seconds", "0.5") == 1
    said = capsys.readouterr().err
    assert "ran out at block 0, and there is nothing left to do without; what was finished is kept: " in said


def test_latents_are_comfyuis_and_can_be_gone_on_from():
    assert generate("--seconds", "1.25", "--latents", "a.latent", "--save-state", "s.safetensors") == 0
    torch.testing.assert_close(normalise(load_latents("a.latent")), load_state("s.safetensors").latents)
    assert generate("--seconds", "1.5", "--continue-from", "a.latent", "--latents", "b.latent") == 0
    longer = load_latents("b.latent")
    assert longer.shape[2] == 6
    torch.testing.assert_close(longer[:, :, :5], load_latents("a.latent"))


def test_a_video_begins_with_a_picture():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = (200, 40, 30)  # the middle, which is what the video shows
    Image.fromarray(pixels).save("a.png")
    blocks = ["--block", "4", "--sink", "4", "--recent", "4"]
    assert generate(*blocks, "--start-image", "a.png", "--seconds", "1.2", "--latents", "a.latent") == 0
    first = read_video("out.mp4")[0][0].astype(float)
    latents = load_latents("a.latent")
    expected = StreamingDecoder(load_vae(demo_vae())).decode(normalise(latents[:, :, :1]))
    shown = (expected[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert abs(first - shown).mean() < 4  # H.264
    assert abs(first.mean(axis=(0, 1)) - (200, 40, 30)).max() < 40  # the demo's VAE


def test_a_video_goes_on_from_a_video(capsys: pytest.CaptureFixture[str]):
    """25 frames at 32 a second are 12 at 16: three are left out, so three latent frames, a block and a half."""
    with VideoWriter("clip.mp4", 32.0, 80, 64) as writer:
        writer.write(torch.linspace(-1, 1, 25).view(1, 25, 1, 1).expand(3, 25, 64, 80))
    blocks = ["--block", "2", "--sink", "2", "--recent", "2"]
    options = parser().parse_args([*COMMAND, *blocks, "--start-video", "clip.mp4", "--seconds", "1.5"])
    start = requested(options).start
    assert start is not None
    assert start.frames == 3
    encoded = start.latents(load_vae(demo_vae()))
    assert generate(*blocks, "--start-video", "clip.mp4", "--seconds", "1.5", "--latents", "a.latent") == 0
    latents = normalise(load_latents("a.latent"))
    assert latents.shape[2] == 6
    torch.testing.assert_close(latents[:, :, :3], encoded, rtol=1e-4, atol=1e-4)


def no_file() -> None: ...


def text_file() -> None:
    Path("a.safetensors").write_text("no state")
    Path("a.png").write_text("no picture")
    Path("a.mp4").write_text("no video")
    Path("a.latent").write_text("no latents")


def small_state() -> None:
    assert generate("--seconds", "0.5", "--save-state", "a.safetensors", "--output", "made.mp4") == 0
    Path("made.mp4").unlink()


def image_latent() -> None:
    from safetensors.torch import save_file

    save_file({"latent_tensor": torch.zeros(1, 4, 8, 8), "latent_format_version_0": torch.tensor([])}, "a.latent")


def large_latent() -> None:
    from safetensors.torch import save_file

    latents = torch.zeros(1, 16, 2, 8, 16)
    save_file({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])}, "a.latent")


MISTAKES: dict[str, tuple[Callable[[], None], list[str], str]] = {
    "no state": (no_file, ["--continue-from", "a.safetensors"], "a.safetensors does not exist: give a file of latents"),
    "text": (text_file, ["--continue-from", "a.safetensors"], "a.safetensors is damaged, incomplete"),
    "no latents": (text_file, ["--continue-from", "a.latent"], "a.latent is damaged, incomplete or no file of latents"),
    "image latents": (image_latent, ["--continue-from", "a.latent"], "must hold latents of one Wan 2.1 video"),
    "size": (large_latent, ["--continue-from", "a.latent"], "give --width 128 --height 64"),
    "no picture": (text_file, ["--start-image", "a.png"], "The start image a.png cannot be read"),
    "no video": (text_file, ["--start-video", "a.mp4"], "The video a.mp4 cannot be opened"),
    "long enough": (small_state, ["--continue-from", "a.safetensors", "--seconds", "0.25"], "The state has 2 blocks"),
    "config": (
        small_state,
        ["--continue-from", "a.safetensors", "--top-k", "1"],
        "made with top_k 2, but this run has 1",
    ),
    "state's place": (no_file, ["--save-state", "a.mp4"], "The state's file a.mp4 must end in .safetensors"),
    "latents' place": (no_file, ["--latents", "no/a.latent"], "The latents' file no/a.latent must end in .latent"),
}


@pytest.mark.parametrize(("prepare", "options", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_before_any_block(
    prepare: Callable[[], None], options: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    prepare()
    before = sorted(Path().iterdir())
    capsys.readouterr()
    assert generate(*options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert len(error.splitlines()) == 1
    assert sorted(Path().iterdir()) == before
