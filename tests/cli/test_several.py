"""`generate` under `torchrun`, and `generate --prompts`: the same videos, each once, and one sentence for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_options import SMALL_VIDEO
from torch import Tensor
from torchrun import run_two

from packforcing import processes
from packforcing.cli import many
from packforcing.cli.main import main, parser
from packforcing.cli.stopping import Stopping
from packforcing.errors import PackForcingError
from packforcing.files.encoded_prompts import EncodedPrompt, write_prompts
from packforcing.files.state_file import load_state
from packforcing.files.video import probe

TINY = ["--model", "tiny", *SMALL_VIDEO, "--device", "cpu"]
SIX_BLOCKS = ["--seconds", "1.5"]  # the last one chooses among its mid blocks
TWO_BLOCKS = ["--seconds", "0.5"]
STORY = ["--prompt", "a red circle", "--at", "0:01", "a blue square", "--prompt-switch", "refresh"]

# The command, of which the second process fails when it has made a block. The first one hears of that when this ends.
FAILING = """
import os, sys
from datetime import timedelta
from packforcing import processes
from packforcing.cli.main import main
from packforcing.errors import PackForcingError
from packforcing.generate.long_video import LongVideo

def fails(self, index, latents):
    if index == 2:
        raise PackForcingError("Block 2 came out wrong here.")

if os.environ["RANK"] == "1":
    LongVideo._check_finite = fails
    processes.PATIENCE = timedelta(seconds=3)
sys.exit(main(sys.argv[1:]))
"""


def errors(told: str) -> list[str]:
    """The sentences of errors that a command told."""
    return [line for line in told.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of the video that one process makes."""
    folder = tmp_path_factory.mktemp("one")
    files = ["--output", f"{folder / 'one.mp4'}", "--save-state", f"{folder / 'one.safetensors'}"]
    assert main(["generate", *TINY, *SIX_BLOCKS, *STORY, *files]) == 0
    return folder / "one.safetensors"


# --- one video --------------------------------------------------------------------------------------------------------


def test_two_processes_make_one_video(by_one: Path, tmp_path: Path) -> None:
    """The demo models with a story: what one process makes, to rounding. The main process alone writes and speaks."""
    files = {name: tmp_path / f"two.{name}" for name in ("mp4", "safetensors", "json")}
    written = ["--output", f"{files['mp4']}", "--save-state", f"{files['safetensors']}", "--report", f"{files['json']}"]
    run = run_two("-m", "packforcing", "generate", *TINY, *SIX_BLOCKS, *STORY, *written, "--json")
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout)["frames"] == probe(files["mp4"]).frames == 21
    assert run.stderr.count("block 6 of 6") == 1
    one, two = load_state(by_one), load_state(files["safetensors"])
    assert torch.equal(one.selected, two.selected)
    # float32 through six blocks of three passes, of which each meets the rounding of those before it.
    assert (one.latents - two.latents).abs().max() < 1e-3 * one.latents.abs().max()
    assert json.loads(files["json"].read_text())["device"] == "cpu, the first of 2"


