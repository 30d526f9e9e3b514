import gzip
import itertools
import os
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_runs import config, train_without_waits

import fngd
from bench import workloads
from bench.models.beam import translate
from bench.models.translator import Translator
from bench.workloads import multi30k
from bench.workloads.multi30k import END, PAD, START

GERMAN = ("ein", "hund", "läuft", "kind", "grün", "haus")
ENGLISH = ("a", "dog", "runs", "child", "green", "house")


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


def write_files(folder, count=60):
    """Sentences that translate word by word, in the files of the published data set."""
    draw = random.Random(0)
    for name in multi30k.FILES.values():
        words = [[draw.randrange(6) for _ in range(draw.randint(1, 7))] for _ in range(count)]
        for language, vocabulary in (("de", GERMAN), ("en", ENGLISH)):
            lines = [" ".join(vocabulary[i] for i in sentence) for sentence in words]
            write(folder / "multi30k" / f"{name}.{language}.gz", lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_files(folder)
    return folder


def load(folder, **options):
    return workloads.load("multi30k", data_dir=folder, cache_dir=folder / "cache", **options)


def small_translator(vocabulary):
    torch.manual_seed(0)
    model = Translator(vocabulary=vocabulary, padding=PAD, layers=1, dimension=16, heads=2, hidden=32)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model.eval()


def test_ids_decode_to_the_sentences(folder):
    task = load(folder)
    assert task.sizes == {"train": 60, "validation": 60, "test": 60}
    for split in (task.train, task.validation, task.test):
        rows = split.target.tolist()
        assert all(row[0] == START for row in rows)
        assert [row.index(END) + 1 for row in rows] == split.target_lengths.tolist()
        texts = [task.tokenizer.decode(row) for row in rows]
        assert [text.strip() for text in texts] == split.references


def test_tokenizer_is_trained_once_on_the_training_split_alone(folder, monkeypatch):
    load(folder)
    before = sorted((folder / "cache").iterdir())

    def train_again(*_, **__):
        raise AssertionError("the cache was not used")

    with monkeypatch.context() as patch:
        patch.setattr(multi30k.trainers, "BpeTrainer", train_again)
        first = load(folder)
    assert sorted((folder / "cache").iterdir()) == before
    before[0].write_text("{")
    assert load(folder).tokenizer.get_vocab() == first.tokenizer.get_vocab()
    write(folder / "multi30k" / "val.en.gz", ["an unheard-of sentence"] * 60)
    assert load(folder).tokenizer.get_vocab() == first.tokenizer.get_vocab()
    write_files(folder)


def test_another_process_may_write_the_tokenizer_at_the_same_time(tmp_path, monkeypatch):
    write_files(tmp_path)
    rename = Path.replace

    def second(path, target):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", rename)
            patch.setattr(os, "getpid", lambda: 1)
            load(tmp_path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", second)
        first = load(tmp_path)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]
    assert load(tmp_path).tokenizer.to_str() == first.tokenizer.to_str()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["adamw", "fngd", "fngd-adamw"])
def test_no_step_on_sentences_waits_for_the_device(folder, method):
    settings = config(
        method, data="multi30k", model="transformer", width=2, epochs=2, batch_size=10, device="cuda"
    )
    train_without_waits(settings, load(folder, device=torch.device("cuda")))


def test_train_size_takes_the_first_pairs(folder):
    task = load(folder, train_size=7)
    assert task.sizes["train"] == 7
    assert task.train.references == load(folder).train.references[:7]


@pytest.mark.parametrize("size", [0, 61])
def test_impossible_train_size_is_named(folder, size):
    with pytest.raises(ValueError, match=f"train_size: expected 1 to 60 pairs, got {size}"):
        load(folder, train_size=size)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir: expected the file .*train\.de\.gz"):
        load(tmp_path)
    write_files(tmp_path)
    path = tmp_path / "multi30k" / "val.de.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"val\.de\.gz: not a complete gzip file"):
        load(tmp_path)
    write(path, ["ein hund"] * 59)
    with pytest.raises(ValueError, match="val has 59 German and 60 English lines"):
        load(tmp_path)
    with pytest.raises(ValueError, match="label_noise: expected 0 for a translation task"):
        load(tmp_path, label_noise=0.2)


