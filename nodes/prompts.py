"""Prompts over time: a schedule as text, and a start for any CONDITIONING."""

from __future__ import annotations

from comfy_api.latest import io

from ..packforcing.checks import check_kind
from ..packforcing.errors import PackForcingError
from ..packforcing.generate.story import parse_story
from . import types
from .conditioning import Conditioning, start_seconds, with_start

EXAMPLE = "0:00 a fox in the snow\n0:20 it starts to rain"


def check_clip(clip) -> None:
    """Raises PackForcingError when there is no CLIP."""
    if clip is None:
        raise PackForcingError("The CLIP is empty, as a checkpoint without one gives it: connect a CLIP loader.")


def encode_words(clip, words: str) -> Conditioning:
    """A prompt by a CLIP."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(words))


class PromptScheduleNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingPromptSchedule",
            display_name="PackForcing Prompt Schedule",
            category=types.CATEGORY,
            description="A story: prompts over time, a line with its time for each. The result is an ordinary "
            "CONDITIONING for the Long Video Sampler, which may be combined with others.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder: UMT5-XXL for Wan 2.1, or the demo models'."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default=EXAMPLE,
                    tooltip="A line such as '0:20 it starts to rain' for each prompt, in order, the first at 0:00. "
                    "Times are m:ss, h:mm:ss or seconds. Empty lines, and those that begin with #, are skipped.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def validate_inputs(cls, text=None) -> bool | str:
        """Tells a mistake before anything runs, by an exception; text from another node is read when it is there."""
        if text is not None:
            check_kind("text", text, str)
            parse_story(text)
        return True

    @classmethod
    def execute(cls, clip, text: str) -> io.NodeOutput:
        prompts = parse_story(text)
        check_clip(clip)
        conditioning = []
        for timed in prompts:
            conditioning += with_start(encode_words(clip, timed.prompt), timed.seconds, timed.prompt)
        return io.NodeOutput(conditioning)


class ConditioningAtNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingConditioningAt",
            display_name="PackForcing Conditioning At",
            category=types.CATEGORY,
            description="Gives a CONDITIONING the time from which it rules in the Long Video Sampler. Join several by "
            "the core node Conditioning (Combine).",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="One prompt, from any text encoder."),
                io.String.Input(
                    "start", default="0:20", tooltip="When it starts: m:ss, h:mm:ss or seconds, such as 0:20."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt's words, for the inspector's report and picture. They change nothing.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def validate_inputs(cls, start=None) -> bool | str:
        """Tells a mistake before anything runs, by an exception."""
        if start is not None:
            check_kind("start", start, str)
            start_seconds(start)
        return True

    @classmethod
    def execute(cls, conditioning, start: str, text: str = "") -> io.NodeOutput:
        if len(conditioning) != 1:
            raise PackForcingError(
                f"A start is given to one prompt, but the conditioning has {len(conditioning)} entries: connect one "
                "before it is combined with others."
            )
        return io.NodeOutput(with_start(conditioning, start_seconds(start), text.strip()))
