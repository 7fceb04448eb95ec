"""Prompts over time on the command line: what reaches the video, and every mistake before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import save_file
from small_options import SMALL_VIDEO
from torch import Tensor

from packforcing.cli import generate
from packforcing.cli.generate import prepared, requested
from packforcing.cli.main import main, parser
from packforcing.demo.text import encode_prompt
from packforcing.files.video import read_video
from packforcing.generate.long_video import LongVideo
from packforcing.generate.story import parse_story
from packforcing.model.wan_modules import SIZES, random_state_dict

VAE = Path(__file__).resolve().parents[2] / "packforcing" / "weights" / "demo_vae.safetensors"

# Blocks of one latent frame at 64x64 and 16 fps: block b begins at (4 b - 3) / 16 s.
SMALL = [*SMALL_VIDEO, "--seconds", "2"]
STORY = "# a short one\n0:00 a red circle\n0:01 a blue square\n"
START = 5  # 1 s lies between block 4 at 0.8125 s and block 5 at 1.0625 s


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def video_of(*options: str) -> LongVideo:
    parsed = parser().parse_args(["generate", *SMALL, *options])
    return prepared(parsed, requested(parsed))


def comment_of(path: Path) -> str:
    with av.open(str(path)) as file:
        return file.metadata["comment"]


def test_a_story_file_makes_a_video(tmp_path: Path):
    story, video, report = tmp_path / "story.txt", tmp_path / "out.mp4", tmp_path / "report.json"
    story.write_text(STORY, encoding="utf-8-sig")  # with a byte order mark, as Windows writes it
    files = ["--story", str(story), "--output", str(video), "--report", str(report)]
    assert main(["generate", *SMALL, *files, "--prompt-switch", "refresh"]) == 0
    assert len(read_video(video)[0]) == 8 * 4 - 3
    assert comment_of(video) == "0:00 a red circle\n0:01 a blue square"
    assert parse_story(comment_of(video)) == parse_story(STORY)
    record = json.loads(report.read_text())
    assert record["prompts"] == [{"start": 0, "prompt": "a red circle"}, {"start": START, "prompt": "a blue square"}]
    assert record["prompt_switch"] == "refresh"
    assert [block["block"] for block in record["blocks"] if "refresh" in block["seconds"]] == [START]


def test_one_prompt_is_the_comment_and_is_recorded(tmp_path: Path):
    video, report = tmp_path / "out.mp4", tmp_path / "report.json"
    files = ["--output", str(video), "--report", str(report)]
    assert main(["generate", *SMALL, "--prompt", "a red circle", *files]) == 0
    assert comment_of(video) == "a red circle"
    record = json.loads(report.read_text())
    assert (record["prompts"], record["prompt_switch"]) == ([{"start": 0, "prompt": "a red circle"}], "keep")


@pytest.mark.parametrize(
    "first", [["--prompt", "a red circle"], ["--at", "0:00", "a red circle"]], ids=["prompt", "at 0:00"]
)
def test_prompts_given_one_by_one_are_the_story(tmp_path: Path, first: list[str]):
    (tmp_path / "story.txt").write_text(STORY)
    written = video_of("--story", str(tmp_path / "story.txt"))
    given = video_of(*first, "--at", "1", "a blue square")
    assert given.record.prompts == written.record.prompts
    for a, b in zip(given.blocks(7), written.blocks(7), strict=True):
        assert torch.equal(a.latents, b.latents)


def test_the_switch_is_passed_on():
    later = ["--prompt", "a", "--at", "1", "b", "--prompt-switch", "blend", "--blend-blocks", "3"]
    story = video_of(*later).story
    assert (story.switch, story.blend_blocks) == ("blend", 3)
    assert [stretch.start for stretch in story.stretches] == [0, START]


def test_encoded_prompts_make_the_story_of_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each file is its stretch's prompt, padded as Wan was trained; its words are not known."""
    contexts: list[Tensor] = [encode_prompt(words) for words in ("a red circle", "two words", "a")]
    for name, context in zip("abc", contexts, strict=True):
        save_file({"prompt": context.contiguous()}, tmp_path / f"{name}.safetensors")
    save_file(random_state_dict(SIZES["tiny"], seed=0), tmp_path / "wan.safetensors")
    monkeypatch.chdir(tmp_path)
    model = ["--model", "wan.safetensors", "--vae", str(VAE)]
    later = ["--at-embedding", "0:00.6", "b.safetensors", "--at-embedding", "1", "c.safetensors"]
    video = video_of(*model, "--text-embedding", "a.safetensors", *later)
    assert [(prompt.start, prompt.prompt) for prompt in video.record.prompts] == [(0, ""), (3, ""), (START, "")]
    for stretch, context in zip(video.story.stretches, contexts, strict=True):
        padded = torch.zeros(1, 512, 4096)
        padded[:, : context.shape[1]] = context
        for found, expected in zip(stretch.text.layers, video.wan.embed_text(padded).layers, strict=True):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    only_later = video_of(*model, "--at-embedding", "0", "a.safetensors", *later)
    assert [stretch.start for stretch in only_later.story.stretches] == [0, 3, START]


