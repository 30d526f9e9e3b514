"""torch's L-BFGS with a strong Wolfe line search, from the start and after Adam."""

import torch

from bench.peers.adam import adam
from bench.peers.base import Fit, Iterate, Peer, Pinn

# Few enough iterations a call to keep the clock in view.
ITERATIONS = 20


def _lbfgs(task: Fit, *, history: float) -> Iterate:
    # Tolerances of 0: it goes on as long as a step can be found, like the other methods.
    optimizer = torch.optim.LBFGS(
        task.parameters,
        max_iter=ITERATIONS,
        history_size=int(history),
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    state = optimizer.state[task.parameters[0]]

    def step(_: float) -> int:
        before = state.get("n_iter", 0)
        optimizer.step(lambda: task.backward().item())  # type: ignore[arg-type, return-value]
        return state["n_iter"] - before

    return step


def _after_adam(task: Fit, *, lr: float, adam_share: float) -> Iterate:
    first, then = adam(task, lr=lr), _lbfgs(task, history=100)

    def step(spent: float) -> int:
        return first(spent / adam_share) if spent < adam_share else then(spent)

    return step


PEERS = {
    "adam-lbfgs": Peer(
        "Adam, then L-BFGS",
        pinn=Pinn(
            tuple({"lr": lr, "adam_share": share} for lr in (3e-3, 1e-2) for share in (0.1, 0.4)),
            _after_adam,
            {"color": "#009E73", "linestyle": "-."},
        ),
    ),
    "lbfgs": Peer(
        "L-BFGS",
        pinn=Pinn(
            tuple({"history": size} for size in (10, 30, 100, 300)),
            _lbfgs,
            {"color": "#56B4E9", "linestyle": (0, (5, 1))},
        ),
    ),
}
