"""What a run of `generate` needs to be made again: all options that change the video, and digests of all files.

It lies in the record under `made_with` as "command", and so in the report, in the video's file and in its state.
Files have names and digests there, and no folders.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from ..config import Layout
from ..demo.models import COMPRESSOR_NAME, WEIGHTS
from ..files.digests import digest_of, size_of
from ..files.state_file import StatePrompt, VideoState
from ..flavours import Flavour
from ..generate.made_with import differences
from ..generate.sampling import Sampling
from ..generate.story import TimedPrompt, block_seconds, start_block, time_of
from ..known_models import TINY
from ..model.compressor import CompressorChoice
from ..text.umt5_files import tokenizer_near
from .sampling import written_out
from .start import state_or_journal

COMMAND = "command"  # its name in `made_with`
NO_FILES = {"model": TINY, "compressor": "training-free"}  # values of the options below that name no file
FILES = ("model", "vae", "compressor", "text_encoder", "tokenizer", "start_image", "start_video", "continue_from")
FILES_WITH_MORE = ("lora", "text_embedding", "at_embedding")  # FILE:STRENGTH, FILE:NAME
DEMO, NEAR_TOKENIZER = "demo", "near tokenizer"  # files that no option names
KEPT = ("output", "report", "picture", "latents", "save_state", "archive_folder", "json")  # change no bit of the video
SAID = ("live", "story", "prompts", "parallel", "preset", "command", "run")  # what other options say
ELSEWHERE = (*KEPT, *SAID)


@dataclass(frozen=True)
class UsedFile:
    """A file that a run reads.

    Attributes:
        option: which option named it, or DEMO or NEAR_TOKENIZER.
        path: where it lies; never recorded.
        after: what followed it in the option, such as ":0.8", a LoRA's strength.
        time: what stood before it in --at-embedding.
    """

    option: str
    path: Path
    after: str = ""
    time: str = ""

    def recorded(self) -> dict[str, Any]:
        """As the recipe has it. Reads all of it."""
        return {
            "option": self.option,
            "name": Path(os.path.abspath(self.path)).name,
            "digest": digest_of(self.path),
            "bytes": size_of(self.path),
            "after": self.after,
            "time": self.time,
        }


class Recipe:
    """The recipe of a run. A thread of its own reads the files, while the models are loaded."""

    def __init__(
        self,
        options: argparse.Namespace,
        layout: Layout,
        sampling: Sampling,
        dtype: torch.dtype,
        compressor: CompressorChoice,
        flavour: Flavour | None,
        state: VideoState | None,
        timed: Sequence[TimedPrompt],
    ) -> None:
        self._state = state
        self._encoded = options.text_embedding is not None or bool(options.at_embedding)
        self._fps, self._block_frames = options.fps, layout.config.block_frames
        self._times = {start_block(each.seconds, self._fps, self._block_frames): each.seconds for each in timed}
        apart = (*ELSEWHERE, *FILES, *FILES_WITH_MORE)
        self._options = {name: value for name, value in vars(options).items() if name not in apart}
        self._options |= {name: value for name, value in NO_FILES.items() if getattr(options, name) == value}
        self._options |= asdict(layout.config) | asdict(layout.size) | written_out(options, flavour, sampling)
        self._options["dtype"] = str(dtype).removeprefix("torch.")
        files = list(used_files(options, compressor))
        # Where nobody asks, since loading them failed, its error is not missed.
        self._files: Future[list[dict[str, Any]]] = in_thread(lambda: [file.recorded() for file in files])

    def made_with(self, given: Mapping[str, Any], told: Sequence[StatePrompt]) -> dict[str, Any]:
        """A record's `made_with` with the recipe in it; `told` are the prompts of the whole video.

        A run that goes on where the same command ended is that of one that never did.
        """
        options, files = dict(self._options), self._files.result()
        given_blocks = 0 if self._state is None else self._state.blocks
        if self._state is not None:
            whole = [file for file in files if file["option"] != "continue_from"]
            now = {**given, COMMAND: {"options": options, "files": whole}}
            if self._is_whole(self._state.made_with, now):
                files, given_blocks = whole, 0
        if not self._encoded:
            options |= self._prompt_options(told, given_blocks)
        return {**given, COMMAND: {"options": options, "files": files}}

    def _prompt_options(self, told: Sequence[StatePrompt], given: int) -> dict[str, Any]:
        """--prompt and --at of told prompts, block for block the same; the first `given` blocks are a state's."""
        ruling = [each for each in told if each.start <= given][-1]
        later = [(self._time(each.start), each.prompt) for each in told if each.start > given]
        return {"prompt": ruling.prompt, "at": [[time, prompt] for time, prompt in later]}

    def _time(self, block: int) -> str:
        """When a prompt starts: as it was given, or of one that was said meanwhile, where its block begins."""
        begins = block_seconds(block, self._fps, self._block_frames)
        return time_of(self._times.get(block, begins))

    def _is_whole(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        """Whether a state's run was this one but for its length and its prompts, which are told anyhow."""
        changing = ("seconds", *(() if self._encoded else ("prompt", "at")))
        names = {name for name, _, _ in differences(before, now)}
        return names <= {f"{COMMAND}.options.{name}" for name in changing}


def in_thread(work: Callable[[], list[dict[str, Any]]]) -> Future[list[dict[str, Any]]]:
    """Begins work in a thread that keeps no program from ending."""
    future: Future[list[dict[str, Any]]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name="packforcing-digests").start()
    return future


def used_files(options: argparse.Namespace, compressor: CompressorChoice) -> Iterator[UsedFile]:
    """All files that a run reads but for stories, whose words are recorded."""
    if options.model == TINY:
        names = ["demo_transformer", "demo_vae", *(["demo_compressor"] if compressor.name == COMPRESSOR_NAME else [])]
        yield from (UsedFile(DEMO, WEIGHTS / f"{name}.safetensors") for name in names)
    for option in FILES:
        value = getattr(options, option)
        if value not in (None, NO_FILES.get(option)):
            path = state_or_journal(value) if option == "continue_from" else Path(value)
            yield from [UsedFile(option, path)] if path.exists() else []  # a state may only come into being
    if options.text_encoder and not options.tokenizer and (near := tokenizer_near(Path(options.text_encoder))):
        yield UsedFile(NEAR_TOKENIZER, near)
    for text in options.lora:
        yield UsedFile("lora", *split(text))
    if options.text_embedding is not None:
        yield UsedFile("text_embedding", *split(options.text_embedding))
    for time, text in options.at_embedding:
        yield UsedFile("at_embedding", *split(text), time)


def split(text: str) -> tuple[Path, str]:
    """FILE:MORE -> the file and ":MORE"; where FILE:MORE is a file itself, that."""
    file, colon, more = text.rpartition(":")
    return (Path(text), "") if not colon or os.path.exists(text) else (Path(file), colon + more)
