"""Checkpoints that are whole or absent: written beside the target, then renamed over it."""

import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`; an interruption at any point leaves the previous file as it was.

    What is written lies beside it as NAME.*.tmp, one for each writer. An error removes it; a process that is
    killed leaves it behind.

    Raises:
        OSError, RuntimeError: Where the file cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # By its path: Ctrl-C while torch writes to a file of Python's ends the process.
        torch.save(state, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, tensors and plain values only, onto the CPU.

    Raises:
        OSError: A file that cannot be opened.
        ValueError: One that is not as `save` wrote it.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as parts:
                # Since torch.load looks at no checksum, and reads nothing for an entry marked as a folder.
                damaged = parts.testzip() or next(
                    (e.filename for e in parts.infolist() if e.external_attr), ""
                )
            if damaged:
                raise zipfile.BadZipFile(f"{damaged} is not as it was written")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # Whatever a reader of foreign bytes may raise.
            raise ValueError(f"checkpoint: {path} is damaged or of another kind ({error})") from error
