"""No tensor is made with the dtype or on the device that a program has set as its default."""

import ast
import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import fngd
from networks import make
from paths import ROOT

FILES = sorted([*(ROOT / "fngd_kernels").rglob("*.py"), *(ROOT / "python" / "fngd").rglob("*.py")])
FACTORIES = """
arange as_tensor asarray empty empty_permuted empty_strided eye full hann_window linspace logspace normal ones
rand randint randn randperm range scalar_tensor tensor tril_indices triu_indices zeros
"""
NEEDED = {name: {"dtype", "device"} for name in FACTORIES.split()} | {"Generator": {"device"}}


def factory(node):
    """Return the name in NEEDED that an expression `torch.name` is, None for any other."""
    named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    return node.attr if named and node.attr in NEEDED else None


def offending(source):
    """Return the lines that make a tensor and leave its dtype or its device to the defaults."""
    complete, found = set(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            # torch.zeros(...), or partial(torch.zeros, ...)
            for made in (node.func, *node.args[:1]):
                if factory(made) and NEEDED[factory(made)] <= {keyword.arg for keyword in node.keywords}:
                    complete.add(id(made))
        if factory(node):
            found[id(node)] = node.lineno
    return sorted(line for number, line in found.items() if number not in complete)


def test_the_check_finds_what_it_looks_for():
    source = """
torch.zeros(3)
torch.zeros(3, dtype=d)
torch.zeros(3, dtype=d, device=x.device)
partial(torch.randn, device="cpu")(3)
partial(torch.randn, dtype=d, device="cpu")(3)
[torch.arange][0](3)
torch.Generator().manual_seed(0)
x.new_zeros(3), torch.zeros_like(x)
"""
    assert offending(source) == [2, 3, 5, 7, 8]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_factories_name_dtype_and_device(path):
    assert offending(path.read_text()) == []


@contextmanager
def defaults(dtype):
    """Set defaults that nothing can be computed with: another dtype, and a device without data."""
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def trained(model, x, y, sketch):
    opt = fngd.FNGD(model, lr=0.1, share="none", norms="weighted", sketch=sketch)
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return opt.coverage(), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sketch", [None, 2], ids=["exact", "sketched"])
@pytest.mark.parametrize("name", ["mlp", "conv2d-groups-reflect", "language-model", "lstm", "transformer"])
def test_a_step_does_not_depend_on_the_defaults(name, sketch, default):
    model, x, y = make(name, 6, torch.float32)
    torch.manual_seed(0)
    coverage, expected = trained(copy.deepcopy(model), x, y, sketch)
    torch.manual_seed(0)
    with defaults(default):
        found = trained(model, x, y, sketch)
    assert found[0] == coverage
    assert all(map(torch.equal, found[1], expected))


def test_a_gauss_newton_step_does_not_depend_on_the_defaults():
    model, x, _ = make("mlp", 6)
    other = copy.deepcopy(model)
    fngd.GaussNewton(other).step(lambda: other(x) - 1)
    with defaults(torch.bfloat16):
        fngd.GaussNewton(model).step(lambda: model(x) - 1)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_counters_made_under_inference_mode_count_outside():
    model, x, y = make("mlp", 6, torch.float32)
    with torch.inference_mode():
        opt = fngd.FNGD(model, share="none")
    F.cross_entropy(model(x * torch.nan), y).backward()
    opt.step()
    state = opt.state_dict()
    with torch.inference_mode():
        assert opt.stats()["skipped_steps"] == 1
    opt.load_state_dict(state)
    F.cross_entropy(model(x * torch.nan), y).backward()
    opt.step()
    assert opt.stats()["skipped_steps"] == 2
