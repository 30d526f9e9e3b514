"""Finished runs on file, one JSON object a line; what is there is not run again."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from bench.pinn.run import Record, Run
from bench.tools import environment, jsonl

History = list[Record]


class Archive:
    """Runs in `folder`/runs.jsonl, the networks they trained in `folder`/networks.

    Raises:
        ValueError: A file that holds anything else, such as half a line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "runs.jsonl"
        self._histories: dict[str, History] = {}
        if self._path.exists():
            for number, line in enumerate(self._path.read_text().splitlines(), start=1):
                try:
                    row = json.loads(line)
                    self._histories[_key(Run(**row["run"]))] = [Record(**entry) for entry in row["history"]]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"output: line {number} of {self._path} is not a run ({error})"
                    ) from error

    def history(self, run: Run) -> History | None:
        """Return what was recorded of `run`, None when it is not here."""
        return self._histories.get(_key(run))

    def add(self, run: Run, history: History, network: nn.Module) -> None:
        """Keep a finished run and its network."""
        path = self.network_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
        row = {
            "run": asdict(run),
            "history": [_rounded(entry) for entry in history],
            **environment.describe(torch.device("cpu")),
        }
        jsonl.append(self._path, [row])
        self._histories[_key(run)] = history

    def network_path(self, run: Run) -> Path:
        """Return the file for the state of the network that `run` trained."""
        setting = "-".join(f"{name}{value:g}" for name, value in run.setting.items())
        return self.folder / "networks" / f"{run.problem}-{run.method}-{setting}-seed{run.seed}.pt"


def _key(run: Run) -> str:
    return json.dumps(asdict(run), sort_keys=True)


def _rounded(entry: Record) -> dict[str, float | None]:
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in asdict(entry).items()
    }
