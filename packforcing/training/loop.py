"""What every trainer shares: the loop over the steps of a run.

A trainer says what is trained (`learners`), what a batch is (`batch`) and what its losses are (`losses`). `train` does
the rest. Two rules make a resumed run equal an uninterrupted one, bit for bit, without saving the state of a data
loader:

- All random numbers of sample i in step s come from one seed, made of (run seed, turn, s, i). So it does not matter how
  the samples of a step are dealt to micro-batches and to processes, and the number of GPUs changes nothing.
- A checkpoint is a file that is either whole or absent, and it holds all that the next step reads.

A *step* is what the loop counts. A step has one or several *turns*. A turn is one update of one learner, over all
samples of that turn. Most trainers have one learner and one turn a step. DMD has two learners: the critic has a turn in
each step, the generator in every fifth.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import check_between, check_count, shown
from ..errors import PackForcingError
from ..processes import any_process, is_main, process_count, rank, wait_for_all
from ..telling import tell
from .checkpoints import FORMAT, Checkpoints
from .learner import Learner
from .log import Log
from .processes import mean_over_processes
from .run_config import FREE_OPTIONS, PRECISIONS, MicroBatch, RunConfig


class Trainer(Protocol):
    """What each trainer brings to `train`."""

    device: torch.device

    @property
    def learners(self) -> Mapping[str, Learner[Any]]:
        """What is trained, by name."""
        ...

    def turns(self, step: int) -> Sequence[str]:
        """Names of the learners to update in this step, in order; a name may come again."""
        ...

    def batch(self, micro: MicroBatch) -> Any:
        """The micro-batch's data and noise, on the device: a pure function of `micro.seeds()`."""
        ...

    def losses(self, turn: str, batch: Any) -> Mapping[str, Tensor]:
        """Means over the micro-batch. `loss` is what the turn's learner descends; the others are logged."""
        ...

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Measures for the log, at `evaluate_every` and at the end. Under FSDP, all processes come here."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Options that must be the same for a checkpoint to be continued: plain numbers, strings, lists."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int  # steps done in all
    finished: bool  # False: stopped by the time limit or a signal, and can be resumed
    minutes: float  # wall clock of all calls


def train(trainer: Trainer, config: RunConfig) -> Outcome:
    """Train up to `config.steps`, from the newest checkpoint in the folder if there is one.

    Writes `checkpoints/`, `log.jsonl` and `curve.png` into the folder. Ends early, with a checkpoint, at
    `max_minutes` and at the first SIGINT or SIGTERM; a second one interrupts at once. Raises `PackForcingError`
    if the folder holds a run with other options, or if a loss is not finite.
    """
    folder = Path(config.folder)
    checkpoints = Checkpoints(folder / "checkpoints", config.keep)
    identity = {**{k: v for k, v in asdict(config).items() if k not in FREE_OPTIONS}, **trainer.describe()}
    identity["samples"] = config.micro_batch * config.accumulate * process_count()
    first, minutes_before = _resume(trainer, checkpoints, identity)
    log = Log(folder, first, config.steps) if is_main() else None
    start = time.monotonic()

    def minutes() -> float:
        return minutes_before + (time.monotonic() - start) / 60

    def save(step: int, last: bool) -> None:
        state = {name: learner.state() for name, learner in trainer.learners.items()}
        if is_main():
            checkpoints.save(
                step, {"format": FORMAT, "identity": identity, "minutes": minutes(), "learners": state, "step": step}
            )
        if log:
            log.draw(at_once=last)
        wait_for_all()  # whichever process reads the newest checkpoint next must find this one

    step, saved = first, first
    with _stop_signal() as stopped:
        while step < config.steps:
            record = _one_step(trainer, config, step)
            step += 1
            over_time = 0 < config.max_minutes <= (time.monotonic() - start) / 60
            last = any_process(over_time or stopped.is_set(), trainer.device) or step == config.steps
            if config.evaluate_every and (step % config.evaluate_every == 0 or last):
                record.update(trainer.evaluate(step))
            if log:
                log.add(step, record, minutes(), write=step % config.log_every == 0 or last)
            if last or step % config.save_every == 0:
                save(step, last)
                saved = step
            if last:
                break
    assert saved == step
    return Outcome(step, step >= config.steps, minutes())


