"""What every trainer shares: the step loop, its checkpoints, its log.

A trainer says what is trained (`learners`), what a batch is (`batch`) and what its losses are (`losses`); `train` does
the rest. Two rules make a resumed run equal an uninterrupted one, bit for bit, with nothing of a data loader to save:

- Every number drawn for sample i of step s comes from the seed (run seed, turn, s, i). How the samples of a step are
  dealt to processes and micro-batches does not change them, so neither does the number of GPUs.
- A checkpoint is a file that is either whole or absent, and holds all that the next step reads.

Terms: a *step* is what the loop counts. In a step one or several *turns* are taken; a turn is one update of one
learner, over all samples of that turn. Most trainers have one learner and one turn a step; DMD takes a critic's turn
in each step and a generator's in every fifth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import plots
from ..errors import PackForcingError
from .optimizers import JointOptimizer

DECAYS = ("cosine", "constant")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
FORMAT = 1  # of the checkpoints


# --- what a run is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """How long and how a run trains, and where it writes. `samples` = processes x `micro_batch` x `accumulate`."""

    folder: str | Path
    steps: int
    micro_batch: int = 1  # samples that go through the model at once, in each process
    accumulate: int = 1  # micro-batches whose gradients make one update
    seed: int = 0
    warmup: int = 0  # steps over which the learning rate rises from 0
    decay: str = "cosine"
    final_rate: float = 0.0  # where the cosine ends, as a part of the learning rate
    clip: float = 1.0  # largest norm of a learner's gradient; 0 is off
    precision: str = "float32"
    save_every: int = 100  # steps
    keep: int = 2  # checkpoints
    log_every: int = 10  # steps
    evaluate_every: int = 0  # steps; 0 is never
    max_minutes: float = 0.0  # wall clock of this process; 0 is no limit

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "accumulate", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise PackForcingError(f"{name} counts from 1, but is {getattr(self, name)}; give 1 or more.")
        if self.decay not in DECAYS:
            raise PackForcingError(f"decay is {self.decay!r}; choose one of {', '.join(DECAYS)}.")
        if self.precision not in PRECISIONS:
            raise PackForcingError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}.")

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0), as a part of the full one."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2


# What may change between a run and its continuation: it does not change what a step computes.
_FREE = {"folder", "save_every", "keep", "log_every", "evaluate_every", "max_minutes", "micro_batch", "accumulate"}


@dataclass(frozen=True)
class Micro:
    """One micro-batch's place in the run: which samples it holds."""

    step: int
    turn: str
    samples: range  # numbers within the turn: 0 to `micro_batch * accumulate * processes`
    seed: int  # the run's

    def seeds(self) -> list[int]:
        """One seed a sample; no two samples of a run share one."""
        return [_mix(self.seed, self.turn, self.step, sample) for sample in self.samples]

    def step_seed(self) -> int:
        """A seed that all samples of the turn share: for what a batch has in common, such as its shape."""
        return _mix(self.seed, self.turn, self.step, "step")

    def __len__(self) -> int:
        return len(self.samples)


def _mix(*parts: object) -> int:
    """A seed from names and numbers: the same on every machine, and unlike its neighbours'."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: what torch and numpy take


class Learner:
    """A module, the optimizer that moves it, and the moving average of its weights.

    `ema`: how much of the average stays at each update, e.g. 0.999; 0 keeps no average. The first updates weigh more
    than that, so that the random start is soon forgotten. Parameter groups are the optimizer's own; a group's `lr` at
    this point is its full learning rate.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer | JointOptimizer, ema: float = 0.0) -> None:
        self.module = module
        self.optimizer = optimizer
        self.ema = ema
        self.updates = 0
        self._average = {name: p.detach().clone() for name, p in self._trained()} if ema else {}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def update(self, rate: float, clip: float) -> float:
        """One optimizer step with the gradients that are there, which are then dropped; returns their norm."""
        _average_over_processes(self.parameters)
        # The norm is wanted even where nothing is clipped: it tells a run that has blown up.
        norm = clip_gradients(self.parameters, clip or math.inf)
        if not math.isfinite(norm):
            raise FloatingPointError
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self._average:
            stays = min(self.ema, self.updates / (self.updates + 10))
            with torch.no_grad():
                for name, p in self._trained():
                    self._average[name].lerp_(p.detach(), 1 - stays)
        return norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The module with its average weights, for evaluation; without an average, as it is."""
        own = {name: p.detach().clone() for name, p in self._trained()} if self._average else {}
        try:
            self._fill(self._average)
            yield self.module
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._trained():
            if name in values:
                p.copy_(values[name])

    def state(self) -> dict[str, Any]:
        """All that the next update reads, in whole tensors on the CPU. Under FSDP, all processes must call it."""
        return {
            "weights": _gathered(self.module.state_dict()),
            "ema": _gathered(self._average),
            "optimizer": _gathered(self.optimizer.state_dict()),
            "updates": self.updates,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state` gave, whatever the number of processes it was gathered from."""
        like = self.module.state_dict()
        self.module.load_state_dict({name: _laid_out(value, like[name]) for name, value in state["weights"].items()})
        for name, average in self._average.items():
            average.copy_(_laid_out(state["ema"][name], average))
        optimizer = state["optimizer"]
        for number, parameter in enumerate(self.parameters):
            entry = optimizer["state"].get(number, {})
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entry[name] = _laid_out(value, parameter)
        self.optimizer.load_state_dict(optimizer)
        self.updates = state["updates"]


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scales gradients down to a norm of `largest` at most; returns the norm they had. FSDP's shards and whole tensors
    may be mixed, which PyTorch's own function does not take."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    groups = [[g for g in gradients if _is_shard(g) == sharded] for sharded in (True, False)]
    norms = [whole(nn.utils.get_total_norm(group)) for group in groups if group]
    norm = torch.stack(norms).norm().item() if norms else 0.0
    if norm > largest:
        for gradient in gradients:
            gradient.mul_(largest / norm)
    return norm


