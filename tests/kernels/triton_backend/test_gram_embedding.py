import pytest
import torch
from poison import poisoned

import oracles
from fngd_kernels.backends.torch.gram_embedding import gram_embedding as library_gram_embedding
from fngd_kernels.backends.triton import gram_embedding as fused
from fngd_kernels.backends.triton.gram_embedding import gram_embedding, gram_embedding_diag
from fngd_kernels.workspace import WORKSPACE

# On top of twice the library's error; products of 16-bit numbers are exact, tensor cores cut off their sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}


def assert_as_good_as_the_library(ids, e, vocabulary, padding_idx):
    rows = oracles.embedding_rows(ids.cpu(), e.cpu(), vocabulary, padding_idx)
    truth = rows @ rows.T
    library = library_gram_embedding(ids, e, padding_idx, WORKSPACE).cpu()
    with poisoned():
        k, norms = gram_embedding(ids, e, padding_idx), gram_embedding_diag(ids, e, padding_idx)
    for actual, peer, exact in (k, library, truth), (norms, library.diagonal(), truth.diagonal()):
        assert actual.dtype == torch.float32
        allowed = 2 * oracles.relative_error(peer, exact) + TOLERANCE[e.dtype]
        assert oracles.relative_error(actual.cpu(), exact) <= allowed
    assert torch.equal(k, k.T)
    assert torch.equal(k, gram_embedding(ids, e, padding_idx))


@pytest.mark.parametrize(
    ("dtype", "padding_idx"),
    [(torch.float32, None), (torch.float32, 4), (torch.bfloat16, 0), (torch.float16, 0)],
)
@pytest.mark.parametrize(
    ("n", "positions", "size", "vocabulary"),
    [(1, 1, 1, 5), (17, 1, 33, 5), (20, 3, 17, 7), (3, 33, 5, 9), (1, 130, 3, 5), (5, 4, 6, 1000)],
)
def test_embedding_and_its_diagonal(n, positions, size, vocabulary, padding_idx, dtype, device):
    ids = torch.randint(vocabulary, (n, positions), device=device)
    e = torch.randn(n, positions, size).to(device, dtype)
    assert_as_good_as_the_library(ids, e, vocabulary, padding_idx)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_tile(arch, device, monkeypatch):
    monkeypatch.setattr(fused, "capability", lambda _: divmod(arch, 10))
    ids = torch.randint(7, (11, 9), device=device)
    for dtype in TOLERANCE:
        assert_as_good_as_the_library(ids, torch.randn(11, 9, 33).to(device, dtype), 7, 3)


def test_any_strides_and_32_bit_ids(device):
    ids = torch.randint(4, (11, 5), device=device, dtype=torch.int32).T
    e = torch.randn(11, 5, 12, device=device)[..., ::2].transpose(0, 1)
    assert_as_good_as_the_library(ids, e, 4, None)
    assert_as_good_as_the_library(ids[:1].expand(5, 11), e[:, :, :1].expand(5, 11, 3), 4, 1)


def test_no_common_id_gives_a_diagonal_matrix(device):
    ids, e = torch.arange(40, device=device).view(10, 4), torch.randn(10, 4, 6, device=device)
    assert_as_good_as_the_library(ids, e, 40, None)
    k = gram_embedding(ids, e, None)
    assert torch.equal(k, k.diagonal().diag())


def test_padding_alone_gives_zeros(device):
    ids, e = torch.full((3, 4), 2, device=device), torch.randn(3, 4, 5, device=device)
    with poisoned():
        k = gram_embedding(ids, e, 2)
    assert torch.equal(k, torch.zeros_like(k))
