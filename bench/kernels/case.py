"""One case = one operator on one layer shape: its inputs, its contenders, their work, its truth."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench.kernels.roofline import Work

Role = Literal["fngd", "plain", "unweighted"]
Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """A way to compute the case's result; role "unweighted" is the ordinary gradient, a baseline only."""

    run: Callable[..., Any]
    work: Work
    role: Role = "fngd"


@dataclass(frozen=True)
class Case:
    """An operator on a layer: `inputs` draws new tensors, `truth` takes them in float64."""

    op: str
    network: str
    layer: str
    batch: int
    dtype: torch.dtype
    inputs: Inputs
    truth: Callable[..., Any]
    contenders: dict[str, Contender]

    @property
    def name(self) -> str:
        """Return what --shapes is matched with."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}/{self.network}/{self.layer}/N={self.batch}/{dtype}"


@dataclass(frozen=True)
class Setting:
    """What the cases of one network have in common."""

    network: str
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def fused(self) -> bool:
        """Whether the Triton kernels run: on a GPU, interpreted, or compiled for meta tensors."""
        return self.device.type in ("cuda", "meta") or os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def arithmetic(self) -> str:
        """Return the arithmetic of products of inputs; both half precisions run at one rate."""
        return "fp32" if self.dtype == torch.float32 else "bf16"

    def random(self, *shape: int) -> Tensor:
        """Return random activations or gradients."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def coefficients(self) -> Tensor:
        """Return one random coefficient per sample, around 1."""
        return 1 + torch.randn(self.batch, device=self.device) / 4

    def case(
        self,
        op: str,
        layer: object,
        inputs: Inputs,
        truth: Callable[..., Any],
        contenders: dict[str, Contender],
    ) -> Case:
        """Return a case of this setting."""
        return Case(op, self.network, str(layer), self.batch, self.dtype, inputs, truth, contenders)
