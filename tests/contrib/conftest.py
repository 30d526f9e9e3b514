"""Frameworks set defaults of torch and write files: each test has them for itself."""

import os

import pytest
import torch

os.environ.setdefault("DDE_BACKEND", "pytorch")


@pytest.fixture(autouse=True)
def _defaults(monkeypatch, tmp_path):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_default_dtype(before)