def _resume(trainer: Trainer, checkpoints: Checkpoints, identity: Mapping[str, Any]) -> tuple[int, float]:
    """Brings the trainer to the newest checkpoint; returns its step and the minutes spent so far."""
    state = checkpoints.load_newest()
    if state is None:
        return 0, 0.0
    try:
        return _taken_up(trainer, checkpoints, state, identity)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        if isinstance(error, PackForcingError):
            raise
        raise PackForcingError(
            f"{checkpoints.paths()[-1]} is damaged or of another trainer ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0][:80]}); delete it to go on from the one before."
        ) from error


def _taken_up(
    trainer: Trainer, checkpoints: Checkpoints, state: Mapping[str, Any], identity: Mapping[str, Any]
) -> tuple[int, float]:
    """`_resume` from a checkpoint's content. Raises nearly anything for one that is damaged."""
    # Through JSON, so that a tuple and a list are the same option.
    then, now = (json.loads(json.dumps(options)) for options in (state["identity"], identity))
    odd = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if odd:
        raise PackForcingError(
            f"The folder {checkpoints.folder.parent} holds a run with another {odd[0][:60]}: "
            f"{shown(then.get(odd[0]), 300)}, and now {shown(now.get(odd[0]), 300)}; give the options it was started "
            "with, or another folder."
        )
    for name, learner in trainer.learners.items():
        learner.load(state["learners"][name])
    check_count("The checkpoint's step", state["step"])
    check_between("The checkpoint's minutes", state["minutes"], 0)
    return state["step"], state["minutes"]


def _one_step(trainer: Trainer, config: RunConfig, step: int) -> dict[str, float]:
    """Takes the turns of one step; returns what to log of them."""
    record: dict[str, float] = {}
    for turn in trainer.turns(step):
        prefix = f"{turn}/" if len(trainer.learners) > 1 else ""
        record.update({prefix + name: value for name, value in _one_turn(trainer, config, step, turn).items()})
    return record


def _one_turn(trainer: Trainer, config: RunConfig, step: int, turn: str) -> dict[str, float]:
    """One update of one learner; returns the turn's mean losses, the gradient's norm and the learning rate."""
    learner = trainer.learners[turn]
    sums: dict[str, Tensor] = {}
    for number in range(config.accumulate):
        first = (number * process_count() + rank()) * config.micro_batch
        micro = MicroBatch(step, turn, range(first, first + config.micro_batch), config.seed)
        batch = trainer.batch(micro)
        # For layers that draw from the global generator. With a seed of its own, its state need not be saved.
        torch.manual_seed(micro.seeds()[0])
        dtype = PRECISIONS[config.precision]
        with torch.autocast(trainer.device.type, dtype, enabled=dtype is not None):
            losses = trainer.losses(turn, batch)
        (losses["loss"] / config.accumulate).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulate
    try:
        norm = learner.update(config.rate(step), config.clip)
    except FloatingPointError:
        parts = ", ".join(f"{name} {value.item():.4g}" for name, value in sums.items())
        raise PackForcingError(
            f"Training broke at step {step}: the gradient of {turn!r} is not finite ({parts}); resume from the "
            f"last checkpoint with a lower learning rate or in float32."
        ) from None
    means = mean_over_processes(torch.stack(list(sums.values()))).tolist()
    rate = learner.optimizer.param_groups[0]["lr"]
    return {**dict(zip(sums, means, strict=True)), "gradient": norm, "lr": rate}


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second does what it always does."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        tell("\nstopping after this step; once more to stop at once")
        stopped.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
