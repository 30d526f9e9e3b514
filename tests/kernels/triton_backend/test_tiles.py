import pytest
import torch

from fngd_kernels.backends.triton.tiles import TILES, Tile, tile


def table(*rows):
    return {"some": {row: Tile({"ROWS": number}, 4, 3, "") for number, row in enumerate(rows)}}


@pytest.mark.parametrize(
    ("capability", "dtype", "row"),
    [
        ((8, 0), torch.bfloat16, 0),
        ((8, 9), torch.float16, 0),
        ((9, 0), torch.bfloat16, 1),
        ((12, 0), torch.bfloat16, 1),
        ((7, 5), torch.bfloat16, 0),
        ((0, 0), torch.float32, 2),
        ((9, 0), torch.float32, 2),
    ],
)
def test_newest_row_up_to_the_architecture(capability, dtype, row, monkeypatch):
    monkeypatch.setattr("fngd_kernels.backends.triton.tiles.TILES", table((80, 2), (90, 2), (80, 4)))
    assert tile("some", capability, dtype.itemsize).blocks["ROWS"] == row


@pytest.mark.parametrize("kernel", TILES)
def test_every_row_can_launch_and_tells_how_it_was_chosen(kernel):
    for (arch, itemsize), chosen in TILES[kernel].items():
        assert arch in (80, 90, 100)
        assert itemsize in (2, 4)
        assert all(block & (block - 1) == 0 for block in chosen.blocks.values())
        assert chosen.num_warps in (1, 2, 4, 8)
        assert chosen.evidence
