"""The same run twice, in one process and in two, with one thread and with two: the same bits."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import fngd
import fngd_kernels as fk
from fngd.coefficients import Batch

SAMPLES, BATCH, EPOCHS = 40, 20, 3
SHARES, BASES = ("sample", "position", "mean", "none"), ("sgd", "adamw")


class Words(nn.Module):
    """Tokens (N, T) through an embedding that is read out by its own weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(50, 32, padding_idx=0), nn.Linear(32, 32)
        self.head = nn.Linear(32, 50)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embedding(x)))).mean(1)


class Recurrent(nn.Module):
    """An LSTM, and an MLP on its last state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """An encoder layer on (N, T, 32), with dropout."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, groups=2),
        nn.GroupNorm(4, 32),
        nn.Flatten(),
        nn.Linear(32 * 49, 10),
    )


# Large enough for torch to use more threads than one.
NETWORKS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(64, 512), nn.LayerNorm(512), nn.ReLU(), nn.Linear(512, 10)),
        lambda: torch.randn(SAMPLES, 64),
    ),
    "convolution": (convolutions, lambda: torch.randn(SAMPLES, 3, 16, 16)),
    "tied embedding": (Words, lambda: torch.randint(0, 50, (SAMPLES, 100))),
    "attention": (Attention, lambda: torch.randn(SAMPLES, 40, 32)),
    "LSTM": (Recurrent, lambda: torch.randn(SAMPLES, 12, 16)),
}
# On CUDA cuDNN and fused attention need torch.use_deterministic_algorithms to be reproducible.
NEEDS_FLAG = ("convolution", "attention", "LSTM")


def train(network, share, base, device, workers=0):
    """Train with shuffled batches of a sampler that draws samples twice; return everything that results."""
    torch.manual_seed(0)
    build, inputs = NETWORKS[network]
    model, data = build().to(device), TensorDataset(inputs(), torch.randint(0, 10, (SAMPLES,)))
    options = {"momentum": 0.9} if base == "sgd" else {}
    opt = fngd.FNGD(model, lr=0.01, base=base, share=share, norms="weighted", refresh_every=2, **options)
    drawn = RandomSampler(data, replacement=True, num_samples=SAMPLES)
    loader = DataLoader(data, BATCH, sampler=drawn, num_workers=workers)
    losses = []
    for _ in range(EPOCHS):
        for x, y in fngd.track(loader, opt) if share == "sample" else counted(loader, opt):
            opt.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            opt.step()
            losses.append(loss.detach())
    stats = {name: value for name, value in opt.stats().items() if name != "solve_seconds"}
    return losses, model.state_dict(), opt.state_dict(), stats


def drawn_twice(device):
    """Sum the rows of very many samples, each of which was drawn many times."""
    torch.manual_seed(0)
    sample_of, k = torch.randint(0, 10, (1000,)), torch.rand(1000, 1000)
    batch = Batch(1000, torch.arange(10), sample_of=sample_of.to(device))
    return [batch.by_sample(k.to(device)) for _ in range(10)]


def counted(loader, opt):
    opt.start_epoch()
    return loader


def optimize(model, residuals, steps, **options):
    opt = fngd.GaussNewton(model, **options)
    return [opt.step(residuals) for _ in range(steps)], model.state_dict(), opt.state_dict()


def equation(device):
    """u'' = f with its ends as a second block, by Levenberg and Marquardt."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)).to(device, torch.float64)
    points = torch.linspace(0, 1, 60, dtype=torch.float64, device=device).unsqueeze(1)

    def residuals():
        x = points.clone().requires_grad_()
        (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (d2u,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return {"equation": d2u + torch.sin(6 * x), "ends": (model(points[[0, -1]]), 100.0)}

    return optimize(model, residuals, 6)


def minibatches(device):
    """Regression in minibatches, with momentum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 2)).to(device)
    batches = iter(torch.randn(6, 48, 16, device=device))
    return optimize(model, lambda: model(next(batches)) - 1, 6, lr=0.3, damping=0.01, momentum=0.9)


