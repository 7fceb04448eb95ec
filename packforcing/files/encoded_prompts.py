"""Files of encoded prompts: safetensors with one tensor [L, 4096] a prompt, and its words in the metadata.

The metadata has the words under the tensor's name. Files of other programs have no words, and may have tensors
[1, L, 4096].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import TEXT_TOKENS
from ..errors import PackForcingError
from .weights import quoted, read_state_dict
from .writing import save_tensors

ENCODER = "encoder"  # the metadata's key for what encoded the prompts


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt of a file."""

    context: Tensor  # [L, width]
    words: str = ""  # "" where the file does not tell them


def read_prompts(path: str | os.PathLike[str]) -> dict[str, EncodedPrompt]:
    """The prompts of a file by their names, in the order of the names.

    Raises PackForcingError when it holds anything else, none, prompts of several widths, or longer ones than Wan takes.
    """
    tensors, metadata = read_state_dict(path)
    prompts = {name: EncodedPrompt(context_of(tensor), metadata.get(name, "")) for name, tensor in tensors.items()}
    shapes = {name: list(getattr(tensor, "shape", [])) for name, tensor in tensors.items()}
    wrong = [name for name, prompt in prompts.items() if prompt.context.ndim != 2 or not len(prompt.context)]
    widths = sorted({prompt.context.shape[-1] for prompt in prompts.values() if prompt.context.ndim == 2})
    if wrong or len(widths) != 1:
        found = f"'{wrong[0][:80]}' has the shape {shapes[wrong[0]]}" if wrong else f"it has {len(tensors)} tensors"
        if not wrong and widths:
            found = f"they are {' and '.join(map(str, widths))} wide"
        raise PackForcingError(f"{path} must hold encoded prompts [L, 4096] and nothing else, but {found}.")
    for name, prompt in prompts.items():
        if len(prompt.context) > TEXT_TOKENS:
            raise PackForcingError(
                f"'{name[:80]}' of {path} is a prompt of {len(prompt.context)} tokens, and Wan takes {TEXT_TOKENS} at "
                "most: shorten its words, and encode it anew."
            )
    return dict(sorted(prompts.items()))


def context_of(tensor: object) -> Tensor:
    """A tensor [L, width] or [1, L, width] as [L, width]; anything else as an empty one."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return Tensor()
    return tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor


def read_prompt(path: str) -> EncodedPrompt:
    """The one prompt of a file, or of FILE:NAME. Raises what `read_prompts` raises, and where it is not clear which."""
    file, colon, name = path.rpartition(":")
    if not colon or Path(path).is_file() or not Path(file).is_file():
        file, name = path, ""
    prompts = read_prompts(file)
    if name:
        if name not in prompts:
            raise PackForcingError(f"{file} has no prompt '{name}', but {quoted(prompts)}: choose one of these.")
        return prompts[name]
    if len(prompts) != 1:
        raise PackForcingError(
            f"{file} holds {len(prompts)} prompts, and one is wanted: name it, as in {file}:{next(iter(prompts))}."
        )
    return next(iter(prompts.values()))


def encoder_of(path: str | os.PathLike[str]) -> str:
    """What encoded the prompts of a file, as `write_prompts` was told; "" for another program's file."""
    return read_state_dict(path)[1].get(ENCODER, "")


def write_prompts(path: str | os.PathLike[str], prompts: Mapping[str, EncodedPrompt], encoder: str) -> None:
    """Writes a file that is whole or, after a kill, as it was before. `encoder` says what encoded the prompts."""
    tensors = {name: prompt.context.contiguous() for name, prompt in prompts.items()}
    words = {name: prompt.words for name, prompt in prompts.items()}
    save_tensors(path, tensors, {**words, ENCODER: encoder}, "prompts")
