import pytest
import torch
from poison import poisoned

import oracles
from fngd_kernels.backends.torch.gram_hadamard import gram_hadamard as library_gram_hadamard
from fngd_kernels.backends.triton import gram_hadamard as fused

# On top of twice the library's error; products of 16-bit numbers are exact, tensor cores cut off their sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
LAYERS = [(5, 3, True), (33, 1, False), (1, 130, True), (16, 32, True)]


def layers(n, dtype, device):
    for inputs, outputs, bias in LAYERS:
        a, e = torch.randn(n, 1, inputs), torch.randn(n, 1, outputs)
        yield a.to(device, dtype), e.to(device, dtype), bias


def assert_as_good_as_the_library(a, e, bias):
    with poisoned():
        k = fused.gram_hadamard(a, e, bias)
    assert k.shape == (len(a), len(a))
    assert k.dtype == torch.float32
    library = library_gram_hadamard(a, e, bias).cpu()
    rows = oracles.linear_rows(a.cpu(), e.cpu(), bias)
    exact = rows @ rows.T
    allowed = 2 * oracles.relative_error(library, exact) + TOLERANCE[a.dtype]
    assert oracles.relative_error(k.cpu(), exact) <= allowed
    assert torch.equal(k, k.T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 3, 17, 33, 100])
def test_gram(n, dtype, device):
    for layer in layers(n, dtype, device):
        assert_as_good_as_the_library(*layer)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_every_tile(multiprocessors, arch, device, monkeypatch):
    monkeypatch.setattr(fused, "capability", lambda _: divmod(arch, 10))
    monkeypatch.setattr(fused, "multiprocessors", lambda _: multiprocessors)
    for dtype in TOLERANCE:
        for layer in layers(33, dtype, device):
            assert_as_good_as_the_library(*layer)


def test_any_strides(device):
    a = torch.randn(11, 1, 9, device=device).permute(2, 1, 0)
    assert_as_good_as_the_library(a, torch.randn(1, 1, 4, device=device).expand(9, 1, 4), True)
    a = torch.randn(18, 1, 6, device=device)[::2, :, ::3]
    assert_as_good_as_the_library(a, torch.randn(9, 7, 5, device=device)[:, 3:4], False)


def test_same_bits_every_time(device):
    for layer in layers(33, torch.float32, device):
        assert torch.equal(fused.gram_hadamard(*layer), fused.gram_hadamard(*layer))


@pytest.mark.parametrize(("count", "n"), [(2, 33), (18, 5)])
def test_layers_of_one_launch_have_the_bits_of_their_own(count, n, device, monkeypatch):
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 1)  # so that the tiles are the same
    cases = [(torch.randn(n, 1, 5, device=device), torch.randn(n, 1, 9, device=device)) for _ in range(count)]
    with poisoned():
        k = fused.gram_hadamard_batch(*zip(*cases, strict=True), True)
    assert k.shape == (count, n, n)
    for own, (a, e) in zip(k, cases, strict=True):
        assert torch.equal(own, fused.gram_hadamard(a, e, True))
