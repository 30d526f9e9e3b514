"""The registry of optimizers that are compared, each from its own library, set up as that library recommends.

A module of this folder that defines PEERS takes part once it is named in MODULES.
"""

from importlib import import_module

from bench.peers.base import Peer, Pinn, Settings, Training, Update

__all__ = [
    "CORE",
    "PEERS",
    "PINN_NAMES",
    "TRAINING_NAMES",
    "Peer",
    "Pinn",
    "Settings",
    "Training",
    "Update",
    "available",
    "pinn_of",
    "training_of",
]

# In the order of tables, legends and --help.
MODULES = (
    "sgd",
    "adam",
    "lbfgs",
    "fngd",
    "muon",
    "soap",
    "shampoo",
    "distributed_shampoo",
    "kfac",
    "ssbroyden",
    "levenberg_marquardt",
    "gauss_newton",
)
PEERS: dict[str, Peer] = {
    name: peer for module in MODULES for name, peer in import_module(f"bench.peers.{module}").PEERS.items()
}
TRAINING_NAMES = tuple(name for name, peer in PEERS.items() if peer.training is not None)
PINN_NAMES = tuple(name for name, peer in PEERS.items() if peer.pinn is not None)
CORE = ("sgd", "adamw", "fngd", "fngd-exact")


def training_of(name: str) -> Training:
    """Return how the peer takes part in training.

    Raises:
        KeyError: When it does not.
    """
    part = PEERS[name].training
    if part is None:
        raise KeyError(name)
    return part


def pinn_of(name: str) -> Pinn:
    """Return how the peer takes part in the comparison on equations.

    Raises:
        KeyError: When it does not.
    """
    part = PEERS[name].pinn
    if part is None:
        raise KeyError(name)
    return part


def available(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return those of `names` that can run here, and a reason for each that cannot."""
    missing = {name: PEERS[name].missing() for name in names}
    return [name for name in names if missing[name] is None], [
        reason for reason in missing.values() if reason
    ]
