"""Run the reliability campaign, and write its table into docs/reliability.md.

python -m bench.reliability            the whole campaign
python -m bench.reliability --quick    the part that runs with the tests
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.reliability.table import put, table
from bench.tools.environment import describe

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reliability.md"


def main() -> int:
    """Run the campaign; return pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="as many cases as the tests run")
    quick = parser.parse_args().quick
    tally = ROOT / "runs/reliability.json"
    tally.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/reliability", f"--tally={tally}"]
    status = subprocess.run(command + ([] if quick else ["--full"]), cwd=ROOT).returncode
    if not status:
        machine = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        size = "The quick part" if quick else "The whole campaign"
        tallies = json.loads(tally.read_text())
        cases = sum(n for rows in tallies.values() for outcomes in rows.values() for n in outcomes.values())
        where = "commit {commit}, torch {torch}, {cpu}, GPU: {gpu}".format(**machine)
        PAGE.write_text(put(PAGE.read_text(), f"{size}, {cases:,} cases ({where}).\n\n{table(tallies)}"))
    return status


if __name__ == "__main__":
    sys.exit(main())
