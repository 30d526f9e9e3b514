"""What a solving step asks of a GPU beside SGD's, counted without one: `python -m bench.kernels.count`.

Steps run on tensors without data. Each operator of torch is a kernel, the backward of a convolution one for
each result. Attention is the flash form: q, k, v and the result are moved, scores are not, and blocks above
a causal diagonal are left out. Autocast casts as on a CPU, which for these networks is as on a GPU.

A kernel's floor is the longer of two times: that of its multiply-adds at the assumed rates, and that of its
bytes at the assumed bandwidth. A step's is the sum over its kernels. Inputs and results are moved once. The
Triton launches of one operator of FNGD are one kernel, with the multiply-adds of its plan. Scratch memory
is what these launches hand to one another: it counts as often as a launch takes it, in a column of its own.
Two floors are given: scratch memory goes through device memory, or all of it stays in the L2 cache.

Not counted: the time of launching, reads that miss a cache and come again, padding of tiles, work of the
host. The Gram matrix of an embedding counts all pairs of positions, the most that it can cost: how many
tiles are skipped, because no two of their ids are equal, depends on the data. Sketched Gram matrices have
64 channels on either side.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.gpu.meta import launching
from bench.kernels.counting import Kernel, KernelCounter
from bench.kernels.roofline import ASSUMED
from bench.models.transformer import LanguageModel
from bench.steps.contenders import SKETCH, base_optimizer, fngd_optimizer, training_step
from bench.steps.networks import MIXED, Batch, Network
from bench.tools import environment, jsonl
from fngd import preconditioner
from fngd.coefficients import Report
from fngd.update import Update

CAPABILITY = (9, 0)
CPU = torch.device("cpu")
GPT2_VOCABULARY, GPT2_LENGTH = 50_257, 1024


def _gpt2() -> nn.Module:
    return LanguageModel(
        vocabulary=GPT2_VOCABULARY, length=GPT2_LENGTH, layers=12, dimension=768, heads=12, hidden=3072
    )


def _gpt2_batch() -> Batch:
    return tuple(torch.randint(GPT2_VOCABULARY, (32, GPT2_LENGTH)) for _ in range(2))


NETWORKS = {
    "resnet": MIXED["resnet"]["gpu"],
    "transformer": MIXED["transformer"]["gpu"],
    "gpt2": dataclasses.replace(
        MIXED["transformer"]["gpu"],
        name="GPT-2 small, T 1024, batch 32, head not tied, bf16 autocast",
        model=_gpt2,
        batch=_gpt2_batch,
    ),
}
STEPS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": partial(base_optimizer, base="sgd", mode="eager", fused=True),
    "FNGD solving": partial(fngd_optimizer, base="sgd", mode="eager", fused=True, share="none"),
    "FNGD sketched": partial(
        fngd_optimizer, base="sgd", mode="eager", fused=True, share="none", sketch=SKETCH
    ),
}


def kernels_of(network: Network, step: str) -> list[Kernel]:
    """Return what one of STEPS launches, after a first step that has no momentum yet."""
    with torch.device("meta"):
        model = network.build(torch.device("meta"))
    counter = KernelCounter()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        launching(counter.launched, CAPABILITY),
        # They read numbers on the host, which are not there.
        mock.patch.object(Report, "_log_outcomes"),
        mock.patch.object(Update, "_log_skipped"),
        mock.patch.object(preconditioner, "runs_triton", return_value=True),
    ):
        model.to_empty(device=CPU)
        batch = network.draw(CPU)
        run = training_step(partial(network.objective, model), STEPS[step](model), counter.part)
        run(*batch)
        with counter:
            run(*batch)
    return counter.kernels


def figures(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Return the sums over some kernels: multiply-adds, bytes, launches, seconds of the floor by GPU."""
    listed = list(kernels)
    macs: Counter[str] = sum((kernel.macs for kernel in listed), Counter())
    sums: dict[str, float] = {
        f"macs_{arithmetic}": macs[arithmetic] for arithmetic in ("bf16", "tf32", "fp32")
    }
    sums["bytes_moved"] = sum(kernel.moved for kernel in listed)
    sums["scratch_bytes"] = sum(kernel.scratch for kernel in listed)
    sums["launches"] = sum(kernel.launches for kernel in listed)
    for gpu, ceilings in ASSUMED.items():
        for name, scratch in (("floor", True), ("floor_cached", False)):
            sums[f"{name}_{gpu}_s"] = sum(kernel.floor(ceilings, scratch=scratch) for kernel in listed)
    return sums


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each network, and append its rows to a file where one is named."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.count", description=__doc__)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--layers", action="store_true", help="a row for each kind of layer and its Gram matrix"
    )
    parser.add_argument("--output", type=Path, help="where to append rows; by default nowhere")
    options = parser.parse_args(argv)
    for name in options.network:
        network = NETWORKS[name]
        counted = {step: kernels_of(network, step) for step in STEPS}
        print(f"\n## {network.name}\n\n{_table(counted)}\n")
        for step in list(STEPS)[1:]:
            print(_ratios(counted, step))
        if options.layers:
            print(f"\nGram matrices of all layers of a kind:\n\n{_layer_table(counted['FNGD solving'])}")
        if options.output:
            rows = [
                {"network": network.name, "step": step, "part": part, **sums}
                for step, kernels in counted.items()
                for part, sums in _by_part(kernels).items()
            ]
            jsonl.append(options.output, [row | environment.describe(CPU) for row in rows])


