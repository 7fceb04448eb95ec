"""A video's state as a file: saved into ComfyUI's output folder, and loaded from there or from the input folder."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..packforcing.checks import shown
from ..packforcing.errors import PackForcingError
from ..packforcing.files.state_file import VideoState, save_state
from ..packforcing.files.state_journal import UNFINISHED, read_state
from . import types
from .files import STATES, state_folder
from .loaders import check_choice

SUFFIX = ".safetensors"
NAME = re.compile(r"\w[\w .-]{0,99}")


def folders() -> dict[str, Path]:
    """The folders in which states lie, by the mark that their names carry in the list."""
    roots = {"": folder_paths.get_input_directory(), " [output]": folder_paths.get_output_directory()}
    return {mark: Path(root) / STATES for mark, root in roots.items()}


def state_files() -> dict[str, Path]:
    """The files that can be loaded, by their names in the list; newest first, so that this is the default."""
    found = {
        f"{path.name}{mark}": path
        for mark, folder in folders().items()
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.endswith((SUFFIX, UNFINISHED)) and path.is_file()
    }
    return dict(sorted(found.items(), key=lambda item: -written_at(item[1])))


def written_at(path: Path) -> float:
    """Seconds; 0 for a file that is gone by now, as that of a run that ends."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def check_name(name: str) -> None:
    """Raises PackForcingError for a name that is no plain file name."""
    if not NAME.fullmatch(name):
        raise PackForcingError(
            "The state's name must be a plain name of letters, digits, blanks, '.', '-' and '_', but it is "
            f"{shown(name)}."
        )


def check_file(name: str) -> None:
    advice = f": choose one of the list, or put it into input/{STATES} and press R to refresh"
    check_choice("state", name, state_files(), advice)


class SaveStateNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingSaveState",
            display_name="PackForcing Save State",
            category=types.CATEGORY,
            description="Saves a video's state, from which the sampler goes on exactly as if it had never stopped: "
            f"later, after a restart, or on another machine. The file lies in output/{STATES}.",
            inputs=[
                types.VideoState.Input("state", tooltip="The state of the Long Video Sampler."),
                io.String.Input(
                    "name", default="state", tooltip="The file's name; a number is added, so no file is overwritten."
                ),
            ],
            outputs=[io.String.Output(display_name="file")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name=None) -> bool | str:
        if name is not None:
            check_name(name)
        return True

    @classmethod
    def execute(cls, state: VideoState, name: str) -> io.NodeOutput:
        check_name(name)
        folder = state_folder()
        numbers = [int(file.stem[len(name) + 1 :]) for file in folder.glob(f"{name}_*{SUFFIX}") if numbered(file, name)]
        path = folder / f"{name}_{max(numbers, default=0) + 1:05}{SUFFIX}"
        save_state(path, state)
        listed = f"{path.name} [output]"
        words = f"{listed}: {state.blocks} blocks, {path.stat().st_size / 1e6:.1f} MB"
        return io.NodeOutput(listed, ui=ui.PreviewText(words))


def numbered(file: Path, name: str) -> bool:
    """Whether a file is one of that name with a number."""
    return re.fullmatch(rf"{re.escape(name)}_\d{{1,9}}", file.stem) is not None


class LoadStateNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingLoadState",
            display_name="PackForcing Load State",
            category=types.CATEGORY,
            description="Loads a video's state for the sampler's state input. The model, size and cache config must be "
            "those it was made with; the prompt and the seed may be others from there on.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(state_files()),
                    tooltip=f"A state in output/{STATES}, or one that was put into input/{STATES}.",
                )
            ],
            outputs=[types.VideoState.Output(display_name="state")],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        if file is not None:
            check_file(file)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Another one once the file was written again."""
        path = state_files().get(file)
        return "" if path is None else f"{path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        check_file(file)
        return io.NodeOutput(read_state(state_files()[file]))
