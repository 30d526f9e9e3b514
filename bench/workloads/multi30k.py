"""Multi30k (Elliott et al. 2016): captions of photographs, German to English, in shared sub-word units."""

import contextlib
import hashlib
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import sacrebleu
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench.models.beam import translate
from bench.models.translator import LONGEST, Translator
from bench.workloads.compressed import read_gzip
from bench.workloads.images import shuffled, to_device

NAME = "multi30k"
FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
VOCABULARY = 10_000
MAX_TEXT_BYTES = 1 << 26
PAD, START, END = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>"]
LABEL_SMOOTHING = 0.1
EVALUATION_BATCH = 250
# A target is searched up to this many times its source's length, plus a few.
LENGTH_RATIO = 1.5


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs: ids (N,L) padded with PAD, their lengths on the CPU, and the references as text."""

    source: Tensor
    target: Tensor
    source_lengths: Tensor
    target_lengths: Tensor
    references: list[str]

    def __len__(self) -> int:
        return len(self.source)

    def to(self, device: torch.device) -> "Pairs":
        """Copy the ids to `device`."""
        return replace(self, source=self.source.to(device), target=self.target.to(device))

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return source and target ids of `rows` (CPU), no longer than the longest of them."""
        there = to_device(rows, self.source.device)
        return (
            self.source[there, : int(self.source_lengths[rows].max())],
            self.target[there, : int(self.target_lengths[rows].max())],
        )


class Fetched(Dataset[tuple[Tensor, Tensor]]):
    """Pairs that are fetched a batch at a time."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pairs.batch(torch.tensor(indices))


@dataclass(frozen=True)
class Translation:
    """Three splits of sentence pairs; accuracy is that of the next token, given the reference before it."""

    train: Pairs
    validation: Pairs
    test: Pairs
    tokenizer: Tokenizer

    title = "Multi30k German-English"
    metric = "BLEU"
    target = 0.6
    replaced = None

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of pairs by split."""
        return {name: len(getattr(self, name)) for name in FILES}

    @property
    def device(self) -> torch.device:
        """Return where the ids are."""
        return self.train.source.device

    def to(self, device: torch.device) -> "Translation":
        """Copy every split to `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in FILES})

    def model(self, name: str, width: int) -> nn.Module:
        """Return a Transformer with 3 + 3 layers of dimension 32 x width: base, d = 512, at width 16.

        Raises:
            ValueError: Another name.
        """
        if name != "transformer":
            raise ValueError(f"model: expected transformer for {self.title}, got {name!r}")
        return Translator(
            vocabulary=self.tokenizer.get_vocab_size(),
            padding=PAD,
            layers=3,
            dimension=32 * width,
            heads=8,
            hidden=128 * width,
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> DataLoader:
        """Return training batches in a new random order every epoch."""
        return shuffled(Fetched(self.train), batch_size, generator)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        """Return the mean over the batch's tokens, with smoothed labels."""
        source, target = batch
        logits = model(source, target[:, :-1]).flatten(0, 1)
        return F.cross_entropy(
            logits, target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=LABEL_SMOOTHING
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Pairs) -> tuple[float, float]:
        """Return the mean loss per token, without smoothing, and the share of tokens that come first."""
        model.eval()
        loss = correct = torch.zeros((), device=split.source.device)
        for rows in torch.arange(len(split)).split(EVALUATION_BATCH):
            source, target = split.batch(rows)
            logits = model(source, target[:, :-1]).flatten(0, 1).float()
            wanted = target[:, 1:].flatten()
            loss = loss + F.cross_entropy(logits, wanted, ignore_index=PAD, reduction="sum")
            correct = correct + ((logits.argmax(dim=1) == wanted) & (wanted != PAD)).sum()
        tokens = int((split.target_lengths - 1).sum())
        return loss.item() / tokens, correct.item() / tokens

    def score(self, model: nn.Module, split: Pairs) -> float:
        """Return sacrebleu's BLEU, with its default tokenisation, of a beam search with 4 hypotheses."""
        return sacrebleu.corpus_bleu(self.translations(model, split), [split.references]).score

    def translations(self, model: nn.Module, split: Pairs) -> list[str]:
        """Translate the sources of `split`."""
        assert isinstance(model, Translator)
        model.eval()
        # Sentences of like length together: a batch takes as long as its longest.
        order = split.source_lengths.argsort(stable=True)
        texts = [""] * len(split)
        for rows in order.split(EVALUATION_BATCH):
            source, _ = split.batch(rows)
            longest = min(int(LENGTH_RATIO * source.shape[1]) + 5, LONGEST)
            found = translate(model, source, start=START, end=END, longest=longest)
            for row, text in zip(rows.tolist(), self.tokenizer.decode_batch(found), strict=True):
                texts[row] = text.strip()
        return texts