def _by_part(kernels: Sequence[Kernel]) -> dict[str, dict[str, float]]:
    parts = dict.fromkeys(kernel.part for kernel in kernels)
    return {part: figures(k for k in kernels if k.part == part) for part in parts} | {"all": figures(kernels)}


def _table(counted: dict[str, list[Kernel]]) -> str:
    rows = [
        {"step": step, "part": part} | _columns(sums)
        for step, kernels in counted.items()
        for part, sums in _by_part(kernels).items()
    ]
    return tabulate(rows, "keys", tablefmt="github", floatfmt=".4g")


def _columns(sums: dict[str, float]) -> dict[str, float]:
    columns = {
        f"{arithmetic} GMAC": sums[f"macs_{arithmetic}"] / 1e9 for arithmetic in ("bf16", "tf32", "fp32")
    }
    columns |= {"GB": sums["bytes_moved"] / 1e9, "scratch GB": sums["scratch_bytes"] / 1e9}
    columns["launches"] = sums["launches"]
    for gpu in ASSUMED:
        columns[f"{gpu} floor ms"] = 1e3 * sums[f"floor_{gpu}_s"]
        columns[f"{gpu}, scratch in L2"] = 1e3 * sums[f"floor_cached_{gpu}_s"]
    return columns


def _ratios(counted: dict[str, list[Kernel]], step: str) -> str:
    """Return what a step costs in steps of SGD."""
    sgd, solving = (figures(counted[step]) for step in ("SGD", step))
    macs = [sum(value for key, value in sums.items() if key.startswith("macs_")) for sums in (sgd, solving)]
    ratios = {"multiply-adds": macs[1] / macs[0]}
    for gpu in ASSUMED:
        ratios[f"{gpu} floor"] = solving[f"floor_{gpu}_s"] / sgd[f"floor_{gpu}_s"]
        ratios[f"{gpu} floor, scratch in L2"] = (
            solving[f"floor_cached_{gpu}_s"] / sgd[f"floor_cached_{gpu}_s"]
        )
    return f"{step} / SGD: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())


def _layer_table(kernels: Sequence[Kernel]) -> str:
    found: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        if kernel.part == "gram":
            found.setdefault((kernel.layer, kernel.algorithm), []).append(kernel)
    rows = [
        {
            "layer": layer,
            "layers": sum(kernel.layers for kernel in own),
            "algorithm": algorithm,
        }
        | _columns(figures(own))
        for (layer, algorithm), own in found.items()
    ]
    return tabulate(rows, "keys", tablefmt="github", floatfmt=".4g")


if __name__ == "__main__":
    main()
