"""Where a figure was measured: commit, versions and hardware, to be stored beside it.

`python -m bench.tools.environment` prints it. It fails where torch has CUDA and the native extension has not.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from fngd_kernels import native

REPOSITORY = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, str | float | bool | None]:
    """Return commit, whether there are uncommitted changes, date, versions, processor, load, GPU, threads.

    FNGD_COMMIT and FNGD_DIRTY (1 or 0) say the first two for a copy whose repository, if any, does not know.
    extension: what of the native extension is there: "cuda", "cpu" or nothing
    """
    commit, changed = _code()
    return {
        "commit": commit,
        "uncommitted_changes": changed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "extension": _extension(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _code() -> tuple[str | None, bool | None]:
    """Return the commit that runs and whether it has changes."""
    if "FNGD_COMMIT" in os.environ:
        return os.environ["FNGD_COMMIT"], os.environ.get("FNGD_DIRTY") != "0"
    # Results are appended to files of the repository, which must not make the next ones look uncommitted.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return _git("rev-parse", "--short=12", "HEAD"), None if changes is None else bool(changes)


def _extension() -> str | None:
    if not native.AVAILABLE:
        return None
    return "cuda" if native.HAS_CUDA else "cpu"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    """Print what is here; return 1 where torch has CUDA and the extension has not."""
    here = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps(here))
    return int(torch.version.cuda is not None and here["extension"] != "cuda")


if __name__ == "__main__":
    raise SystemExit(main())
