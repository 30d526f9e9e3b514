"""Tracked loaders report the ids of exactly the samples they yield."""

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

import fngd
from fngd.coefficients import Schedule


class Heard(Schedule):
    """Notes what a tracked loader says."""

    def __init__(self, share):
        super().__init__(share, None, 1, torch.device("cpu"))
        self.ids, self.passes, self.sizes = [], 0, set()

    def name(self, ids, highest, batches, content):
        assert highest == max(ids)
        self.ids.append(ids.tolist())

    def begin_pass(self, batches, dataset, size):
        self.passes += 1
        self.sizes.add(size)
        return super().begin_pass(batches, dataset, size)


class Recorder:
    """Stands for an optimizer."""

    def __init__(self, share="sample"):
        self._schedule = Heard(share)
        self.ids, self.sizes = self._schedule.ids, self._schedule.sizes

    @property
    def passes(self):
        return self._schedule.passes


class Squares(Dataset):
    """Item i holds i in a form that a collate function must take apart."""

    def __len__(self):
        return 23

    def __getitem__(self, i):
        return {"image": torch.full((2,), float(i)), "name": f"item {i}"}


def collate(items):
    return [item["name"] for item in items], torch.stack([item["image"] for item in items])


LOADERS = {
    "in-order": {"batch_size": 5},
    "shuffled": {"batch_size": 5, "shuffle": True},
    "drop-last": {"batch_size": 5, "shuffle": True, "drop_last": True},
    "workers": {"batch_size": 3, "shuffle": True, "num_workers": 2},
    "persistent-workers": {"batch_size": 3, "shuffle": True, "num_workers": 2, "persistent_workers": True},
    "distributed": {"batch_size": 4, "sampler": DistributedSampler(range(23), 2, 1)},
    "weighted": {"batch_size": 4, "sampler": WeightedRandomSampler(torch.ones(23), 30)},
    "batch-sampler": {"batch_sampler": BatchSampler(RandomSampler(range(23)), 7, False)},
    "sampler-of-batches": {"batch_size": None, "sampler": BatchSampler(range(23), 7, False)},
}


class Batches(Squares):
    """A dataset that is asked for whole batches."""

    def __getitem__(self, indices):
        return collate([super(Batches, self).__getitem__(i) for i in indices])


@pytest.mark.parametrize("kind", LOADERS)
def test_ids_name_the_samples_of_each_batch(kind):
    options = LOADERS[kind]
    dataset = Batches() if kind == "sampler-of-batches" else Squares()
    recorder = Recorder()
    loader = DataLoader(dataset, collate_fn=None if kind == "sampler-of-batches" else collate, **options)
    tracked = fngd.track(loader, recorder)
    assert len(tracked) == len(loader)
    for epoch in range(2):
        heard = len(recorder.ids)
        for names, images in tracked:
            assert names == [f"item {i}" for i in recorder.ids[-1]]
            assert images[:, 0].tolist() == recorder.ids[-1]
        assert len(recorder.ids) - heard == len(loader)
        assert recorder.passes == epoch + 1
    assert recorder.sizes == {23}


def test_the_order_of_batches_is_the_loaders_own():
    def loader():
        return DataLoader(range(20), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(3))

    plain, tracked = loader(), fngd.track(loader(), Recorder())
    for _ in range(2):
        expected = [batch.tolist() for batch in plain]
        assert [batch.tolist() for batch in tracked] == expected


def test_leaving_an_epoch_early_and_nesting_iterators():
    recorder = Recorder()
    tracked = fngd.track(DataLoader(range(20), batch_size=4, shuffle=True), recorder)
    for batch in tracked:
        assert batch.tolist() == recorder.ids[-1]
        break
    for first, second in zip(tracked, tracked, strict=True):
        assert first.tolist() == recorder.ids[-2]
        assert second.tolist() == recorder.ids[-1]