def sequences(device):
    """Regression on few long sequences of tokens: many threads add to the same rows of the Jacobian."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(4, 16).to(device), nn.Linear(16, 1).to(device)
    ids, places = torch.randint(0, 4, (3, 20_000), device=device), torch.randn(3, 20_000, 16, device=device)
    model = nn.ModuleList([embedding, head])
    return optimize(model, lambda: head(torch.tanh(embedding(ids) + places).mean(1)), 3, damping=0.1)


def layer_grams(network, device):
    torch.manual_seed(0)
    build, inputs = NETWORKS[network]
    model, x = build().to(device), inputs().to(device)
    return fngd.layer_grams(model, lambda: F.cross_entropy(model(x), torch.zeros(SAMPLES).long().to(device)))


def repeated(function, make, repeats, device):
    """Call the function again and again, each time on copies in other places of memory."""
    torch.manual_seed(0)
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in make()]
    calls = [
        fingerprint(function(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)))
        for _ in range(repeats)
    ]
    return sorted(set(calls))


def rows(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def spd(*shape):
    x = torch.randn(*shape, 2 * shape[-1])
    return x @ x.mT


FUNCTIONS = {
    "gram, a position": (fk.gram, lambda: (rows(40, 200), rows(40, 100))),
    "gram, pairs": (partial(fk.gram, bias=True), lambda: (rows(20, 4, 300), rows(20, 4, 200))),
    "gram, explicit": (partial(fk.gram, bias=True), lambda: (rows(20, 90, 24), rows(20, 90, 16))),
    "gram, bfloat16": (fk.gram, lambda: (rows(20, 90, 24, dtype=torch.bfloat16),) * 2),
    "gram, float64": (fk.gram, lambda: (rows(20, 9, 24, dtype=torch.float64),) * 2),
    "gram, diagonal": (partial(fk.gram, diag=True), lambda: (rows(40, 30, 24), rows(40, 30, 16))),
    "gram of a convolution, explicit": (
        partial(fk.gram_conv, bias=True),
        lambda: (rows(16, 8, 12, 12), rows(16, 8, 10, 10), (8, 8, 3, 3)),
    ),
    "gram of a convolution, pairs": (
        fk.gram_conv,
        lambda: (rows(4, 256, 2, 2), rows(4, 256, 2, 2), (256, 256, 1, 1)),
    ),
    "gram of a convolution, diagonal": (
        partial(fk.gram_conv, diag=True, groups=2),
        lambda: (rows(16, 8, 12, 12), rows(16, 8, 10, 10), (8, 4, 3, 3)),
    ),
    "gram of an embedding": (
        partial(fk.gram_embedding, padding_idx=0),
        lambda: (torch.randint(0, 9, (16, 90)), rows(16, 90, 32)),
    ),
    "gram of an embedding, diagonal": (
        partial(fk.gram_embedding, diag=True),
        lambda: (torch.randint(0, 9, (16, 90)), rows(16, 90, 32)),
    ),
    "gram of rows": (fk.gram_rows, lambda: (rows(40, 3000),)),
    "gram of rows, diagonal": (partial(fk.gram_rows, diag=True), lambda: (rows(40, 3000),)),
    "combine": (partial(fk.combine, bias=True), lambda: (rows(20, 90, 64), rows(20, 90, 32), rows(20))),
    "combine of a convolution": (
        partial(fk.combine_conv, bias=True),
        lambda: (rows(16, 8, 12, 12), rows(16, 8, 10, 10), rows(16), (8, 8, 3, 3)),
    ),
    "combine of an embedding": (
        fk.combine_embedding,
        lambda: (torch.randint(0, 9, (16, 90)), rows(16, 90, 32), rows(16), 9),
    ),
    "combine of rows": (fk.combine_rows, lambda: (rows(40, 3000), rows(40))),
    "solve": (fk.solve, lambda: (spd(9, 65), 0.1)),
}


def runs(full):
    """Return {name: run}, a run takes a device; without `full` one base for each network and share."""
    found = {}
    for choice in itertools.product(NETWORKS, SHARES, BASES):
        if full or sum(map(list.index, map(list, (NETWORKS, SHARES, BASES)), choice)) % 2 == 0:
            found["FNGD: " + ", ".join(choice)] = partial(train, *choice)
    found["FNGD: loader with workers"] = partial(train, "linear", "sample", "sgd", workers=2)
    found["FNGD: samples drawn twice"] = drawn_twice
    for run in (equation, minibatches, sequences):
        found[f"GaussNewton: {run.__name__}"] = run
    for network in NETWORKS:
        found[f"layer_grams: {network}"] = partial(layer_grams, network)
    for name, (function, make) in FUNCTIONS.items():
        found[f"fngd_kernels: {name}"] = partial(repeated, function, make, 100 if full else 20)
    return found


def fingerprint(result):
    """Return a hash of every bit of nested tensors and plain values."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, (list, tuple)):
            digest.update(str(len(value)).encode())
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(result)
    return digest.hexdigest()


def main(device, threads, deterministic, times, full):
    """Print {name: fingerprints} of all runs, each done so many times."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    chosen = runs(full)
    if device == "cuda" and not deterministic:
        chosen = {name: run for name, run in chosen.items() if not any(part in name for part in NEEDS_FLAG)}
    print(
        json.dumps({name: [fingerprint(run(device)) for _ in range(times)] for name, run in chosen.items()})
    )


def processes(count, *arguments):
    """Return what `main` prints in so many processes that run side by side."""
    here = Path(__file__).parent
    program = f"import sys; sys.path.insert(0, {str(here)!r}); import test_determinism; test_determinism.main"
    # Asked for by torch's deterministic mode; threads that spin would hold each other up on a busy machine.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-W", "ignore", "-c", f"{program}{arguments}"]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(count)]
    printed = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    return [json.loads(text) for text in printed]


CONFIGURATIONS = [
    ("cpu", 1, False),
    ("cpu", 2, False),
    ("cpu", 2, True),
    pytest.param("cuda", 2, False, marks=pytest.mark.gpu),
    pytest.param("cuda", 2, True, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "threads", "deterministic"), CONFIGURATIONS)
def test_runs_are_reproduced_bit_for_bit(device, threads, deterministic, full, tally):
    times = 2 if full or threads == 1 else 1
    one, other = processes(2, device, threads, deterministic, times, full)
    differing = [name for name in one if len({*one[name], *other[name]}) > 1]
    assert one.keys() == other.keys()
    assert not differing
    mode = ", deterministic algorithms" if deterministic else ""
    for kind, count in Counter(name.partition(":")[0] for name in one).items():
        given = f"{kind}, two processes, {device}, {threads} thread(s){mode}"
        tally("Determinism", given, "the same bits", cases=2 * times * count)
