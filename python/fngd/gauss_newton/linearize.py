"""From a residual closure to its Jacobian: what rules serve is captured, the rest is differentiated."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..capture import (
    Collected,
    Gradients,
    ParameterBlock,
    RoutedModule,
    UseCollector,
    Uses,
    combined,
    find_blocks,
    route,
)
from ..rules import Use, is_linear_map
from ..torch_private import BATCH_NORMS
from .autograd_rows import differentiated_rows, per_sample_rows
from .jacobian import Factor, Jacobian, RowsFactor, linear_factor
from .residuals import Block, evaluate, loss


class UseRecorder(UseCollector):
    """Collects the uses of each differentiation of the residuals, of which there may be many.

    Every use of a weight counts, in the forward and in derivatives that the closure takes of it.
    """

    def __init__(self) -> None:
        super().__init__()
        # Where it is set, every use is answered with the ordinary gradient and none is collected.
        self.returns_gradients = False
        self.uses: Uses = {}  # in the last differentiation

    def forward(self, module: RoutedModule, x: Tensor, *arguments: Any) -> Any:
        """Return the module's output, from a node that collects."""
        return self.collect(module, None, x, *arguments)

    def complete(self, block: ParameterBlock, uses: Uses) -> None:
        """Do nothing before the end: the graph serves several differentiations."""

    def deliver(
        self, batch: None, collected: dict[ParameterBlock, Collected], *, early: bool
    ) -> Iterator[tuple[RoutedModule, Gradients]]:
        """Keep the uses; no gradient is made of them."""
        self.uses = {module: uses for each in collected.values() for module, uses in each.uses.items()}
        return iter(())

    def answer(self, module: RoutedModule, batch: None, use: Use, *, is_only_use: bool) -> Gradients:
        """Return the ordinary gradient."""
        return combined(module, [use], None)


@dataclass
class Group:
    """One component of a block: N rows of the Jacobian."""

    residuals: Tensor  # (N,)
    scale: float
    uses: Uses
    rows: dict[Parameter, Tensor]  # (N, *shape), what was differentiated already


