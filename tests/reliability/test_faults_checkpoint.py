"""Checkpoint files: writers that are killed, a full disk, two writers of one file, damaged files."""

import itertools
import multiprocessing
import os
import random
import resource
import time
from pathlib import Path

import pytest
import torch

from bench.train.checkpoint import load, save

AREA = "Checkpoints"
FORKED = multiprocessing.get_context("fork")  # spares each writer the seconds that importing torch takes


def state(seed, number):
    """Return the state `number` of a writer, large enough that it is written in several pieces."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    return {"seed": seed, "number": number, "values": torch.randn(50_000, generator=generator)}


class Writer:
    """A process that writes checkpoints without end, and says which of them it called whole."""

    def __init__(self, file, seed):
        self.whole, theirs = FORKED.Pipe(duplex=False)
        self.process = FORKED.Process(target=self.write, args=(file, seed, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.last = self.whole.recv()

    @staticmethod
    def write(file, seed, whole):
        for number in itertools.count():
            save(file, state(seed, number))
            whole.send(number)

    def kill(self):
        self.process.kill()
        self.process.join()
        try:
            while True:
                self.last = self.whole.recv()
        except EOFError:
            self.whole.close()


def assert_written(found):
    expected = state(found["seed"], found["number"])
    assert torch.equal(found["values"], expected["values"])


def test_a_writer_killed_at_any_time_leaves_a_whole_file(tmp_path, full, tally):
    draw, interrupted = random.Random(0), 0
    kills = 200 if full else 10
    for kill in range(kills):
        folder = tmp_path / str(kill)
        folder.mkdir()
        writer = Writer(folder / "run.pt", kill)
        time.sleep(draw.uniform(0, 0.03))
        writer.kill()
        found = load(folder / "run.pt")
        assert_written(found)
        assert found["number"] in (writer.last, writer.last + 1)
        interrupted += len(list(folder.glob("*.tmp")))
    assert interrupted > 0  # some were killed in the middle of a file
    tally(
        AREA,
        "writer killed (SIGKILL) at a random time",
        "the file is a whole state, the last or its successor",
        kills,
    )


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, tally):
    file, soft = tmp_path / "run.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    save(file, state(0, 1))
    before, large = file.read_bytes(), len(file.read_bytes())
    sizes = [0, 1, 1000, 100_000, large - 1]
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, soft[1]))  # Python ignores SIGXFSZ: an OSError
        try:
            with pytest.raises((OSError, RuntimeError)):
                save(file, state(0, 2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]
    assert_written(load(file))
    tally(
        AREA,
        "disk full while writing",
        "OSError or RuntimeError, old file whole, nothing left beside it",
        len(sizes),
    )


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, tally):
    file = tmp_path / "run.pt"
    save(file, state(0, 1))

    def interrupt(*args):
        raise KeyboardInterrupt

    for place in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, place, interrupt)
            if place == "replace":
                patch.setattr(Path, "replace", interrupt)
            with pytest.raises(KeyboardInterrupt):
                save(file, state(0, 2))
        assert list(tmp_path.iterdir()) == [file]
        assert_written(load(file))
    tally(AREA, "Ctrl-C while writing", "old file whole, nothing left beside it", 2)


def test_two_writers_of_one_file_do_not_mix(tmp_path, full, tally):
    file, reads = tmp_path / "run.pt", 2000 if full else 100
    writers = [Writer(file, seed) for seed in (1, 2)]
    try:
        seen = set()
        for _ in range(reads):
            found = load(file)
            assert_written(found)
            seen.add(found["seed"])
        assert all(writer.process.is_alive() for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
    assert seen == {1, 2}
    tally(AREA, "read while two processes write the same file", "a whole state of one of them", reads)


def test_damaged_files_are_refused(tmp_path, full, tally):
    file, whole, draw = tmp_path / "run.pt", tmp_path / "whole.pt", random.Random(0)
    save(whole, state(0, 1))
    content, cases = whole.read_bytes(), 2000 if full else 60
    expected = load(whole)
    for _ in range(cases):
        file.write_bytes(content[: draw.randrange(len(content))])
        with pytest.raises(ValueError, match=r"checkpoint: .*run\.pt"):
            load(file)
    tally(AREA, "truncated file", "ValueError", cases)
    refused = 0
    for _ in range(cases):
        # Headers and table of contents are a small part of the file, but not of the cases.
        at = draw.choice([draw.randrange(len(content)), -draw.randrange(1, 1000), draw.randrange(2000)])
        damaged = bytearray(content)
        damaged[at] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            found = load(file)
        except ValueError:
            refused += 1
        else:  # a bit that means nothing, as the time of writing
            assert found.keys() == expected.keys()
            assert torch.equal(found["values"], expected["values"])
            assert (found["seed"], found["number"]) == (0, 1)
    assert refused > cases / 2
    tally(AREA, "one bit of a file flipped", "ValueError", refused)
    tally(AREA, "one bit of a file flipped", "loaded, and as it was written", cases - refused)
    foreign = {"text": b"not a checkpoint", "empty": b"", "pickle": b"\x80\x02}q\x00."}
    for content in foreign.values():
        file.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint"):
            load(file)
    tally(AREA, "file of another kind", "ValueError", len(foreign))
