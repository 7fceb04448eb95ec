"""python -m packforcing, as a shell sees it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from failing_memory import device_error, fail_passes, held_bytes
from PIL import Image
from safetensors.torch import save_file
from small_options import SMALL_VIDEO

from packforcing.cli.generate import Request, prepared, requested
from packforcing.cli.main import main, parser
from packforcing.config import CacheConfig
from packforcing.errors import PackForcingError
from packforcing.files.video import read_video
from packforcing.flavours import flavour_named
from packforcing.generate.sampling import Sampling, sampling_of
from packforcing.model.causal_wan import CausalWan
from packforcing.model.wan_modules import SIZES, random_state_dict
from packforcing.presets import preset_named

REPO = Path(__file__).resolve().parents[2]


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "packforcing", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    """The JSON that `plan` prints for some options."""
    assert main(["plan", "--json", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def generate(*options: str) -> int:
    """Runs `generate` with a tiny model; returns its exit status."""
    return main(["generate", "--model", "tiny", "--prompt", "a red circle", *SMALL_VIDEO, *options])


# --- plan ------------------------------------------------------------------------------------------------------------


def test_plan_prints_one_json_object_with_the_papers_numbers():
    done = shell("plan", "--width", "832", "--height", "480", "--seconds", "120", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    numbers = json.loads(done.stdout)
    expected = {
        "tokens_per_frame": 1_560,
        "tokens_per_block": 6_240,
        "compressed_tokens_per_block": 182,
        "context_tokens": 27_872,
        "cached_tokens": 21_632,
        "cache_bytes": 21_632 * 30 * 2 * 1536 * 2,
        "full_tokens": 748_800,
        "full_cache_bytes": 748_800 * 30 * 2 * 1536 * 2,
        "archive_bytes_per_block": 182 * 30 * 2 * 1536 * 2,
        "blocks": 120,
        "latent_frames": 480,
    }
    assert {name: numbers[name] for name in expected} == expected
    assert round(numbers["cache_bytes"] / 1e9, 2) == 3.99
    assert round(numbers["full_cache_bytes"] / 1e9) == 138


def test_plan_without_options_is_the_papers_video(capsys: pytest.CaptureFixture[str]):
    assert plan(capsys) == plan(capsys, "--width", "832", "--height", "480", "--seconds", "120", "--fps", "16")


def test_plan_for_people_says_the_same(capsys: pytest.CaptureFixture[str]):
    assert main(["plan"]) == 0
    text = capsys.readouterr().out
    for words in ("832x480", "6,240 tokens", "182 tokens", "27,872 tokens", "3.99 GB", "138.02 GB", "748,800 tokens"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80


def test_plan_follows_its_options(capsys: pytest.CaptureFixture[str]):
    chunks = plan(capsys, "--block", "3", "--sink", "6", "--recent", "3", "--top-k", "8", "--seconds", "60")
    assert chunks["tokens_per_block"] == 3 * 1_560
    assert chunks["compressed_tokens_per_block"] == 3 * 7 * 13  # a stride of 2 does not divide 3 frames
    assert chunks["context_tokens"] == (6 + 3 + 3) * 1_560 + 8 * 273
    assert chunks["blocks"] == 80
    large = plan(capsys, "--model", "wan2.1-14b")
    assert large["cached_tokens"] == 21_632
    assert large["cache_bytes"] == 21_632 * 40 * 2 * 5120 * 2
    assert plan(capsys, "--fps", "24")["blocks"] == 180
    assert plan(capsys, "--top-k", "0")["context_tokens"] == 24_960


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_makes_a_video_a_report_and_a_picture(tmp_path: Path):
    video, report, picture = tmp_path / "out.mp4", tmp_path / "report.json", tmp_path / "picture.png"
    paths = ["--output", str(video), "--report", str(report), "--picture", str(picture)]
    settings = ["--seconds", "2", "--seed", "1", "--width", "64", "--height", "64"]
    done = shell("generate", "--model", "tiny", "--prompt", "a red circle", *settings, *paths)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert str(video) in done.stdout
    frames, fps = read_video(video)
    assert (frames.shape, fps) == ((29, 64, 64, 3), 16.0)  # two blocks of 16, less the 3 of the very first
    record = json.loads(report.read_text())
    assert [block["block"] for block in record["blocks"]] == [0, 1]
    assert record["model"] == {"layers": 4, "dim": 256, "heads": 2}
    assert str(tmp_path) not in report.read_text()
    with Image.open(picture) as image:
        assert image.width == 1600


def test_inspect_shows_a_record_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report, pictures = tmp_path / "report.json", [tmp_path / name for name in ("picture.png", "again.png", "node.png")]
    output = ["--output", str(tmp_path / "out.mp4"), "--report", str(report), "--picture", str(pictures[0])]
    assert generate("--seconds", "1.5", "--top-k", "2", *output) == 0  # the last of six blocks has a choice
    told = capsys.readouterr().out
    record = json.loads(report.read_text())
    scored = [all(block["affinity"]) and block["selected"][0] != [] for block in record["blocks"]]
    assert scored == [False] * 5 + [True]
    assert record["summary"]["ages"]["stored"] == [3 * 4, 2 * 4, 4]  # of the ages 2, 3 and 4, in four layers
    assert sum(record["summary"]["ages"]["chosen"]) == (1 + 2 + 2) * 4
    assert main(["inspect", str(report), "--picture", str(pictures[1]), "--overview", str(pictures[2])]) == 0
    assert capsys.readouterr().out.strip() in told
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with Image.open(pictures[2]) as image:
        assert image.width == 800


def test_generate_with_json_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    video = tmp_path / "out.mp4"
    assert generate("--seconds", "1.5", "--output", str(video), "--json") == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["output"], summary["frames"], summary["fps"]) == (str(video), 21, 16.0)
    assert summary["video_seconds"] == pytest.approx(21 / 16)
    assert "block 6 of 6" in err  # progress goes where it does not disturb
    assert read_video(video)[0].shape == (21, 64, 64, 3)


def test_the_same_seed_gives_the_same_video(tmp_path: Path):
    files = [tmp_path / f"{i}.mp4" for i in range(3)]
    for file, seed in zip(files, ("5", "5", "6"), strict=True):
        assert generate("--seconds", "0.5", "--seed", seed, "--output", str(file)) == 0
    same, again, other = (read_video(file)[0].astype(float) for file in files)
    # Not the same bytes: one encoding in some fifty chooses otherwise in a frame.
    assert abs(same - again).mean() < 2
    assert abs(same - other).mean() > 20


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., Request]:
    """What `generate` makes of some options."""
    save_file({"prompt": torch.zeros(1, 5, 4096)}, tmp_path / "prompt.safetensors")
    files = ["--text-embedding", str(tmp_path / "prompt.safetensors"), "--vae", "gone"]
    return lambda *options: requested(parser().parse_args(["generate", *files, *options]))


def test_a_flavour_is_taken_from_the_files_name_with_its_preset(asked: Callable[..., Request]):
    request = asked("--model", "causal-forcing++/framewise-2step.pt")
    assert request.flavour is flavour_named("causal-forcing-2step")
    assert request.layout.config == preset_named("frame-wise").config
    assert request.sampling == sampling_of(request.flavour)
    none = asked("--model", "causal-forcing++/framewise-2step.pt", "--flavour", "none")
    assert (none.flavour, none.layout.config, none.sampling) == (None, CacheConfig(), Sampling())
    named = asked("--model", "model.pt", "--flavour", "causvid")
    assert named.sampling == sampling_of(flavour_named("causvid"))


def test_every_option_overrides_the_flavour(asked: Callable[..., Request]):
    causvid = ["--model", "model.pt", "--flavour", "causvid"]
    assert asked(*causvid, "--steps", "4").sampling.timesteps_of(1) == [1000, 750, 500, 250]  # as listed
    warped = asked(*causvid, "--warp", "--timesteps", "1000,500").sampling
    assert warped.timesteps_of(1) == pytest.approx([1000, 8000 / 9])
    own = asked(*causvid, "--first-timesteps", "1000,900").sampling
    assert (own.timesteps_of(0), own.timesteps_of(1)) == ([1000, 900], [1000, 757, 522])
    assert asked(*causvid, "--update", "euler").sampling.update == "euler"
    assert asked("--model", "self_forcing_dmd.pt", "--shift", "3").sampling.timesteps_of(1)[1] == 900
    # A size that is given puts the preset aside, so that older command lines mean what they meant.
    old = ["--block", "3", "--sink", "6", "--recent", "3"]
    assert asked("--model", "self_forcing_dmd.pt", *old).layout.config == CacheConfig(3, 6, 3)
    mixed = asked("--model", "model.pt", "--preset", "deep-sink", "--sink", "9").layout.config
    assert mixed == replace(preset_named("deep-sink").config, sink_frames=9)


def test_generate_says_the_flavour_and_what_departs_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lists = ["--timesteps", "1000,500", "--first-timesteps", "1000", "--no-warp"]
    small = [*SMALL_VIDEO[:-2], "--seconds", "0.5", "--output", str(tmp_path / "out.mp4"), *lists]
    assert main(["generate", "--model", "tiny", "--prompt", "a red circle", *small]) == 0
    out, err = capsys.readouterr()
    assert "flavour: demo" in err
    assert "warning: the timesteps are 1000, 500, and it was trained with 1000, 954.55, 900, 833.33, 750" in err
    assert "t = 1000, 500; first block 1000" in out


def test_plan_knows_presets(capsys: pytest.CaptureFixture[str]):
    assert plan(capsys, "--preset", "training-free")["context_tokens"] == 18 * 1_560 + 273


def test_blocks_of_three_frames(tmp_path: Path):
    video = tmp_path / "out.mp4"
    odd = ["--block", "3", "--sink", "6", "--recent", "3", "--seconds", "1.5"]
    assert generate(*odd, "--output", str(video)) == 0
    assert len(read_video(video)[0]) == 2 * 12 - 3


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "width": (["plan", "--width", "100"], "The width must be a positive multiple of 16 pixels, but it is 100"),
    "huge width": (
        ["plan", "--width", "1600000000"],
        "The width can be at most 16,384 pixels, but it is 1,600,000,000",
    ),
    "share": (["train", "base", "--composed", "2"], "composed must be from 0 to 1, but it is 2.0"),
    "other share": (["train", "base", "--place-share", "-0.5"], "place_share must be from 0 to 1, but it is -0.5"),
    "average": (["train", "compressor", "--ema", "1"], "ema must be below 1, since an average of 1 never moves"),
    "rate that is none": (["train", "forcing", "--rate", "nan"], "generator_rate must be at least 0, but it is nan"),
    "batch": (["train", "vae", "--batch", "0"], "micro_batch counts from 1, but is 0"),
    "threads": (["train", "vae", "--threads", "-1"], "--threads must be at least 0, but it is -1"),
    "many mid blocks": (["plan", "--top-k", "9" * 20], "top_k can be at most 1,000,000,000, but it is 99"),
    "many steps": (
        ["generate", "--prompt", "a cat", "--steps", "2147483648"],
        "Denoising takes at most 1,000 steps, but 2,147,483,648 were asked for",
    ),
    "length": (["plan", "--seconds", "0"], "length must be above 0 and at most 10,000,000 seconds, but it is 0"),
    "rate": (["plan", "--fps", "0"], "The frame rate must be above 0, but it is 0"),
    "partition": (["plan", "--sink", "6"], "sink_frames must be whole blocks of 4 latent frames, but it is 6: set it"),
    "small frame": (["plan", "--width", "48"], "at least 64x64 pixels, but the video is 48x480"),
    "no embedding": (
        ["generate", "--model", "gone.pt", "--text-embedding", "gone.safetensors", "--vae", "gone.safetensors"],
        "gone.safetensors does not exist",
    ),
    "no VAE": (
        ["generate", "--model", "gone.pt", "--text-embedding", "gone.safetensors"],
        "A video file needs the Wan 2.1 VAE: give --vae FILE.",
    ),
    "prompt for a real model": (
        ["generate", "--model", "gone.pt", "--prompt", "a cat", "--vae", "gone.safetensors"],
        "give its file or folder as --text-encoder PATH",
    ),
    "embedding for the tiny model": (
        ["generate", "--text-embedding", "gone.safetensors"],
        "The tiny model brings its own VAE and text encoder",
    ),
    "no folder": (
        ["generate", "--prompt", "a cat", "--output", "no/such/folder/out.mp4"],
        "the folder no/such/folder does not exist",
    ),
    "no report folder": (
        ["generate", "--prompt", "a cat", "--seconds", "0.25", "--report", "no/such/folder/report.json"],
        "no/such/folder",
    ),
    "a long name": (
        ["generate", "--prompt", "a cat", "--output", "x" * 248 + ".mp4"],
        "(File name too long): shorten it.",
    ),
    "a long state's name": (
        ["generate", "--prompt", "a cat", "--save-state", "x" * 230 + ".safetensors"],
        "(File name too long): shorten it.",
    ),
    "one file": (
        ["generate", "--prompt", "a cat", "--report", "a.mp4", "--output", "./a.mp4"],
        "--output and --report name one file",
    ),
    "a report in a folder's place": (
        ["generate", "--prompt", "a cat", "--report", "."],
        "The report cannot be written to ., which is a folder: add a file name to it.",
    ),
    "no record": (["inspect", "gone.json"], "gone.json cannot be read as JSON"),
    "no compressor": (["generate", "--prompt", "a cat", "--compressor", "gone.safetensors"], "gone.safetensors does"),
    "seed": (["generate", "--prompt", "a cat", "--seed", "-1"], "The seed must lie between 0 and 2^64 - 1, but it is"),
    "timesteps": (["generate", "--prompt", "a cat", "--timesteps", "1000,1200"], "at most at 1000, but one is 1200"),
    "rising timesteps": (["generate", "--prompt", "a cat", "--timesteps", "500,1000"], "must fall from step to step"),
    "words for timesteps": (["generate", "--prompt", "a cat", "--first-timesteps", "x"], "Timesteps are numbers with"),
    "steps and timesteps": (
        ["generate", "--prompt", "a cat", "--timesteps", "1000", "--steps", "2"],
        "Both --timesteps and --steps say how many steps there are: leave one of them out.",
    ),
    "steps": (["generate", "--prompt", "a cat", "--steps", "0"], "0"),
    "device": (["generate", "--prompt", "a cat", "--device", "toaster"], "toaster"),
    "compiled weights that move": (
        ["generate", "--prompt", "a cat", "--compile", "--weights-device", "host"],
        "reads them anew in each pass: drop one of them",
    ),
    "no card": (["plan", "--fit", "large"], "is a number of gigabytes such as 8GB, but it is 'large'"),
    "a card for nothing": (
        ["plan", "--fit", "1GB", "--model", "wan2.1-14b"],
        "No frame of wan2.1-14b fits a card of 1GB",
    ),
}


@pytest.mark.parametrize(("arguments", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_on_standard_error(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing half-made is left behind


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = tmp_path / "words.safetensors"
    save_file({"prompt": torch.zeros(1, 5, 4096)}, words)
    video = ["--output", str(tmp_path / "out.mp4")]
    assert main(["generate", "--model", "gone.pt", "--text-embedding", str(words), "--vae", "gone.pt", *video]) == 1
    assert "gone.pt does not exist" in capsys.readouterr().err


def test_a_mistake_leaves_an_older_video_alone(tmp_path: Path):
    video = tmp_path / "out.mp4"
    assert generate("--seconds", "0.25", "--output", str(video)) == 0
    before = video.read_bytes()
    assert generate("--seconds", "0.25", "--output", str(video), "--compressor", "gone.safetensors") == 1
    assert main(["generate", "--model", "gone.pt", "--text-embedding", "x", "--vae", "x", "--output", str(video)]) == 1
    assert video.read_bytes() == before


def test_an_unknown_option_is_told_without_a_traceback():
    done = shell("plan", "--colour", "red")
    assert done.returncode == 2
    assert "--colour" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_out_of_memory_is_one_sentence_and_finished_blocks_are_kept(
    overlap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_passes(monkeypatch, CausalWan)(range(6, 100))  # in the fourth block: each has two
    file = tmp_path / "out.mp4"
    assert generate("--seconds", "5", "--overlap", overlap, "--output", str(file)) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: The device's memory ran out at block 3, and there is nothing left to do without; ")
    assert len(read_video(file)[0]) == 9  # three blocks of one latent frame


def test_a_run_whose_memory_ran_out_goes_on_to_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, file, report = tmp_path / "whole.mp4", tmp_path / "out.mp4", tmp_path / "report.json"
    assert generate("--seconds", "2", "--output", str(whole)) == 0
    capsys.readouterr()
    fail_passes(monkeypatch, CausalWan)(range(6, 7))
    assert generate("--seconds", "2", "--overlap", "on", "--output", str(file), "--report", str(report)) == 0
    said = capsys.readouterr()
    sentence = "The device's memory ran out at block 3: from there on blocks are decoded after their denoising, "
    assert sentence in said.err
    assert sentence in said.out, "the report"
    assert json.loads(report.read_text())["notes"][0].startswith(sentence)
    assert (read_video(file)[0] == read_video(whole)[0]).all()


def test_weights_without_room_are_told_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    options = parser().parse_args(["generate", "--prompt", "a red circle", *SMALL_VIDEO])
    request, before = requested(options), held_bytes()

    def no_room(*_: object, **__: object) -> None:
        assert held_bytes() > before, "the transformer's are there by then"
        raise device_error()

    monkeypatch.setattr("packforcing.cli.networks.load_vae", no_room)
    with pytest.raises(PackForcingError) as told:
        prepared(options, request)
    assert str(told.value) == (
        "The device's memory ran out while the weights were loaded: choose a smaller model or one in fp8, or close "
        "other programs."
    )
    del told
    assert held_bytes() == before


def test_what_no_machine_can_hold_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.mp4"
    assert generate("--width", "16384", "--height", "16384", "--sink", "4000", "--output", str(file)) == 1
    told = capsys.readouterr().err
    assert "A video of 16384x16384 needs about " in told
    assert " takes " in told
    assert "block 1" not in told
    assert not file.exists()


def test_a_short_prompt_of_a_real_model_is_padded_as_wan_was_trained(tmp_path: Path):
    """The same latents from a prompt of 5 tokens as from one with zeros up to 512, and others from other words."""
    sizes = replace(SIZES["tiny"], layers=2)  # the demo's own shape is known, and its prompts are not padded
    save_file(random_state_dict(sizes, seed=0), tmp_path / "wan.safetensors")
    words = torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(0))
    prompts = {"short": words, "padded": torch.cat((words, torch.zeros(1, 507, 4096)), dim=1), "other": -words}
    vae = REPO / "packforcing" / "weights" / "demo_vae.safetensors"
    latents = {}
    for name, prompt in prompts.items():
        save_file({"prompt": prompt.contiguous()}, tmp_path / f"{name}.safetensors")
        files = ["--model", str(tmp_path / "wan.safetensors"), "--vae", str(vae), "--text-embedding"]
        options = parser().parse_args(["generate", *files, str(tmp_path / f"{name}.safetensors"), *SMALL_VIDEO])
        latents[name] = next(iter(prepared(options, requested(options)).video.blocks(1))).latents
    assert torch.equal(latents["short"], latents["padded"])
    assert not torch.equal(latents["short"], latents["other"])
