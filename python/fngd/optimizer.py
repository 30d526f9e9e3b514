"""FNGD: natural gradients for any torch.optim update rule."""

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fngd_kernels import Sketch
from fngd_kernels.ops.coefficients import DAMPING_MODES, NORMALIZATIONS
from fngd_kernels.sketch import as_sketch

from .base_optimizer import base_class, fuses_on_cuda, make_base
from .capture import (
    USER_REASONS,
    ParameterBlock,
    RoutedModule,
    SharedParameters,
    find_blocks,
    listed,
    reason_against_routing,
    release,
    route,
)
from .coefficients import SHARES, Report, Schedule, Solver
from .preconditioner import Preconditioner
from .samples import checked_ids
from .state import NotCopied, check_groups, check_like
from .torch_private import parameters_of
from .update import SHARED, Update

ADDED_LATER = "its parameter group was added later"
"""Reason for the plain gradient of a module that was not optimized when the layers were looked for."""

SWAPPED = "its module was replaced since the optimizer was made"
"""Reason for the plain gradient of a parameter that is in the model without the module that was routed."""

NOT_OPTIMIZED = "not optimized: it is not the parameter that the optimizer was made with"
"""What is said of a parameter that joined the model later, or took the place of another."""


class FNGD(NotCopied):
    """Natural-gradient descent at first-order cost: a torch.optim rule applied to weighted gradients.

    For every supported layer `.grad` becomes sum_n s_n C_n, C_n the contribution of sample n to the ordinary
    gradient. In the first epoch s solves (lam I + N K) s = 1 with K_ij = <C_i, C_j>, which is the natural
    gradient under the empirical Fisher; later epochs reuse each sample's s at the ordinary gradient's cost.

    Example:
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = fngd.FNGD(model, lr=0.1, momentum=0.9)
        loader = fngd.track(DataLoader(data, batch_size=128, shuffle=True), optimizer)
        for epoch in range(10):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

    Args:
        model: The network; its modules are routed through FNGD's layer rules until `detach()`.
        lr: The base optimizer's learning rate; None for 0.1 with SGD and for the default of any other base.
        params: What to optimize, as for any torch optimizer: an iterable of parameters or of groups, by
            default all of the model's. No other parameter gets a weighted gradient: a linear layer or
            convolution of which only the weight or only the bias is among them has that one weighted. FNGD's
            own options are one for all groups.
        base: "sgd", "adamw" or any torch.optim class: the update rule. It updates from the gradients alone;
            what works around another optimizer (SAM, Lookahead) goes around FNGD.
        damping: lam in the unit of damping_mode; `optimizer.damping = ...` changes it from the next solve on.
        damping_mode: "trace" tr(K') / N, "mean_eig" tr(K') / N^2, or "absolute" 1, with K' the Gram matrix of
            the per-sample gradients N C_n.
        normalize: "mean" s / mean(s), so that learning rates carry over; "lambda" lam s; "raw" s; "graft"
            keeps the length of the plain gradient in each layer.
        share: What later epochs reuse: "sample" each sample's own s (needs `fngd.track` or `set_samples`),
            "position" the mean s of a batch position, "mean" of the layer, "none" nothing: solve at every
            step.
        refresh_every: Epochs between new solves; None solves in the first epoch only.
        norms: Scale and shift of normalisation layers take the "plain" or the "weighted" gradient.
        sketch: An fngd_kernels.Sketch, or its size alone, to solve with Gram matrices of compressed
            contributions: right in expectation and cheaper; None for the exact ones.
        skip: fnmatch patterns of the names of modules that keep the plain gradient, with all inside them.
        strict: Raise for a module with trainable parameters that no rule serves.
        process_group: The data-parallel ranks that share coefficients where torch.distributed is in use, by
            default all; `start_epoch`, and with it a tracked loader, is then called by all of them.
        **options: The base optimizer's own (momentum, weight_decay, betas, ...), with its defaults. One
            differs: on CUDA, with SGD, Adam and AdamW, `fused` is True unless it, foreach, capturable or
            differentiable is named. A fused update leaves out a step on the device, without the host waiting
            for the gradients.

    Raises:
        ValueError: An argument out of range, a base that cannot serve, a pattern in skip without a module, a
            model without supported layers or with parameters that have no values yet (lazy modules, the meta
            device), and with strict an unsupported module.
        TypeError: A wrong type, or an option that the base optimizer does not know.

    Source: Ou, Zhu, Huang, Liu 2024, arXiv 2403.03473.
    """

    _update: Update
    _preconditioner: Preconditioner
    _solver: Solver
    _schedule: Schedule
    _report: Report
    _model: nn.Module
    _plain: dict[str, str]
    _left_out: set[str]
    _served: dict[int, ParameterBlock]

    def __init__(
        self,
        model: nn.Module,
        lr: SupportsFloat | None = None,
        *,
        params: Iterable[Any] | None = None,
        base: str | type[Optimizer] = "sgd",
        damping: float = 0.1,
        damping_mode: str = "trace",
        normalize: str = "mean",
        share: str = "sample",
        refresh_every: int | None = None,
        norms: str = "plain",
        sketch: int | Sketch | None = None,
        skip: Sequence[str] = (),
        strict: bool = False,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a torch.nn.Module, got {type(model).__name__}; parameters go to params="
            )
        if not (lr is None or isinstance(lr, SupportsFloat)):
            raise TypeError(
                f"lr: expected a number or a tensor, got {type(lr).__name__}; parameters go to params="
            )
        _one_of("damping_mode", damping_mode, DAMPING_MODES)
        _one_of("normalize", normalize, NORMALIZATIONS)
        damping = _checked_damping(damping, normalize)
        _one_of("share", share, SHARES)
        _one_of("norms", norms, ("plain", "weighted"))
        if refresh_every is not None and (not isinstance(refresh_every, int) or refresh_every < 1):
            raise ValueError(f"refresh_every: expected epochs >= 1 or None, got {refresh_every!r}")
        sketch = as_sketch(sketch)
        if isinstance(skip, str):
            raise TypeError(f"skip: expected a sequence of module-name patterns, got the string {skip!r}")

        rule = base_class(base)
        if fuses_on_cuda(rule, model, options):
            options["fused"] = True
        updating = make_base(rule, model.parameters() if params is None else params, lr, options, _OWN)
        super().__init__(updating.param_groups, updating.defaults)
        self.state.update(updating.state)  # Adagrad's begins in its constructor

        optimized = [p for group in self.param_groups for p in group["params"]]
        blocks, self._plain = find_blocks(model, optimized, affine=norms == "weighted", skip=skip)
        if not blocks:
            kinds = sorted({type(m).__name__ for m in model.modules() if parameters_of(m)})
            reasons = listed(self._plain) or f"none holds a parameter to optimize: {', '.join(kinds)}"
            raise ValueError(f"model: no supported layer among its modules ({reasons})")
        unsupported = {name: reason for name, reason in self._plain.items() if reason not in USER_REASONS}
        if strict and unsupported:
            raise ValueError(f"strict: modules without a rule ({listed(unsupported)})")
        self._model = model
        wanted = {id(p) for p in optimized}
        self._left_out = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in wanted}
        device = blocks[0].parameters[0].device
        self._update = Update(updating, self, device)
        self._schedule = Schedule(share, refresh_every, len(blocks), device, process_group)
        self._report = Report(blocks, device)
        self._solver = Solver(damping, damping_mode, normalize)
        shared = SharedParameters(model, blocks)
        self._preconditioner = Preconditioner(
            blocks, self._schedule, self._solver, self._report, sketch, shared
        )
        self._served = {id(p): block for block in blocks for p in block.parameters}
        self._settings = {
            "base": rule.__name__,
            "damping_mode": damping_mode,
            "normalize": normalize,
            "share": share,
            "refresh_every": refresh_every,
            "norms": norms,
            "sketch": sketch,
            "skip": [*skip],
        }
        self._restore: Callable[[], None] | None = None
        release(model, optimized)
        self.attach()

    @property
    def share(self) -> str:
        """What later epochs reuse of the coefficients."""
        return self._schedule.share

    @property
    def damping(self) -> float:
        """The damping, in the unit of damping_mode; setting it takes effect from the next solve on.

        It is an argument, which a state does not hold: a schedule of one's own sets it again after a restart.
        """
        return self._solver.damping

    @damping.setter
    def damping(self, damping: float) -> None:
        self._solver.damping = _checked_damping(damping, self._solver.normalize)

    def __getattr__(self, name: str) -> Any:
        """Return what the base optimizer has beyond any other: train() and eval() of schedule-free ones."""
        base = getattr(vars(self).get("_update"), "base", None)  # absent during construction
        if name.startswith("_") or not hasattr(base, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    def __repr__(self) -> str:
        settings = {"damping": self.damping} | self._settings
        own = "".join(f"\n    {name}: {value}" for name, value in settings.items())
        return super().__repr__().replace("(", f"({own}", 1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters; their layers keep the plain gradient, which `coverage()` says.

        Raises:
            ValueError: An option of FNGD itself in the group.
        """
        mine = _OWN & param_group.keys() - self.defaults.keys() if isinstance(param_group, dict) else ()
        if mine:
            named = ", ".join(map(repr, sorted(mine)))
            raise ValueError(f"parameter group: one for all groups is {named}, give it to FNGD itself")
        if "_update" in vars(self):
            self._update.link(self)
            self._update.base.add_param_group(param_group)
        else:  # during construction, where the base has its groups already
            super().add_param_group(param_group)

    def attach(self) -> None:
        """Route the model's layers again after `detach`."""
        self._preconditioner.shared.look()
        if self._restore is None:
            self._restore = route(self._preconditioner.modules, self._preconditioner)

    def detach(self) -> None:
        """Give the model its own forwards back; gradients are plain from here on."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def set_samples(self, ids: Sequence[int] | Tensor) -> None:
        """Name the samples of the next forward, for loops without a loader to track.

        Args:
            ids: (N,) integers >= 0, the sample of each row of the batch; the table grows with them, or ends
                at the dataset's length when a loader is tracked.

        Raises:
            TypeError: Ids that are no integers of shape (N,).
            ValueError: Ids out of range.
        """
        named, highest = checked_ids(ids, self._schedule.dataset_size)
        self._preconditioner.shared.glance()
        self._schedule.set_samples(named, highest)

    def start_epoch(self, dataset_size: int | None = None) -> None:
        """Begin an epoch; a tracked loader says so itself, other loops do where epochs count in sharing.

        In data-parallel runs all ranks call it, and merge what the epoch that ends has solved for.
        """
        self._preconditioner.shared.look()
        self._schedule.start_epoch(dataset_size)

    def merge_coefficients(self) -> None:
        """Take in what the other ranks of a data-parallel run have solved for; all ranks call it.

        `start_epoch` does so. Call it too before a checkpoint that one rank writes in the middle of an epoch.
        """
        self._schedule.merge()

    @property
    def solving(self) -> bool:
        """True if the next forward belongs to a batch that is solved for, which must run uncompiled.

            compiled = torch.compile(model, fullgraph=True)
            for x, y in loader:
                loss = loss_fn((model if opt.solving else compiled)(x), y)

        Without this the compiler refuses such a batch (fullgraph=True), or breaks the graph at every layer,
        after which a forward that loops over its layers stays uncompiled (fullgraph=False). With sample ids
        every batch size is compiled once.
        """
        return self._schedule.solving

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as any torch optimizer does, and let go of what a failed backward captured."""
        self._preconditioner.drop_failed()
        self._schedule.drop()
        self._preconditioner.shared.glance()
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Apply the base optimizer's rule to the gradients; a step whose gradient is not finite is left out.

        With fused=True nothing waits for the device, and a GradScaler leaves unscaling to the update, so that
        `.grad` keeps its scale.

        Args:
            closure: Re-evaluates the model and returns the loss; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._preconditioner.reset()
        self._schedule.end_step()
        # A GradScaler sets both, and then leaves unscaling and skipping to this step; without gradients its
        # found_inf is the number 0.
        found_inf, grad_scale = vars(self).get("found_inf"), vars(self).get("grad_scale")
        self._update.step(self, found_inf if isinstance(found_inf, Tensor) else None, grad_scale)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the update itself leaves out a step; GradScaler asks for this."""
        return self._update.skips_on_device

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state and, under "fngd", coefficients, counters and what else it saves.

        torch.distributed.checkpoint.state_dict passes on the base optimizer's part alone.
        """
        with self._update.saving(self):
            state = super().state_dict()
        return {**state, "fngd": self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        shapes = [list(p.shape) for group in self.param_groups for p in group["params"]]
        own = {
            "skipped_steps": self._update.skipped_steps,
            "shapes": shapes,
            "base": self._update.own_state(),
        }
        return self._schedule.state_dict() | self._report.state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what state_dict returned; the continued run is the same bit for bit.

        Without "fngd" coefficients stay as they are: a state of the base optimizer alone, or what
        torch.distributed.checkpoint.state_dict passes on.

        Raises:
            TypeError: What is no dictionary.
            ValueError: A state of another optimizer, model or way of sharing, or one that is not whole;
                nothing is changed then.
        """
        check_groups(state_dict, self)
        own = state_dict.get("fngd")
        if isinstance(own, Mapping):
            own = {"base": {}, **self._schedule.added(), **own}  # which earlier versions did not save
        of_base = {key: value for key, value in state_dict.items() if key not in (*SHARED, "fngd")}
        if own is not None:
            self._check_own_state(own)
            of_base = own["base"]
        # Earlier versions marked their groups.
        groups = [{k: v for k, v in group.items() if k != "fngd"} for group in state_dict["param_groups"]]
        with self._update.loading(self, of_base):
            super().load_state_dict({**state_dict, "param_groups": groups})
        if own is not None:
            self._schedule.load_state_dict(own)
            self._report.load_state_dict(own)
            self._update.skipped_steps = own["skipped_steps"]

    def _check_own_state(self, state: dict[str, Any]) -> None:
        mine = self._own_state()
        check_like(state, mine, "fngd")
        self._report.check_state(state)
        self._schedule.check_state(state)
        if len(state["shapes"]) != len(mine["shapes"]):
            count = f"{len(mine['shapes'])} parameters, got {len(state['shapes'])}"
            raise ValueError(f"state_dict: expected the shapes of {count}")
        for number, (shape, stored) in enumerate(zip(mine["shapes"], state["shapes"], strict=True)):
            if shape != stored:
                raise ValueError(f"state_dict: expected shape {shape} of parameter {number}, got {stored}")

    def coverage(self) -> dict[str, str]:
        """Return for every optimized parameter the rule that weights it, or "plain: " and the reason.

        A parameter of the model that was put there since, and which no group holds, is "not optimized: ".
        """
        self._preconditioner.shared.look()
        optimized = {id(p) for group in self.param_groups for p in group["params"]}
        served = self._served | {id(p): b for b in self._preconditioner.blocks for p in b.parameters}
        holders = {part: each for each in self._preconditioner.modules for part in each.owner.modules()}
        report = {}
        for module_name, module in self._model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                path = f"{module_name}.{name}" if module_name else name
                if id(parameter) not in optimized:
                    if path not in self._left_out:
                        report[path] = NOT_OPTIMIZED
                    continue
                block = served.get(id(parameter))
                if block is None:
                    report[path] = f"plain: {self._plain.get(module_name, ADDED_LATER)}"
                    continue
                if parameter.requires_grad and (reason := self._reason_against(block, holders.get(module))):
                    report[path] = f"plain: {reason}"
                else:
                    report[path] = self._report.describe(block, parameter, self._schedule.missed(block.index))
        return report

    def _reason_against(self, block: ParameterBlock, holder: RoutedModule | None) -> str:
        """Return what in the model of now keeps a parameter of a block plain, held by a module, or ""."""
        if block.why_shared:
            return block.why_shared
        if holder is None or holder.block is not block:
            return SWAPPED
        routing = reason_against_routing(holder, self._preconditioner) if self._restore else ""
        return routing or holder.reason_against_places()

    def stats(self) -> dict[str, Any]:
        """Return counters of batches, solves and steps, the coefficients' spread, seconds in batched solves,
        and bytes; waits for the device.
        """
        counted = {"skipped_steps": self._update.skipped_steps}
        return self._schedule.stats() | self._report.stats() | counted


def _one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _checked_damping(damping: float, normalize: str) -> float:
    if not isinstance(damping, numbers.Real):
        raise TypeError(f"damping: expected a number, got {type(damping).__name__}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: expected a finite number >= 0, got {damping}")
    if damping == 0 and normalize == "lambda":
        raise ValueError("damping: expected a number > 0 with normalize='lambda', which multiplies by it")
    return float(damping)


_OWN = inspect.signature(FNGD).parameters.keys() - {"model", "lr", "params", "options"}
"""The names of FNGD's own options."""
