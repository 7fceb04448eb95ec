"""Prompts that are said while a video is being made: each rules from the next block on.

    any thread   Mailbox.say
    the loop     LongVideo.on_block = LivePrompts.listen: takes the newest words, encodes them, tells the video

The video is that of the story which its record then tells. Said again from the start, with the same seed, that story
makes the same video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from torch import Tensor

from ..checks import is_utf8, shown
from ..errors import PackForcingError
from ..files.state_file import StatePrompt
from .long_video import LongVideo
from .state import same_context

MOST_LETTERS = 10_000  # of a prompt; Wan reads its first 512 tokens
MOST_HELD = 8  # prompts that memory is planned for, beside the story's own


class Mailbox:
    """Holds the newest words that were said and not taken yet. Any thread may say and take."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._words: str | None = None

    @property
    def words(self) -> str | None:
        """What waits to be taken."""
        return self._words

    def say(self, words: str) -> None:
        """Puts words there, in place of others that nobody has taken."""
        with self._lock:
            self._words = words

    def take(self) -> str | None:
        """The words, which are then gone; None where there are none."""
        with self._lock:
            words, self._words = self._words, None
        return words


def live_words(text: Any) -> str:
    """What was said as one line, which is how a story's text can hold it.

    Raises PackForcingError for what is no text, has no words, or is very long.
    """
    if not isinstance(text, str):
        raise PackForcingError(f"A prompt must be text, but it is {shown(text)}: write what the video shall show.")
    words = " ".join(text.split())
    if not words:
        raise PackForcingError("The prompt has no words: write what the video shall show from the next block on.")
    if len(words) > MOST_LETTERS:
        raise PackForcingError(f"The prompt has {len(words):,} letters, and at most {MOST_LETTERS:,} are read: cut it.")
    if not is_utf8(words):
        raise PackForcingError(f"The prompt {shown(words)} is no text in UTF-8: write it anew.")
    return words


def most_held(switch: str, blend_blocks: int) -> int:
    """Prompts that a video holds at most beside its story's own, however many are said (`LongVideo.tell`).

    A long blend could hold more, if something new were said at each of its blocks.
    """
    return min(MOST_HELD, 3 + (blend_blocks if switch == "blend" else 0))


def no_answer(block: int, words: str, refused: str) -> None:
    """The default `on_heard`."""


class LivePrompts:
    """Tells a video what is said while it is made.

    Args:
        video: whose `on_block` is then `listen`.
        prompts: its story, encoded.
        take: the newest words since it was last called, or None.
        encode: words -> their encoding [1, L, width]. Nothing is being decoded when it is called, so it may move
            weights. It is called once for the same words.
        on_heard: called as on_heard(block, words, refused) when words have been taken: `refused` is "" where they rule
            from that block on, else the sentence that says why not.

    Attributes:
        prompts: the video's prompts so far, encoded, those that were said included: for its state.
    """

    def __init__(
        self,
        video: LongVideo,
        prompts: Sequence[StatePrompt],
        take: Callable[[], str | None],
        encode: Callable[[str], Tensor],
        on_heard: Callable[[int, str, str], None] = no_answer,
    ) -> None:
        self.prompts = tuple(prompts)
        self._video = video
        self._take = take
        self._encode = encode
        self._on_heard = on_heard
        self._encoded: dict[str, Tensor] = {}
        self._unheard: str | None = None  # words that were taken and not told
        video.on_block = self.listen

    def listen(self, block: int) -> None:
        """Takes what was said, and lets it rule from this block on. Words that cannot be encoded end no run."""
        words = self._take() or self._unheard
        if words is None:
            return
        self._unheard = words  # until they are told: what fails for want of memory is done again
        try:
            self._tell(block, words)
        except PackForcingError as error:
            self._on_heard(block, words, str(error))
        else:
            self._on_heard(block, words, "")
        self._unheard = None

    def _tell(self, block: int, words: str) -> None:
        if words not in self._encoded:
            self._video.finish_decoding()
            self._encoded[words] = self._encode(words)
        context = self._encoded[words]
        ruling = [prompt for prompt in self.prompts if prompt.start <= block][-1]
        if same_context(ruling.context, context):
            return  # it goes on: no switch
        self._video.tell(self._video.wan.embed_text(context), words)
        others = (prompt for prompt in self.prompts if prompt.start != block)
        self.prompts = tuple(sorted((*others, StatePrompt(block, words, context)), key=lambda prompt: prompt.start))