def test_several_optimizers_hear_the_same():
    first, second, mean = Recorder(), Recorder(), Recorder("mean")
    for batch in fngd.track(DataLoader(range(10), batch_size=4, shuffle=True), mean, first, second):
        assert batch.tolist() == first.ids[-1] == second.ids[-1]
    assert len(first.ids) == 3
    assert first.passes == second.passes == mean.passes == 1
    with pytest.raises(TypeError, match="optimizer: expected"):
        fngd.track(DataLoader(range(3)), first, object())


def test_the_tracked_loader_shows_the_loaders_attributes():
    loader = DataLoader(range(20), batch_size=4)
    tracked = fngd.track(loader, Recorder())
    assert tracked.batch_size == 4
    assert tracked.dataset is loader.dataset
    assert isinstance(loader.batch_sampler, BatchSampler)  # the user's loader itself is as it was


def test_training_through_a_tracked_loader_solves_once_per_sample():
    x, y = torch.randn(22, 4), torch.randint(0, 3, (22,))
    loader = DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    opt = fngd.FNGD(model, lr=0.1)
    loader = fngd.track(loader, opt)
    for _ in range(3):
        for inputs, labels in loader:
            opt.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            opt.step()
    stats = opt.stats()
    assert (stats["solved_batches"], stats["seen_samples"], stats["epoch"]) == (5, 22, 3)
    assert stats["table_bytes"] == 2 * 22 * 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10.0).view(5, 2))


def test_loaders_without_ids():
    with pytest.raises(ValueError, match=r"IterableDataset has no sample indices.*set_samples.*share='none'"):
        fngd.track(DataLoader(Stream()), Recorder())
    with pytest.raises(TypeError, match="loader: expected a torch"):
        fngd.track([1, 2], Recorder())
    with pytest.raises(TypeError, match=r"optimizer: expected an fngd\.FNGD"):
        fngd.track(DataLoader(range(3)), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ValueError, match="in_order=True"):
        fngd.track(DataLoader(range(3), in_order=False), Recorder())
    with pytest.raises(ValueError, match="single indices"):
        list(fngd.track(DataLoader(range(3), batch_size=None), Recorder()))


@pytest.mark.parametrize("share", ["none", "position", "mean"])
def test_any_loader_will_do_without_sample_sharing(share):
    model = nn.Linear(2, 1)
    opt = fngd.FNGD(model, lr=0.01, share=share)
    for _ in range(2):
        for x in fngd.track(DataLoader(Stream(), batch_size=2), opt):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    assert opt.stats()["epoch"] == 2
    assert opt.stats()["solved_batches"] == (6 if share == "none" else 3)


def test_keys_that_are_no_integers_are_refused():
    class Named(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, key):
            return torch.zeros(2)

    loader = DataLoader(Named(), batch_sampler=[["a", "b"]])
    with pytest.raises(TypeError, match="ids: expected integers"):
        list(fngd.track(loader, fngd.FNGD(nn.Linear(2, 1))))


class Prefetching(DataLoader):
    """Leaves out its first batch, or yields one that it did not draw."""

    extra = 0

    def __iter__(self):
        batches = list(super().__iter__())
        yield from batches[1:] if self.extra == 0 else [*batches, batches[0]]


@pytest.mark.parametrize("extra", [0, 1])
def test_a_loader_that_yields_other_batches_than_it_draws_is_found_out(extra):
    loader = Prefetching(Squares(), batch_size=5, collate_fn=collate)
    loader.extra = extra
    with pytest.raises(
        RuntimeError, match="this Prefetching does not yield the batches that its sampler draws"
    ):
        list(fngd.track(loader, Recorder()))


def test_a_loader_that_accelerate_prepared_is_refused_where_ids_are_needed():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(Squares(), batch_size=5, collate_fn=collate))
    with pytest.raises(ValueError, match=r"loader: a DataLoaderShard around a DataLoader.*set_samples"):
        fngd.track(loader, Recorder())
    unnamed = Recorder("none")
    assert len(list(fngd.track(loader, unnamed))) == 5
    assert unnamed.passes == 1
