"""Prompts over time on the command line: what reaches the video, and every mistake before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import tiny_umt5
import torch
from safetensors.torch import save_file
from small_options import SMALL_VIDEO
from torch import Tensor

from packforcing.cli import generate
from packforcing.cli.generate import prepared, requested
from packforcing.cli.main import main, parser
from packforcing.demo.text import encode_prompt
from packforcing.errors import PackForcingError
from packforcing.files.video import read_video
from packforcing.generate.long_video import LongVideo
from packforcing.generate.story import parse_story
from packforcing.model.wan_modules import WanSizes, random_state_dict
from packforcing.text.encoder import TextEncoder, open_text_encoder

VAE = Path(__file__).resolve().parents[2] / "packforcing" / "weights" / "demo_vae.safetensors"

# Blocks of one latent frame at 64x64 and 16 fps: block b begins at (4 b - 3) / 16 s.
SMALL = [*SMALL_VIDEO, "--seconds", "2"]
STORY = "# a short one\n0:00 a red circle\n0:01 a blue square\n"
START = 5  # 1 s lies between block 4 at 0.8125 s and block 5 at 1.0625 s


def video_of(*options: str) -> LongVideo:
    parsed = parser().parse_args(["generate", *SMALL, *options])
    return prepared(parsed, requested(parsed)).video


def real_model(folder: Path) -> list[str]:
    """Options of a random model that is none of the known ones, with the demo's VAE."""
    sizes = WanSizes(dim=128, ffn_dim=64, layers=2, heads=1)
    save_file(random_state_dict(sizes, seed=0), folder / "wan.safetensors")
    return ["--model", str(folder / "wan.safetensors"), "--vae", str(VAE)]


def assert_prompts(video: LongVideo, contexts: list[Tensor]) -> None:
    """The stretches' texts are those of encoded prompts [L, 4096], with zeros up to 512 tokens."""
    for stretch, context in zip(video.story.stretches, contexts, strict=True):
        padded = torch.zeros(1, 512, 4096)
        padded[0, : len(context)] = context
        hidden = video.wan.modules.text_embedding(padded)
        for (keys, values), block in zip(stretch.text.layers, video.wan.modules.blocks, strict=True):
            cross = block.cross_attn
            assert torch.equal(keys.flatten(2), cross.norm_k(cross.k(hidden)))
            assert torch.equal(values.flatten(2), cross.v(hidden))


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
    contexts[1] = contexts[1][0]  # [L, 4096] will do
    for name, context in zip("abc", contexts, strict=True):
        save_file({"prompt": context.contiguous()}, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    model = real_model(tmp_path)
    later = ["--at-embedding", "0:00.6", "b.safetensors", "--at-embedding", "1", "c.safetensors"]
    video = video_of(*model, "--text-embedding", "a.safetensors", *later)
    assert [(prompt.start, prompt.prompt) for prompt in video.record.prompts] == [(0, ""), (3, ""), (START, "")]
    assert_prompts(video, [context.reshape(-1, 4096) for context in contexts])
    only_later = video_of(*model, "--at-embedding", "0", "a.safetensors", *later)
    assert [stretch.start for stretch in only_later.story.stretches] == [0, 3, START]


@pytest.mark.parametrize(
    "words",
    [["--prompt", "a red circle", "--at", "1", "it starts to rain"], ["--story", "story.txt"]],
    ids=["prompt and at", "story"],
)
def test_words_are_encoded_for_a_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
):
    monkeypatch.chdir(tmp_path)
    umt5 = tiny_umt5.comfyui_file(tmp_path, tiny_umt5.random_umt5())
    Path("story.txt").write_text("0:00 a red circle\n0:01 it starts to rain\n")
    video = video_of(*real_model(tmp_path), "--text-encoder", str(umt5), *words)
    prompts = ["a red circle", "it starts to rain"]
    assert_prompts(video, open_text_encoder(str(umt5), None, torch.device("cpu")).encode(prompts))
    assert [prompt.prompt for prompt in video.record.prompts] == prompts
    assert (
        "encoding 2 prompts by umt5_xxl_fp16.safetensors, one of 3 layers at a time: about" in capsys.readouterr().err
    )


