"""Levenberg-Marquardt of the torch-levenberg-marquardt package."""

import importlib
from typing import Any

from bench.peers.base import Fit, Iterate, Peer, Pinn


def _build(task: Fit, *, damping: float) -> Iterate:
    library: Any = importlib.import_module("torch_levenberg_marquardt")
    trainer = library.training.LevenbergMarquardtModule(
        task.network,
        damping_strategy=library.damping.StandardDampingStrategy(starting_value=damping),
        solve_method="cholesky",
    )

    def step(_: float) -> int:
        trainer.training_step(task.points["x"], task.points["y"].unsqueeze(1))
        return 1

    return step


PEERS = {
    "levenberg-marquardt": Peer(
        "torch-levenberg-marquardt",
        pinn=Pinn(
            tuple({"damping": damping} for damping in (1e-4, 1e-3, 1e-2, 1e-1)),
            _build,
            {"color": "#000000", "linestyle": (0, (1, 1))},
            regression_only=True,
        ),
        module="torch_levenberg_marquardt",
        source="pip install torch-levenberg-marquardt",
    )
}