class Trainer(Protocol):
    """What each trainer brings to `train`."""

    learners: Mapping[str, Learner]
    device: torch.device

    def rotary(self, step: int) -> Sequence[str]:
        """Names of the learners to update in this step, in order; a name may come again."""
        ...

    def batch(self, micro: Micro) -> Any:
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


# --- the loop -------------------------------------------------------------------------------------


def train(trainer: Trainer, config: RunConfig) -> Outcome:
    """Train up to `config.steps`, from the newest checkpoint in the folder if there is one.

    Writes `checkpoints/`, `log.jsonl` and `curve.png` into the folder. Ends early, with a checkpoint, at
    `max_minutes` and at the first SIGINT or SIGTERM; a second one interrupts at once. Raises `PackForcingError`
    if the folder holds a run with other options, or if a loss is not finite.
    """
    folder = Path(config.folder)
    checkpoints = Checkpoints(folder / "checkpoints", config.keep)
    identity = {**{k: v for k, v in asdict(config).items() if k not in _FREE}, **trainer.describe()}
    identity["samples"] = config.micro_batch * config.accumulate * _processes()
    first, minutes_before = _resume(trainer, checkpoints, identity)
    log = Log(folder, first, config.steps) if _is_main() else None
    start = time.monotonic()

    def minutes() -> float:
        return minutes_before + (time.monotonic() - start) / 60

    def save(step: int) -> None:
        state = {name: learner.state() for name, learner in trainer.learners.items()}
        if _is_main():
            checkpoints.save(
                step, {"format": FORMAT, "identity": identity, "minutes": minutes(), "learners": state, "step": step}
            )
        if log:
            log.draw(at_once=step == config.steps)
        if _distributed():
            dist.barrier()  # whichever process reads the newest checkpoint next must find this one

    step, saved = first, first
    with _stop_signal() as stopped:
        while step < config.steps:
            record = _one_step(trainer, config, step)
            step += 1
            over_time = 0 < config.max_minutes <= (time.monotonic() - start) / 60
            last = _any_process(over_time or stopped.is_set(), trainer.device) or step == config.steps
            if config.evaluate_every and (step % config.evaluate_every == 0 or last):
                record.update(trainer.evaluate(step))
            if log:
                log.add(step, record, minutes(), write=step % config.log_every == 0 or last)
            if last or step % config.save_every == 0:
                save(step)
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
    # Through JSON, as the log would show them: a tuple and a list are the same option.
    then, now = (json.loads(json.dumps(options)) for options in (state["identity"], identity))
    odd = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if odd:
        raise PackForcingError(
            f"The folder {checkpoints.folder.parent} holds a run with another {odd[0]}: {then.get(odd[0])!r}, and now "
            f"{now.get(odd[0])!r}; give the options it was started with, or another folder."
        )
    for name, learner in trainer.learners.items():
        learner.load(state["learners"][name])
    return state["step"], state["minutes"]


def _one_step(trainer: Trainer, config: RunConfig, step: int) -> dict[str, float]:
    """The turns of one step; returns what to log of them."""
    record: dict[str, float] = {}
    for turn in trainer.rotary(step):
        learner = trainer.learners[turn]
        sums: dict[str, Tensor] = {}
        for number in range(config.accumulate):
            first = (number * _processes() + _rank()) * config.micro_batch
            micro = Micro(step, turn, range(first, first + config.micro_batch), config.seed)
            batch = trainer.batch(micro)
            # For layers that draw from the global generator. Re-seeding stands for saving its state.
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
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in sums.items())
            raise PackForcingError(
                f"Training broke at step {step}: the gradient of {turn!r} is not finite ({values}); resume from the "
                f"last checkpoint with a lower learning rate or in float32."
            ) from None
        prefix = f"{turn}/" if len(trainer.learners) > 1 else ""
        values = _mean_over_processes(torch.stack(list(sums.values()))).tolist()
        record.update({prefix + name: value for name, value in zip(sums, values, strict=True)})
        record[prefix + "gradient"] = norm
        record[prefix + "lr"] = learner.optimizer.param_groups[0]["lr"]
    return record


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second does what it always does."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)
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


