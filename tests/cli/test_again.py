"""python -m packforcing again: a video made anew, from its own file, report or state, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_options import SMALL_VIDEO
from small_state import small_state

from packforcing.cli.again import found_files, generate_options, record_of
from packforcing.cli.generate import recipe_of, requested
from packforcing.cli.main import main, parser
from packforcing.demo.models import WEIGHTS
from packforcing.errors import PackForcingError
from packforcing.files.digests import digest_of
from packforcing.files.state_file import StatePrompt, load_state, save_state
from packforcing.files.video import read_video, tags_of

SECOND = ["--model", "tiny", *SMALL_VIDEO, "--seconds", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(*options: str) -> None:
    assert main(["generate", *SECOND, *options]) == 0


def again(source: str, *options: str) -> None:
    assert main(["again", source, *options]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["again", *arguments]) == 1
    return capsys.readouterr().err


def same_file(one: str, other: str) -> bool:
    return Path(one).read_bytes() == Path(other).read_bytes()


# --- the same video ------------------------------------------------------------------------------------------------


def test_a_story_is_made_again_from_its_file_and_from_its_report(capsys: pytest.CaptureFixture[str]):
    """With settings of all kinds, of which none is a default."""
    Path("story.txt").write_text("0:00 a red circle\n0:00.7 a blue square", encoding="utf-8")
    odd = ["--prompt-switch", "blend", "--blend-blocks", "3", "--seed", "77", "--timesteps", "1000,640.5", "--no-warp"]
    cache = ["--selection", "recency", "--kv-dtype", "fp8_e4m3", "--update", "few-step", "--shift", "4.5"]
    size = SECOND[: SECOND.index("--steps")]  # the timesteps say how many there are
    length = ["--fps", "12", "--seconds", "1.4"]
    assert main(["generate", *size, *length, "--story", "story.txt", *odd, *cache, "--report", "report.json"]) == 0
    Path("story.txt").unlink()
    capsys.readouterr()
    again("out.mp4")
    assert "again.mp4 is out.mp4 again, byte for byte" in capsys.readouterr().out
    assert same_file("out.mp4", "again.mp4")
    again("report.json", "--output", "third.mp4", "--report", "third.json")
    assert "made again under the same conditions" in capsys.readouterr().out
    assert same_file("out.mp4", "third.mp4")
    reports = [json.loads(Path(name).read_text()) for name in ("report.json", "third.json")]
    assert reports[0]["made_with"] == reports[1]["made_with"]
    other = ["--seed", "78"]
    generate("--prompt", "a red circle", *other, "--output", "other.mp4")
    assert not same_file("out.mp4", "other.mp4")


def test_what_was_typed_while_it_was_made_is_in_the_recipe(monkeypatch: pytest.MonkeyPatch):
    Path("typed").write_bytes(b"a blue square\n")
    with open("typed") as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        generate("--prompt", "a red circle", "--live")
    said = record_of("out.mp4").prompts
    assert [prompt.prompt for prompt in said] in (["a red circle", "a blue square"], ["a blue square"])
    again("out.mp4")
    assert record_of("again.mp4").prompts == said
    assert np.array_equal(read_video("out.mp4")[0], read_video("again.mp4")[0])


def test_another_process_makes_the_same_bytes():
    generate("--prompt", "a red circle", "--seed", "5")
    threads = str(torch.get_num_threads() + 1)  # it takes those of the run
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "packforcing", "again", "out.mp4"]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "byte for byte" in told.stdout
    assert "may differ" not in told.stderr
    assert same_file("out.mp4", "again.mp4")


def test_a_start_image_and_a_lora_are_found_by_name_below_a_folder(capsys: pytest.CaptureFixture[str]):
    Image.new("RGB", (64, 64), (200, 30, 30)).save("first.png")
    name = "blocks.0.self_attn.q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 256), f"{name}.lora_B.weight": torch.ones(256, 2)}, "style.safetensors"
    )
    generate("--prompt", "a red circle", "--start-image", "first.png", "--lora", "style.safetensors:0.01")
    Path("kept/deep").mkdir(parents=True)
    for file in ("first.png", "style.safetensors"):
        shutil.move(file, f"kept/deep/{file}")
    os.mkdir("empty")
    told = refusal(capsys, "out.mp4", "--files", "empty")
    assert "the start image 'first.png' (" in told
    assert "the lora 'style.safetensors' (" in told
    assert told.count("is missing") == 2
    again("out.mp4", "--files", "kept")
    assert same_file("out.mp4", "again.mp4")
    Image.new("RGB", (64, 64), (200, 30, 31)).save("kept/deep/first.png")
    assert "the start image 'first.png' is another file than it was made of" in refusal(capsys, "out.mp4")


# --- from states ---------------------------------------------------------------------------------------------------


KEPT = ["--save-state", "run.safetensors", "--continue-from", "run.safetensors"]


def test_a_run_that_goes_on_by_the_same_command_is_made_again_without_its_state(capsys: pytest.CaptureFixture[str]):
    generate("--prompt", "a red circle", *KEPT, "--seconds", "0.5")
    generate("--prompt", "a red circle", *KEPT)
    Path("run.safetensors").unlink()
    again("out.mp4")
    assert same_file("out.mp4", "again.mp4")


def test_a_run_that_goes_on_with_another_seed_needs_the_state(capsys: pytest.CaptureFixture[str]):
    generate("--prompt", "a red circle", "--save-state", "run.safetensors", "--seconds", "0.5")
    generate("--prompt", "a blue square", "--seed", "9", "--continue-from", "run.safetensors")
    again("out.mp4")
    assert same_file("out.mp4", "again.mp4")
    Path("run.safetensors").unlink()
    assert "the continue from 'run.safetensors' (" in refusal(capsys, "out.mp4")


def test_a_state_keeps_what_it_was_made_with():
    made_with = {"seed": 2**64 - 1, "sigmas": [1.0, 0.1 + 0.2]}
    save_state("s.safetensors", replace(small_state(), made_with=made_with))
    assert load_state("s.safetensors").made_with == made_with


# --- files of a real model -----------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path) -> list[str]:
    """A command line with files for everything: the demo's networks as if they were a real model's."""
    for name in ("transformer", "vae", "compressor"):
        shutil.copy(WEIGHTS / f"demo_{name}.safetensors", f"{name}.safetensors")
    save_file({"a": torch.randn(1, 5, 4096), "b": torch.randn(1, 7, 4096)}, "words.safetensors")
    files = ["--model", "transformer.safetensors", "--vae", "vae.safetensors", "--compressor", "compressor.safetensors"]
    words = ["--text-embedding", "words.safetensors:a", "--at-embedding", "0:03", "words.safetensors:b"]
    size = ["--width", "64", "--height", "64", "--steps", "1", "--seconds", "5", "--sink", "4"]
    return ["generate", *files, *words, *size]


@pytest.mark.parametrize("changed", ["transformer", "vae", "compressor", "words"])
def test_another_file_is_refused_by_name(real: list[str], changed: str, capsys: pytest.CaptureFixture[str]):
    """One bit of it differs, in its last weight."""
    options = parser().parse_args(real)
    made_with = recipe_of(options, requested(options)).made_with({}, ())
    given = found_files(made_with["command"]["files"], [Path()])
    assert given["text_embedding"] == "words.safetensors:a"
    assert given["at_embedding"] == [["0:03", "words.safetensors:b"]]
    content = bytearray(Path(f"{changed}.safetensors").read_bytes())
    content[-1] ^= 1
    Path(f"{changed}.safetensors").write_bytes(content)
    with pytest.raises(PackForcingError, match=f"'{changed}.safetensors' is another file than it was made of"):
        found_files(made_with["command"]["files"], [Path()])


def test_a_real_models_video_is_made_again(real: list[str]):
    assert main(real) == 0
    again("out.mp4")
    assert same_file("out.mp4", "again.mp4")
    text = tags_of("out.mp4")["packforcing"]
    assert str(Path.cwd()) not in text  # it names no folder
    assert digest_of(Path("vae.safetensors")) in text


# --- what is no recipe ---------------------------------------------------------------------------------------------


def test_a_video_without_a_recipe_is_refused(capsys: pytest.CaptureFixture[str]):
    generate("--prompt", "a red circle", "--seconds", "0.5")
    with av.open("out.mp4") as old, av.open("plain.mp4", "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        for packet in old.demux(video=0):
            packet.stream = stream
            if packet.dts is not None:
                new.mux(packet)
    assert "does not say how it was made" in refusal(capsys, "plain.mp4")
    Path("report.json").write_text(json.dumps(record_of("out.mp4").as_dict() | {"made_with": {}}))
    assert "was not made by `generate`" in refusal(capsys, "report.json")
    assert "name one file" in refusal(capsys, "out.mp4", "--output", "out.mp4")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("output", "/etc/passwd", "is not known here"),
        ("save_state", "x.safetensors", "is not known here"),
        ("wings", 2, "is not known here"),
        ("model", "/tmp/evil.pt", "names a file"),
        ("start_image", "/etc/passwd", "names a file"),
        ("lora", ["x"], "names a file"),
        ("at", {"a": 1}, "the value"),
    ],
)
def test_a_recipe_cannot_name_files_or_unknown_options(name: str, value: object, told: str):
    with pytest.raises(PackForcingError, match=told):
        generate_options({name: value}, {})


def test_every_option_of_generate_is_either_recorded_or_known_to_change_nothing():
    """A new option is recorded by itself; here is what is not."""
    options = parser().parse_args(["generate", "--model", "tiny", "--prompt", "x", *SMALL_VIDEO])
    recorded = recipe_of(options, requested(options)).made_with({}, (StatePrompt(0, "x", torch.zeros(1, 1, 8)),))
    left = set(vars(options)) - set(recorded["command"]["options"])
    assert left == {
        *("output", "report", "picture", "latents", "save_state", "archive_folder", "json"),
        *("live", "story", "prompts", "parallel", "preset", "command", "run"),
        *("vae", "text_encoder", "tokenizer", "start_image", "start_video", "continue_from"),
        *("compressor", "lora", "text_embedding", "at_embedding"),  # files, with their digests
    }
