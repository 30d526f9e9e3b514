"""Training runs for the tests: their configuration, invented histories, a watch over waits for the device."""

import torch

from bench.peers import training_of
from bench.train.run import Run, RunConfig, train


def config(method="sgd", **changes):
    values = {
        "data": "digits",
        "train_size": 200,
        "model": "mlp",
        "width": 1,
        "method": method,
        "lr": training_of(method).lrs[2],
        "damping": training_of(method).damping,
        "share": "sample",
        "seed": 0,
        "epochs": 3,
        "warmup_epochs": 0,
        "batch_size": 32,
        "label_noise": 0.0,
        "precision": "fp32",
        "device": "cpu",
    }
    return RunConfig(**(values | changes))


def fake_run(method, lr, accuracies, losses=None, test=None, seconds=None, diverged=False, shared=False):
    losses = losses or [1.0] * len(accuracies)
    seconds = seconds or [1.0] * len(accuracies)
    epochs = [
        {"train_loss": 1.0, "validation_loss": loss, "validation_accuracy": accuracy, "seconds": time_taken}
        for accuracy, loss, time_taken in zip(accuracies, losses, seconds, strict=True)
    ]
    score = None if diverged else 100 * accuracies[-1]
    test_score = None if test is None else 100 * test
    environment = {"shared_device": shared}
    return Run(config(method, lr=lr), epochs, diverged, score, test_score, environment=environment)


class NoWaits:
    """Forbids that a step waits for the device, but for the first two of an epoch."""

    def __init__(self, steps):
        self.steps, self.done = steps, 0

    def __call__(self):
        self.done += 1
        torch.cuda.set_sync_debug_mode("error" if self.done % self.steps >= 2 else "default")


def train_without_waits(settings, task):
    watch = NoWaits(len(task.batches(settings.batch_size, torch.Generator())))
    try:
        run = train(settings, task, on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(run.epochs) == settings.epochs
    assert watch.done == settings.epochs * watch.steps > 2 * settings.epochs
