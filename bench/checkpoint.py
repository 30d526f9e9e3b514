"""Checkpoints that are whole or absent: written beside the target, then renamed over it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`; an interruption at any point leaves the previous file as it was."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, tensors and plain values only, onto the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)
