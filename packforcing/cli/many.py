"""`generate --prompts FILE`: a video for each prompt of a file, in one process or shared out among several."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import telling
from ..checks import shown
from ..errors import PackForcingError
from ..files.encoded_prompts import read_prompts
from ..files.weights import SAFETENSORS_SUFFIXES
from ..files.writing import check_output_file, write_whole
from ..generate.long_video import VideoModels
from ..generate.story import TimedPrompt
from ..host_memory import is_out_of_host_memory
from ..processes import (
    FromFirst,
    any_process,
    distributed,
    in_all,
    is_main,
    joined,
    own_number,
    side_by_side,
    started_processes,
    take_device,
)
from ..telling import tell
from . import generate
from .encode import prompt_lines
from .generate import OUTPUT, Request, help_along, made, models_of, prepared, requested
from .options import Commands
from .prompts import encoder_of
from .several import check_together
from .stopping import Stopping, stopping
from .text import check_words, text_file

TENSOR, PROMPTS = "tensor", "prompts"  # what processes share out
FOLDER = "out"  # for the videos, where --output names none
LIST = "prompts.json"  # there: how the videos are made, and what each shows
UNFINISHED = ".unfinished.mp4"

# Options that may change between a run and its continuation: they do not change the videos, or not but for rounding.
FREE = (
    *("device", "output", "prompts", "parallel", "json", "overlap", "run"),
    *("archive_device", "archive_budget_gb", "archive_folder", "weights_device"),
)
# Options that are about one video, and what each is without them.
OF_ONE: dict[str, object] = {
    "--prompt": None,
    "--text-embedding": None,
    "--story": None,
    "--at": [],
    "--at-embedding": [],
    "--live": False,
    "--continue-from": None,
    "--save-state": None,
    "--latents": None,
    "--report": None,
    "--picture": None,
}


def add_command(commands: Commands) -> None:
    """Adds `generate` and its options, for one video and for many."""
    command = generate.add_command(commands)
    command.add_argument(
        "--prompts",
        metavar="FILE",
        help="a text file with a prompt on each line, or a file that `encode` wrote: makes a video of each, 00001.mp4 "
        "and so on; what is there from an earlier run is not made again",
    )
    command.add_argument(
        "--parallel",
        choices=(TENSOR, PROMPTS),
        help="under torchrun, whether all processes make one video together (tensor), or each makes others (prompts); "
        "default: prompts where there are --prompts",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Makes one video or many."""
    if options.prompts is None:
        if options.parallel == PROMPTS:
            raise PackForcingError("--parallel prompts shares out the prompts of a file: give --prompts FILE.")
        generate.run(options)
        return
    started = time.perf_counter()
    if options.parallel == TENSOR and started_processes() > 1:
        with joined(options.device), stopping(any_process) as heard:
            options.device = in_all(lambda: take_device(options.device))
            in_all(lambda: check_together(options))
            done = [made_of(in_all(lambda: tasks_of(options)), heard)]
        if own_number():
            return
    else:
        with stopping() as heard:
            done = side_by_side(lambda from_first: own_part(options, heard, from_first))
    if done:
        conclude(options, [Done(**each) for part in done for each in part], time.perf_counter() - started)


# --- what there is to make --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A video to make."""

    number: int  # from 1, in the order of the file
    words: str  # "" where a file of encoded prompts does not tell them
    key: str = ""  # its name in a file of encoded prompts
    context: Tensor | None = None  # the prompt, encoded [1, L, 4096]; None: still to be encoded

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


@dataclass(frozen=True)
class Tasks:
    """The videos that are asked for."""

    options: argparse.Namespace
    request: Request  # of the first one
    tasks: list[Task]
    folder: Path

    def video(self, task: Task) -> Path:
        return self.folder / f"{task.name}.mp4"

    @property
    def missing(self) -> list[Task]:
        return [task for task in self.tasks if not self.video(task).exists()]


@dataclass(frozen=True)
class Done:
    """What came of a video, as JSON has it."""

    number: int
    error: str = ""  # "" for one that was made


def tasks_of(options: argparse.Namespace) -> Tasks:
    """What the options ask for. Raises PackForcingError for what can be seen to be wrong before a model is loaded."""
    for option, without in OF_ONE.items():
        if getattr(options, option.strip("-").replace("-", "_")) != without:
            raise PackForcingError(f"{option} is for one video, but --prompts makes one of each prompt: leave it out.")
    folder = Path(FOLDER if options.output == OUTPUT else options.output)
    if folder.suffix == ".mp4" or folder.is_file():
        raise PackForcingError(f"--prompts makes many videos, so --output must name a folder, but it is {folder}.")
    tasks = encoded_tasks(options) if Path(options.prompts).suffix in SAFETENSORS_SUFFIXES else worded_tasks(options)
    first = argparse.Namespace(**vars(options) | {"prompt": tasks[0].words, "output": f"{folder / 'x.mp4'}"})
    if tasks[0].context is not None:
        first.prompt, first.text_embedding = None, f"{options.prompts}:{tasks[0].key}"
    request = requested(first)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PackForcingError(f"The folder {folder} cannot be made ({error.strerror}): choose another.") from error
    check_output_file(folder / LIST, "list of prompts")
    check_list(options, folder, tasks)
    return Tasks(options, request, tasks, folder)


def worded_tasks(options: argparse.Namespace) -> list[Task]:
    """A task for each line of a text file."""
    words = prompt_lines(text_file(options.prompts, "file of prompts"), options.prompts)
    for each in words:
        check_words(each)
    return [Task(number, each) for number, each in enumerate(words, 1)]