# --- checkpoints ----------------------------------------------------------------------------------


class Checkpoints:
    """A folder of `step-00000100.pt`, the newest `keep` of them."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        part = self.folder / "writing.part"
        with part.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        # From here on the new one is whole, under its name; only then may an old one go.
        os.replace(part, path)
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint, on the CPU; None if there is none. Raises `PackForcingError` if it is not one."""
        paths = self.paths()
        if not paths:
            return None
        try:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle raises
            raise PackForcingError(
                f"{paths[-1]} cannot be read as a checkpoint ({error}); delete it to go on from the one before."
            ) from error
        if state.get("format") != FORMAT:
            raise PackForcingError(f"{paths[-1]} is not a checkpoint of this version's trainers; use another folder.")
        return state


# --- log ------------------------------------------------------------------------------------------


class Log:
    """`log.jsonl`, one object a line; its curves as a picture; and progress on stderr."""

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self.picture = folder / "curve.png"
        self.steps = steps
        # Lines after the checkpoint, or half a line: a killed run's, which this one writes anew.
        lines = [entry for entry in read_log(self.path) if entry["step"] <= first]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        self._first, self._start, self._drawn = first, time.monotonic(), -math.inf
        self._sums: dict[str, list[float]] = {}
        if not plots.available():
            print(f"no {self.picture.name} will be drawn: {plots.MISSING}", file=sys.stderr)

    def add(self, step: int, record: Mapping[str, float], minutes: float, write: bool) -> None:
        """Take in a step's record; `write`: put the mean of those since the last line into the file."""
        for name, value in record.items():
            self._sums.setdefault(name, []).append(value)
        self._show(step, record, write)
        if write:
            means = {name: sum(values) / len(values) for name, values in self._sums.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "minutes": round(minutes, 3), **means}) + "\n")
            self._sums = {}

    def _show(self, step: int, record: Mapping[str, float], write: bool) -> None:
        in_terminal = sys.stderr.isatty()
        if not in_terminal and not write:
            return
        pace = (time.monotonic() - self._start) / (step - self._first)
        values = "  ".join(f"{name} {value:.4g}" for name, value in record.items())
        left = pace * (self.steps - step) / 60
        line = f"step {step} of {self.steps}  {values}  {pace:.2f} s a step, {left:.0f} min left"
        end = "\n" if write else ""
        print(f"\r\x1b[K{line}" if in_terminal else line, end=end, file=sys.stderr, flush=True)

    def draw(self, at_once: bool) -> None:
        """Draw the curves; unless `at_once`, not more often than once a minute."""
        if plots.available() and (at_once or time.monotonic() - self._drawn > 60):
            plots.curves(read_log(self.path), self.picture)
            self._drawn = time.monotonic()


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The lines of a `log.jsonl`; none if it is not there. A last line that a kill cut off is left out."""
    path = Path(path)
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


# --- several processes ----------------------------------------------------------------------------


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _processes() -> int:
    return dist.get_world_size() if _distributed() else 1


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _is_main() -> bool:
    return _rank() == 0


def _average_over_processes(parameters: Sequence[nn.Parameter]) -> None:
    """The mean gradient of all processes. FSDP's parameters (DTensors) have it already."""
    if not _distributed():
        return
    for parameter in parameters:
        if parameter.grad is not None and not _is_shard(parameter.grad):
            dist.all_reduce(parameter.grad)
            parameter.grad /= _processes()


def _mean_over_processes(values: Tensor) -> Tensor:
    if _distributed():
        dist.all_reduce(values)
        values /= _processes()
    return values


def _any_process(flag: bool, device: torch.device) -> bool:
    """Whether any process says so; all must ask. They have to leave the loop together."""
    if not _distributed():
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0


def _is_shard(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which FSDP's parameters are made. Told without the second that its import takes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with its other processes' parts. All processes must call it; without FSDP it does nothing."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def _gathered(state: Any) -> Any:
    """The same nest of mappings and lists, its tensors whole and on the CPU."""
    if isinstance(state, Tensor):
        tensor = whole(state.detach())
        # All processes gather; one keeps.
        return tensor.cpu() if _is_main() else None
    if isinstance(state, Mapping):
        return {key: _gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_gathered(value) for value in state]
    return state


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, distributed as `like` is."""
    tensor = tensor.to(like.device)
    if not _is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)
