"""The trainers of generator and compressor: each command killed at a random moment ends with the same weights, one
process and two of `torchrun` make the same step, and what is written can be loaded."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL

import pytest
import torch
from safetensors.torch import save_file
from torchrun import ENVIRONMENT
from warm import Warm

from packforcing.cli.main import main
from packforcing.demo.models import demo_vae
from packforcing.demo.text import encode_prompt
from packforcing.devices import fast_dtype
from packforcing.errors import PackForcingError
from packforcing.files.compressor_file import load_compressor
from packforcing.files.wan_checkpoint import load_wan
from packforcing.model.vae import load_vae
from packforcing.model.wan_modules import SIZES, WanModules, build_wan_modules
from packforcing.training import base, base_command, blocks, clips, compressor, models, options, rollouts
from packforcing.training.checkpoints import Checkpoints
from packforcing.training.histories import History
from packforcing.training.log import read_log
from packforcing.training.optimizers import JointOptimizer, muon_and_adamw

STEPS = 4
RUN = ["--threads", "1", "--precision", "float32", "--save-every", "1", "--log-every", "1", "--steps", str(STEPS)]
RATES = ["--rate", "1e-3", "--warmup", "0"]
SMALL = ["--width", "64", "--height", "64", "--sink", "4", "--recent", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of one length, so that no padding depends on who is trained beside whom."""
    folder = tmp_path_factory.mktemp("trainers")
    colours = ("red", "green", "yellow", "white")
    prompts = {c: encode_prompt(f"a {c} circle bounces on a blue background")[0].contiguous() for c in colours}
    save_file(prompts, folder / "prompts.safetensors")
    save_file({"empty": encode_prompt("")[0].contiguous()}, folder / "empty.safetensors")
    return folder


def command(part: str, folder: Path) -> list[str]:
    """A small run of each trainer, without its folder."""
    model = f"--model random:tiny --prompts {folder / 'prompts.safetensors'} --blocks 4"
    parts = {
        "base": f"--latent-frames 12 --size 64 --clips 6 --held-out 2 --batch 2 --open-captions 0.5 --away-clips 6 "
        f"--place-clips 12 --whole-steps 1 --compressor-output {folder / 'hr.safetensors'} "
        f"--clip-folder {folder / 'clips'}",
        "compressor": f"{model} --rollouts 2 --held-out 1 --batch 2 --rollout-folder {folder / 'rollouts'}",
        "forcing": f"{model} --critic-turns 2 --critic-rate 1e-3 --empty-prompt {folder / 'empty.safetensors'}",
    }
    small = [] if part == "base" else SMALL
    return [part, *parts[part].split(), *small, *RUN, *RATES]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as warm:
        yield warm


def finish(warm: Warm, arguments: list[str], processes: int = 1) -> None:
    """A `train` command, to its end."""
    with tempfile.NamedTemporaryFile() as errors:
        code = warm.start(["train", *arguments], errors.name, processes).wait(timeout=300)
        assert code == 0, Path(errors.name).read_text(errors="replace")[-3000:]


def kill_at_random(warm: Warm, arguments: list[str], folder: Path, processes: int = 1) -> None:
    """Starts the command and kills it, all of its processes, in one of its steps or beside a checkpoint."""
    target = random.Random(time.time_ns()).randint(1, STEPS - 1)
    process = warm.start(["train", *arguments], processes=processes)
    deadline = time.monotonic() + 300
    while process.poll() is None and len(read_log(folder / "log.jsonl")) < target:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.Random(time.time_ns()).random() * 0.3)
    if process.poll() is None:
        process.kill()
    process.wait(timeout=60)


def learnt(folder: Path) -> dict[str, object]:
    """Weights, averages and optimizer states of a run's last checkpoint."""
    state = Checkpoints(folder / "checkpoints").load_newest()
    assert state["step"] == STEPS
    learners = state["learners"].items()
    return {name: (each["weights"], each["ema"], each["optimizer"]["state"]) for name, each in learners}


@pytest.mark.parametrize("part", ["base", "compressor", "forcing"])
def test_a_killed_run_ends_with_the_same_weights(part: str, warm: Warm, folder: Path, tmp_path: Path) -> None:
    arguments = command(part, folder)
    finish(warm, [*arguments, "--folder", f"{tmp_path / 'whole'}"])
    killed = [*arguments, "--folder", f"{tmp_path / 'killed'}"]
    kill_at_random(warm, killed, tmp_path / "killed")
    finish(warm, killed)
    wanted = learnt(tmp_path / "whole")
    torch.testing.assert_close(learnt(tmp_path / "killed"), wanted, rtol=0, atol=0)
    states = [entry for _, _, state in wanted.values() for entry in state.values()]
    assert states
    assert all(tensor.abs().max() > 0 for entry in states for tensor in list(entry.values())[:1])
    assert (tmp_path / "whole" / "curve.png").stat().st_size > 1000


