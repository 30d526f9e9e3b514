"""From a residual closure to its Jacobian: what rules serve is captured, the rest is differentiated."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..capture import RoutedModule, Uses, route
from ..event_log import log
from .autograd_rows import differentiated_rows, per_sample_rows
from .checks import disagreeing, refuse_batch_statistics, refuse_broadcasting
from .jacobian import Group, Jacobian, jacobian_of
from .layers import ROWS_DIFFER, USED_ELSEWHERE, Layers, trainable
from .ranks import Ranks
from .recorder import UseRecorder
from .residuals import Block, evaluate, with_counts
from .rows import RowFinder

UNUSED = "unused: no residual depends on it"


class LayersChanged(Exception):
    """A layer was given up or its rows are arranged otherwise: the residuals are evaluated once more."""


class Linearizer:
    """Evaluates residuals with their Jacobian.

    A layer is captured when a rule serves it and nothing but its own forward uses its parameters
    (layers.py), and each of its rows belongs to one residual (rows.py). All other parameters are
    differentiated (autograd_rows.py).

    Args:
        model: The network.
        parameters: What is optimized; what is outside of the model goes by its place here.
        ranks: Who holds the other residuals.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor], ranks: Ranks) -> None:
        self.model, self.parameters, self._ranks = model, list(parameters), ranks
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._names = {p: names.get(p, f"params[{i}]") for i, p in enumerate(self.parameters)}
        self.layers = Layers(model, self.parameters)
        self.recorder = UseRecorder()
        self._rows = RowFinder()
        self._active: list[RoutedModule] = []  # the layers that are captured in this linearization
        self._shapes: list[Any] = []  # of the blocks, when they were last asked for broadcasting
        self._checked: tuple[Any, ...] = ()  # the form of the last Jacobian that was compared with autograd's
        self._counts: dict[str, int] = {}  # residuals of the blocks, of all ranks, in this step
        self._unused: set[Tensor] = set()

    def __call__(self, residuals: Callable[[], Any]) -> Jacobian:
        """Return the scaled residuals, whose squares sum to the loss, with their Jacobian.

        Raises:
            TypeError, ValueError: Residuals of a wrong form, or that do not depend on the parameters.
        """
        refuse_batch_statistics(self.model)
        if not self._trained():
            raise ValueError("params: expected a parameter that requires a gradient, all are frozen")
        if not self._counts:
            self._ranks.check_equal({self._names[p]: p for p in self.parameters})
        self._counts = {}
        while True:
            try:
                return self._linearized(residuals)
            except LayersChanged:
                continue

    @property
    def count(self) -> int:
        """Return how many residuals the last Jacobian has, on all ranks."""
        return sum(self._counts.values())

    def rows(self, residuals: Callable[[], Any]) -> Tensor:
        """Return the scaled residuals (M,) alone, in float64, in the blocks that the last Jacobian had."""
        with torch.enable_grad():
            blocks = with_counts(evaluate(residuals, self._of_model()), self._counts)
        return torch.cat([block.rows.double() for block in blocks])

    def coverage(self) -> dict[str, str]:
        """Return how the Jacobian of every parameter is found: a rule, or "generic: " and why."""
        captured: dict[Tensor, str] = {
            p: module.rule.name for module in self.layers.captured() for p in trainable(module)
        }
        names: dict[Tensor, str] = {p: name for name, p in self._of_model().items()}  # as they are now
        report = {}
        for p in dict.fromkeys([*names, *self.parameters]):
            reason = self.layers.reason_against(names[p]) if p in names else "it is outside of the model"
            found = captured.get(p, f"generic: {reason}") if p.requires_grad else "frozen"
            report[names.get(p, self._names[p])] = UNUSED if p in self._unused else found
        return report

    def _of_model(self) -> dict[str, Parameter]:
        """Return the parameters of the model that are optimized, by name."""
        wanted = set(self.parameters)
        return {name: p for name, p in self.model.named_parameters() if p in wanted}

    def _trained(self) -> list[Tensor]:
        return [p for p in self.parameters if p.requires_grad]

    def _owners(self) -> dict[Tensor, RoutedModule]:
        return {p: module for module in self._active for p in trainable(module)}

    @torch.enable_grad()
    def _linearized(self, residuals: Callable[[], Any]) -> Jacobian:
        self._active = self.layers.captured()
        restore = route(self._active, self.recorder)
        try:
            blocks = evaluate(residuals, self._of_model())
            if not self._counts:
                self._counts = self._ranks.sums({block.name: block.values.numel() for block in blocks})
            blocks = with_counts(blocks, self._counts)
            with _freed_graphs_explained():
                shapes = [(block.name, block.values.shape) for block in blocks]
                if shapes != self._shapes:
                    for block in blocks:
                        refuse_broadcasting(block.name, block.values, self._gradient)
                    self._shapes = shapes
                groups: list[Group] = []
                for block in blocks:
                    groups += self._per_sample(block) if block.per_sample else self._captured(block)
                rho = torch.cat([block.rows for block in blocks])
                jacobian = jacobian_of(rho, self._trained(), self._active, groups)
                form = shapes, self._active, self._rows.changes
                if form != self._checked and bool(jacobian.residuals.isfinite().all()):
                    self._check(blocks, jacobian)
                    self._checked = form
            return jacobian
        finally:
            restore()
            self.recorder.reset()

    def _gradient(self, residual: Tensor) -> Tensor:
        """Return the gradient (P,) of one residual by all parameters that train."""
        gradients = self._gradients(residual, torch.ones_like(residual))
        pairs = zip(self._trained(), gradients, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])

    def _gradients(self, values: Tensor, seed: Tensor) -> Sequence[Tensor | None]:
        """Return the gradient of sum(seed values) by each parameter that trains, as autograd gives it."""
        self.recorder.returns_gradients = True
        try:
            return torch.autograd.grad(values, self._trained(), seed, retain_graph=True, allow_unused=True)
        finally:
            self.recorder.returns_gradients = False

    def _per_sample(self, block: Block) -> list[Group]:
        """Return the groups of a block that is a function of one sample."""
        named = self._of_model()
        assert block.per_sample is not None
        rows = per_sample_rows(block.per_sample, named)  # (N, C, *shape) by name
        inside = set(named.values())
        outside = [p for p in self._trained() if p not in inside]
        groups = []
        for c, component in enumerate(block.values.unbind(1)):
            own: dict[Tensor, Tensor] = {
                p: block.scale * rows[name][:, c] for name, p in named.items() if p.requires_grad
            }
            own |= differentiated_rows(component, outside, block.scale)
            groups.append(Group(component, {}, own))
        return groups

    def _captured(self, block: Block) -> list[Group]:
        """Return the groups of a block whose layers are captured."""
        owners = self._owners()
        components = block.values.unbind(1)
        uses = [self._uses(block, c, owners) for c in range(len(components))]
        others = [p for p in self._trained() if p not in owners]
        rows = differentiated_rows(block.values.T.flatten(), others, block.scale)  # component after component
        by_component = {p: r.split(len(block.values)) for p, r in rows.items()}
        return [
            Group(component, uses[c], {p: parts[c] for p, parts in by_component.items()})
            for c, component in enumerate(components)
        ]

    def _uses(self, block: Block, component: int, owners: Mapping[Tensor, RoutedModule]) -> Uses:
        """Return the uses of the layers for one component, a row for each residual."""
        if not owners:
            return {}
        values = block.values[:, component]

        def differentiate(seed: float) -> Uses:
            self.recorder.uses = {}
            with torch.autograd.set_detect_anomaly(False):  # the seed may be NaN
                arrived = torch.autograd.grad(
                    values,
                    list(owners),
                    torch.full_like(values, seed),
                    retain_graph=True,
                    allow_unused=True,
                )
            # Collected uses return nothing: a gradient that arrives came another way.
            escaped = {owners[p] for p, g in zip(owners, arrived, strict=True) if g is not None}
            self._give_up(escaped, USED_ELSEWHERE)
            return self.recorder.uses

        uses = differentiate(block.scale)
        found, misfits = self._rows.by_residual(block, component, uses, lambda: differentiate(math.nan))
        side = math.isqrt(len(values))
        if side**2 == len(values) and any(len(use.e) == side for m in misfits for use in uses[m]):
            refuse_broadcasting(block.name, values.view(side, side), self._gradient)  # flattened since
        self._give_up(misfits, ROWS_DIFFER)
        return found

    def _give_up(self, modules: Collection[RoutedModule], reason: str) -> None:
        self.layers.give_up(modules, reason)
        if modules:
            raise LayersChanged

    @torch.no_grad()
    def _check(self, blocks: Sequence[Block], jacobian: Jacobian) -> None:
        """Compare J^T v of each block for one random v with what autograd gives.

        They differ where a residual depends on other rows of a layer than those that were taken to be its.
        """
        owners, trained = self._owners(), self._trained()
        used: set[Tensor] = set()
        wrong: set[tuple[str, RoutedModule]] = set()
        generator = torch.Generator(device="cpu").manual_seed(0)
        normal = partial(torch.randn, dtype=torch.float32, device="cpu", generator=generator)
        v = torch.zeros_like(jacobian.residuals)
        parts = v.split([block.values.numel() for block in blocks])
        for block, part in zip(blocks, parts, strict=True):
            seed = normal(block.values.shape).to(block.values)
            gradients = self._gradients(block.values, block.scale * seed)
            expected = {p: g for p, g in zip(trained, gradients, strict=True) if g is not None}
            if not expected:
                raise ValueError(
                    f"residuals: block {block.name!r} depends on no parameter of this optimizer; was it "
                    "computed by another model?"
                )
            used |= expected.keys()
            part.copy_(seed.T.flatten())
            for p in disagreeing(expected, jacobian.by_parameter(jacobian.transposed_times(v))):
                if p not in owners:
                    raise ValueError(
                        f"residuals: the Jacobian of {self._names[p]} in block {block.name!r} does not agree "
                        "with its gradient; is the backward of a function in it wrong, or random?"
                    )
                wrong.add((block.name, owners[p]))
            part.zero_()
        if wrong:
            misfits = {module for name, module in wrong if not self._rows.arrange_otherwise(name, module)}
            self.layers.give_up(misfits, ROWS_DIFFER)
            raise LayersChanged
        unused = [p for p in trained if p not in used]
        for p in unused:
            if p not in self._unused:
                log.warning("GaussNewton: no residual depends on %s, which stays as it is", self._names[p])
        self._unused = set(unused)


@contextmanager
def _freed_graphs_explained() -> Iterator[None]:
    """Say what to do where a derivative in the residuals has freed their graph."""
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ValueError(
            "residuals: their graph was freed by a derivative that the closure took; "
            "take it by autograd.grad(..., create_graph=True)"
        ) from error
