"""The files of a sampler's run: where they lie while it goes on, what becomes of them, and what is left of them.

While a run makes its video, the video and the state so far lie in ComfyUI's output folder, where they survive a server
that is killed. When it ends well, they are the node's outputs and go from there.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import folder_paths
from comfy_api.input_impl import VideoFromFile
from torch import Tensor

from ..packforcing.errors import PackForcingError
from ..packforcing.files.latent_file import save_latents
from ..packforcing.files.state_file import VideoState, save_state
from ..packforcing.files.state_journal import StateJournal, journal_of
from ..packforcing.files.video import check_video_path
from ..packforcing.files.writing import whole_file
from .files import STATES, temporary_video

log = logging.getLogger(__name__)

RESCUE_FOLDER = "packforcing_interrupted"
StateMaker = Callable[[Tensor], VideoState]


class RunFiles:
    """The video and the journal of a run.

    Attributes:
        video: the MP4 to write; in the temporary folder where nothing can be written into the output folder.
        journal: the state so far; None where it cannot be written.
    """

    def __init__(self) -> None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        output = Path(folder_paths.get_output_directory())
        self._latents = output / RESCUE_FOLDER / f"{name}.latent"
        self._state = output / STATES / f"interrupted {name}.safetensors"
        self.video = output / RESCUE_FOLDER / f"{name}.mp4"
        self.journal: StateJournal | None = StateJournal(journal_of(self._state))
        try:
            self._make_folders()
            check_video_path(self.video)
        except (OSError, PackForcingError) as error:
            log.warning("PackForcing: should the server be killed, this run is lost: %s", error)
            self.video, self.journal = temporary_video(), None

    def _make_folders(self) -> None:
        for file in (self._latents, self._state):
            file.parent.mkdir(parents=True, exist_ok=True)

    def finished(self) -> Path | None:
        """Takes the files of a finished run away. Returns the video's new place; None when there is no video."""
        if self.journal is not None:
            self.journal.remove()
        if not self.video.exists():
            return None
        target = temporary_video()
        try:
            shutil.move(self.video, target)
        except OSError as error:  # the temporary folder's disk is full, say
            log.warning("PackForcing: the video stays in %s (%s).", self.video, error.strerror)
            target.unlink(missing_ok=True)
            return self.video
        return target

    def keep(self, latents: Tensor | None, samples: Callable[[Tensor], Tensor], state: StateMaker) -> None:
        """Makes the rest of a run that ended early into files that can be loaded. What cannot be written is told.

        Args:
            latents: of its finished blocks; None: there is none.
            samples: gives them as ComfyUI has them.
            state: gives their state.
        """
        if self.journal is not None:
            self.journal.close()
        if latents is None:
            return
        writers: dict[Path, Callable[[], object]] = {
            self._latents: lambda: save_latents(self._latents, samples(latents)),
            self._state: lambda: save_state(self._state, state(latents)),
        }
        kept = [self.video] if self.video.exists() else []
        for path, write in writers.items():
            try:
                self._make_folders()
                write()
                kept.append(path)
            except (OSError, PackForcingError) as error:
                log.error("PackForcing: %s cannot be kept: %s", path, error)
        if self.journal is not None and self._state in kept:
            self.journal.remove()
        log.warning(
            "PackForcing: the run ended early; its finished part is kept: %s. To go on, connect PackForcing Load State "
            "with %s.",
            ", ".join(map(str, kept)),
            self._state.name,
        )


class TemporaryVideo(VideoFromFile):
    """A VIDEO in the temporary folder: the file goes when no result holds it any more, and comes back when deleted.

    ComfyUI keeps results between prompts and does not look whether their files are still there. So the file is held
    open: what is deleted can be written again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._open: BinaryIO = path.open("rb")
        weakref.finalize(self, _release, self._open, path)

    def __getattribute__(self, name: str) -> Any:
        # Every public method reads the file, and newer versions of ComfyUI bring new ones.
        if not name.startswith("_"):
            self._restore()
        return super().__getattribute__(name)

    def as_trimmed(self, *arguments: Any, **options: Any) -> Any:
        """A part of the video, which reads the same file: so it holds this one."""
        trimmed = super().as_trimmed(*arguments, **options)
        if trimmed is not None:
            trimmed._packforcing_whole = self
        return trimmed

    def _restore(self) -> None:
        if self._path.exists():
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open.seek(0)
            with whole_file(self._path) as part, part.open("wb") as file:
                shutil.copyfileobj(self._open, file)
        except OSError as error:
            raise PackForcingError(
                f"The sampler's video {self._path} was deleted and cannot be written again ({error.strerror}): free "
                "some space, or change the seed to make another."
            ) from error


def _release(file: BinaryIO, path: Path) -> None:
    file.close()
    path.unlink(missing_ok=True)
