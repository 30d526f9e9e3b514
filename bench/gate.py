"""The correctness gate before timing: FNGD's figures of single layers against torch.func in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fngd
from bench.contenders import fngd_optimizer, make_step
from bench.networks import Batch, Network

DAMPING = 0.1


@dataclass(frozen=True)
class Tolerance:
    """The largest deviation over the largest entry; `mode` of norms."""

    gram: float
    gradient: float
    coefficients: float
    mode: float


TOLERANCES = {
    None: Tolerance(gram=1e-5, gradient=1e-5, coefficients=1e-4, mode=1e-3),
    torch.bfloat16: Tolerance(gram=1e-2, gradient=2e-2, coefficients=1e-2, mode=0.5),
}
"""By the network's autocast dtype."""


def check(network: Network, batch: Batch) -> None:
    """Compare Gram matrices, shared coefficients' gradients and coverage on one batch of `network`.

    Raises: AssertionError that names the layer and the deviation.
    """
    device = batch[0].device
    tolerance = TOLERANCES[network.autocast]
    # the three passes below are compared: they have to round alike
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        contributions = per_sample_contributions(network, network.build(device), batch)
        _check_grams(network, network.build(device), batch, contributions, tolerance)
        _check_weighted_gradients(network, network.build(device), batch, contributions, tolerance)


def check_mode(network: Network, batch: Batch, mode: str) -> None:
    """Compare what FNGD changes about the gradients in a compiled or captured step with an eager one.

    The change alone, because a compiler rounds otherwise: behind BatchNorm in bf16 that moves the gradients
    of any optimizer by tens of percent. A layer left plain, or with weights of other samples, is 100 % off.

    Raises: AssertionError that names the parameter and the deviation.
    """
    eager, other = (_changes(network, batch, m) for m in ("eager", mode))
    for name, change in eager.items():
        deviation = float((other[name] - change).norm() / change.norm())
        # written so that NaN fails
        if not deviation <= TOLERANCES[network.autocast].mode:
            raise AssertionError(f"{mode} step: weighted gradient of {name} is {deviation:.0%} off")


def _changes(network: Network, batch: Batch, mode: str) -> dict[str, Tensor]:
    """Return FNGD's gradient less SGD's of every weighted parameter, in the last of a few steps."""
    models = [network.build(batch[0].device) for _ in range(2)]
    # the momentum buffer then holds the last gradient, which a graph's step has deleted
    options: dict[str, Any] = {"lr": 0.0, "momentum": 1e-9}
    weighted = fngd_optimizer(models[0], "sgd", mode, share="sample", **options)
    plain = torch.optim.SGD(models[1].parameters(), **options)
    for model, optimizer in zip(models, (weighted, plain), strict=True):
        step = make_step(network, batch, model, optimizer, mode)
        for _ in range(3):
            step()
    kinds = weighted.coverage()
    return {
        name: weighted.state[p]["momentum_buffer"] - plain.state[q]["momentum_buffer"]
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True)
        if not kinds[name].startswith("plain")
    }


def per_sample_contributions(
    network: Network, model: nn.Module, batch: Batch
) -> dict[str, dict[str, Tensor]]:
    """Each sample's share (N, *shape) of every parameter's gradient, in float64, for the gate's layers.

    A layer's input and its output's gradient come from an ordinary backward; what each sample contributes is
    the gradient of <its output, its output gradient>, which also defines it behind BatchNorm.
    """
    with _captured(model, network.gate) as captured:
        network.objective(model, *batch).backward()
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
    network: Network,
    model: nn.Module,
    batch: Batch,
    contributions: dict[str, dict[str, Tensor]],
    tolerance: Tolerance,
) -> None:
    grams = fngd.layer_grams(model, lambda: network.objective(model, *batch))
    owners = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert grams.keys() == owners, f"layers without a Gram matrix: {sorted(owners - grams.keys())}"
    for name, parts in contributions.items():
        rows = _flat(parts)
        _assert_close(f"Gram matrix of {name}", grams[name], rows @ rows.T, tolerance.gram)


def _check_weighted_gradients(
    network: Network,
    model: nn.Module,
    batch: Batch,
    contributions: dict[str, dict[str, Tensor]],
    tolerance: Tolerance,
) -> None:
    ids = torch.arange(len(batch[0]))
    optimizer = fngd.FNGD(model, lr=0.0, damping=DAMPING, share="sample")
    for _ in range(2):
        optimizer.set_samples(ids)
        optimizer.zero_grad()
        network.objective(model, *batch).backward()
        optimizer.step()
    # the second pass took its coefficients from the table
    assert optimizer.stats()["solved_batches"] == 1
    state = optimizer.state_dict()["fngd"]
    for index, name in enumerate(state["layers"]):
        if name not in contributions:
            continue
        s = state["values"][index, ids].double()
        expected_s = _coefficients(_flat(contributions[name]), DAMPING)
        _assert_close(f"coefficients of {name}", s, expected_s, tolerance.coefficients)
        for part, rows in contributions[name].items():
            gradient = model.get_submodule(name).get_parameter(part).grad
            assert gradient is not None
            expected = torch.tensordot(s, rows, dims=1)
            _assert_close(f"weighted gradient of {name}.{part}", gradient, expected, tolerance.gradient)


def _flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


def _coefficients(rows: Tensor, damping: float) -> Tensor:
    """Solve (damping tr(F) I + F) v = 1, F_ij = <g_i, g_j> / N with g_n = N C_n; returns v / mean(v)."""
    fisher = len(rows) * rows @ rows.T
    fisher.diagonal().add_(damping * fisher.trace())
    v = torch.linalg.solve(fisher, fisher.new_ones(len(rows)))
    return v / v.mean()


def _assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    deviation = float((actual.double() - expected).abs().max() / expected.abs().max())
    assert deviation <= tolerance, f"{what}: relative deviation {deviation:.1e}, over {tolerance:.0e}"
