"""Prompts of a batch, each of its own length: none is padded, so the model sees in training what it sees later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..demo.text import encode_prompt
from ..model.attention import Attention
from ..model.causal_wan import CausalWan, Text, TextKV


@dataclass(frozen=True)
class Prompts:
    """The captions of B samples, block by block; each caption is encoded once."""

    context: Tensor  # [1, L, 4096], all captions one after another
    spans: tuple[tuple[slice, ...], ...]  # [blocks][B]: where each sample's caption lies

    def texts(self, wan: CausalWan) -> list[Text]:
        """The prompts of each block."""
        whole = wan.embed_text(self.context)
        return [SampleTexts(tuple(part(whole, span) for span in block)) for block in self.spans]


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
    contexts = [encode_prompt(caption) for caption in unique]
    spans, end = {}, 0
    for caption, context in zip(unique, contexts, strict=True):
        spans[caption] = slice(end, end := end + context.shape[1])
    by_block = tuple(tuple(spans[caption] for caption in block) for block in zip(*rows, strict=True))
    return Prompts(torch.cat(contexts, dim=1).to(device), by_block)