def test_two_processes_killed_end_as_they_should(warm: Warm, folder: Path, tmp_path: Path) -> None:
    """As torchrun starts them, with FSDP: as two processes that were left alone and, but for rounding, as one."""
    arguments = command("forcing", folder)
    two = [*arguments, "--batch", "1", "--fsdp", "--folder"]
    finish(warm, [*two, f"{tmp_path / 'whole'}"], processes=2)
    kill_at_random(warm, [*two, f"{tmp_path / 'killed'}"], tmp_path / "killed", processes=2)
    finish(warm, [*two, f"{tmp_path / 'killed'}"], processes=2)
    wanted = learnt(tmp_path / "whole")
    torch.testing.assert_close(learnt(tmp_path / "killed"), wanted, rtol=0, atol=0)

    finish(warm, [*arguments, "--batch", "2", "--folder", f"{tmp_path / 'one'}"])
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "one")]
    for entry, other in zip(*logs, strict=True):
        for name in ("critic/loss", "critic/gradient", "generator/loss", "generator/gradient"):
            if name in entry:
                assert entry[name] == pytest.approx(other[name], rel=1e-3), (entry["step"], name)


def test_what_training_writes_can_be_used(warm: Warm, folder: Path, tmp_path: Path) -> None:
    """The files of base and compressor. The first command is started as a shell does it."""
    arguments = [
        *command("base", folder),
        "--folder",
        f"{tmp_path / 'b'}",
        "--output",
        f"{tmp_path / 'base.safetensors'}",
    ]
    run = [sys.executable, "-m", "packforcing", "train", *arguments]
    subprocess.run(run, env=ENVIRONMENT, check=True, stdout=DEVNULL, timeout=300)
    assert load_wan(tmp_path / "base.safetensors").shape.dim == 256
    part = command("compressor", folder)
    finish(warm, [*part, "--folder", f"{tmp_path / 'c'}", "--output", f"{tmp_path / 'compressor.safetensors'}"])
    _, metadata = load_compressor(tmp_path / "compressor.safetensors")
    assert (metadata.model_dim, metadata.temporal_stride, metadata.block_frames) == (256, 2, 4)
    measures = read_log(tmp_path / "c" / "log.jsonl")
    assert all(entry["loss"] > 0 for entry in measures)


def test_the_branch_learns_what_full_resolution_says(warm: Warm, folder: Path, tmp_path: Path) -> None:
    """A few steps on one rollout bring the velocities closer to those of the whole history."""
    arguments = [*command("compressor", folder), "--evaluate-every", "20", "--folder", f"{tmp_path}"]
    arguments[arguments.index("--steps") + 1] = "20"
    arguments[arguments.index("--rate") + 1] = "3e-3"
    finish(warm, arguments)
    losses = [entry["loss"] for entry in read_log(tmp_path / "log.jsonl")]
    last = read_log(tmp_path / "log.jsonl")[-1]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {"held_out", "held_out_lr", "held_out_none"} <= last.keys()
    assert last["held_out_lr"] != last["held_out_none"]


def test_a_branch_that_begins_at_zero_is_the_training_free_form(folder: Path) -> None:
    parsed = parse("compressor", command("compressor", folder))
    loaded = models.load_training_models(parsed, torch.device("cpu"))
    shape = rollouts.RolloutShape(4, loaded.layout.size, loaded.layout.config, loaded.sampling)
    made = rollouts.make(loaded.wan, loaded.vae, encode_prompt("a red circle")[0], shape, seed=0)
    assert made["latents"].shape == (16, 16, 8, 8)
    assert made["reduced"].shape[:2] == (4, 16)

    class One:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, number: int) -> rollouts.Rollout:
            stored = {name: tensor.float() for name, tensor in made.items()}
            return rollouts.Rollout(stored["latents"], stored["reduced"], stored["context"])

    hr = compressor.HRBranch((16, 4, 4, 4, 4, 256), 2)
    trainer = compressor.CompressorTrainer(
        loaded.wan, hr, One(), loaded.layout, compressor.CompressorOptions(held_out=1)
    )
    measures = trainer.evaluate(0)
    assert measures["held_out"] == measures["held_out_lr"] > 0


def parse(part: str, arguments: list[str]):
    from packforcing.cli.main import parser

    return parser().parse_args(["train", *arguments, "--folder", "unused"])