class Linearizer:
    """Evaluates residuals with their Jacobian; knows which parameters are captured and which are not.

    A layer is captured when a rule serves it and nothing but its own forward uses its parameters. All other
    parameters are differentiated (generic.py).
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor]) -> None:
        self.model = model
        self.parameters = [p for p in parameters if isinstance(p, Parameter)]
        blocks, self.reasons = find_blocks(model, self.parameters, affine=True, composite=False)
        wanted = {id(p) for p in self.parameters}
        self.modules: list[RoutedModule] = []
        for module in (
            block.modules[0] for block in blocks
        ):  # without composite ones, each has a single module
            if isinstance(module.owner, BATCH_NORMS):
                self.reasons[module.name] = "batch normalisation"
            elif any(id(p) not in wanted for p in _trainable(module)):
                self.reasons[module.name] = "some of its parameters are not optimized here"
            else:
                self.modules.append(module)
        self.recorder = UseRecorder()
        self._checked: list[tuple[str, int]] = []

    def __call__(self, residuals: Callable[[], Any]) -> tuple[Tensor, Jacobian]:
        """Return the loss and the Jacobian of the scaled residuals, whose squares sum to the loss.

        Raises:
            TypeError, ValueError: Residuals of a wrong form, or that are not per sample.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, BATCH_NORMS) and module.training:
                raise ValueError(
                    f"model: {name or type(module).__name__} couples the samples of a batch in "
                    "training mode, so that no residual belongs to one sample; call .eval() on it, or "
                    "normalise per sample"
                )
        while (result := self._linearized(residuals)) is None:
            pass  # a layer was given up: once more without it
        return result

    def value(self, residuals: Callable[[], Any]) -> Tensor:
        """Return the loss alone."""
        with torch.enable_grad():
            return loss(evaluate(residuals, self._named_parameters()))

    def coverage(self) -> dict[str, str]:
        """Return how the Jacobian of every parameter is found: a rule, or "generic: " and why."""
        captured = {id(p): module.rule.name for module in self._active() for p in _trainable(module)}
        report = {}
        for name, parameter in self._named_parameters().items():
            reason = self.reasons.get(name.rpartition(".")[0], "its layer's weight is frozen")
            report[name] = captured.get(
                id(parameter), f"generic: {reason}" if parameter.requires_grad else "frozen"
            )
        return report

    def _active(self) -> list[RoutedModule]:
        return [module for module in self.modules if module.module.weight.requires_grad]

    def _named_parameters(self) -> dict[str, Parameter]:
        wanted = {id(p) for p in self.parameters}
        return {name: p for name, p in self.model.named_parameters() if id(p) in wanted}

    @torch.enable_grad()
    def _linearized(self, residuals: Callable[[], Any]) -> tuple[Tensor, Jacobian] | None:
        restore = route(self._active(), self.recorder)
        try:
            blocks = evaluate(residuals, self._named_parameters())
            groups: list[Group] = []
            for block in blocks:
                found = self._per_sample(block) if block.per_sample else self._captured(block)
                if found is None:
                    return None
                groups += found
            jacobian = Jacobian(self._factors(groups), torch.cat([block.rows for block in blocks]))
            if bool(jacobian.residuals.isfinite().all()):
                self._check(blocks, jacobian)
            return loss(blocks), jacobian
        finally:
            restore()
            self.recorder.reset()

    def _per_sample(self, block: Block) -> list[Group]:
        """Return the groups of a block that is a function of one sample."""
        named = self._named_parameters()
        assert block.per_sample is not None
        rows = per_sample_rows(block.per_sample, named)  # (N, C, *shape) by name
        inside = {id(p) for p in named.values()}
        outside = [p for p in self.parameters if p.requires_grad and id(p) not in inside]
        groups = []
        for c, component in enumerate(block.values.unbind(1)):
            own = {p: block.scale * rows[name][:, c] for name, p in named.items() if p.requires_grad}
            own |= differentiated_rows(component, outside, block.scale)
            groups.append(Group(component, block.scale, {}, own))
        return groups

    def _captured(self, block: Block) -> list[Group] | None:
        """Return the groups of a block, or None when layers had to be given up."""
        owners = {p: module for module in self._active() for p in _trainable(module)}
        others = [p for p in self.parameters if p.requires_grad and p not in owners]
        groups = []
        for component in block.values.unbind(1):
            uses: Uses = {}
            if owners:
                self.recorder.uses = {}
                seed = torch.full_like(component, block.scale)
                arrived = torch.autograd.grad(
                    component, list(owners), seed, retain_graph=True, allow_unused=True
                )
                uses = self.recorder.uses
                # Collected uses return nothing: a gradient that arrives came another way.
                escaped = {owners[p] for p, g in zip(owners, arrived, strict=True) if g is not None}
                if escaped:
                    self.modules = [module for module in self.modules if module not in escaped]
                    for module in escaped:
                        self.reasons[module.name] = "its parameters are used outside its own training forward"
                    return None
            for module, captured in uses.items():
                _check_rows(block, module, captured)
            rows = differentiated_rows(component, others, block.scale)
            groups.append(Group(component, block.scale, uses, rows))
        return groups

    @torch.no_grad()
    def _factors(self, groups: Sequence[Group]) -> list[Factor]:
        """Return the factors of all parameters; linear layers stay unformed unless a group has their rows."""
        sizes = [len(group.residuals) for group in groups]
        factors: list[Factor] = []
        for module in self._active():
            parameters = _trainable(module)
            uses = [group.uses.get(module, []) for group in groups]
            formed = any(parameters[0] in group.rows for group in groups)
            if is_linear_map(module.rule) and any(uses) and not formed:
                factors.append(linear_factor(parameters, uses, sizes))
                continue
            for group, captured in zip(groups, uses, strict=True):
                if captured:
                    contributions = module.rule.contributions(module.module, captured)
                    pairs = zip(module.parameters, contributions, strict=True)
                    group.rows |= {p: c for p, c in pairs if p is not None and c is not None}
        for parameter in dict.fromkeys(p for group in groups for p in group.rows):
            zeros = (parameter.new_zeros((size, *parameter.shape)) for size in sizes)
            rows = [g.rows.get(parameter, zero) for g, zero in zip(groups, zeros, strict=True)]
            factors.append(RowsFactor(parameter, torch.cat(rows)))
        return factors

    def _check(self, blocks: Sequence[Block], jacobian: Jacobian) -> None:
        """Compare J^T v for one random v with what autograd gives, when blocks are new.

        They differ when a residual depends on several samples: all residuals were differentiated at once.
        """
        described = [(block.name, block.values.shape[1]) for block in blocks]
        if described == self._checked:
            return
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(b.values.shape, generator=generator).to(b.values) for b in blocks]
        trained = [p for p in self.parameters if p.requires_grad]
        self.recorder.returns_gradients = True
        try:
            scaled = [block.scale * seed for block, seed in zip(blocks, seeds, strict=True)]
            expected = torch.autograd.grad(
                [block.values for block in blocks], trained, scaled, retain_graph=True, allow_unused=True
            )
        finally:
            self.recorder.returns_gradients = False
        found = jacobian.transposed_times(torch.cat([seed.T.flatten() for seed in seeds]))
        size = torch.cat([g.flatten() for g in expected if g is not None]).norm()
        names = {p: name for name, p in self.model.named_parameters()}
        for parameter, gradient in zip(trained, expected, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            error = (found.get(parameter, torch.zeros_like(parameter)) - gradient).norm()
            if not error <= 100 * torch.finfo(gradient.dtype).eps ** 0.5 * size:
                raise ValueError(
                    "residuals: expected row n to depend on sample n alone, but the gradient of "
                    f"{names.get(parameter, 'a parameter outside the model')} is no sum over samples "
                    "(statistics or means over the batch, or rows mixed or reordered?)"
                )
        self._checked = described


def _check_rows(block: Block, module: RoutedModule, uses: Sequence[Use]) -> None:
    samples = len(block.values)
    sizes = {use.e.shape[0] for use in uses} - {samples}
    if sizes:
        raise ValueError(
            f"residuals: block {block.name!r} has {samples} rows, but layer {module.name!r} was called on "
            f"{', '.join(map(str, sorted(sizes)))} rows for it; call the model on one row for each "
            "residual, and on points of different kinds separately"
        )


def _trainable(module: RoutedModule) -> list[Parameter]:
    return [p for p in module.parameters if p is not None and p.requires_grad]
