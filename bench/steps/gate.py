"""The correctness gate before timing: FNGD's figures of single layers against float64.

A pass is compared with its own layer inputs and output gradients: two passes in 16 bits may round
differently, and behind BatchNorm that moves gradients by tens of percent.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fngd
from bench.steps import oracle
from bench.steps.contenders import fngd_optimizer, make_step
from bench.steps.networks import Batch, Network
from bench.tools.precision import allow_tf32

DAMPING = 0.1
# The momentum buffer then holds the last gradient, which a graph's step has deleted.
KEEP_GRADIENT: dict[str, Any] = {"lr": 0.0, "momentum": 1e-9}
NORMS = nn.LayerNorm | nn.BatchNorm2d


@dataclass(frozen=True)
class Tolerance:
    """The largest deviation over the largest entry."""

    gram: float
    gradient: float
    coefficients: float


TOLERANCES = {
    None: Tolerance(gram=1e-5, gradient=1e-5, coefficients=1e-4),
    torch.bfloat16: Tolerance(gram=1e-2, gradient=2e-2, coefficients=1e-2),
}
"""By the network's autocast dtype."""

COMPILED_TOLERANCE = 1e-2
"""Of norms, in float32: a compiler rounds otherwise, and BatchNorm amplifies that."""


class Captured(NamedTuple):
    """A layer of one pass: its input, and the gradient of the loss at its output once that is known."""

    layer: nn.Module
    a: Tensor
    e: list[Tensor]

    def contributions(self) -> dict[str, Tensor]:
        """Return each sample's share of every parameter's gradient."""
        return oracle.contributions(self.layer, self.a, self.e[0])


def check(network: Network, batch: Batch) -> None:
    """Compare Gram matrices, shared coefficients, their gradients and coverage on one batch of `network`.

    Raises:
        AssertionError: Names the layer and the deviation.
    """
    _check_grams(network, batch)
    _check_weighted_gradients(network, batch)


def check_mode(network: Network, batch: Batch, mode: str) -> None:
    """Compare what a compiled or captured step makes of the gradients.

    Raises:
        AssertionError: Names the parameter and the deviation.
    """
    if mode == "graphed":
        for share in ("sample", "none"):
            _check_graphed(network, batch, share)
    else:
        _check_compiled(network, batch, mode)


def _check_grams(network: Network, batch: Batch) -> None:
    model = network.build(batch[0].device)
    with captured(model, network.gate) as layers:
        grams = fngd.layer_grams(model, lambda: network.objective(model, *batch))
    owners = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert grams.keys() == owners, f"layers without a Gram matrix: {sorted(owners - grams.keys())}"
    for name, layer in layers.items():
        expected = oracle.gram(layer.contributions())
        _assert_close(f"Gram matrix of {name}", grams[name], expected, TOLERANCES[network.autocast].gram)


def _check_weighted_gradients(network: Network, batch: Batch) -> None:
    """Check two passes: the first solves, the second takes its coefficients from the table."""
    ids = torch.arange(len(batch[0]))
    model = network.build(batch[0].device)
    optimizer = fngd.FNGD(model, lr=0.0, damping=DAMPING, share="sample")
    solved: dict[str, Tensor] = {}
    for _ in range(2):
        with captured(model, network.gate) as layers:
            optimizer.set_samples(ids)
            optimizer.zero_grad()
            network.objective(model, *batch).backward()
            optimizer.step()
        if not solved:
            solved = {name: _solved(layer) for name, layer in layers.items()}
    assert optimizer.stats()["solved_batches"] == 1
    tolerance = TOLERANCES[network.autocast]
    for name in _weighted(optimizer, layers):
        s = _shared(optimizer, name, ids)
        _assert_close(f"coefficients of {name}", s, solved[name], tolerance.coefficients)
        gradients = {part: p.grad for part, p in layers[name].layer.named_parameters()}
        _check_gradients(name, layers[name], s, gradients, tolerance.gradient)


