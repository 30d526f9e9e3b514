import pytest
import torch
from poison import poisoned

import oracles
from fngd_kernels.backends.torch.combine_embedding import combine_embedding as library_combine_embedding
from fngd_kernels.backends.triton.combine_embedding import combine_embedding

# On top of twice the library's error: one rounding of the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def assert_as_good_as_the_library(ids, e, s, num_embeddings, padding_idx):
    with poisoned():
        combined = combine_embedding(ids, e, s, num_embeddings, padding_idx)
    assert combined.dtype == e.dtype
    assert combined.shape == (num_embeddings, e.shape[-1])
    exact = (s.double() @ oracles.embedding_rows(ids, e, num_embeddings, padding_idx)).view(combined.shape)
    library = library_combine_embedding(ids, e, s, num_embeddings, padding_idx)
    allowed = 2 * oracles.relative_error(library, exact) + TOLERANCE[e.dtype]
    assert oracles.relative_error(combined, exact) <= allowed
    if padding_idx is not None:
        assert not combined[padding_idx].count_nonzero()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding_idx", [None, 0, 4])
@pytest.mark.parametrize("shape", [(1,), (33,), (3, 1), (17, 9)])
def test_weighted_gradient(shape, padding_idx, dtype, device):
    ids, e = torch.randint(5, shape, device=device), torch.randn(*shape, 7).to(device, dtype)
    assert_as_good_as_the_library(ids, e, torch.randn(shape[0], device=device), 11, padding_idx)


@pytest.mark.parametrize("num_embeddings", [1, 2, 1000])
def test_runs_of_any_length(num_embeddings, device):
    # One id: a run over every chunk, longer than the 32 chunks that are joined at a time; 1000: no repeats.
    positions = 1100 if num_embeddings == 1 else 70
    ids = torch.randperm(1000, device=device)[:positions].remainder(num_embeddings)
    ids = ids if num_embeddings > 1 else torch.zeros(positions, dtype=torch.int64, device=device)
    e, s = torch.randn(1, positions, 3, device=device), torch.randn(1, device=device)
    assert_as_good_as_the_library(ids[None], e, s, num_embeddings, None)


def test_runs_that_end_with_a_chunk(device):
    ids = torch.tensor([0] * 32 + [1] * 31 + [2] * 33 + [3] * 64, device=device)
    e, s = torch.randn(160, 5, device=device), torch.randn(160, device=device)
    assert_as_good_as_the_library(ids, e, s, 5, None)
    assert_as_good_as_the_library(ids, e, s, 5, 3)


def test_columns_over_several_programs(device):
    ids, e = torch.randint(4, (5, 9), device=device), torch.randn(5, 9, 129, device=device)
    assert_as_good_as_the_library(ids, e, torch.randn(5, device=device), 4, None)


def test_any_strides(device):
    ids = torch.randint(4, (11, 10), device=device).int().T
    e = torch.randn(11, 10, 12, device=device)[..., ::2].transpose(0, 1)
    s = torch.randn(20, device=device)[::2]
    assert_as_good_as_the_library(ids, e, s, 4, None)
    assert_as_good_as_the_library(ids, e[:, :1].expand_as(e), s, 4, 2)


def test_no_samples_give_zeros(device):
    ids, e = torch.zeros(0, 3, dtype=torch.int64, device=device), torch.zeros(0, 3, 4, device=device)
    assert not combine_embedding(ids, e, torch.zeros(0, device=device), 6, None).count_nonzero()


def test_ids_outside_the_weight_write_nothing(device):
    ids, e = torch.tensor([0, 3, 2, -1], device=device), torch.ones(4, 2, device=device)
    combined = combine_embedding(ids, e, torch.ones(4, device=device), 3, None)
    assert combined.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_same_bits_every_time(device):
    ids, e = torch.zeros(2, 40, dtype=torch.int64, device=device), torch.randn(2, 40, 3, device=device)
    s = torch.randn(2, device=device)
    assert torch.equal(combine_embedding(ids, e, s, 2, None), combine_embedding(ids, e, s, 2, None))
