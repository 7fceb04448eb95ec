"""Prompts of a batch, each as long as it is when it stands alone: so the model sees in training what it sees later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..demo.text import encode_prompt
from ..model.attention import Attention
from ..model.causal_wan import CausalWan, Text, TextKV


@dataclass(frozen=True)
class Prompts:
    """The captions of B samples, block by block; each caption is encoded once."""

    contexts: tuple[Tensor, ...]  # [1, L, 4096] each
    numbers: tuple[tuple[int, ...], ...]  # [blocks][B]: which of them is each sample's caption

    def texts(self, wan: CausalWan) -> list[Text]:
        """The prompts of each block. All go through the model's text layers at once, one after another."""
        padded = [wan.padded(context) for context in self.contexts]
        whole = wan.embed_text(torch.cat(padded, dim=1))
        ends = list(accumulate(context.shape[1] for context in padded))
        texts = [part(whole, slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
        return [SampleTexts(tuple(texts[number] for number in block)) for block in self.numbers]


@dataclass(frozen=True)
class SampleTexts:
    """A prompt for each sample of a batch."""

    texts: tuple[Text, ...]

    def attend(self, layer: int, queries: Tensor, attention: Attention) -> Tensor:
        """The attention of queries [B, L, H, D] to each sample's prompt."""
        pairs = zip(self.texts, queries.split(1), strict=True)
        return torch.cat([text.attend(layer, own, attention) for text, own in pairs])


def part(text: TextKV, span: slice) -> TextKV:
    """Some tokens of a text."""
    return TextKV(tuple((keys[:, span], values[:, span]) for keys, values in text.layers))


def encoded(captions: Sequence[Sequence[str]], device: torch.device | str = "cpu") -> Prompts:
    """The captions of B samples, given as one a block, or as a single one for all blocks."""
    blocks = max(len(each) for each in captions)
    rows = [each if len(each) == blocks else blocks * tuple(each) for each in captions]
    unique = list(dict.fromkeys(caption for row in rows for caption in row))
    contexts = tuple(encode_prompt(caption).to(device) for caption in unique)
    by_block = tuple(tuple(unique.index(caption) for caption in block) for block in zip(*rows, strict=True))
    return Prompts(contexts, by_block)
