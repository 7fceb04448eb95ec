"""Weights read ahead of their layer: the same bits, two layers of memory, and the order of copies and passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from copy_streams import ELSEWHERE, Recorder, slots_on_cpu
from torch import Tensor, nn

from packforcing.bench.baselines import block_input, make_block
from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.errors import PackForcingError
from packforcing.generate.sampling import Sampling
from packforcing.known_models import KNOWN_MODELS
from packforcing.model.causal_wan import CausalWan
from packforcing.model.load import check_speed, make_causal_wan
from packforcing.model.read_ahead import PROMPT_PARTS, ReadAhead, StreamedWeights
from packforcing.model.wan_modules import WanModules, WanSizes, build_wan_modules, random_state_dict
from packforcing.model.weight_count import weight_count

SMALL = WanSizes(dim=64, ffn_dim=96, layers=3, heads=2, text_dim=32, freq_dim=16)
LAYOUT = Layout(CacheConfig(block_frames=2, sink_frames=2, recent_frames=2, top_k=2), FrameSize(128, 64), 2)
SAMPLING = Sampling(seed=3, steps=2)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots lie on the CPU, whatever the device is called."""
    slots_on_cpu(monkeypatch)


def modules() -> WanModules:
    return build_wan_modules(SMALL, random_state_dict(SMALL, seed=1))


def made(wan: CausalWan, blocks: int = 4) -> Tensor:
    """All latents of a video under a prompt."""
    with torch.no_grad():
        text = wan.embed_text(torch.randn(1, 5, SMALL.text_dim, generator=torch.Generator().manual_seed(0)))
        cache = Cache(LAYOUT, SMALL.shape, torch.device("cpu"), torch.float32)
        return torch.cat(
            [make_block(wan, text, cache, SAMPLING, block_input(wan, LAYOUT, SAMPLING, i)) for i in range(blocks)], 2
        )


class Poisoned(Recorder):
    """Whatever a slot held is gone as soon as it may be written again."""

    def copy(self, pairs: list[tuple[Tensor, Tensor]], after: str) -> str:
        for target, _ in pairs:
            target.fill_(torch.nan)
        return super().copy(pairs, after)


def test_a_video_from_streamed_weights_has_the_same_bits_and_the_weights_are_left_as_they_were(on_cpu: None):
    plain, streamed = (CausalWan(modules(), text_len=0) for _ in range(2))
    before = dict(streamed.modules.named_parameters())
    stream = Poisoned()
    streamed.weights = StreamedWeights(streamed.modules.blocks, ELSEWHERE, stream)
    assert torch.equal(made(plain), made(streamed))
    after = dict(streamed.modules.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert len([line for line in stream.asked if line.startswith("copy")]) == SMALL.layers * (1 + 4 * 3)


def numbered(count: int, stream: Recorder) -> list[list[nn.Module]]:
    layers: list[list[nn.Module]] = [[nn.Linear(2, 2).requires_grad_(False)] for _ in range(count)]
    stream.names = {layer[0].weight.data_ptr(): str(number) for number, layer in enumerate(layers)}
    return layers


@pytest.mark.parametrize("pinned", [True, False])
def test_a_layer_is_copied_while_the_one_before_computes(on_cpu: None, monkeypatch: pytest.MonkeyPatch, pinned: bool):
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: pinned)
    stream = Recorder()
    layers = numbered(4, stream)
    ahead = ReadAhead(layers, ELSEWHERE, stream)
    held = []
    for number, (layer,) in enumerate(layers):
        with ahead.at(number):
            held.append(layer.weight.data_ptr())
            stream.asked.append(f"compute {number}")
    assert held[0] == held[2] != held[1] == held[3], "two slots, in turn"
    assert not set(held) & {layer[0].weight.data_ptr() for layer in layers}
    # A slot is written again only after the layer that used it: its mark is the third and the fourth, the first two
    # being those of the slots' making.
    quick = [
        ["copy 0 after mark 1", "copy 1 after mark 2", "wait for copy 0", "compute 0"],
        ["copy 2 after mark 3", "wait for copy 1", "compute 1"],
        ["copy 3 after mark 4", "wait for copy 2", "compute 2"],
        ["wait for copy 3", "compute 3"],
    ]
    # From ordinary memory the host copies too: only after the layer's own work is queued.
    slow = [
        ["copy 0 after mark 1", "wait for copy 0", "compute 0"],
        ["copy 1 after mark 3", "wait for copy 1", "compute 1"],
        ["copy 2 after mark 2", "wait for copy 2", "compute 2"],
        ["copy 3 after mark 4", "wait for copy 3", "compute 3"],
    ]
    assert stream.asked == [line for lines in (quick if pinned else slow) for line in lines]


