"""A whole training step as one CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .coefficients import Batch
from .optimizer import FNGD

WARM_UP = 3
"""Steps in a row on inputs of the same shapes before they are captured."""


class GraphedStep:
    """Runs a training step, from its forward to the update, as one CUDA graph wherever that is possible.

    Batches that are solved for run as they are (with share="none" they are captured as well), and so does
    everything off CUDA. Inputs that come in the same shapes a few times in a row are captured: from then on
    they and the coefficients of their samples are copied to where the graph reads them, and it is replayed.
    Inputs of other shapes, such as a short last batch, run as they are.

    Calling it with inputs, tensors on the model's device or in pinned memory, returns the detached loss.

    Args:
        optimizer: The FNGD that step uses. Its learning rates are tensors on the model's device, because a
            graph keeps a number for ever; schedulers fill them in place. On CUDA its base optimizer is a
            fused one.
        step: (*inputs) -> the loss, or None; runs forward, backward, optimizer.step() and
            optimizer.zero_grad(). It does not wait for the device (no .item()), and what changes from step to
            step is in inputs.

    Raises:
        TypeError: Another optimizer, inputs that are no tensors, or a step that returns something else.
        ValueError: Learning rates that are numbers, and on CUDA a base that is not fused.

    Example:
        import torch, fngd
        from torch import nn
        from torch.utils.data import DataLoader, TensorDataset

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)).to(device)
        opt = fngd.FNGD(model, lr=torch.tensor(0.1, device=device), momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=4)
        data = TensorDataset(torch.randn(250, 8), torch.randint(0, 4, (250,)))
        loader = fngd.track(DataLoader(data, batch_size=25, shuffle=True), opt)

        def step(x, y):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        graphed = fngd.GraphedStep(opt, step)
        for _ in range(4):
            for x, y in loader:
                loss = graphed(x.to(device), y.to(device))
            schedule.step()
    """

    def __init__(self, optimizer: FNGD, step: Callable[..., Tensor | None]) -> None:
        if not isinstance(optimizer, FNGD):
            raise TypeError(f"optimizer: expected an fngd.FNGD, got {type(optimizer).__name__}")
        self.optimizer, self.step = optimizer, step
        self._device = optimizer._schedule.table.values.device
        self._stream: torch.cuda.Stream | None = None
        self._graph: _Graph | None = None
        self._last_key: object = None
        self._repeats = 0  # how many steps in a row had this key and solved for nothing
        self._check_optimizer()

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """Run the step on a batch and return its detached loss."""
        if not _can_capture(self._device):
            return _detached(self.step(*inputs))
        batch = self.optimizer._schedule.batch
        if batch is not None and (batch.why_plain or not batch.certain or batch.sample_of is not None):
            self._repeats = 0  # what such a batch needs is not what the next one does
            return _detached(self.step(*inputs))
        key = self._key(inputs)
        if key != self._last_key:
            self._last_key, self._repeats = key, 0
        if self._graph is not None and self._graph.key == key:
            return self._graph.run(inputs)
        if self._repeats == WARM_UP:
            self._check_optimizer()
            self._graph = None  # first, so that its memory serves the next
            self._graph = _Graph(key, self.optimizer, self.step, inputs)
            return self._graph.run(inputs)
        report = self.optimizer._report
        solved_before = report.solved_batches
        output = self._on_side_stream(inputs) if self._repeats else self.step(*inputs)
        steady = report.solved_batches == solved_before or self.optimizer.share == "none"
        self._repeats = self._repeats + 1 if steady else 0
        return _detached(output)

    def _key(self, inputs: Sequence[Tensor]) -> object:
        """Return what a graph is captured for: shapes, a damping to solve with, tensors of learning rates."""
        for n, x in enumerate(inputs):
            if not isinstance(x, Tensor):
                raise TypeError(f"inputs: expected tensors, got {type(x).__name__} at position {n}")
        batch = self.optimizer._schedule.batch
        samples = (
            None if batch is None else (batch.size, batch.coefficients is None or batch.coefficients.shape)
        )
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        damping = self.optimizer.damping if self.optimizer.share == "none" else None
        return shapes, samples, damping, tuple(id(group["lr"]) for group in self.optimizer.param_groups)

    def _check_optimizer(self) -> None:
        for group in self.optimizer.param_groups:
            lr = group["lr"]
            if not isinstance(lr, Tensor) or lr.device != self._device:
                raise ValueError(
                    f"optimizer: expected lr as a tensor, lr=torch.tensor({float(lr):g}, "
                    f"device={str(self._device)!r}), because a graph keeps a number for ever; got {lr!r}"
                )
        if _can_capture(self._device) and not self.optimizer._step_supports_amp_scaling:
            raise ValueError(
                "optimizer: expected a base whose update is fused (SGD without dampening, Adam or AdamW with "
                "fused=True), because any other has the host wait for the test of the gradients"
            )

    def _on_side_stream(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Run the step as it will be captured: on a stream that is not the default one."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self.step(*inputs)
        current.wait_stream(self._stream)
        return output


class _Graph:
    """A captured step, and the tensors that it reads: the inputs and the coefficients of their samples."""

    def __init__(
        self, key: object, optimizer: FNGD, step: Callable[..., Tensor | None], inputs: Sequence[Tensor]
    ) -> None:
        self.key = key
        self.schedule, self.report = optimizer._schedule, optimizer._report
        batch, device = self.schedule.batch, self.schedule.table.values.device
        coefficients = None if batch is None or batch.coefficients is None else batch.coefficients.clone()
        static_batch = Batch(None if batch is None else batch.size, coefficients=coefficients)
        static_inputs = [x.to(device, copy=True) for x in inputs]
        self.inputs, self.coefficients = static_inputs, coefficients
        self.lr = [group["lr"] for group in optimizer.param_groups]  # kept alive: the key holds their ids

        def static_step() -> Tensor | None:
            named, self.schedule.batch = self.schedule.batch, static_batch
            try:
                return step(*static_inputs)
            finally:
                self.schedule.batch = named

        solved_before = self.report.solved_batches
        with _capturable(optimizer.param_groups):
            self.replay = _capture(static_step, device)
        # A capture solves for nothing, its replays do.
        self.solves = self.report.solved_batches - solved_before
        self.report.solved_batches = solved_before

    def run(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Replay the step on the inputs and on the coefficients of the batch that was named."""
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x, non_blocking=True)
        batch = self.schedule.batch
        if self.coefficients is not None and batch is not None and batch.coefficients is not None:
            self.coefficients.copy_(batch.coefficients)
        output = self.replay()
        self.report.solved_batches += self.solves
        self.schedule.end_step()
        return None if output is None else output.clone()  # the next replay writes over it


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def _capture(step: Callable[[], Tensor | None], device: torch.device) -> Callable[[], Tensor | None]:
    """Return a function that replays what the step does on the device, and returns its detached output."""
    graph = torch.cuda.CUDAGraph()
    # Loaders pin memory in threads of their own, which a "global" capture would not survive.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = _detached(step())

    def replay() -> Tensor | None:
        graph.replay()
        return output

    return replay


@contextmanager
def _capturable(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Set the flag that torch's Adam asks for in a capture; its fused update needs no more than that."""
    flagged = [group for group in groups if group.get("capturable") is False]
    for group in flagged:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in flagged:
            group["capturable"] = False


def _detached(output: Tensor | None) -> Tensor | None:
    if output is not None and not isinstance(output, Tensor):
        raise TypeError(f"step: expected the loss, a tensor, or None, got {type(output).__name__}")
    return None if output is None else output.detach()
