"""Weights that ComfyUI keeps on the host are read ahead of their layer: over ComfyUI's operations and over stand-ins.

The order of copies and passes is tested in `tests/model/test_read_ahead.py`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from copy_streams import ELSEWHERE, Recorder, slots_on_cpu
from torch import Tensor, nn

from packforcing.model.read_ahead import AtHand, ReadAhead

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def run(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.nodes.run")


def test_comfyuis_own_operations_take_what_was_read_ahead_patches_included(
    adapter: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """A partly loaded model: weights stay on the host, operations cast them, LoRAs are functions on the weight."""
    slots_on_cpu(monkeypatch)
    operations = importlib.import_module("comfy.ops").manual_cast
    layers = [operations.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        layer.requires_grad_(False)
    layers[1].weight_function = [lambda weight: 2 * weight]
    x = torch.randn(4, 8)
    own = [layer.weight for layer in layers]

    def through(weights: Any) -> Tensor:
        hidden = x
        for number, layer in enumerate(layers):
            with weights.at(number):
                hidden = layer(hidden)
        return hidden

    plain = through(AtHand())
    ahead = ReadAhead([[layer] for layer in layers], ELSEWHERE, Recorder())
    assert torch.equal(through(ahead), plain)
    assert torch.equal(through(ahead), plain)
    assert all(layer.weight is weight for layer, weight in zip(layers, own, strict=True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(2, 2)


def model(device: torch.device, **methods: Any) -> SimpleNamespace:
    return SimpleNamespace(load_device=device, **methods)


WAN = SimpleNamespace(modules=SimpleNamespace(blocks=nn.ModuleList(Block() for _ in range(3))))


def test_each_way_of_keeping_weights_has_its_reader(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    assert isinstance(adapter.weights_ahead(model(torch.device("cpu")), WAN), adapter.AtHand)
    assert isinstance(adapter.weights_ahead(model(CUDA), WAN), adapter.StreamedWeights)
    partly = model(CUDA, is_dynamic=lambda: False)
    assert isinstance(adapter.weights_ahead(partly, WAN), adapter.StreamedWeights)
    dynamic = model(CUDA, is_dynamic=lambda: True)
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", None)
    assert isinstance(adapter.weights_ahead(dynamic, WAN), adapter.AtHand)


class Queue(ModuleType):
    """`comfy.model_prefetch` as in Comfy-Org/ComfyUI 0.22.0 to 0.33.0, without a device."""

    def __init__(self) -> None:
        super().__init__("comfy.model_prefetch")
        self.asked: list[str] = []

    def make_prefetch_queue(self, queue: list, device: torch.device, transformer_options: dict) -> list:
        assert transformer_options["prefetch_dynamic_vbars"]
        self.asked.append("new queue")
        return [None, *queue, None]

    def prefetch_queue_pop(self, queue: list, device: torch.device, module: nn.Module | None) -> None:
        queue.pop(0)
        assert queue[0] is module
        self.asked.append("end" if module is None else "layer")

    def cleanup_prefetch_queues(self) -> None:
        self.asked.append("clean up")


def test_dynamic_vram_has_comfyuis_own_queue_read_whole_layers(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    queue = Queue()
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", queue)
    monkeypatch.setattr(adapter.comfy, "model_prefetch", queue, raising=False)
    weights = adapter.weights_ahead(model(CUDA, is_dynamic=lambda: True), WAN)
    for _ in range(2):
        for layer in range(3):
            with weights.at(layer):
                queue.asked.append("compute")
    one_pass = ["new queue", *3 * ["layer", "compute"], "end"]
    assert queue.asked == 2 * one_pass

    def interrupted() -> None:
        with weights.at(0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert queue.asked[-1] == "clean up"


@pytest.mark.parametrize(("free", "reads"), [(100, False), (99, True), (None, False)])
def test_only_what_does_not_fit_is_read_ahead(run: ModuleType, monkeypatch: pytest.MonkeyPatch, free, reads: bool):
    reader = SimpleNamespace(bytes=7)
    monkeypatch.setattr(run.adapter, "weights_ahead", lambda model, wan: reader)
    wan = SimpleNamespace(weights=AtHand())
    memory = run.DeviceMemory("a card", free, movable=40)
    planned = SimpleNamespace(models=SimpleNamespace(wan=wan), needed_bytes=60, memory=memory)
    this = run.Run(None, [], planned, (), ("keep", 1), None, 5, [])
    assert this._room_to_read_ahead() == (7 if reads else 0)
    assert (wan.weights is reader) == reads