def encoded_tasks(options: argparse.Namespace) -> list[Task]:
    """A task for each prompt of a file of encoded prompts."""
    prompts = read_prompts(options.prompts)
    return [
        Task(number, prompt.words, key, prompt.context[None]) for number, (key, prompt) in enumerate(prompts.items(), 1)
    ]


def check_list(options: argparse.Namespace, folder: Path, tasks: list[Task]) -> None:
    """Writes down how the videos of a folder are made. Raises PackForcingError where that was another way before.

    More prompts may come; those that are there keep their numbers.
    """
    plain = {name: value for name, value in vars(options).items() if name not in FREE}
    now = {
        "options": json.loads(json.dumps(plain, default=str)),
        "prompts": {task.name: task.words for task in tasks},
    }
    file = folder / LIST
    before = list_of(file)
    for part, noun in (("options", "--"), ("prompts", "prompt ")):
        for name in before[part].keys() & now[part].keys():
            if before[part][name] != now[part][name]:
                raise PackForcingError(
                    f"The videos in {folder} were made with {noun}{name.replace('_', '-')} "
                    f"{shown(before[part][name])}, but now it is {shown(now[part][name])}: choose another --output, or "
                    f"delete {file} and the videos that are to be made again."
                )
    if own_number() == 0:
        now["prompts"] = before["prompts"] | now["prompts"]
        write_whole(file, json.dumps(now, indent=1, ensure_ascii=False).encode())


def list_of(file: Path) -> dict[str, dict[str, Any]]:
    """What `check_list` wrote, or nothing yet. Raises PackForcingError for another file."""
    if not file.exists():
        return {"options": {}, "prompts": {}}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"options": dict(found["options"]), "prompts": dict(found["prompts"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackForcingError(f"{file} is no list of prompts: choose another --output, or delete it.") from error


# --- making them ------------------------------------------------------------------------------------------------------


def own_part(options: argparse.Namespace, heard: Stopping, from_first: FromFirst) -> list[dict[str, Any]]:
    """Makes this process's part of what is missing: every Nth video, so that all have as many.

    What is missing is what the first process found to be: the others may look when it has made one.
    """
    options.device = take_device(options.device)
    tasks = tasks_of(options)
    numbers = from_first([task.number for task in tasks.missing])[own_number() :: started_processes()]
    own = replace(tasks, tasks=[task for task in tasks.tasks if task.number in numbers])
    telling.mute(own_number() > 0)
    try:
        return made_of(own, heard)
    finally:
        telling.mute(False)


def made_of(tasks: Tasks, heard: Stopping) -> list[dict[str, Any]]:
    """Makes the videos that are missing, one after another. Returns what came of each."""
    todo = tasks.missing
    if not todo:
        return []
    contexts = encoded(tasks, todo)
    models = models_of(tasks.options, tasks.request)  # after what encodes the prompts has gone
    done = []
    for task, context in zip(todo, contexts, strict=True):
        try:
            make(tasks, task, context, models, heard)
            done.append(asdict(Done(task.number)))
        except (PackForcingError, MemoryError, RuntimeError) as error:
            reason = reason_of(error)
            if distributed() or not reason:  # the other processes cannot know that this one goes on
                raise
            tell(f"video {task.name} could not be made: {reason}")
            done.append(asdict(Done(task.number, reason)))
    return done


def encoded(tasks: Tasks, todo: list[Task]) -> list[Tensor]:
    """The prompts [1, L, 4096] of some tasks, encoded together."""
    given = [task.context for task in todo if task.context is not None]
    return given or encoder_of(tasks.options, [task.words for task in todo], tasks.request.device)()


def make(tasks: Tasks, task: Task, context: Tensor, models: VideoModels, heard: Stopping) -> None:
    """Makes one video. It has its name only when it is whole."""
    unfinished = tasks.folder / f"{task.name}{UNFINISHED}"
    options = argparse.Namespace(**vars(tasks.options) | {"output": f"{unfinished}"})
    prompts = replace(tasks.request.prompts, timed=(TimedPrompt(0.0, task.words),), encode=lambda: [context])
    request = replace(tasks.request, prompts=prompts)
    if not is_main():
        help_along(prepared(options, request, models), request, heard)
        return
    tell(f"video {task.name}: {shown(task.words)}")
    try:
        made(options, request, heard, models)
        os.replace(unfinished, tasks.video(task))
    finally:
        unfinished.unlink(missing_ok=True)


def reason_of(error: Exception) -> str:
    """Why a video could not be made, where the others still can be; "" for an error of another kind."""
    if isinstance(error, PackForcingError):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the device ran out of memory"
    return "the machine's own memory ran out" if is_out_of_host_memory(error) else ""


def conclude(options: argparse.Namespace, done: list[Done], elapsed: float) -> None:
    """Says what came of all. Raises PackForcingError when some could not be made."""
    failed = sorted((each for each in done if each.error), key=lambda each: each.number)
    folder = FOLDER if options.output == OUTPUT else options.output
    there = len(list(Path(folder).glob("[0-9]*.mp4")))
    summary = {
        "output": str(folder),
        "videos": there,
        "made": len(done) - len(failed),
        "failed": {f"{each.number:05d}": each.error for each in failed},
        "elapsed_seconds": elapsed,
    }
    text = f"written: {folder}, {there} videos, {len(done) - len(failed)} of them now, in {elapsed:.0f} s"
    print(json.dumps(summary) if options.json else text)
    if failed:
        names = ", ".join(f"{each.number:05d}" for each in failed)
        raise PackForcingError(
            f"{len(failed)} of {len(done)} videos could not be made ({names}), the first because: "
            f"{failed[0].error.rstrip('.')}; the same command tries what is missing again."
        )
