"""FNGD's GaussNewton."""

import fngd
from bench.peers.base import Fit, Iterate, Peer, Pinn


def _build(task: Fit, *, damping: float) -> Iterate:
    optimizer = fngd.GaussNewton(task.network, damping="lm", initial_damping=damping)

    def step(_: float) -> int:
        optimizer.step(task.residuals)
        return 1

    return step


PEERS = {
    "gauss-newton": Peer(
        "GaussNewton",
        pinn=Pinn(
            tuple({"damping": damping} for damping in (0.1, 1.0, 10.0, 100.0)),
            _build,
            {"color": "#D55E00", "linestyle": "-"},
        ),
    )
}
