"""The correctness gate before timing: FNGD's figures of single layers against torch.func in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import fngd
from bench.networks import Network

GRAM_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
COEFFICIENT_TOLERANCE = 1e-4
DAMPING = 0.1


def check(network: Network, x: Tensor, y: Tensor) -> None:
    """Compare Gram matrices, shared coefficients' gradients and coverage on one batch of `network`.

    Raises: AssertionError that names the layer and the deviation.
    """
    torch.manual_seed(0)
    model = network.model()
    contributions = per_sample_contributions(network, copy.deepcopy(model), x, y)
    _check_grams(network, copy.deepcopy(model), x, y, contributions)
    _check_weighted_gradients(network, model, x, y, contributions)


def per_sample_contributions(
    network: Network, model: nn.Module, x: Tensor, y: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Each sample's share (N, *shape) of every parameter's gradient, in float64, for the gate's layers.

    A layer's input and its output's gradient come from an ordinary backward; what each sample contributes is
    the gradient of <its output, its output gradient>, which also defines it behind BatchNorm.
    """
    with _captured(model, network.gate) as captured:
        network.loss(model(x), y).backward()
    found = {}
    for name, (a, out) in captured.items():
        layer = model.get_submodule(name)
        assert out.grad is not None
        found[name] = _contributions(layer, a.detach(), out.grad)
    return found


def _contributions(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Tensor]:
    layer = copy.deepcopy(layer).double()
    a = a.double() if a.is_floating_point() else a
    if isinstance(layer, nn.BatchNorm2d):
        # its affine part alone: the normalisation couples the samples and has no parameters
        a = torch.nn.functional.batch_norm(a, None, None, training=True, eps=layer.eps)
        # too small to change the fresh layer's variance of one
        layer = nn.BatchNorm2d(layer.num_features, eps=1e-30).double().eval()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def inner(parameters: dict[str, Tensor], a: Tensor, e: Tensor) -> Tensor:
        out = torch.func.functional_call(layer, parameters, (a.unsqueeze(0),))
        return (out * e.unsqueeze(0)).sum()

    gradients = torch.func.vmap(torch.func.grad(inner), in_dims=(None, 0, 0))
    return gradients(parameters, a, e.double())


@contextmanager
def _captured(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    captured: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, a: Tensor, out: Tensor) -> None:
        out.retain_grad()
        captured[name] = (a, out)

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: keep(name, args[0], out)
        )
        for name in names
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def _check_grams(
    network: Network, model: nn.Module, x: Tensor, y: Tensor, contributions: dict[str, dict[str, Tensor]]
) -> None:
    grams = fngd.layer_grams(model, lambda: network.loss(model(x), y))
    owners = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert grams.keys() == owners, f"layers without a Gram matrix: {sorted(owners - grams.keys())}"
    for name, parts in contributions.items():
        rows = _flat(parts)
        _assert_close(f"Gram matrix of {name}", grams[name], rows @ rows.T, GRAM_TOLERANCE)


def _check_weighted_gradients(
    network: Network, model: nn.Module, x: Tensor, y: Tensor, contributions: dict[str, dict[str, Tensor]]
) -> None:
    ids = torch.arange(len(x))
    optimizer = fngd.FNGD(model, lr=0.0, damping=DAMPING, share="sample")
    for _ in range(2):
        optimizer.set_samples(ids)
        optimizer.zero_grad()
        network.loss(model(x), y).backward()
        optimizer.step()
    # the second pass took its coefficients from the table
    assert optimizer.stats()["solved_batches"] == 1
    state = optimizer.state_dict()["fngd"]
    for index, name in enumerate(state["layers"]):
        if name not in contributions:
            continue
        s = state["values"][index, ids].double()
        expected_s = _coefficients(_flat(contributions[name]), DAMPING)
        _assert_close(f"coefficients of {name}", s, expected_s, COEFFICIENT_TOLERANCE)
        for part, rows in contributions[name].items():
            gradient = model.get_submodule(name).get_parameter(part).grad
            assert gradient is not None
            expected = torch.tensordot(s, rows, dims=1)
            _assert_close(f"weighted gradient of {name}.{part}", gradient, expected, GRADIENT_TOLERANCE)


def _flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


def _coefficients(rows: Tensor, damping: float) -> Tensor:
    """Solve (damping tr(F) I + F) v = 1, F_ij = <g_i, g_j> / N with g_n = N C_n; returns v / mean(v)."""
    fisher = len(rows) * rows @ rows.T
    v = torch.linalg.solve(
        fisher + damping * fisher.trace() * torch.eye(len(rows)), torch.ones(len(rows)).double()
    )
    return v / v.mean()


def _assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    deviation = float((actual.double() - expected).abs().max() / expected.abs().max())
    assert deviation <= tolerance, f"{what}: relative deviation {deviation:.1e}, over {tolerance:.0e}"
