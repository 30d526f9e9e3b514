"""The recipes of docs/frameworks.md run as written, and train what a plain loop trains on those batches."""

import copy
import os
import re
import sys
from collections import Counter
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import fngd
import paths
from fngd.coefficients import Schedule
from ranks import torchrun

PAGE = (paths.DOCS / "frameworks.md").read_text()
PACKAGES = {"Hugging Face Trainer": "transformers", "accelerate": "accelerate", "Lightning": "lightning"}
SAMPLES, BATCH, EPOCHS = 64, 16, 3
DATA = [
    {"input_ids": torch.randint(20, (4,), generator=torch.Generator().manual_seed(n)), "labels": n % 3}
    for n in range(SAMPLES)
]


class Network(nn.Module):
    """Returns what Hugging Face's models return."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(20, 6), nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, input_ids, labels):
        logits = self.head(torch.tanh(self.hidden(self.embedding(input_ids).flatten(1))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def recipe(heading):
    """Run a section of the page, and return what it defines and the lines that it is to print."""
    pytest.importorskip(PACKAGES[heading])
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    code = sections["A dataset that carries its indices"] + sections[heading]
    namespace, expected = {}, []
    for example in re.findall(r"^```py(?:thon)?\n(.*?)^```", code, re.MULTILINE | re.DOTALL):
        exec(compile(example, "frameworks.md", "exec"), namespace)
        expected += re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    return namespace, expected


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch, tmp_path):
    """Let the frameworks choose the CPU, and write into a folder of the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch):
    """The ids of every batch that an optimizer was told of."""
    drawn = []

    def noting(method):
        def noted(schedule, ids, *rest):
            drawn.append(ids.tolist())
            return method(schedule, ids, *rest)

        return noted

    for name in ("set_samples", "name"):
        monkeypatch.setattr(Schedule, name, noting(getattr(Schedule, name)))
    return drawn


def plain_loop(model, opt, drawn, accumulated=1):
    """Train on the batches that were drawn, `accumulated` of them for each step."""
    for n, ids in enumerate(list(drawn)):
        opt.set_samples(ids)
        batch = torch.utils.data.default_collate([DATA[i] for i in ids])
        (model(**batch)["loss"] / accumulated).backward()
        if (n + 1) % accumulated == 0:
            opt.step()
            opt.zero_grad()


def assert_same(model, reference):
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q), name


def assert_shared(opt, drawn):
    """Every sample came once an epoch, was solved for once, and kept its weight."""
    assert Counter(chain(*drawn)) == dict.fromkeys(range(SAMPLES), EPOCHS)
    assert opt.stats()["solved_batches"] == SAMPLES // BATCH
    assert opt.stats()["seen_samples"] == SAMPLES


@pytest.mark.parametrize("heading", PACKAGES)
def test_the_recipe_runs_as_written(heading, capsys):
    _, expected = recipe(heading)
    printed = capsys.readouterr().out.splitlines()
    assert expected
    assert [line for line in printed if line in expected] == expected


TWO_PROCESSES = """
import os
import torch
from test_frameworks import recipe

results = {}
for heading in ("accelerate", "Hugging Face Trainer"):
    defined, _ = recipe(heading)
    opt = defined["natural"] if heading == "accelerate" else defined["trainer"].natural
    parameters = [p.detach() for group in opt.param_groups for p in group["params"]]
    results[heading] = opt.stats()["seen_samples"], opt.stats()["epoch"], parameters
assert torch.distributed.get_world_size() == 2
torch.save(results, os.environ["RANK"])
"""


def test_the_recipes_run_in_two_processes(tmp_path):
    """Each process solves for half of the samples and knows all of them after the first epoch."""
    for package in ("accelerate", "transformers"):
        pytest.importorskip(package)
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    torchrun(script, PYTHONPATH=os.pathsep.join(sys.path), ACCELERATE_USE_CPU="true")
    first, second = torch.load("0"), torch.load("1")
    for heading, (seen, epoch, parameters) in first.items():
        assert (seen, epoch) == second[heading][:2] == (64, 2)
        for p, q in zip(parameters, second[heading][2], strict=True):
            assert torch.equal(p, q)


# ---- Hugging Face Trainer ----


def hugging_face(model, recipe, **arguments):
    arguments = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | arguments
    return recipe["NaturalTrainer"](
        model, recipe["TrainingArguments"]("out", **arguments), train_dataset=recipe["Numbered"](DATA)
    )


