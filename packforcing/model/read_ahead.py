"""Weights that lie in host memory, read to the device one layer ahead of the pass that needs them.

A layer's weights are copied on a stream of their own into one of two slots on the device, while the layer before
computes. So the device never waits for the host, and waits for the bus only where a copy takes longer than a layer.
With the copies in the weights' place a pass computes what it would with the weights there: the same bits.

    side   copy 0 | copy 1      | copy 2 (over 0, when layer 0 is done) ...
    main          | layer 0     | layer 1     | layer 2 ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SLOTS = 2  # the layer that computes, and the next one
PROMPT_PARTS = ("cross_attn.k", "cross_attn.v", "cross_attn.norm_k")  # of a layer: used once a prompt, in no pass


class Weights(Protocol):
    """Sees to it that a layer's weights are at hand while it is computed."""

    @property
    def bytes(self) -> int:
        """Bytes of the device that it takes for that, at most."""

    def at(self, layer: int) -> AbstractContextManager[None]:
        """Within it, the weights of a layer that a pass needs are there; a pass goes through the layers in order."""

    def prompt(self, layer: int) -> AbstractContextManager[None]:
        """Within it, those that make a prompt's keys and values are."""


class AtHand:
    """Weights that need no care: they lie on the device, or are brought there by whoever owns the modules."""

    bytes = 0

    def at(self, layer: int) -> AbstractContextManager[None]:
        return nullcontext()

    def prompt(self, layer: int) -> AbstractContextManager[None]:
        return nullcontext()


class CopyStream(Protocol):
    """What copies beside the main work. An event is whatever it returns."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copies (to, from) once the main work has come to the event `after`; gives the event of its end."""

    def wait(self, event: Any) -> None:
        """The main work waits for a copy; the host does not."""

    def mark(self) -> Any:
        """The event that the main work queued so far is done."""


class CudaCopyStream:
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._side):
            self._side.wait_event(after)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._recorded(self._side)

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def mark(self) -> torch.cuda.Event:
        return self._recorded(torch.cuda.current_stream(self._device))

    @staticmethod
    def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event


@dataclass(frozen=True)
class Away:
    """A tensor of a module that does not lie on the device."""

    tensors: dict[str, Any]  # where the module keeps it, under `name`
    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Copied:
    """A layer whose weights are on their way to a slot."""

    layer: int
    slot: int
    copies: list[tuple[Away, Tensor]]
    ready: Any  # the event of their arrival


class ReadAhead:
    """The weights of some layers, wherever they lie, read ahead of a pass through these layers.

    Plain tensors only: what lies on the device is left alone, and so is a quantised tensor of a class of its own, which
    its owner must bring. Where a weight lies is looked up at every layer, since its owner may move it between passes.

    Args:
        layers: of each layer, the modules whose own tensors are meant.
        device: where the layers are computed.
        stream: what copies; None: a CUDA stream, made when it is first needed.
    """

    def __init__(
        self, layers: Sequence[Sequence[nn.Module]], device: torch.device, stream: CopyStream | None = None
    ) -> None:
        self._layers = layers
        self._device = device
        self._stream = stream
        self._slots: list[dict[int, Tensor]] = [{} for _ in range(SLOTS)]
        self._free: list[Any] = [None] * SLOTS  # events: the layer that last used the slot is done
        self._turn = 0
        self._next: Copied | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the slots, when all of a layer's weights are away."""
        return SLOTS * max(sum(away.tensor.nbytes for away in self._away(i)) for i in range(len(self._layers)))

    @contextmanager
    def at(self, layer: int) -> Iterator[None]:
        """Within it, the layer's modules have their weights on the device, and the next layer's are on their way."""
        copied = self._next if self._next is not None and self._next.layer == layer else self._read(layer)
        self._next = None
        at_once = self._all_pinned(layer + 1)
        if at_once:
            self._next = self._read(layer + 1)
        with self._placed(copied):
            yield
        if not at_once:  # from ordinary memory the host takes part in a copy: only once the device has its work
            self._next = self._read(layer + 1)

    @contextmanager
    def _placed(self, copied: Copied | None) -> Iterator[None]:
        """Within it, copies stand in their weights' place, but for weights that their owner moved meanwhile."""
        if copied is None:
            yield
            return
        assert self._stream is not None, "something was copied"
        self._stream.wait(copied.ready)
        placed = [(away, copy) for away, copy in copied.copies if away.tensors.get(away.name) is away.tensor]
        try:
            for away, copy in placed:
                away.tensors[away.name] = copy
            yield
        finally:
            for away, _ in placed:
                away.tensors[away.name] = away.tensor
            self._free[copied.slot] = self._stream.mark()

    def _away(self, layer: int) -> list[Away]:
        """A layer's tensors that lie elsewhere; none beyond the last layer."""
        return [
            Away(tensors, name, tensor)
            for module in chain(*self._layers[layer : layer + 1])
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and tensor.device.type != self._device.type and type(tensor) in (Tensor, nn.Parameter)
        ]

    def _all_pinned(self, layer: int) -> bool:
        return all(away.tensor.is_pinned() for away in self._away(layer))

    def _read(self, layer: int) -> Copied | None:
        """Starts to copy a layer's weights; None if all lie on the device."""
        found = self._away(layer)
        if not found:
            return None
        if self._stream is None:
            self._stream = CudaCopyStream(self._device)
        slot, self._turn = self._turn, (self._turn + 1) % SLOTS
        pairs = [(away, self._buffer(slot, number, away.tensor)) for number, away in enumerate(found)]
        free = self._free[slot] or self._stream.mark()  # new memory may still be read by work that is queued
        ready = self._stream.copy([(buffer, away.tensor) for away, buffer in pairs], free)
        return Copied(layer, slot, pairs, ready)

    def _buffer(self, slot: int, number: int, like: Tensor) -> Tensor:
        """The slot's place for its n-th tensor. All layers have the same shapes, so it is made once."""
        place = self._slots[slot].get(number)
        if place is None or (place.shape, place.dtype) != (like.shape, like.dtype):
            place = torch.empty_like(like, device=self._device, requires_grad=False)
            self._slots[slot][number] = place
            self._free[slot] = None
        return place


class StreamedWeights:
    """`Weights` of a transformer's layers that lie in host memory, all of them or some.

    Args:
        blocks: the transformer's layers, with Wan's sub-module names.
        device: where they are computed.
        stream: that of `ReadAhead`.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, stream: CopyStream | None = None) -> None:
        # What belongs to a layer itself, its modulation, is sent once by `CausalWan`.
        parts = [[(name, module) for name, module in block.named_modules() if name] for block in blocks]
        passes = [[module for name, module in layer if name not in PROMPT_PARTS] for layer in parts]
        prompts = [[module for name, module in layer if name in PROMPT_PARTS] for layer in parts]
        self._passes, self._prompts = (ReadAhead(layers, device, stream) for layers in (passes, prompts))

    @property
    def bytes(self) -> int:
        return self._passes.bytes + self._prompts.bytes

    def at(self, layer: int) -> AbstractContextManager[None]:
        return self._passes.at(layer)

    def prompt(self, layer: int) -> AbstractContextManager[None]:
        return self._prompts.at(layer)
