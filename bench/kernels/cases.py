"""All cases of the networks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import fngd_kernels as fk
from bench.kernels import plain
from bench.kernels.case import Case, Contender, Setting
from bench.kernels.conv import conv_cases
from bench.kernels.embedding import embedding_cases
from bench.kernels.linear import hadamard_case, linear_cases
from bench.kernels.roofline import Work
from bench.kernels.shapes import Conv, Embedding, Layer, Linear, NetworkShapes

DAMPING = 0.1


def cases(
    networks: Sequence[NetworkShapes], dtypes: Sequence[torch.dtype], device: torch.device, *, quick: bool
) -> Iterator[Case]:
    """Yield the cases of all networks; `quick` takes the first batch size and a layer shape only once."""
    seen: set[tuple[str, torch.dtype]] = set()
    for network in networks:
        for batch in network.batches[:1] if quick else network.batches:
            if not quick:
                seen.clear()
            for dtype in dtypes:
                setting = Setting(network.name, batch, dtype, device)
                for layer in network.layers:
                    for kind in _dtypes(layer, dtype):
                        shape = str(layer), kind
                        if shape not in seen:
                            yield from _layer_cases(replace(setting, dtype=kind), layer)
                        seen.add(shape)
                rows = [
                    layer for layer in network.layers if isinstance(layer, Linear) and layer.positions == 1
                ]
                if len(rows) > 1:
                    yield hadamard_case(setting, rows)
            count = sum(layer.count for layer in network.layers)
            yield _solve_case(Setting(network.name, batch, torch.float32, device), count)


def _dtypes(layer: Layer, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtypes of gradients in a network of 16 bits: under autocast embeddings give float32."""
    both = isinstance(layer, Embedding) and dtype != torch.float32
    return (dtype, torch.float32) if both else (dtype,)


def _layer_cases(setting: Setting, layer: Layer) -> Iterator[Case]:
    if isinstance(layer, Linear):
        return linear_cases(setting, layer)
    return conv_cases(setting, layer) if isinstance(layer, Conv) else embedding_cases(setting, layer)


def _solve_case(setting: Setting, count: int) -> Case:
    n = setting.batch
    work = Work(((count * (n**3 // 6 + n * n), "fp32"),), count * n * (n + 1) * 4)

    def inputs() -> tuple[Tensor, ...]:
        rows = setting.random(count, n, 2 * n)
        return (rows @ rows.mT / (2 * n),)

    def linalg(k: Tensor) -> Tensor:
        return plain.solve(k, DAMPING)

    contenders = {
        "fngd": Contender(lambda k: fk.solve(k, DAMPING), work),
        "plain linalg": Contender(linalg, work, "plain"),
    }
    return setting.case("solve", f"{count} systems", inputs, linalg, contenders)