def test_the_encoder_is_done_before_the_transformer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And a mistake in its file is told before anything is encoded."""
    calls = []
    encode, load = TextEncoder.encode, generate.load_models
    monkeypatch.setattr(TextEncoder, "encode", lambda self, words: calls.append("encoded") or encode(self, words))
    monkeypatch.setattr(generate, "load_models", lambda *given: calls.append("loaded") or load(*given))
    umt5 = tiny_umt5.comfyui_file(tmp_path, tiny_umt5.random_umt5())
    video_of(*real_model(tmp_path), "--prompt", "a", "--text-encoder", str(umt5))
    assert calls == ["encoded", "loaded"]
    with pytest.raises(PackForcingError, match="does not exist"):
        video_of(*real_model(tmp_path), "--prompt", "a", "--text-encoder", "gone.safetensors")
    assert calls == ["encoded", "loaded"]


def test_a_prompt_of_100_000_words_is_cut_and_that_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    umt5 = tiny_umt5.comfyui_file(tmp_path, tiny_umt5.random_umt5())
    video = video_of(*real_model(tmp_path), "--prompt", "lake " * 100_000, "--text-encoder", str(umt5))
    assert video.story.stretches[0].text.layers[0][0].shape[1] == 512
    assert "tokens, of which Wan reads the first 512" in capsys.readouterr().err


FILES = {
    "empty.txt": b"\n# nothing\n",
    "words.txt": b"0:00 a cat\nthen it rains\n",
    "late.txt": b"0:00 a cat\n0:05 it rains\n",
    "latin.txt": "0:00 caf\u00e9\n".encode("latin-1"),
    "wide.txt": "0:00 a cat\n".encode("utf-16"),
    "long.txt": b"".join(b"%d a cat\n" % second for second in range(5_000)),
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
    "an encoder for the tiny model": ([*A, "--text-encoder", "u.pt"], "The tiny model brings its own VAE and text enc"),
    "an encoder for encoded prompts": (
        [*REAL, "--text-embedding", "a.pt", "--text-encoder", "u.pt"],
        "The prompts of --text-embedding are encoded already",
    ),
    "no encoder": ([*REAL, *A, "--text-encoder", "gone.pt"], "gone.pt does not exist"),
    "no encoder's folder": ([*REAL, *A, "--text-encoder", "."], "The folder . has no weights of a text encoder"),
    "bytes that are no text": (["--prompt", "caf\udce9"], "The prompt 'caf\\udce9' is no text in UTF-8"),
    "an old encoding": (
        ["--story", "latin.txt"],
        "The story latin.txt is no text file: save it as plain",
    ),
    "Windows's Unicode": (["--story", "wide.txt"], "The story wide.txt is no text file"),
    "a story of 5,000 lines": (["--story", "long.txt"], "The prompt at 0:02, 'a cat', has no block of its own"),
    "an empty prompt": (["--prompt", " "], "--prompt ' ' has no words: say what the video shows"),
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


BAD = {
    "two prompts": (torch.zeros(2, 5, 4096), "'prompt' has the shape [2, 5, 4096]"),
    "one number": (torch.zeros(()), "'prompt' has the shape []"),
    "no tokens": (torch.zeros(0, 4096), "'prompt' has the shape [0, 4096]"),
    "integers": (torch.zeros(5, 4096, dtype=torch.int64), "'prompt' has the shape [5, 4096]"),
    "too long": (torch.zeros(513, 4096), "'prompt' of b.safetensors is a prompt of 513 tokens, and Wan takes 512"),
}


@pytest.mark.parametrize(("tensor", "told"), BAD.values(), ids=BAD)
def test_a_file_that_holds_no_encoded_prompt_is_named_before_a_model_is_loaded(
    tensor: Tensor, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    save_file({"prompt": torch.zeros(1, 5, 4096)}, "a.safetensors")
    save_file({"prompt": tensor}, "b.safetensors")
    files = ["--text-embedding", "a.safetensors", "--at-embedding", "1", "b.safetensors"]
    assert main(["generate", *SMALL, *REAL, *files]) == 1
    assert told in capsys.readouterr().err