def load(data_dir: Path, *, cache_dir: Path, train_size: int | None = None) -> Translation:
    """Read `multi30k/{train,val,test_2016_flickr}.{de,en}.gz`; the tokenizer is kept in `cache_dir`.

    Args:
        train_size: Use the first pairs only, also of the other splits; for trials.

    Raises:
        ValueError: When a file is missing or damaged, or the two sides differ in length.
    """
    folder = data_dir / NAME
    texts = {}
    for split, name in FILES.items():
        pair = [_lines(folder / f"{name}.{language}.gz") for language in ("de", "en")]
        if len(pair[0]) != len(pair[1]):
            raise ValueError(f"{NAME}: {name} has {len(pair[0])} German and {len(pair[1])} English lines")
        if train_size is not None and split == "train" and not 1 <= train_size <= len(pair[0]):
            raise ValueError(f"train_size: expected 1 to {len(pair[0])} pairs, got {train_size}")
        texts[split] = [side[:train_size] for side in pair]
    tokenizer = _tokenizer(texts["train"], cache_dir)
    return Translation(
        **{split: _encode(tokenizer, *pair) for split, pair in texts.items()}, tokenizer=tokenizer
    )


def _lines(path: Path) -> list[str]:
    try:
        lines = read_gzip(path, MAX_TEXT_BYTES).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"data_dir: expected the file {str(path)!r}, found none") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a complete gzip file of UTF-8 text ({error})") from error
    if not lines:
        raise ValueError(f"{path.name}: expected sentences, got an empty file")
    return [line.strip() for line in lines]


def _tokenizer(texts: list[list[str]], cache_dir: Path) -> Tokenizer:
    """Return byte-level BPE of both languages together, trained on the training split."""
    digest = hashlib.sha256("\n".join(line for side in texts for line in side).encode()).hexdigest()
    cache = cache_dir / f"{NAME}-bpe{VOCABULARY}-{digest[:16]}.json"
    # A damaged file is made anew; the package raises nothing narrower.
    with contextlib.suppress(Exception):
        return Tokenizer.from_file(str(cache))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for side in texts for line in side), trainer)
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = cache.with_suffix(f".{os.getpid()}.tmp")
    tokenizer.save(str(unfinished))
    unfinished.replace(cache)
    return tokenizer


def _encode(tokenizer: Tokenizer, sources: list[str], targets: list[str]) -> Pairs:
    source, source_lengths = _pad([[*entry.ids, END] for entry in tokenizer.encode_batch(sources)])
    target, target_lengths = _pad([[START, *entry.ids, END] for entry in tokenizer.encode_batch(targets)])
    return Pairs(source, target, source_lengths, target_lengths, targets)


def _pad(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in ids])
    if lengths.max() > LONGEST:
        raise ValueError(f"{NAME}: expected at most {LONGEST} tokens a sentence, got {int(lengths.max())}")
    rows = [torch.tensor(row) for row in ids]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD), lengths
