"""Random calls of every public function, sound and wrong: each is answered rightly or refused.

python tests/reliability/fuzz.py --calls 100000 --seed 0

A call begins as a sound one; then, in half of all calls, arguments are replaced by others of any kind. What
must happen: a result equal to an independent one in float64; or ValueError or TypeError whose message begins
with the name of an argument, but not for a sound call. All else is a finding.
"""

import argparse
import random
import re
import sys
import traceback
from collections import Counter
from typing import Any

import torch
from fuzz_targets import TARGETS, Target
from fuzz_values import wrong_value
from torch import Tensor

NO_MEMORY = re.compile(
    r"can't allocate memory|[Ss]torage size calculation overflow|numel: integer multiplication overflow"
)


class Finding(Exception):
    """A call that was neither answered rightly nor refused properly."""


def on_meta(value: Any) -> Any:
    """Return the value with its tensors on the meta device."""
    if isinstance(value, list | tuple):
        return type(value)(map(on_meta, value))
    return value.detach().to("meta") if isinstance(value, Tensor) and value.layout == torch.strided else value


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    return [part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, Tensor)]


def shapes(result: Any) -> list:
    """Return the shape and dtype of every tensor of a result."""
    return [(tuple(part.shape), part.dtype) for part in tensors_of(result)]


def call(target: Target, seed: int) -> str:
    """Make the call that the seed describes; return what happened, or raise Finding."""
    rng = random.Random(f"{target.name} {seed}")
    torch.manual_seed(rng.getrandbits(31))
    given = target.draw(rng)
    sound = rng.random() < 0.5
    if not sound:
        for name in rng.sample(sorted(given), min(len(given), rng.choice((1, 1, 1, 2)))):
            given[name] = wrong_value(rng, given[name])
    try:
        result = target.call(**given)
        meta = {name: on_meta(value) for name, value in given.items()}
        twin = target.call(**meta) if rng.random() < 0.1 else result
    except target.errors as error:
        if sound:
            raise Finding(f"refused a sound call: {type(error).__name__}: {error}") from error
        names_argument = re.match(rf"({'|'.join(given)})\b", str(error))
        if not names_argument and not isinstance(error, torch.linalg.LinAlgError):
            raise Finding(f"{type(error).__name__} names no argument: {error}") from error
        return type(error).__name__
    except Exception as error:
        if isinstance(error, RuntimeError) and not sound and NO_MEMORY.search(str(error)):
            return "out of memory"
        if isinstance(error, NotImplementedError) and "meta" in str(error).lower():
            return "NotImplementedError for meta tensors"
        raise Finding(f"{type(error).__name__}: {error}") from error
    try:
        assert shapes(twin) == shapes(result), f"meta tensors give {shapes(twin)} instead of {shapes(result)}"
        if not any(part.is_meta for part in tensors_of(result)):
            target.judge(result, given)
    except Exception as error:
        raise Finding(f"wrong answer: {type(error).__name__}: {error}") from error
    return "right answer"


def campaign(calls: int, seed: int) -> tuple[dict[str, Counter], list[str]]:
    """Make so many calls, in turns; return {function: {outcome: calls}}, and the findings."""
    outcomes = {target.name: Counter() for target in TARGETS}
    findings = []
    for number in range(calls):
        target = TARGETS[number % len(TARGETS)]
        try:
            outcomes[target.name][call(target, seed + number)] += 1
        except Finding as finding:
            findings.append(f"{target.name} --seed {seed + number}: {finding}")
    return outcomes, findings


def main() -> int:
    """Run a campaign, or one call again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--function", help="make this function's call of that seed alone, and show what happens"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.function:
        try:
            print(call(next(target for target in TARGETS if target.name == options.function), options.seed))
        except Finding:
            traceback.print_exc()
            return 1
        return 0
    outcomes, findings = campaign(options.calls, options.seed)
    for name, counts in outcomes.items():
        print(f"{name:40}", dict(counts))
    print(*findings[:100], f"{len(findings)} findings", sep="\n")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