def test_what_lies_on_the_device_is_left_alone():
    layers = numbered(2, Recorder())
    ahead = ReadAhead(layers, torch.device("cpu"))  # without a stream: none is needed
    assert ahead.bytes == 0
    own = layers[0][0].weight
    with ahead.at(0):
        assert layers[0][0].weight is own


def test_a_weight_that_moved_meanwhile_and_one_of_a_class_of_its_own_are_left_alone(on_cpu: None):
    class Quantised(Tensor):
        pass

    stream = Recorder()
    layers = numbered(2, stream)
    layers[1][0].register_buffer("scales", torch.ones(2).as_subclass(Quantised))
    ahead = ReadAhead(layers, ELSEWHERE, stream)
    with ahead.at(0):
        pass
    moved = nn.Parameter(torch.zeros(2, 2))
    layers[1][0].weight = moved
    scales = layers[1][0].scales
    with ahead.at(1):
        assert layers[1][0].weight is moved
        assert layers[1][0].scales is scales
        assert layers[1][0].bias is not None


def test_an_interrupted_pass_leaves_the_weights_in_place_and_the_next_one_starts_anew(on_cpu: None):
    def interrupted(ahead: ReadAhead) -> None:
        with ahead.at(0):
            raise KeyboardInterrupt

    stream = Recorder()
    layers = numbered(3, stream)
    own = [layer[0].weight for layer in layers]
    ahead = ReadAhead(layers, ELSEWHERE, stream)
    with pytest.raises(KeyboardInterrupt):
        interrupted(ahead)
    assert all(layer[0].weight is weight for layer, weight in zip(layers, own, strict=True))
    values = [layer[0].weight.clone() for layer in layers]
    for number, (layer,) in enumerate(layers):
        with ahead.at(number):
            assert torch.equal(layer.weight, values[number])


def parts(blocks: nn.ModuleList) -> Iterator[tuple[str, Tensor]]:
    for block in blocks:
        yield from block.named_parameters()


def test_the_count_of_weights_is_that_of_the_tensors():
    model = KNOWN_MODELS["tiny"]
    count, real = weight_count(model), WanModules(model.sizes)
    layers = sum(tensor.numel() for _, tensor in parts(real.blocks))
    everything = sum(tensor.numel() for tensor in real.parameters())
    assert count.bytes(2, 0) == 2 * everything
    matrices = sum(tensor.numel() for name, tensor in parts(real.blocks) if tensor.ndim == 2)
    assert count.bytes(2, 0, fp8=True) == 2 * everything - matrices
    streamed = StreamedWeights(real.blocks, ELSEWHERE)
    assert count.bytes(4, 0, streamed=True) == 4 * (everything - layers) + streamed.bytes
    skipped = sum(t.numel() for name, t in parts(real.blocks) if name.startswith(PROMPT_PARTS) or name == "modulation")
    assert count.pass_bytes(4, fp8=False) == 4 * (layers - skipped)


def test_a_transformer_on_the_host_keeps_only_its_layers_there():
    wan = make_causal_wan(modules(), "cpu", torch.float32, weights_device="host")
    assert isinstance(wan.weights, StreamedWeights)
    assert wan.weights.bytes == 0, "on a CPU host and device are one"


def test_compiled_layers_cannot_be_streamed():
    with pytest.raises(PackForcingError, match="drop one of them"):
        check_speed(torch.device("cpu"), "model", compiled=True, weights_device="host")
