"""The VAE's convolutions on a CPU, against a sum over the kernel's places in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from packforcing.model.vae_convolutions import Conv2d, Conv3d, takes_onednn


def by_places(x: Tensor, layer: Conv2d | Conv3d) -> Tensor:
    """The convolution as a sum over the places of its kernel, each a product of channels, in float64."""
    padding = [amount for axis in reversed(layer.padding) for amount in (axis, axis)]
    x = torch.nn.functional.pad(x.double(), padding)
    kernel, stride = layer.kernel_size, layer.stride
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    out = layer.bias.double().view(-1, *[1] * len(size)).expand(len(x), -1, *size).clone()
    for place in torch.cartesian_prod(*map(torch.arange, kernel)).tolist():
        window = x
        for axis, (start, step, count) in enumerate(zip(place, stride, size, strict=True)):
            window = window.narrow(axis + 2, start, step * (count - 1) + 1)[
                (slice(None),) * (axis + 2) + (slice(None, None, step),)
            ]
        weight = layer.weight.double()[(slice(None), slice(None), *place)]
        out += torch.einsum("oc, bc... -> bo...", weight, window)
    return out


LAYERS = [
    (lambda: Conv3d(8, 6, (3, 3, 3), padding=(0, 1, 1)), (2, 8, 5, 9, 7)),
    (lambda: Conv3d(4, 8, (3, 1, 1), stride=(2, 1, 1)), (1, 4, 7, 6, 5)),
    (lambda: Conv3d(5, 3, 1), (1, 5, 2, 4, 4)),
    (lambda: Conv2d(4, 4, 3, stride=2), (3, 4, 9, 11)),
    (lambda: Conv2d(4, 2, 3, padding=1), (3, 4, 6, 5)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_they_are_convolutions_and_have_their_gradients(make, shape, channels_last: bool) -> None:
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape, requires_grad=True)
    given = x
    if channels_last:
        order = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
        layer, given = layer.to(memory_format=order), x.contiguous(memory_format=order)
    out, expected = layer(given), by_places(x, layer)
    assert takes_onednn(given)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn_like(out)
    both = [torch.autograd.grad((y * weights).sum(), [x, layer.weight, layer.bias]) for y in (out, expected)]
    for found, wanted in zip(*both, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_other_types_are_left_to_pytorch() -> None:
    x = torch.randn(1, 4, 3, 6, 6)
    layer = Conv3d(4, 4, (3, 3, 3), padding=(0, 1, 1))
    assert layer.double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
