"""The command `again`: makes a video anew from what its file, or its report, says of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..byte_units import readable_bytes
from ..checks import shown
from ..config import CacheConfig
from ..demo.models import WEIGHTS
from ..errors import PackForcingError
from ..files.digests import digest_of, found_below, size_of
from ..files.weights import read_json
from ..files.writing import check_distinct
from ..generate.made_with import differences, machine, versions
from ..generate.record import TAG, CacheRecord
from ..telling import tell
from ..text.umt5_files import tokenizer_near
from . import generate
from .inspect import read_record
from .options import Commands
from .recipe import COMMAND, DEMO, ELSEWHERE, FILES, FILES_WITH_MORE, NEAR_TOKENIZER, NO_FILES

REPORT_SUFFIX = ".json"


def add_command(commands: Commands) -> None:
    """Adds `again` and its options."""
    command = commands.add_parser("again", help="make a video again, from its own file or report")
    command.add_argument("source", metavar="VIDEO_OR_REPORT", help="an MP4 of `generate`, or its --report")
    command.add_argument(
        "--files",
        metavar="FOLDER",
        action="append",
        default=[],
        help="where the files that it was made of lie, or below; may be given often; default: beside it, and here",
    )
    command.add_argument("--output", default="again.mp4", help="the MP4 to write")
    command.add_argument("--report", help="a JSON file for the new run's record")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Makes the video, and says whether it is the same."""
    check_distinct({"the video to make again": options.source, "--output": options.output, "--report": options.report})
    before = record_of(options.source)
    command = command_of(before, options.source)
    given = found_files(command["files"], [Path(folder) for folder in options.files] or usual_folders(options.source))
    wanted = generate_options(command["options"], given)
    wanted.output, wanted.report = options.output, options.report
    tell_differences(before, wanted)
    generate.run(wanted)
    print(verdict(Path(options.source), before, Path(options.output)))


# --- reading -----------------------------------------------------------------------------------------------------


def record_of(source: str) -> CacheRecord:
    """The record that a video or a report holds; of a video, without blocks. Raises PackForcingError for neither."""
    if Path(source).suffix.lower() == REPORT_SUFFIX:
        return read_record(source)
    from ..files.video import tags_of  # needs av, which `plan` and `bench` can do without

    tags = tags_of(source)
    if TAG not in tags:
        raise PackForcingError(
            f"{source} does not say how it was made: it is no video of PackForcing, or of an earlier version."
        )
    try:
        return CacheRecord.from_dict(read_json(tags[TAG]))
    except ValueError as error:
        raise PackForcingError(f"What {source} says of its making cannot be read ({error}).") from error


def command_of(record: CacheRecord, source: str) -> dict[str, Any]:
    """The recipe in a record: "options" and "files". Raises PackForcingError when there is none."""
    command = record.made_with.get(COMMAND) if isinstance(record.made_with, Mapping) else None
    if command is None:
        raise PackForcingError(
            f"{source} was not made by `generate` of this version: drag a video that ComfyUI saved onto its canvas, "
            "which brings the workflow back."
        )
    try:
        files = [{**file, "option": str(file["option"]), "name": str(file["name"])} for file in command["files"]]
        return {"options": dict(command["options"]), "files": files}
    except (KeyError, TypeError, ValueError) as error:
        raise PackForcingError(f"The recipe in {source} is damaged ({type(error).__name__}).") from error


# --- the files -----------------------------------------------------------------------------------------------------


def usual_folders(source: str) -> list[Path]:
    """Where files are looked for unless folders are given."""
    return list(dict.fromkeys(folder.resolve() for folder in (Path(source).parent, Path())))


