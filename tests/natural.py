"""A solving and a shared step of any model against float64 gradients per sample, and what was weighted."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fngd
from networks import blocks

Loss = Callable[[nn.Module, Sequence[int]], Tensor]
"""(model, samples) -> the mean of their losses."""

DAMPING = 0.3


def sample_rows(model: nn.Module, loss: Loss, samples: int) -> dict[str, Tensor]:
    """Return {parameter: (N, *shape)}, the gradient of each sample's own loss: one backward a sample."""
    rows = [_gradients(model, loss(model, [n])) for n in range(samples)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def call_rows(model: nn.Module, loss: Loss, samples: int) -> dict[str, Tensor]:
    """Return {parameter: (N, *shape)}, what row n of each module's input gives, times N.

    The definition of a sample's gradient where the rest of the network couples samples. A module without a
    call on N rows is left out.
    """
    model = copy.deepcopy(model)
    calls: dict[str, list[tuple[nn.Module, tuple, Tensor, list[Tensor]]]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, y: Tensor) -> None:
            arrived: list[Tensor] = []
            calls.setdefault(name, []).append((module, args, y, arrived))
            y.register_hook(lambda e: arrived.append(e.clone()))

        return hook

    for name, module in model.named_modules():
        if not any(module.children()) and any(p.requires_grad for p in module.parameters()):
            module.register_forward_hook(note(name), prepend=True)
    loss(model, range(samples)).backward()
    rows: dict[str, Tensor] = {}
    for name, found in calls.items():
        for module, args, _, arrived in found:
            if any(len(x) != samples for x in args) or isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            parameters = {f"{name}.{key}": p for key, p in module.named_parameters() if p.requires_grad}
            for n in range(samples):
                y = type(module).forward(module, *(x[n : n + 1].detach() for x in args))
                gradients = torch.autograd.grad(y, list(parameters.values()), arrived[0][n : n + 1])
                for key, g in zip(parameters, gradients, strict=True):
                    rows.setdefault(key, g.new_zeros(samples, *g.shape))[n] += samples * g
    return rows


def check(
    model: nn.Module,
    loss: Loss,
    samples: int,
    *,
    rows: Callable[[nn.Module, Loss, int], dict[str, Tensor]] = sample_rows,
    tolerance: float = 1e-9,
    **options,
) -> dict[str, str]:
    """Assert that a parameter has the natural gradient, or is named and has the plain one; return coverage().

    Parameters of other optimizers have the plain one. A step of the base optimizer with these gradients is
    made and undone.

    loss: draws the same random numbers every time
    tolerance: of the solving step, relative; weights are shared in single precision
    """
    truth, plain = rows(model, loss, samples), _gradients(model, loss(model, range(samples)))
    opt = fngd.FNGD(model, lr=0.0, normalize="raw", damping=DAMPING, **options)
    for step, error in (("solving", tolerance), ("shared", max(tolerance, 1e-6))):
        opt.set_samples(range(samples))
        opt.zero_grad()
        model.zero_grad()  # also what others optimize
        loss(model, range(samples)).backward()
        coverage = opt.coverage()
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        coverage |= {key: "plain: optimized elsewhere" for key in trained if key not in coverage}
        weighted = {key: g for key, g in truth.items() if not coverage[key].startswith("plain: ")}
        assert opt.stats()["solved_batches"] == bool(weighted)
        assert {key for key in trained if not coverage[key].startswith("plain: ")} == weighted.keys()
        expected = dict(plain)
        sizes = {key: float(g.norm()) for key, g in plain.items()}
        for block in _blocks(model, weighted):
            natural, size = _natural({key: weighted[key] for key in block})
            expected |= natural
            sizes |= dict.fromkeys(block, size)
        opt.step()
        floor = 1e-15 * max(sizes.values())
        for key, p in trained.items():
            found = torch.zeros_like(p) if p.grad is None else p.grad
            difference = float((found - expected[key]).norm())
            assert difference <= error * sizes[key] + floor, (
                f"{key} ({coverage[key]}), {step} step: off by {difference} of {sizes[key]}"
            )
    _check_step(opt)
    opt.detach()
    return opt.coverage()


@torch.no_grad()
def _check_step(opt: fngd.FNGD) -> None:
    """Assert that a step moves every parameter by -lr times its gradient; undo it."""
    (group,) = opt.param_groups
    before = [p.clone() for p in group["params"]]
    group["lr"] = 0.1
    opt.step()
    assert opt.stats()["skipped_steps"] == 0
    for p, old in zip(group["params"], before, strict=True):
        torch.testing.assert_close(p, old if p.grad is None else old - 0.1 * p.grad)
        p.copy_(old)


def natural_gradients(model: nn.Module, loss: Loss, samples: int) -> dict[str, Tensor]:
    """Return the natural gradient of every parameter: normalize="raw", damping=DAMPING."""
    rows = sample_rows(model, loss, samples)
    return {
        key: g
        for block in _blocks(model, rows)
        for key, g in _natural({k: rows[k] for k in block})[0].items()
    }


def share_of_weighted(model: nn.Module, coverage: dict[str, str]) -> float:
    """Return the fraction of trainable numbers that take the weighted gradient."""
    sizes = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    return sum(n for key, n in sizes.items() if not coverage[key].startswith("plain: ")) / sum(sizes.values())


def _gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def _natural(rows: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Return (1/N) sum_n v_n g_n, (lam I + K / N) v = 1 of one block, and (1/N) sum |v_n g_n|."""
    flat = torch.cat([g.flatten(1) for g in rows.values()], 1)
    samples = len(flat)
    k = flat @ flat.T / samples
    if not k.any():
        return {key: g[0] for key, g in rows.items()}, 0.0
    v = torch.linalg.solve(k + DAMPING * k.trace() * torch.eye(samples, dtype=k.dtype), k.new_ones(samples))
    natural = {key: torch.tensordot(v, g, dims=1) / samples for key, g in rows.items()}
    return natural, float(v.abs() @ flat.norm(dim=1)) / samples


def _blocks(model: nn.Module, rows: dict[str, Tensor]) -> list[list[str]]:
    """Return the parameters' names, those of one module or of modules that share a weight together."""
    markers = {key: torch.zeros(1) for key in rows}
    layer_of = {key: next(iter(blocks(model, {key: markers[key][None]}))) for key in rows}
    return [[key for key in rows if layer_of[key] == layer] for layer in dict.fromkeys(layer_of.values())]
