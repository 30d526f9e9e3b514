"""Arguments that several commands have, and the checks of their values."""

import argparse
from pathlib import Path

import torch

from bench.tools.jsonl import RESULTS


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device: by default the GPU where torch sees one."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_device_rows(parser: argparse.ArgumentParser) -> None:
    """Add --output of rows that have a file for each kind of device: see `device_rows`."""
    parser.add_argument("--output", type=Path, help="default: gpu.jsonl or cpu.jsonl among the results")


def device_rows(device: torch.device) -> Path:
    """Return the file for rows of steps and solves on this kind of device."""
    return RESULTS / ("gpu.jsonl" if device.type == "cuda" else "cpu.jsonl")


def positive_int(text: str) -> int:
    """Return the number in `text`.

    Raises:
        ArgumentTypeError: A number below 1.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def positive_float(text: str) -> float:
    """Return the number in `text`.

    Raises:
        ArgumentTypeError: A number that is not above 0 and finite.
    """
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value