def _check_graphed(network: Network, batch: Batch, share: str) -> None:
    """Check a captured pass, whose tensors each replay fills again."""
    ids = torch.arange(len(batch[0]))
    model = network.build(batch[0].device)
    optimizer = fngd_optimizer(model, "sgd", "graphed", share=share, damping=DAMPING, **KEEP_GRADIENT)
    with captured(model, network.gate) as layers:
        step = make_step(network, batch, model, optimizer, "graphed")
        step()
    for name in _weighted(optimizer, layers):
        layer = layers[name]
        s = _solved(layer) if share == "none" else _shared(optimizer, name, ids)
        gradients = {
            part: optimizer.state[p]["momentum_buffer"] for part, p in layer.layer.named_parameters()
        }
        where = f"{name}, graphed, share={share!r}"
        _check_gradients(where, layer, s, gradients, TOLERANCES[network.autocast].gradient)


def _check_compiled(network: Network, batch: Batch, mode: str) -> None:
    """Compare the change that FNGD makes with an eager step's, in float32 as the CPU multiplies it.

    A layer left plain, or with weights of other samples, is 100 % off.
    """
    network = dataclasses.replace(network, autocast=None)
    with allow_tf32(False):
        eager, other = (_changes(network, batch, m) for m in ("eager", mode))
    for name, change in eager.items():
        deviation = float((other[name] - change).norm() / change.norm())
        # Written so that NaN fails.
        if not deviation <= COMPILED_TOLERANCE:
            raise AssertionError(f"{mode} step: weighted gradient of {name} is {deviation:.0%} off")


def _changes(network: Network, batch: Batch, mode: str) -> dict[str, Tensor]:
    """Return FNGD's gradient less SGD's of every weighted parameter, in the last of a few steps."""
    models = [network.build(batch[0].device) for _ in range(2)]
    weighted = fngd_optimizer(models[0], "sgd", mode, share="sample", **KEEP_GRADIENT)
    plain = torch.optim.SGD(models[1].parameters(), **KEEP_GRADIENT)
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


@contextmanager
def captured(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Captured]]:
    """Yield what the named layers of `model` take in and get back; of several passes the last."""
    layers: dict[str, Captured] = {}

    def keep(name: str, layer: nn.Module, a: Tensor, out: Tensor) -> None:
        layers[name] = Captured(layer, a.detach(), [])
        out.register_hook(layers[name].e.append)

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, out, name=name: keep(name, layer, args[0], out)
        )
        for name in names
    ]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def _solved(layer: Captured) -> Tensor:
    return oracle.coefficients(oracle.gram(layer.contributions()), DAMPING)


def _weighted(optimizer: fngd.FNGD, layers: dict[str, Captured]) -> list[str]:
    """Return the layers that are to be weighted: all but normalisations, which keep their gradient."""
    names = [name for name, captured in layers.items() if not isinstance(captured.layer, NORMS)]
    plain = [name for name in names if optimizer.coverage()[f"{name}.weight"].startswith("plain")]
    assert not plain, f"layers with the plain gradient: {plain}"
    return names


def _shared(optimizer: fngd.FNGD, name: str, ids: Tensor) -> Tensor:
    """Return the table's coefficients of a layer."""
    state = optimizer.state_dict()["fngd"]
    return state["values"][state["layers"].index(name), ids]


def _check_gradients(
    where: str, layer: Captured, s: Tensor, gradients: dict[str, Tensor | None], tolerance: float
) -> None:
    for part, rows in layer.contributions().items():
        gradient = gradients[part]
        assert gradient is not None, f"no gradient of {where}, {part}"
        expected = torch.tensordot(s.to(rows), rows, dims=1)
        _assert_close(f"weighted gradient of {where}, {part}", gradient, expected, tolerance)


def _assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    deviation = float((actual.to(expected) - expected).abs().max() / expected.abs().max())
    assert deviation <= tolerance, f"{what}: relative deviation {deviation:.1e}, over {tolerance:.0e}"
