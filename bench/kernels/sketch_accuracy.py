"""Compare coefficients of sketched Gram matrices with the exact ones.

`python -m bench.kernels.sketch_accuracy` trains four networks for some steps of SGD, and then takes the Gram
matrix of every layer for one batch, in float64, exactly and sketched. What the gradient sum_n s_n C_n loses
follows from the exact matrix K: the squared length of a weighted gradient is s^T K s.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fngd
import fngd_kernels as fk
from bench.models import images
from bench.steps.networks import TRANSFORMER
from bench.tools import arguments, environment, jsonl
from bench.tools.jsonl import Row
from bench.workloads import cifar, digits
from bench.workloads.images import Workload

BATCH, LEARNING_RATE, MOMENTUM = 64, 0.05, 0.9
MEASURES = ("s_error", "s_correlation", "gradient_error", "gradient_cosine")


@dataclass(frozen=True)
class Case:
    """A network, and (inputs, targets) of a new batch for each number of a step."""

    name: str
    model: nn.Module
    draw: Callable[[int], tuple[Tensor, Tensor]]

    def loss(self, step: int) -> Tensor:
        """Return the mean loss of a batch, in the dtype of the model."""
        x, y = self.draw(step)
        x = x.to(next(self.model.parameters()).dtype) if x.is_floating_point() else x
        return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())

    def train(self, steps: int) -> float:
        """Take steps of SGD; return the last loss."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        for step in range(steps):
            optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            optimizer.step()
        return loss.item()


def cases(data_dir: Path | None) -> list[Case]:
    """Return the networks; they learn digits, the CNN CIFAR-10 where there is a folder with it."""
    numerals = digits.load()
    pictures = cifar.load("cifar10", data_dir, cache_dir=Path("runs/cache")) if data_dir else numerals
    torch.manual_seed(0)
    return [
        Case("MLP", images.mlp(64, 10, units=256), _of_images(numerals)),
        Case("MLP with BatchNorm", _normalised_mlp(64, 10, units=256), _of_images(numerals)),
        Case("CNN", pictures.model("cnn", 32), _of_images(pictures)),
        Case("Transformer", TRANSFORMER.build(torch.device("cpu")), _progressions),
    ]


def _normalised_mlp(inputs: int, classes: int, *, units: int) -> nn.Sequential:
    hidden = (nn.Linear(inputs, units), nn.BatchNorm1d(units), nn.ReLU())
    second = (nn.Linear(units, units), nn.BatchNorm1d(units), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, *second, nn.Linear(units, classes))


def _of_images(data: Workload) -> Callable[[int], tuple[Tensor, Tensor]]:
    def draw(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(data.train), (BATCH,), generator=torch.Generator().manual_seed(step))
        return data.standardise(data.train.x[rows]), data.train.y[rows]

    return draw


def _progressions(step: int) -> tuple[Tensor, Tensor]:
    """Return sequences that count on by 1 to 8, each tenth token another one, and what follows."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(1000, (BATCH, 1), generator=generator)
    by = torch.randint(1, 9, (BATCH, 1), generator=generator)
    tokens = (first + by * torch.arange(33)) % 1000
    other = torch.randint(1000, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.1, other, tokens)
    return tokens[:, :-1], tokens[:, 1:]


def compare(k: Tensor, s: Tensor, found: Tensor) -> dict[str, float]:
    """Return how much coefficients differ from s (N,), those of the exact Gram matrix k."""

    def inner(x: Tensor, y: Tensor) -> float:
        return float(x @ k @ y)

    difference = found - s
    return {
        "s_error": float(difference.norm() / s.norm()),
        "s_correlation": float(torch.corrcoef(torch.stack([s, found]))[0, 1].nan_to_num()),
        "gradient_error": (max(inner(difference, difference), 0.0) / inner(s, s)) ** 0.5,
        "gradient_cosine": inner(s, found) / (inner(s, s) * inner(found, found)) ** 0.5,
    }


def measure(
    case: Case, steps: int, sizes: Sequence[int], dampings: Sequence[float], seeds: int
) -> Iterator[Row]:
    """Yield a row for each size, kind of layer and damping; size 0 stands for equal coefficients, s = 1."""
    loss = case.train(steps)
    case.model.double()
    kinds = {name: type(module).__name__ for name, module in case.model.named_modules()}

    def grams(sketch: fk.Sketch | None) -> dict[str, Tensor]:
        return fngd.layer_grams(case.model, lambda: case.loss(steps), sketch=sketch)

    def coefficients(k: Tensor, damping: float) -> Tensor:
        return fk.reference.coefficients(k, damping) if damping else torch.ones_like(k[0])

    exact = grams(None)
    for size in (0, *sizes):
        drawn = [grams(fk.Sketch(size, seed)) for seed in range(seeds)] if size else [exact]
        for kind, damping in product(dict.fromkeys(kinds[name] for name in exact), dampings):
            layers = [name for name in exact if kinds[name] == kind]
            found = [
                compare(
                    exact[name],
                    coefficients(exact[name], damping),
                    coefficients(matrices[name], damping if size else 0.0),
                )
                for name, matrices in product(layers, drawn)
            ]
            yield {
                "network": case.name,
                "steps": steps,
                "loss": loss,
                "layers": kind,
                "count": len(layers),
                "damping": damping,
                "size": size,
                "seeds": len(drawn),
                **{name: median(each[name] for each in found) for name in MEASURES},
            }


def table(rows: Sequence[Row], measures: tuple[str, str]) -> str:
    """Return two measures as a Markdown table with a column for each size."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    lines: dict[tuple[str, str, float], list[str]] = {}
    for row in rows:
        key = (row["network"], f"{row['count']} {row['layers']}", row["damping"])
        exact = row["gradient_error"] < 1e-9
        lines.setdefault(key, []).append(
            "exact" if exact else ", ".join(f"{row[name]:.2f}" for name in measures)
        )
    header = ["network", "layers", "damping", *("s = 1" if size == 0 else f"r = {size}" for size in sizes)]
    return tabulate([[*key, *cells] for key, cells in lines.items()], header, tablefmt="github")


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables; append the rows where a file is named."""
    options = _parser().parse_args(argv)
    where = environment.describe(torch.device("cpu"))
    rows: list[Row] = []
    for case in cases(options.data_dir):
        found = list(measure(case, options.steps, options.sizes, options.dampings, options.seeds))
        rows += found
        if options.output:
            jsonl.append(options.output, [{**row, **where} for row in found])
    print("# What coefficients lose by a sketch\n")
    print(f"Medians over layers and {options.seeds} seeds of the sketch, after {options.steps} steps of SGD")
    print(f"(momentum {MOMENTUM}), batch {BATCH}, float64; equal coefficients, s = 1, for comparison.")
    print(f"Commit {where['commit']}, {where['cpu']}, torch {where['torch']}.")
    print("\n## Coefficients: relative error, correlation\n")
    print(table(rows, ("s_error", "s_correlation")))
    print("\n## Weighted gradient: relative error, cosine\n")
    print(table(rows, ("gradient_error", "gradient_cosine")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.sketch_accuracy", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=arguments.positive_int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--dampings", nargs="+", type=arguments.positive_float, default=[0.01, 0.1, 1.0])
    parser.add_argument("--steps", type=arguments.positive_int, default=400)
    parser.add_argument("--seeds", type=arguments.positive_int, default=7)
    parser.add_argument("--data-dir", type=Path, help="folder with CIFAR-10, for the convolutions")
    parser.add_argument("--output", type=Path, help="file to append rows to")
    return parser


if __name__ == "__main__":
    main()
