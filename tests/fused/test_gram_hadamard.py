import pytest
import torch
from poison import poisoned

import oracles
from fngd_kernels.backends.torch.gram_hadamard import gram_hadamard as library_gram_hadamard
from fngd_kernels.backends.triton import gram_hadamard as fused

# On top of twice the library's error; products of 16-bit numbers are exact, tensor cores cut off their sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
LAYERS = [(5, 3, True), (33, 1, False), (1, 130, True)]


def layers(n, dtype, device):
    a = [torch.randn(n, 1, inputs).to(device, dtype) for inputs, _, _ in LAYERS]
    e = [torch.randn(n, 1, outputs).to(device, dtype) for _, outputs, _ in LAYERS]
    return a, e, [bias for *_, bias in LAYERS]


def assert_as_good_as_the_library(a, e, bias):
    with poisoned():
        k = fused.gram_hadamard(a, e, bias)
    assert k.shape == (len(a), len(a[0]), len(a[0]))
    assert k.dtype == torch.float32
    for actual, *layer in zip(k, a, e, bias, strict=True):
        library = library_gram_hadamard(*layer).cpu()
        rows = oracles.linear_rows(layer[0].cpu(), layer[1].cpu(), layer[2])
        exact = rows @ rows.T
        allowed = 2 * oracles.relative_error(library, exact) + TOLERANCE[layer[0].dtype]
        assert oracles.relative_error(actual.cpu(), exact) <= allowed
        assert torch.equal(actual, actual.T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 3, 17, 33, 100])
def test_layers_of_one_launch(n, dtype, device):
    assert_as_good_as_the_library(*layers(n, dtype, device))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_every_tile(multiprocessors, arch, device, monkeypatch):
    monkeypatch.setattr(fused, "capability", lambda _: divmod(arch, 10))
    monkeypatch.setattr(fused, "multiprocessors", lambda _: multiprocessors)
    for dtype in TOLERANCE:
        assert_as_good_as_the_library(*layers(33, dtype, device))


def test_one_layer(device):
    a, e, bias = layers(9, torch.float32, device)
    for place in range(len(LAYERS)):
        assert_as_good_as_the_library(*(some[place : place + 1] for some in (a, e, bias)))


def test_more_layers_than_a_launch_takes(device, monkeypatch):
    monkeypatch.setattr(fused, "LAYERS", 2)
    assert_as_good_as_the_library(*layers(9, torch.float32, device))


def test_any_strides(device):
    a = [
        torch.randn(11, 1, 9, device=device).permute(2, 1, 0),
        torch.randn(18, 1, 6, device=device)[::2, :, ::3],
    ]
    e = [torch.randn(1, 1, 4, device=device).expand(9, 1, 4), torch.randn(9, 7, 5, device=device)[:, 3:4]]
    assert_as_good_as_the_library(a, e, [True, False])


def test_same_bits_every_time(device):
    a, e, bias = layers(33, torch.float32, device)
    assert torch.equal(fused.gram_hadamard(a, e, bias), fused.gram_hadamard(a, e, bias))