@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_is_the_plain_loop(drawn, accumulated):
    namespace, _ = recipe("Hugging Face Trainer")
    drawn.clear()
    model = Network()
    twin = copy.deepcopy(model)
    trainer = hugging_face(model, namespace, gradient_accumulation_steps=accumulated)
    trainer.train()
    assert_shared(trainer.natural, drawn)
    plain_loop(twin, fngd.FNGD(twin, lr=0.01, base="adamw", weight_decay=0.0), drawn, accumulated)
    assert_same(model, twin)


@pytest.mark.parametrize("step", [2, 6])  # of the solving epoch, and of the next
def test_trainer_resumes_in_the_middle_of_an_epoch(step):
    namespace, _ = recipe("Hugging Face Trainer")
    whole, continued = Network(), Network()
    options = {"save_strategy": "steps", "save_steps": step}
    first = hugging_face(whole, namespace, **options)
    first.train()
    second = hugging_face(continued, namespace, **options)
    second.train(resume_from_checkpoint=f"out/checkpoint-{step}")
    assert_same(continued, whole)
    assert second.natural.stats()["solved_batches"] == first.natural.stats()["solved_batches"]


# ---- accelerate ----


def accelerated(model, namespace, accelerator, epochs=EPOCHS, state=None):
    """Train by the page's loop, under accelerator.accumulate."""
    natural = fngd.FNGD(model, lr=0.1, momentum=0.9)
    data = DataLoader(namespace["Numbered"](DATA), BATCH, shuffle=True)
    prepared, opt, loader = accelerator.prepare(model, natural, data)
    if state is not None:
        accelerator.load_state(state)
    loader = fngd.track(loader, natural, key="sample_id")
    for _ in range(epochs):
        for batch in loader:
            del batch["sample_id"]
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch)["loss"])
                opt.step()
                opt.zero_grad()
    return natural


@pytest.mark.parametrize("accumulated", [1, 2])
def test_accelerate_is_the_plain_loop(drawn, accumulated):
    namespace, _ = recipe("accelerate")
    drawn.clear()
    model = Network()
    twin = copy.deepcopy(model)
    accelerator = namespace["Accelerator"](gradient_accumulation_steps=accumulated)
    assert_shared(accelerated(model, namespace, accelerator), drawn)
    plain_loop(twin, fngd.FNGD(twin, lr=0.1, momentum=0.9), drawn, accumulated)
    assert_same(model, twin)


def test_accelerate_saves_and_loads_the_state(drawn):
    namespace, _ = recipe("accelerate")
    drawn.clear()
    model = Network()
    twin = copy.deepcopy(model)
    accelerator = namespace["Accelerator"]()
    accelerated(model, namespace, accelerator, epochs=1)
    accelerator.save_state("state")

    model = Network()
    natural = accelerated(model, namespace, namespace["Accelerator"](), epochs=EPOCHS - 1, state="state")
    assert_shared(natural, drawn)
    plain_loop(twin, fngd.FNGD(twin, lr=0.1, momentum=0.9), drawn)
    assert_same(model, twin)


# ---- Lightning ----


def fit(namespace, epochs=EPOCHS, checkpoint=None, **arguments):
    """Train a Network in the page's module, with the page's loader."""

    class Module(namespace["Classifier"]):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(namespace["network"])

        def training_step(self, batch, batch_idx):
            return self.net(**batch)["loss"]

    module = Module()
    trainer = namespace["lightning"].Trainer(
        accelerator="cpu", max_epochs=epochs, enable_model_summary=False, **namespace["quiet"], **arguments
    )
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer, module.net, module.optimizers(use_pl_optimizer=False)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightning_is_the_plain_loop(drawn, accumulated):
    namespace, _ = recipe("Lightning")
    drawn.clear()
    namespace["texts"], namespace["network"] = DATA, Network()
    twin = namespace["network"]
    _, model, opt = fit(namespace, accumulate_grad_batches=accumulated)
    assert_shared(opt, drawn)
    assert opt.stats()["epoch"] == EPOCHS
    plain_loop(twin, fngd.FNGD(twin, lr=0.1, momentum=0.9), drawn, accumulated)
    assert_same(model, twin)


def test_lightning_goes_on_from_a_checkpoint(drawn):
    namespace, _ = recipe("Lightning")
    drawn.clear()
    namespace["texts"], namespace["network"] = DATA, Network()
    twin = copy.deepcopy(namespace["network"])
    first, _, _ = fit(namespace, epochs=1)
    first.save_checkpoint("first.ckpt")
    namespace["network"] = Network()
    _, model, opt = fit(namespace, checkpoint="first.ckpt")
    assert_shared(opt, drawn)
    plain_loop(twin, fngd.FNGD(twin, lr=0.1, momentum=0.9), drawn)
    assert_same(model, twin)