def test_a_larger_set_of_clips_begins_with_the_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "SHARD", 2)
    vae = load_vae(demo_vae(), fast_dtype("cpu"))
    shape = clips.ClipSet(4, latent_frames=4, size=64)
    assert clips.prepare(tmp_path, shape, vae, part=1, parts=2) == 1
    with pytest.raises(PackForcingError, match="not all encoded"):
        clips.LatentClips(tmp_path, shape)
    assert clips.prepare(tmp_path, shape, vae) == 1
    whole = clips.LatentClips(tmp_path, shape)
    few = clips.LatentClips(tmp_path, clips.ClipSet(1, latent_frames=4, size=64))
    assert (len(whole), len(few)) == (4, 1)
    torch.testing.assert_close(few[0][0], whole[0][0], rtol=0, atol=0)
    latents, compressed, words = whole[3]
    assert (latents.shape, compressed.shape) == ((16, 4, 8, 8), (1, 16, 2, 2, 2))
    assert clips.clip_pixels(3, shape)[1] == words


def test_a_set_that_grows_makes_its_last_file_anew(tmp_path: Path) -> None:
    vae = load_vae(demo_vae(), fast_dtype("cpu"))
    small, large = (clips.ClipSet(count, latent_frames=4, size=64) for count in (2, 3))
    assert clips.prepare(tmp_path, small, vae) == 1
    first = clips.LatentClips(tmp_path, small)
    assert len(first.latents) == 2
    with pytest.raises(PackForcingError, match="of a smaller set"):
        clips.LatentClips(tmp_path, large)
    assert clips.prepare(tmp_path, large, vae) == 1
    assert torch.equal(clips.LatentClips(tmp_path, large).latents[:2], first.latents)
    assert clips.prepare(tmp_path, small, vae) == 0


class SameClips:
    """Forty clips of one caption, in place of `LatentClips`."""

    clips = clips.ClipSet(40, latent_frames=4, size=64)
    latents = torch.randn(40, 16, 4, 8, 8)

    def __init__(self, caption: str = "a red circle swings on a blue background") -> None:
        self.caption = caption

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, clips.ClipCaptions]:
        words = clips.ClipCaptions(*(2 * [self.clips.blocks * (self.caption,)]))
        return self.latents[number], self.latents[number, :, None, ::2, ::4, ::4], words


def tiny_tree() -> WanModules:
    sizes = SIZES["tiny"]
    return build_wan_modules(sizes, base_command.initial_state_dict(sizes, seed=0))


def captions(trainer: base.BaseTrainer, number: int | None) -> list[str]:
    """Of 100 samples: drawn ones, or those that measure on the clip of this number."""
    samples = trainer.samples
    drawn = [samples.drawn(seed) if number is None else samples.measured(number) for seed in range(100)]
    return [sample.captions[0] for sample in drawn]


def test_clips_with_things_away_are_the_share_that_is_asked_for_and_never_measure() -> None:
    away, modules = SameClips("a red circle swings and blinks on a blue background"), tiny_tree()

    def blinking(share: float, number: int | None) -> int:
        data = base.TrainingClips(SameClips(), away)
        trainer = base.BaseTrainer(modules, data, base.BaseOptions(away_share=share))
        return sum("blinks" in caption for caption in captions(trainer, number))

    assert (blinking(0.0, None), blinking(1.0, None), blinking(1.0, 39)) == (0, 100, 0)
    assert 15 < blinking(0.3, None) < 45


def test_what_a_model_gains_from_what_lies_before_the_block_before_is_measured() -> None:
    """The same clips, noise and level twice, with open captions; the block before alone loses what the rest tells."""
    away = SameClips("a red circle swings and blinks on a blue background")
    away.clips = replace(away.clips, latent_frames=20)
    away.latents = torch.randn(40, 16, 20, 8, 8)
    modules = tiny_tree()
    modules.head.head.weight.data.normal_(std=0.1)  # or it would predict zero under any history
    trainer = base.BaseTrainer(modules, base.TrainingClips(away, away, held_out=3), base.BaseOptions())
    sample = trainer.samples.measured_away(away, 39)
    assert torch.equal(sample.latents, away.latents[39])
    assert not re.search("red|blue", sample.captions[0])
    assert (sample.sigma == 0.85).all()
    assert (sample.history_sigma == 0).all()

    seen = []
    whole = trainer._held_out_errors

    def spied(samples: list, given: History) -> torch.Tensor:
        partition, mids = given.config().partition(4), given.config().attended_mids(4)
        seen.append((len(samples), [*partition.sink, *partition.recent], mids))
        return whole(samples, given)

    trainer._held_out_errors = spied
    found = trainer.evaluate(0)
    assert found.keys() == {"held_out", "away", "away_block_before"}
    assert seen == [(3, [0, 1, 2, 3], 0), (3, [0, 1, 2, 3], 0), (3, [3], 0)]
    assert found["away"] != found["away_block_before"]