def test_padding_changes_neither_logits_nor_loss(folder):
    task = load(folder)
    model = task.model("transformer", 1).eval()
    rows = torch.arange(8)
    source, target = task.train.batch(rows)
    logits = model(source, target)
    for row in rows.tolist():
        alone_source, alone_target = task.train.batch(torch.tensor([row]))
        alone = model(alone_source, alone_target)
        torch.testing.assert_close(logits[row, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)
    wide = F.pad(source, (0, 3), value=PAD), F.pad(target, (0, 2), value=PAD)
    loss = task.loss(model, (source, target), torch.Generator())
    torch.testing.assert_close(task.loss(model, wide, torch.Generator()), loss)


def test_evaluation_against_a_loop_over_sentences(folder):
    task = load(folder)
    model = task.model("transformer", 1).eval()
    loss = correct = tokens = 0
    for row in range(len(task.test)):
        source, target = task.test.batch(torch.tensor([row]))
        logits = model(source, target[:, :-1])[0]
        loss += F.cross_entropy(logits, target[0, 1:], reduction="sum").item()
        correct += (logits.argmax(1) == target[0, 1:]).sum().item()
        tokens += target.shape[1] - 1
    measured = task.evaluate(model, task.test)
    assert measured == pytest.approx((loss / tokens, correct / tokens), rel=1e-4)


def best_by_exhaustion(model, source, longest, penalty):
    """Score every sequence of at most `longest` tokens; one of that length need not have ended."""
    inner = [token for token in range(model.head.out_features) if token != END]
    best = (-float("inf"), [])
    for length in range(1, longest + 1):
        for ids in itertools.product(inner, repeat=length - 1):
            last = [END] if length < longest else range(model.head.out_features)
            logits = model(source, torch.tensor([[START, *ids]]))[0].log_softmax(-1)
            prefix = sum(logits[place, token].item() for place, token in enumerate(ids))
            for token in last:
                score = (prefix + logits[-1, token].item()) / ((5 + length) / 6) ** penalty
                if score > best[0]:
                    best = score, [*ids] if token == END else [*ids, token]
    return best[1]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 3.0])
@torch.no_grad()
def test_wide_beam_finds_what_exhaustion_finds(penalty):
    model = small_translator(vocabulary=6)
    source = torch.tensor([[4, 3, END, PAD], [3, END, PAD, PAD], [5, 4, 3, END]])
    found = translate(model, source, start=START, end=END, longest=3, width=6**2, penalty=penalty)
    expected = [
        best_by_exhaustion(model, row[row != PAD].unsqueeze(0), longest=3, penalty=penalty) for row in source
    ]
    assert found == expected


def test_translations_come_in_the_order_of_the_sentences(folder, monkeypatch):
    task = load(folder)
    monkeypatch.setattr(multi30k, "EVALUATION_BATCH", 7)

    def copy(model, source, **_):
        return [[token for token in row if token not in (PAD, END)] for row in source.tolist()]

    monkeypatch.setattr(multi30k, "translate", copy)
    texts = task.translations(task.model("transformer", 1), task.test)
    expected = [task.tokenizer.decode(row).strip() for row in task.test.source.tolist()]
    assert texts == expected


def test_perfect_translations_score_100(folder, monkeypatch):
    task = load(folder)
    monkeypatch.setattr(multi30k.Translation, "translations", lambda self, model, split: split.references)
    assert task.score(None, task.test) == pytest.approx(100)


def test_fngd_serves_every_layer_of_the_translator(folder):
    task = load(folder)
    model = task.model("transformer", 1)
    optimizer = fngd.FNGD(model, share="none")
    batch = task.train.batch(torch.arange(8))
    optimizer.set_samples(range(8))
    task.loss(model, batch, torch.Generator()).backward()
    optimizer.step()
    plain = {name for name, rule in optimizer.coverage().items() if rule.startswith("plain")}
    assert not {name for name in plain if "norm" not in name}
    assert optimizer.stats()["failed_solves"] == 0


def test_training_ends_in_translations(folder):
    task = load(folder, train_size=30)
    torch.manual_seed(0)
    model = task.model("transformer", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for epoch in range(120):
        model.train()
        for batch in task.batches(30, torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            task.loss(model, batch, torch.Generator()).backward()
            optimizer.step()
    assert task.evaluate(model, task.train)[1] > 0.9
    assert task.score(model, task.train) > 80
