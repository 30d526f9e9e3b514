import pytest
import torch

from bench.kernels.sketch_accuracy import compare, main
from bench.tools import jsonl


def test_measures_are_those_of_the_weighted_gradient():
    c = torch.randn(6, 20, dtype=torch.float64)
    s, found = 1 + torch.rand(2, 6, dtype=torch.float64)
    gradient, other = s @ c, found @ c
    measures = compare(c @ c.T, s, found)
    assert measures["s_error"] == pytest.approx(float((found - s).norm() / s.norm()))
    assert measures["gradient_error"] == pytest.approx(float((other - gradient).norm() / gradient.norm()))
    cosine = torch.cosine_similarity(gradient, other, dim=0)
    assert measures["gradient_cosine"] == pytest.approx(float(cosine))
    assert measures["s_correlation"] == pytest.approx(float(torch.corrcoef(torch.stack([s, found]))[0, 1]))


def test_every_kind_of_layer_has_a_row_for_every_size(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    main(["--steps", "2", "--seeds", "1", "--sizes", "4", "512", "--dampings", "0.1", "--output", str(file)])
    rows = jsonl.read(file)
    kinds = {row["layers"] for row in rows}
    assert kinds == {"Linear", "BatchNorm1d", "Conv2d", "Embedding", "LayerNorm"}
    assert {row["size"] for row in rows} == {0, 4, 512}
    exact = [row for row in rows if row["size"] == 512 and row["network"] != "Transformer"]
    assert all(row["gradient_error"] == 0 for row in exact)
    assert all(row["gradient_error"] > 0 for row in rows if row["size"] != 512)
    printed = capsys.readouterr().out
    assert "| r = 4 " in printed
    assert " exact " in printed