@pytest.mark.parametrize(
    "options", [["--held-out", "8"], ["--held-out", "0"], ["--away-clips", "4", "--held-out", "4"]]
)
def test_some_clips_train_and_some_measure(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "base", "--clips", "8", *options, "--folder", f"{tmp_path}"]) == 1
    assert "Some clips train and at least one measures, but --" in capsys.readouterr().err


def test_open_captions_are_for_training_alone() -> None:
    """The share asked for says less than the clip's caption; clips that only measure say all."""
    modules = tiny_tree()

    def said(share: float, number: int | None) -> list[str]:
        trainer = base.BaseTrainer(modules, base.TrainingClips(SameClips()), base.BaseOptions(open_captions=share))
        return captions(trainer, number)

    assert len(set(said(0, None))) == len(set(said(1, 39))) == 1
    open_captions = said(1, None)
    assert {len(re.findall("red|blue", caption)) for caption in open_captions} == {0, 1}
    assert 30 < sum(caption in set(open_captions) for caption in said(0.5, None)) < 70


def test_noise_levels_are_spread_evenly_before_the_shift() -> None:
    import numpy as np

    levels = blocks.noise_levels(np.random.default_rng(0), 1000, shift=3.0)
    even = np.sort(levels / (3 - 2 * levels))  # the shift undone
    assert np.abs(even - (np.arange(1000) + 0.5) / 1000).max() < 0.5 / 1000 + 1e-9


def test_a_joint_optimizer_resumes_where_it_was() -> None:
    """Matrices under one optimizer and vectors under another, saved half-way and loaded into a new pair."""

    def fresh() -> tuple[torch.nn.Linear, JointOptimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        parts = (torch.optim.Muon([layer.weight], lr=0.1), torch.optim.AdamW([layer.bias], lr=0.1))
        return layer, JointOptimizer(*parts)

    def steps(layer: torch.nn.Linear, optimizer: JointOptimizer, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    layer, optimizer = fresh()
    steps(layer, optimizer, range(3))
    saved = (layer.state_dict(), optimizer.state_dict())
    saved = torch.load(save_to_memory(saved), weights_only=True)
    steps(layer, optimizer, range(3, 6))
    other, resumed = fresh()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    steps(other, resumed, range(3, 6))
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_wide_inputs_learn_at_a_smaller_rate() -> None:
    """A step of AdamW moves an output by rate x inputs: by as much for 4,096 dense inputs as for 256."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({"block": torch.nn.Linear(8, 8)})
    for name, inputs in (("narrow", 64), ("full", 256), ("wide", 4096)):
        layers[name] = torch.nn.Linear(inputs, 1)
    optimizer = muon_and_adamw(layers, layers["block"].parameters(), rate=1e-3, weight_decay=0.0)
    signs = {name: torch.randn(layers[name].in_features).sign() for name in ("narrow", "full", "wide")}
    before = {name: layers[name](x).item() for name, x in signs.items()}
    sum(layers[name](x).sum() for name, x in signs.items()).backward()
    optimizer.step()
    moved = {name: before[name] - layers[name](x).item() for name, x in signs.items()}
    assert moved == pytest.approx({"narrow": 0.065, "full": 0.257, "wide": 0.257}, rel=0.01)  # the bias moves too


def save_to_memory(value: object):
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("precision", sorted({"float32", str(fast_dtype("cpu")).removeprefix("torch.")}))
def test_a_dry_run_says_what_a_turn_takes(precision: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*command("forcing", folder), "--precision", precision]
    assert main(["train", *arguments, "--folder", f"{folder / 'dry'}", "--dry-run"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["seconds"].keys() == {"critic", "generator"}
    assert cost["peak_memory_bytes"] > 10**8
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compressor", "--model", "random:huge"], "There is no model size 'huge'"),
        (["compressor", "--model", "some.safetensors"], "give --vae FILE and --prompts FILE"),
        (["compressor", "--blocks", "3", "--model", "random:tiny", "--rollouts", "1"], "no compressed block to learn"),
        (["compressor", "--prepare", "2/2", "--model", "random:tiny"], "A part is I/N"),
        (["forcing", "--model", "demo"], "DMD needs a bidirectional teacher"),
        (["forcing", "--model", "random:tiny", "--fsdp"], "start it with torchrun"),
        (["forcing", "--model", "random:tiny", "--channels", "1,x"], "A list of whole numbers"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--width", "64", "--height", "64", "--held-out", "1"] if arguments[0] == "compressor" else []
    assert main(["train", *arguments, *small, "--folder", f"{tmp_path}"]) == 1
    assert said in capsys.readouterr().err


def test_shared_options() -> None:
    assert options.part_of("1/3") == (1, 3)
    assert options.part_of(None) == (0, 1)
    assert options.numbers("32,64") == (32, 64)
    assert options.numbers(None) == ()