def test_one_that_fails_ends_all_with_one_sentence(by_one: Path, tmp_path: Path) -> None:
    """What was finished is kept, and one process goes on from the state of two."""
    script, film, state = (tmp_path / name for name in ("failing.py", "out.mp4", "state.safetensors"))
    script.write_text(FAILING)
    command = ["generate", *TINY, *SIX_BLOCKS, *STORY, "--output", f"{film}", "--save-state", f"{state}"]
    run = run_two(f"{script}", *command)
    assert run.returncode != 0
    assert errors(run.stderr) == ["error: Block 2 came out wrong here."], run.stderr[-3000:]
    assert probe(film).frames == 9  # three blocks: the main process was through with the third one
    assert load_state(state).blocks == 3
    assert main([*command, "--continue-from", f"{state}"]) == 0
    one, both = load_state(by_one), load_state(state)
    assert torch.equal(one.selected, both.selected)
    assert (one.latents - both.latents).abs().max() < 1e-3 * one.latents.abs().max()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--live"], "--live does not go with one video by 2 processes"),
        (["--linear-dtype", "fp8_e4m3"], "PyTorch shares out plain linear layers only"),
        (["--compile"], "--compile does not go with one video by 2 processes"),
    ],
)
def test_what_several_processes_cannot(more: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = parser().parse_args(["generate", *TINY, "--prompt", "x", *more])
    with pytest.raises(PackForcingError, match=said):
        many.check_together(options)


def test_each_process_takes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes.take_device("cuda") == "cuda:2"
    assert taken == [2]
    assert processes.take_device("cpu") == "cpu"
    with pytest.raises(PackForcingError, match="leave it at cuda"):
        processes.take_device("cuda:1")
    with pytest.raises(PackForcingError, match="--device is mps"):
        processes.take_device("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PackForcingError, match="this machine has 2"):
        processes.take_device("cuda")


# --- many videos ------------------------------------------------------------------------------------------------------

WORDS = ["a red circle", "a blue square", "a green triangle"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("# three\n" + "\n".join(WORDS) + "\n")
    return file


def videos(folder: Path) -> dict[str, int]:
    """Names and frames of what lies in a folder."""
    return {path.name: probe(path).frames if path.suffix == ".mp4" else 0 for path in sorted(folder.iterdir())}


ALL = {"00001.mp4": 5, "00002.mp4": 5, "00003.mp4": 5, "prompts.json": 0}


def many_of(prompts: Path, *more: str) -> list[str]:
    return ["generate", *TINY, *TWO_BLOCKS, "--prompts", f"{prompts}", "--output", f"{prompts.parent / 'out'}", *more]


def test_a_video_of_each_prompt(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `generate --prompt` makes it; what is there is not made again, and new prompts may follow."""
    folder = prompts.parent / "out"
    assert main(many_of(prompts, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 3
    assert videos(folder) == ALL
    alone = prompts.parent / "alone.mp4"
    assert main(["generate", *TINY, *TWO_BLOCKS, "--prompt", WORDS[1], "--output", f"{alone}"]) == 0
    assert (folder / "00002.mp4").read_bytes() == alone.read_bytes()

    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    (folder / "00002.mp4").unlink()
    prompts.write_text(prompts.read_text() + "a red square\n")
    assert main(many_of(prompts, "--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 2
    assert videos(folder) == ALL | {"00004.mp4": 5}
    assert (folder / "00002.mp4").read_bytes() == alone.read_bytes()
    kept = [path for path in times if path.name != "00002.mp4"]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)

    elsewhere = ("--archive-device", "disk", "--archive-folder", f"{prompts.parent}", "--weights-device", "host")
    assert main(many_of(prompts, "--json", *elsewhere)) == 0  # where something lies changes no bit of the videos
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 0


def test_one_that_fails_leaves_the_others(
    prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = many.encoded

    def broken(tasks: many.Tasks, todo: list[many.Task]) -> list[Tensor]:
        contexts = encoded(tasks, todo)
        contexts[1] = torch.full_like(contexts[1], torch.nan)
        return contexts

    with monkeypatch.context() as patch:
        patch.setattr(many, "encoded", broken)
        assert main(many_of(prompts)) == 1
    told = capsys.readouterr().err
    assert len(errors(told)) == 1
    assert "1 of 3 videos could not be made (00002), the first because: Block 0 came out with NaN" in errors(told)[0]
    assert videos(prompts.parent / "out") == {name: frames for name, frames in ALL.items() if name != "00002.mp4"}
    assert main(many_of(prompts)) == 0
    assert videos(prompts.parent / "out") == ALL


def test_a_process_goes_by_what_was_missing_when_the_first_one_looked(
    prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has made its video by now: counted among what is missing still, the second would be nobody's."""
    options = parser().parse_args(many_of(prompts))
    (prompts.parent / "out").mkdir()
    (prompts.parent / "out" / "00001.mp4").touch()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(many, "made_of", lambda tasks, heard: [task.number for task in tasks.tasks])
    found: list[list[int]] = []
    made = many.own_part(options, Stopping(bool), lambda own: found.append(own) or [1, 2, 3])
    assert (found, made) == ([[2, 3]], [2])


def test_two_processes_share_out_the_prompts(prompts: Path) -> None:
    run = run_two("-m", "packforcing", *many_of(prompts, "--json"))
    assert run.returncode == 0, run.stderr[-3000:]
    summary = json.loads(run.stdout)
    assert (summary["videos"], summary["made"], summary["failed"]) == (3, 3, {})
    assert videos(prompts.parent / "out") == ALL
    assert main([*many_of(prompts), "--json"]) == 0  # one process finds nothing left to do


def test_prompts_of_a_file_of_encoded_ones(tmp_path: Path) -> None:
    file = tmp_path / "encoded.safetensors"
    contexts = {"b": torch.ones(2, 64), "a": torch.zeros(3, 64)}
    write_prompts(
        file, {name: EncodedPrompt(each, f"words of {name}") for name, each in contexts.items()}, "no encoder"
    )
    tasks = many.encoded_tasks(parser().parse_args(["generate", "--prompts", f"{file}"]))
    assert [(task.name, task.words) for task in tasks] == [("00001", "words of a"), ("00002", "words of b")]
    assert [task.context.shape for task in tasks if task.context is not None] == [(1, 3, 64), (1, 2, 64)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt", "x"], "--prompt is for one video"),
        (["--save-state", "x.safetensors"], "--save-state is for one video"),
        (["--live"], "--live is for one video"),
        (["--output", "x.mp4"], "--output must name a folder, but it is x.mp4"),
        (["--prompts", "missing.txt"], "The file of prompts missing.txt cannot be read"),
    ],
)
def test_mistakes(
    more: list[str], said: str, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prompts.parent)
    assert main(many_of(prompts, *more)) == 1
    assert said in errors(capsys.readouterr().err)[0]


def test_other_options_are_refused(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder has videos of one kind."""
    folder = prompts.parent / "out"
    folder.mkdir()
    (folder / many.LIST).write_text(json.dumps({"options": {"seed": 3}, "prompts": {}}))
    assert main(many_of(prompts)) == 1
    assert "were made with --seed 3, but now it is 0" in capsys.readouterr().err
    (folder / many.LIST).write_text(json.dumps({"options": {}, "prompts": {"00001": "a dog"}}))
    assert main(many_of(prompts)) == 1
    assert "were made with prompt 00001 'a dog', but now it is 'a red circle'" in capsys.readouterr().err
    (folder / many.LIST).write_text("no list")
    assert main(many_of(prompts)) == 1
    assert "is no list of prompts" in capsys.readouterr().err
    assert main(["generate", *TINY, "--prompt", "x", "--parallel", "prompts"]) == 1
    assert "give --prompts FILE" in capsys.readouterr().err