def found_files(files: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> dict[str, Any]:
    """The options that name the files, as they lie here.

    Raises PackForcingError that names each file that is missing, or is another one than the video was made of.
    """
    given: dict[str, Any] = {}
    faults: list[str] = []
    for file in files:
        option, name = file["option"], file["name"]
        places = list(candidates(file, folders, given))
        same = next((path for path in places if is_the_one(path, file)), None)
        what = option.replace("_", " ")
        if same is None and places:
            faults.append(f"the {what} {shown(name)} is another file than it was made of ({places[0]})")
        elif same is None:
            size = readable_bytes(file["bytes"]) if isinstance(file.get("bytes"), int) else "of unknown size"
            faults.append(f"the {what} {shown(name)} ({size}) is missing")
        else:
            add_file(given, file, str(same))
    if faults:
        raise PackForcingError(
            f"The video cannot be made again: {'; '.join(faults)}. Give the folder in which the files lie by --files."
        )
    return given


def candidates(file: Mapping[str, Any], folders: Sequence[Path], given: Mapping[str, Any]) -> Iterator[Path]:
    """The files of its name."""
    if file["option"] == DEMO:
        path = WEIGHTS / Path(file["name"]).name
        yield from [path] if path.is_file() else []
    elif file["option"] == NEAR_TOKENIZER:
        near = tokenizer_near(Path(given.get("text_encoder", "")))
        yield from [near] if near else []
    else:
        yield from found_below(file["name"], list(folders))


def is_the_one(path: Path, file: Mapping[str, Any]) -> bool:
    return size_of(path) == file.get("bytes") and digest_of(path) == file.get("digest")


def add_file(given: dict[str, Any], file: Mapping[str, Any], path: str) -> None:
    """Adds what names a file to the options of `generate`."""
    option, named = file["option"], path + str(file.get("after", ""))
    if option in FILES or option == "text_embedding":
        given[option] = named
    elif option == "lora":
        given[option] = [*given.get(option, []), named]
    elif option == "at_embedding":
        given[option] = [*given.get(option, []), [str(file.get("time", "")), named]]


# --- the run -----------------------------------------------------------------------------------------------------


def generate_options(told: Mapping[str, Any], files: Mapping[str, Any]) -> argparse.Namespace:
    """The options of `generate` for this run. Raises PackForcingError for one that this version does not know.

    A file says what `generate` shall do, but not which files it shall read or write: those are the caller's.
    """
    root = argparse.ArgumentParser()
    generate.add_command(root.add_subparsers())
    options = root.parse_args(["generate"])
    known = {**vars(options), **vars(CacheConfig())}
    for name, value in told.items():
        if name not in known or name in ELSEWHERE:
            raise PackForcingError(
                f"The video was made with the option {shown(name)}, which is not known here: update."
            )
        if name in (*FILES, *FILES_WITH_MORE) and value != NO_FILES.get(name):
            raise PackForcingError(f"The recipe names a file by the option {shown(name)}, which it must not.")
        if not is_plain(value):
            raise PackForcingError(f"The recipe gives the option {shown(name)} the value {shown(value)}.")
        setattr(options, name, value)
    for name, value in files.items():
        setattr(options, name, value)
    return options


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text or nothing, or as --at has it."""
    if isinstance(value, list):
        return all(
            isinstance(each, list) and len(each) == 2 and all(isinstance(x, str) for x in each) for each in value
        )
    return value is None or isinstance(value, (bool, int, float, str))


def tell_differences(before: CacheRecord, options: argparse.Namespace) -> None:
    """Says what of the versions and the machine is not as it was; takes as many threads as the run had."""
    device = torch.device(options.device if str(options.device).startswith("cuda") else "cpu")
    old = before.made_with.get("machine", {})
    if device.type == "cpu" and isinstance(old.get("threads"), int) and 0 < old["threads"] <= 1024:
        torch.set_num_threads(old["threads"])
    now = {"versions": versions(), "machine": machine(device)}
    was = {name: before.made_with.get(name, {}) for name in now}
    was["machine"] = {name: value for name, value in was["machine"].items() if name != "attention"}
    for name, made, found in differences(was, now):
        tell(f"warning: {name} was {made}, and is {found}: the video may differ in its bits")


def verdict(source: Path, before: CacheRecord, output: Path) -> str:
    """What the new file is, beside the old one or the old one's record."""
    if source.suffix.lower() != REPORT_SUFFIX:
        if source.read_bytes() == output.read_bytes():
            return f"{output} is {source} again, byte for byte"
        unlike = "the files differ"
    else:
        unlike = ""
    after = record_of(str(output))
    found = [f"{name}: {was} and {now}" for name, was, now in differences(before.made_with, after.made_with)]
    if found:
        unlike = "; ".join(found)
    return f"made again, but other conditions: {unlike}" if unlike else "made again under the same conditions"
