"""A comparison: tune every method on validation points, then train at the chosen settings over the seeds."""

import sys
from dataclasses import dataclass, replace

from tqdm import tqdm

from bench.peers import PEERS, pinn_of
from bench.peers.base import Setting
from bench.pinn.archive import Archive, History
from bench.pinn.problems import Problem, Regression
from bench.pinn.run import Record, Run, train
from bench.pinn.task import Task

# Tuning has a seed of its own: no final run was chosen by its own error.
TUNING_SEED = 0


@dataclass(frozen=True)
class Study:
    """What the command line asks for; `settings` limits how many each method tries."""

    methods: tuple[str, ...]
    settings: int
    seeds: tuple[int, ...]
    seconds: float

    @property
    def seconds_per_problem(self) -> float:
        """Return the training time of one problem, when all methods can run."""
        return self.seconds * len(self.methods) * (self.settings + len(self.seeds))


@dataclass(frozen=True)
class Final:
    """Runs of a method at its tuned setting, one for each seed; `tried` are all the settings tuning tried."""

    tried: tuple[Setting, ...]
    runs: tuple[Run, ...]
    histories: tuple[History, ...]

    @property
    def setting(self) -> Setting:
        """Return the tuned setting."""
        return self.runs[0].setting

    @property
    def ended(self) -> list[History]:
        """Return the histories of the runs that did not diverge."""
        pairs = zip(self.runs, self.histories, strict=True)
        return [history for run, history in pairs if not diverged(run, history)]


def conduct(study: Study, problem: Problem, archive: Archive, bar: tqdm) -> dict[str, Final]:
    """Do what of the study is not yet in `archive`; methods that cannot run are named and left out."""
    finals = {}
    for name in study.methods:
        final = obstacle(name, problem) or _tune_and_train(study, problem, name, archive, bar)
        if isinstance(final, str):
            bar.write(f"{problem.name}: {PEERS[name].label} left out: {final}", file=sys.stderr)
        else:
            finals[name] = final
    return finals


def obstacle(name: str, problem: Problem) -> str | None:
    """Return why the peer called `name` cannot run on `problem`, None when it can."""
    if not PEERS[name].installed:
        return f"{PEERS[name].module} is not installed"
    if pinn_of(name).regression_only and not isinstance(problem, Regression):
        return "it differentiates by torch.func, where autograd.grad inside the residuals is refused"
    return None


def _tune_and_train(study: Study, problem: Problem, method: str, archive: Archive, bar: tqdm) -> Final | str:
    first = Run(problem.name, method, {}, TUNING_SEED, study.seconds)
    tried = pinn_of(method).settings[: study.settings]
    tuning = [replace(first, setting=setting) for setting in tried]
    errors = {
        number: outcome(problem, history).validation_error
        for number, run in enumerate(tuning)
        if not diverged(run, history := finished(run, problem, archive, bar))
    }
    if not errors:
        return "it diverged with every setting"
    best = tuning[min(errors, key=errors.__getitem__)]
    runs = tuple(replace(best, seed=seed) for seed in study.seeds)
    return Final(tried, runs, tuple(finished(run, problem, archive, bar) for run in runs))


def finished(run: Run, problem: Problem, archive: Archive, bar: tqdm) -> History:
    """Return the history of `run`, from the archive or, when it is not there, by training."""
    bar.set_description(f"{run.problem} {PEERS[run.method].label} {describe(run.setting)} seed {run.seed}")
    history = archive.history(run)
    if history is not None:
        bar.update(run.seconds)
        return history
    task = Task.of(problem, run.seed)
    history = []
    for entry in train(run, problem, task):
        bar.update(entry.seconds - (history[-1].seconds if history else 0))
        bar.set_postfix_str(f"error {entry.test_error:.1e}")
        history.append(entry)
    archive.add(run, history, task.network)
    last = history[-1]
    end = "diverged" if diverged(run, history) else f"error {last.test_error:.2e}, loss {last.loss:.2e}"
    name = bar.desc.removesuffix(": ")
    bar.write(f"{name}: {last.step} steps in {last.seconds:.1f} s, {end}", file=sys.stderr)
    return history


def describe(setting: Setting) -> str:
    """Return the setting as `lr 0.01, ...`."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in setting.items())


def diverged(run: Run, history: History) -> bool:
    """Return whether the run ended before its time, as it does once its loss is not finite."""
    return history[-1].seconds < run.seconds


def outcome(problem: Problem, history: History) -> Record:
    """Return the record that counts: the last, or with early stopping that of the lowest validation error."""
    if problem.early_stopping:
        return min(history, key=lambda entry: entry.validation_error)
    return history[-1]