FILES = {
    "empty.txt": b"\n# nothing\n",
    "words.txt": b"0:00 a cat\nthen it rains\n",
    "late.txt": b"0:00 a cat\n0:05 it rains\n",
    "image.txt": b"\x89PNG\xff\xfe\x00",
}
A = ["--prompt", "a cat"]
REAL = ["--model", "gone.pt", "--vae", "gone.pt"]
MISTAKES = {
    "nothing": ([], "Nothing says what the video shows: give --prompt TEXT or --story FILE"),
    "story and prompt": ([*A, "--story", "late.txt"], "both --story and --prompt are there: leave one out"),
    "story and at": (["--story", "late.txt", "--at", "1", "b"], "both --story and --at are there"),
    "words and files": ([*A, "--at-embedding", "1", "b.pt"], "both --prompt and --at-embedding are there"),
    "words for a real model": ([*REAL, "--story", "late.txt"], "A real model needs a prompt encoded by UMT5-XXL"),
    "files for the tiny model": (["--at-embedding", "0", "b.pt"], "The tiny model brings its own VAE and text encoder"),
    "no story": (["--story", "gone.txt"], "The story gone.txt cannot be read (No such file or directory)"),
    "a folder": (["--story", "."], "The story . cannot be read (Is a directory)"),
    "no text": (["--story", "image.txt"], "The story image.txt is no text file"),
    "empty story": (["--story", "empty.txt"], "The story has no prompt"),
    "bad line": (["--story", "words.txt"], "Line 2 of the story, 'then it rains', must begin with a time"),
    "late story": (
        ["--story", "late.txt"],
        "The prompt at 0:05, 'it rains', has no block of its own before the",
    ),
    "late": (
        [*A, "--at", "0:02", "b"],
        "The prompt at 0:02, 'b', has no block of its own before the",
    ),
    "bad time": ([*A, "--at", "soon", "b"], "--at soon 'b' must begin with a time such as 0:20"),
    "no words": ([*A, "--at", "1", " "], "--at 1 ' ' has a time but no prompt"),
    "order": (
        [*A, "--at", "1", "b", "--at", "0:00.5", "c"],
        "--at 0:00.5 'c' must start after the prompt before it",
    ),
    "twice at 0": (
        [*A, "--at", "0:00", "b"],
        "--at 0:00 'b' must start after the prompt before it",
    ),
    "no first": (["--at", "1", "b"], "--at 1 'b' is the first prompt and must start at 0:00"),
    "one block": ([*A, "--at", "0.02", "b"], "The prompts at 0:00 and 0:00.02 fall into the same block"),
    "blend": ([*A, "--prompt-switch", "blend", "--blend-blocks", "0"], "but blend_blocks is 0"),
}


@pytest.mark.parametrize(("options", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_before_a_model_is_loaded(
    options: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_models", loaded)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    assert main(["generate", *SMALL, *options]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("error: ")
    assert told in err
    assert not Path("out.mp4").exists()


@pytest.mark.parametrize("shape", [(5, 4096), (2, 5, 4096)], ids=str)
def test_a_file_that_holds_no_encoded_prompt_is_named_before_a_model_is_loaded(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    save_file({"prompt": torch.zeros(1, 5, 4096)}, "a.safetensors")
    save_file({"prompt": torch.zeros(shape)}, "b.safetensors")
    files = ["--text-embedding", "a.safetensors", "--at-embedding", "1", "b.safetensors"]
    assert main(["generate", *SMALL, *REAL, *files]) == 1
    assert f"b.safetensors must hold an encoded prompt [1, L, 4096], but its tensor has the shape {list(shape)}" in (
        capsys.readouterr().err
    )
