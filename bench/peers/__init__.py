"""The methods compared, each from its own library, set up as that library's documentation recommends."""

from __future__ import annotations

from bench.peers import distributed_shampoo, first_order, kfac, muon, natural, shampoo
from bench.peers.base import Method, Settings, Update

__all__ = ["CORE", "METHODS", "Method", "Settings", "Update", "available"]

METHODS = {
    "sgd": first_order.SGD,
    "adamw": first_order.ADAMW,
    "fngd": natural.SHARED,
    "fngd-exact": natural.EXACT,
    "fngd-adamw": natural.OVER_ADAMW,
    "muon": muon.MUON,
    "soap": shampoo.SOAP,
    "shampoo": shampoo.SHAMPOO,
    "distributed-shampoo": distributed_shampoo.DISTRIBUTED_SHAMPOO,
    "kfac": kfac.KFAC,
}
CORE = ("sgd", "adamw", "fngd", "fngd-exact")


def available(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return those of `names` that can run here, and a reason for each that cannot."""
    missing = {name: METHODS[name].missing() for name in names}
    return [name for name in names if missing[name] is None], [
        reason for reason in missing.values() if reason
    ]
