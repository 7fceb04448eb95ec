"""The loop of all trainers: resumes bit for bit, accumulates to the same update, and ends when told."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from packforcing.errors import PackForcingError
from packforcing.training.checkpoints import Checkpoints
from packforcing.training.learner import Learner
from packforcing.training.log import read_log
from packforcing.training.loop import train
from packforcing.training.run_config import MicroBatch, RunConfig

REPO = Path(__file__).resolve().parents[2]
STEPS = 12


class Toy:
    """Two learners with turns of their own, as DMD has; dropout draws from the global generator."""

    device = torch.device("cpu")

    def __init__(self, pause: float = 0.0, rate: float = 0.05, shard: bool = False, dropout: float = 0.1) -> None:
        torch.manual_seed(7)
        generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
        critic = nn.Linear(4, 4)
        if shard:
            from torch.distributed.fsdp import fully_shard

            fully_shard(generator)
        groups = [{"params": generator[0].parameters()}, {"params": generator[3].parameters(), "lr": rate / 2}]
        self.learners = {
            "generator": Learner(generator, torch.optim.AdamW(groups, lr=rate), ema=0.9),
            "critic": Learner(critic, torch.optim.SGD(critic.parameters(), lr=rate, momentum=0.9)),
        }
        self.pause = pause
        self.seen: list[int] = []

    def describe(self) -> dict[str, object]:
        return {"toy": (1, 2)}

    def turns(self, step: int) -> tuple[str, ...]:
        return ("critic", "generator") if step % 3 == 0 else ("critic",)

    def batch(self, micro: MicroBatch) -> Tensor:
        time.sleep(self.pause)
        self.seen += micro.seeds()
        return torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in micro.seeds()])

    def losses(self, turn: str, batch: Tensor) -> dict[str, Tensor]:
        made = self.learners[turn].module(batch)
        return {"loss": (made - 0.5 * batch.flip(1)).square().mean()}

    def evaluate(self, step: int) -> dict[str, float]:
        with self.learners["generator"].averaged() as module:
            return {"size": sum(p.abs().sum().item() for p in module.parameters())}


def config(folder: Path, **options: object) -> RunConfig:
    return RunConfig(folder, **{"steps": STEPS, "micro_batch": 2, "warmup": 2, "save_every": 2, **options})


def final(folder: Path) -> dict[str, object]:
    """What the last checkpoint holds of the learners."""
    return Checkpoints(folder / "checkpoints").load_newest()["learners"]


def assert_same(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    outcome = train(Toy(), config(folder))
    assert outcome.finished
    assert outcome.step == STEPS
    return folder


def toy_process(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """This file as a program: trains the toy in the folder."""
    environment = {**os.environ, "PYTHONPATH": f"{REPO}"}
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), *arguments], env=environment, start_new_session=True
    )


def test_killed_at_random_steps_it_ends_with_the_same_weights(tmp_path: Path, uninterrupted: Path) -> None:
    dice = random.Random(time.time_ns())
    for _ in range(2):
        process = toy_process(tmp_path, "0.03")
        newest = len(read_log(tmp_path / "log.jsonl"))
        target = newest + dice.randint(1, 5)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(read_log(tmp_path / "log.jsonl")) < target:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(dice.random() * 0.06)  # anywhere in a step, or in the writing of a checkpoint
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    train(Toy(), config(tmp_path, log_every=1))
    assert_same(final(tmp_path), final(uninterrupted))
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == list(range(1, STEPS + 1))


def test_two_processes_resume_and_equal_one_process(tmp_path: Path) -> None:
    """FSDP for one learner, averaged gradients for the other; stopped half-way, and gone on with."""
    processes = [toy_process(tmp_path / "two", "0", str(rank)) for rank in range(2)]
    # Not the dropout: its mask is drawn for a micro-batch, and these are not the same ones.
    train(Toy(dropout=0), config(tmp_path / "one", micro_batch=4))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    torch.testing.assert_close(final(tmp_path / "two"), final(tmp_path / "one"), rtol=1e-4, atol=1e-5)


def test_accumulated_micro_batches_equal_a_larger_batch(tmp_path: Path) -> None:
    large, small = Toy(dropout=0), Toy(dropout=0)
    train(large, config(tmp_path / "large", micro_batch=6))
    train(small, config(tmp_path / "small", micro_batch=2, accumulate=3))
    assert large.seen == small.seen
    torch.testing.assert_close(final(tmp_path / "small"), final(tmp_path / "large"), rtol=1e-4, atol=1e-6)


def test_the_loss_falls_and_is_logged_and_drawn(tmp_path: Path) -> None:
    train(Toy(), config(tmp_path, steps=200, save_every=100, log_every=1, evaluate_every=100))
    log = read_log(tmp_path / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 201))
    losses = [entry["critic/loss"] for entry in log]
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    assert [entry["step"] for entry in log if "size" in entry] == [100, 200]
    assert ("generator/loss" in log[0], "generator/loss" in log[1]) == (True, False)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_two_samples_share_a_seed(tmp_path: Path) -> None:
    toy = Toy()
    train(toy, config(tmp_path, accumulate=2))
    assert len(set(toy.seen)) == len(toy.seen) == (STEPS + STEPS // 3) * 4


def test_the_time_limit_ends_with_a_checkpoint(tmp_path: Path, uninterrupted: Path) -> None:
    outcome = train(Toy(pause=0.05), config(tmp_path, max_minutes=0.003))
    assert not outcome.finished
    assert Checkpoints(tmp_path / "checkpoints").load_newest()["step"] == outcome.step
    train(Toy(), config(tmp_path))
    assert_same(final(tmp_path), final(uninterrupted))


def terminate_at(stop: int) -> Callable[[int], dict[str, float]]:
    """An evaluation that sends this process a signal."""

    def evaluate(step: int) -> dict[str, float]:
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    return evaluate


def test_a_signal_ends_with_a_checkpoint(tmp_path: Path) -> None:
    toy = Toy()
    toy.evaluate = terminate_at(5)
    outcome = train(toy, config(tmp_path, evaluate_every=5, save_every=100))
    assert outcome.step == 6  # the signal is seen at the end of the step after
    assert final(tmp_path)


def test_only_the_newest_checkpoints_are_kept_and_no_part_is_taken_for_one(tmp_path: Path) -> None:
    train(Toy(), config(tmp_path, keep=3))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    assert [path.name for path in checkpoints.paths()] == [f"step-{step:08d}.pt" for step in (8, 10, 12)]
    (checkpoints.folder / "writing.part").write_bytes(b"half")
    assert checkpoints.load_newest()["step"] == STEPS


def test_the_learning_rate_warms_up_and_decays() -> None:
    run = RunConfig("unused", steps=110, warmup=10, final_rate=0.1)
    assert [run.rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert run.rate(60) == pytest.approx(0.55)
    assert run.rate(110) == pytest.approx(0.1)
    assert RunConfig("unused", steps=110, decay="constant").rate(109) == 1


def test_each_group_keeps_its_own_rate(tmp_path: Path) -> None:
    toy = Toy()
    train(toy, config(tmp_path, steps=1, warmup=2))
    assert [group["lr"] for group in toy.learners["generator"].optimizer.param_groups] == [0.025, 0.0125]


def test_clipping_bounds_what_an_update_does() -> None:
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    learner = Learner(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    layer(torch.tensor([[30.0, 40.0]])).sum().backward()
    assert learner.update(rate=1.0, clip=1.0) == pytest.approx(50)
    assert (layer.weight - before).norm().item() == pytest.approx(1, abs=1e-4)


def test_the_average_is_used_for_evaluation_only() -> None:
    layer = nn.Linear(1, 1, bias=False)
    learner = Learner(layer, torch.optim.SGD(layer.parameters(), lr=1.0), ema=0.5)
    first = layer.weight.item()
    layer.weight.grad = torch.ones(1, 1)
    learner.update(rate=1.0, clip=0)
    assert layer.weight.item() == pytest.approx(first - 1)
    with learner.averaged():
        assert layer.weight.item() == pytest.approx(first - 10 / 11)  # the first updates weigh more than 0.5 says
    assert layer.weight.item() == pytest.approx(first - 1)


def test_bfloat16_runs_the_model_under_autocast(tmp_path: Path) -> None:
    toy = Toy()
    kinds = set()
    toy.learners["critic"].module.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    train(toy, config(tmp_path, precision="bfloat16", steps=2))
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in toy.learners["critic"].parameters} == {torch.float32}


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    train(Toy(), config(tmp_path, steps=2))
    with pytest.raises(PackForcingError, match="another seed: 0, and now 1"):
        train(Toy(), config(tmp_path, steps=2, seed=1))
    with pytest.raises(PackForcingError, match="another samples: 2, and now 6"):
        train(Toy(), config(tmp_path, steps=2, micro_batch=3, accumulate=2))


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path / "checkpoints").save(3, {"format": 1})
    path.write_bytes(b"nothing")
    with pytest.raises(PackForcingError, match="cannot be read as a checkpoint"):
        train(Toy(), config(tmp_path))


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path) -> None:
    toy = Toy()
    toy.losses = lambda turn, batch: {"loss": toy.learners[turn].module(batch).sum() * float("nan")}
    with pytest.raises(PackForcingError, match=r"broke at step 0: the gradient of 'critic' is not finite \(loss nan\)"):
        train(toy, config(tmp_path))


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("decay", "steep"), ("precision", "float8"), ("keep", 0)])
def test_a_wrong_option_is_named(option: str, value: object) -> None:
    with pytest.raises(PackForcingError, match=option):
        RunConfig("unused", **{"steps": 1, option: value})


def main(folder: str, pause: str, rank: str = "") -> None:
    if not rank:
        train(Toy(float(pause)), config(Path(folder), log_every=1))
        return
    Path(folder).mkdir(exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=2)
    # As a cluster may do it: a signal to one process only, and all must leave together.
    toy = Toy(shard=True, dropout=0)
    toy.evaluate = terminate_at(5 if rank == "1" else -1)
    outcome = train(toy, config(Path(folder), evaluate_every=5))
    assert outcome.step == 6
    train(Toy(shard=True, dropout=0), config(Path(folder)))
    dist.barrier()  # so that none of them ends while the other still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
