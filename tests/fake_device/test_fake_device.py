"""The device that is not there: what it refuses, what it counts as a wait, and that its numbers are right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_device import CUDA, FakeDevice, Refused
from torch import Tensor

CPU_ROW = torch.ones(3)


def there(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


def test_tensors_say_where_they_are():
    with FakeDevice():
        for x in (there(3), CPU_ROW.to("cuda"), CPU_ROW.cuda(), torch.tensor([1.0], device=CUDA), there(3).half()):
            assert (x.device, x.is_cuda, x.get_device()) == (CUDA, True, 0)
        layer = torch.nn.Linear(3, 2).to("cuda")
        assert isinstance(layer.weight, torch.nn.Parameter)
        for x in (there(3) + 1, layer(there(3)), torch.zeros_like(there(3)), there(3).new_zeros(2), layer.weight.data):
            assert x.device == CUDA
        for x in (there(3).cpu(), there(3).to("cpu"), torch.empty_like(there(2), device="cpu"), torch.ones(3)):
            assert (x.device.type, x.is_cuda) == ("cpu", False)
        assert there(2).tolist() == [1.0, 1.0]
    assert not torch.cuda.is_available()


REFUSED: dict[str, Callable[[], object]] = {
    "a sum": lambda: there(3) + CPU_ROW,
    "the other way": lambda: CPU_ROW * there(3),
    "in place": lambda: there(3).add_(CPU_ROW),
    "into a number of the host": lambda: torch.tensor(1.0).add_(there(1)[0]),
    "a product": lambda: there(3, 3) @ torch.ones(3, 3),
    "a layer": lambda: torch.nn.Linear(3, 3)(there(3)),
    "joined": lambda: torch.cat((there(3), CPU_ROW)),
    "attention": lambda: F.scaled_dot_product_attention(there(1, 2, 3, 4), there(1, 2, 3, 4), torch.ones(1, 2, 3, 4)),
    "chosen by indices of the device": lambda: CPU_ROW[there(2).long()],
    "a generator of the host": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "a generator of the device": lambda: torch.randn(3, generator=torch.Generator("cuda")),
    "numpy": lambda: there(3).numpy(),
    "pinned": lambda: there(3).pin_memory(),
    "a time that has not passed": lambda: _elapsed(),
}


def _elapsed() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    there(3).add_(1)
    end.record()
    return start.elapsed_time(end)


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_device_refuses(what: str):
    with pytest.raises(Refused), FakeDevice():  # noqa: PT012
        with pytest.raises(Refused):
            REFUSED[what]()
        there(3)  # whoever caught it does not keep it from being told at the end


def pinned() -> Tensor:
    return CPU_ROW.pin_memory()


WAITS: dict[str, tuple[int, Callable[[], object]]] = {
    "work": (0, lambda: (there(3) * 2).sum()),
    "a number of the host": (0, lambda: there(3) * torch.tensor(2.0)),
    "a number written": (0, lambda: there(3).__setitem__(0, 5.0)),
    "item": (1, lambda: there(3).sum().item()),
    "bool": (1, lambda: bool((there(3) > 0).all())),
    "tolist": (1, lambda: there(3).tolist()),
    "nonzero": (1, lambda: there(3).nonzero()),
    "boolean indices": (1, lambda: there(3)[there(3) > 0]),
    "equal": (1, lambda: torch.equal(there(3), there(3))),
    "indices on the CPU": (1, lambda: there(3)[torch.tensor([0, 1])]),
    "to the CPU": (1, lambda: there(3).cpu()),
    "to the CPU, later": (0, lambda: there(3).to("cpu", non_blocking=True)),
    "to the device": (1, lambda: CPU_ROW.to("cuda")),
    "to the device, ordinary memory": (1, lambda: CPU_ROW.to("cuda", non_blocking=True)),
    "to the device, blocking": (1, lambda: pinned().to("cuda")),
    "to the device, pinned": (0, lambda: pinned().to("cuda", non_blocking=True)),
    "to the device, converted": (1, lambda: pinned().to("cuda", torch.float64, non_blocking=True)),
    "a list": (1, lambda: torch.tensor([1.0], device="cuda")),
    "copied in": (1, lambda: there(3).copy_(CPU_ROW)),
    "synchronised twice": (1, lambda: (there(3), torch.cuda.synchronize(), torch.cuda.synchronize())),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_for_the_device(what: str):
    count, work = WAITS[what]
    with FakeDevice() as fake:
        work()
    assert len(fake.waits) == count


def test_a_copy_must_be_waited_for():
    with FakeDevice() as fake:
        copy = there(3).to("cpu", non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        with pytest.raises(Refused, match="may not have written yet"):
            copy.sum()
        with pytest.raises(Refused, match="may not have written yet"):
            copy.tolist()
        done.synchronize()
        assert copy.tolist() == [1.0] * 3
        fake.errors.clear()


def test_synchronize_waits_for_every_stream():
    """A copy in a side stream that nobody has heard of yet is over as well."""
    with FakeDevice() as fake:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            copy = there(3).to("cpu", non_blocking=True)
        torch.cuda.synchronize()
        assert copy.tolist() == [1.0] * 3
    assert len(fake.waits) == 1


def test_memory_that_is_still_read_must_not_change():
    with FakeDevice() as fake:
        source = pinned()
        source.to("cuda", non_blocking=True)
        with pytest.raises(Refused, match="may not have read yet"):
            source.add_(1)
        torch.cuda.synchronize()
        source.add_(1)
        fake.errors.clear()


@pytest.mark.parametrize("waits", ["nobody", "the stream", "the host"])
def test_streams_must_wait_for_each_other(waits: str):
    with FakeDevice() as fake:
        x, side = there(3), torch.cuda.Stream()
        if waits == "the stream":
            side.wait_stream(torch.cuda.current_stream())
        if waits == "the host":
            torch.cuda.synchronize()
        with torch.cuda.stream(side):
            if waits == "nobody":
                with pytest.raises(Refused, match="may not have written yet"):
                    x + 1
            else:
                x + 1
        assert bool(fake.errors) == (waits == "nobody")
        fake.errors.clear()


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_goes_back_to_its_stream(recorded: bool):
    with FakeDevice() as fake:
        x, side = there(3), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.sum()
        if recorded:
            x.record_stream(side)
        del x
        assert bool(fake.errors) != recorded
        fake.errors.clear()


def test_gradients_are_those_of_the_cpu():
    """Through attention, complex rotations, convolutions, norms, slices, copies from and to the device, and indices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 6, 8, generator=generator)
    turn = torch.polar(torch.ones(6, 4), torch.linspace(0, 3, 24).view(6, 4))
    kernel = torch.randn(4, 4, 3, 3, generator=generator)

    def gradient(device: str) -> np.ndarray:
        leaf = x.clone().requires_grad_()
        y = leaf.to(device)
        y = F.conv2d(y, kernel.to(device), padding=1) + F.gelu(y)
        y = torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2))) * turn.to(device)).flatten(-2)
        y = F.layer_norm(F.scaled_dot_product_attention(y[:, :, :3], y, y), (8,)) + F.rms_norm(y[:, :, 3:], (8,))
        picked = y[:, :, torch.tensor([0, 2, 2]).to(device)]
        (picked.square().sum().cpu() + y.exp().mean().cpu()).backward()
        return leaf.grad.numpy()

    wanted = gradient("cpu")
    with FakeDevice():
        found = gradient("cuda")
    np.testing.assert_array_equal(found, wanted)
