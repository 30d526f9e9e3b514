"""Coefficients belong to the samples of their batch, whoever draws batches, and whenever."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, random_split

import fngd

SAMPLES, SIZE = 12, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(samples=SAMPLES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, dtype=torch.float64, generator=generator)
    return TensorDataset(torch.arange(samples), x, torch.randint(0, 3, (samples,), generator=generator))


def weights(model, x, y, rows_of=None):
    """Return (layers, n): the definition's weights of n samples, each of one row or of several, by layer."""
    rows_of = [[n] for n in range(len(x))] if rows_of is None else rows_of
    parameters = list(model.parameters())
    losses = F.cross_entropy(model(x), y, reduction="none") / len(x)
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    found = []
    for layer in range(0, len(parameters), 2):
        rows = torch.stack([torch.cat([p.flatten() for p in g[layer : layer + 2]]) for g in gradients])
        c = torch.stack([rows[own].sum(0) for own in rows_of])
        k, n = c @ c.T, len(c)
        v = torch.linalg.solve(k + 0.1 * k.trace() * torch.eye(n, dtype=k.dtype), k.new_ones(n))
        found.append(v / v.mean())
    return torch.stack(found)


def kept(opt, ids):
    return opt.state_dict()["fngd"]["values"][:, list(ids)].double()


def train(model, opt, batches, step=None):
    """Make a step of each batch (ids, x, y); return the ids of all."""
    drawn = []
    for ids, x, y in batches:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        (step or opt.step)()
        drawn.append(ids.tolist())
    return drawn


def assert_kept(opt, drawn, dataset, offset=0):
    """Every sample keeps the weight that the definition gives it in the batch that it came in."""
    for ids in drawn:
        _, x, y = dataset[ids]
        columns = [i + offset for i in ids]
        torch.testing.assert_close(kept(opt, columns), weights(network(), x, y), rtol=1e-5, atol=1e-6)


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, "fngd")
    return lambda: " ".join(record.getMessage() for record in caplog.records)


# ---- Batches that are drawn ahead, or left out ----


def ahead(batches, depth=1):
    waiting = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > depth:
            yield waiting.pop(0)
    yield from waiting


def moved(batches):
    """As device prefetchers do: the batches handed out are copies, of another dtype."""
    for ids, x, y in ahead(batches):
        yield ids, x.to(torch.float32).to(torch.float64), y


def skipping(batches):
    for n, batch in enumerate(batches):
        if n != 0:
            yield batch


@pytest.mark.parametrize("depth", [1, 2])
def test_batches_drawn_ahead_are_told_by_their_content(depth):
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0)
    loader = fngd.track(DataLoader(dataset, SIZE, shuffle=True), opt)
    drawn = train(model, opt, ahead(loader, depth))
    assert_kept(opt, drawn, dataset)
    torch.manual_seed(5)
    assert sorted(train(model, opt, ahead(loader, depth))) != sorted(drawn)
    assert opt.stats()["solved_batches"] == 3
    assert opt.stats()["fallbacks"] == {}


def test_batches_that_were_left_out_leave_the_others_their_names(warned):
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0)
    drawn = train(model, opt, skipping(fngd.track(DataLoader(dataset, SIZE), opt)))
    assert_kept(opt, drawn, dataset)
    assert opt.stats()["seen_samples"] == SAMPLES - SIZE
    assert not warned()


def test_inputs_that_are_in_no_batch_keep_the_plain_gradient_and_it_is_said(warned):
    model = network()
    opt = fngd.FNGD(model, lr=0.0)
    for _, x, y in ahead(fngd.track(DataLoader(data(), SIZE), opt)):
        opt.zero_grad()
        F.cross_entropy(model(2 * x), y).backward()
        opt.step()
        opt.detach()
        plain = torch.autograd.grad(F.cross_entropy(model(2 * x), y), list(model.parameters()))
        opt.attach()
        for p, gradient in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(p.grad, gradient)
    assert opt.stats()["solved_batches"] == 0
    assert "drawn ahead" in opt.coverage()["0.weight"]
    assert "set_samples" in warned()


def test_two_loaders_side_by_side():
    first, second, model = data(seed=1), data(seed=2), network()
    opt = fngd.FNGD(model, lr=0.0)
    loaders = [fngd.track(DataLoader(dataset, SIZE), opt) for dataset in (first, second)]
    for _ in range(2):
        for (_, a, y), (_, b, z) in zip(*loaders, strict=True):
            opt.zero_grad()
            (F.cross_entropy(model(a), y) + F.cross_entropy(model(b), z)).backward()
            opt.step()
    batches = [list(range(n, n + SIZE)) for n in range(0, SAMPLES, SIZE)]
    assert_kept(opt, batches, first)
    assert_kept(opt, batches, second, offset=SAMPLES)
    assert (opt.stats()["solved_batches"], opt.stats()["epoch"]) == (6, 2)


# ---- Ids in the batch ----


def longest_first(items):
    return [torch.stack(column) for column in zip(*sorted(items, key=lambda item: item[1][0]), strict=True)]


@pytest.mark.parametrize("key", [0, lambda batch: batch[0].tolist()])
def test_ids_out_of_the_batch_follow_what_collate_does(key):
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0)
    loader = DataLoader(dataset, SIZE, shuffle=True, collate_fn=longest_first)
    assert_kept(opt, train(model, opt, fngd.track(loader, opt, key=key)), dataset)


def test_a_collate_function_of_ones_own_is_named_once(warned):
    opt = fngd.FNGD(network())
    for _ in range(2):
        fngd.track(DataLoader(data(), SIZE, collate_fn=lambda items: items), opt)
        assert "key=" in warned()
    fngd.track(DataLoader(data(), SIZE, collate_fn=longest_first), opt, key=0)
    assert "longest_first" not in warned()


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


class Stateful(DataLoader):
    """A loader that goes on where it was, as torchdata's does."""

    begin = 0

    def state_dict(self):
        return {"begin": 2}

    def load_state_dict(self, state):
        self.begin = state["begin"]

    def __iter__(self):
        batches = list(super().__iter__())
        return iter(batches[self.begin :])


@pytest.mark.parametrize("kind", [lambda d: DataLoader(Stream(d), SIZE), lambda d: Stateful(d, SIZE)])
def test_loaders_that_draw_no_indices_of_their_own_need_a_key(kind):
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0)
    with pytest.raises(ValueError, match="key="):
        fngd.track(kind(dataset), opt)
    assert_kept(opt, train(model, opt, fngd.track(kind(dataset), opt, key=0)), dataset)


def test_a_loaders_own_state_is_the_tracked_ones():
    opt = fngd.FNGD(network(), lr=0.0)
    loader = fngd.track(Stateful(data(), SIZE), opt, key=0)
    loader.load_state_dict(loader.state_dict())
    assert [ids.tolist() for ids, _, _ in loader] == [[8, 9, 10, 11]]


def test_a_loader_that_accelerate_prepared_is_tracked_by_a_key():
    accelerate = pytest.importorskip("accelerate")
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0)
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(dataset, SIZE, shuffle=True))
    drawn = train(model, opt, fngd.track(loader, opt, key=0))
    assert len(drawn) == 3
    assert_kept(opt, drawn, dataset)


# ---- Datasets ----


def test_every_dataset_has_weights_of_its_own(warned):
    first, second, model = data(seed=1), data(seed=2), network()
    opt = fngd.FNGD(model, lr=0.0)
    for _ in range(2):
        for dataset, offset in ((first, 0), (second, SAMPLES)):
            drawn = train(model, opt, fngd.track(DataLoader(dataset, SIZE), opt))
            assert_kept(opt, drawn, dataset, offset)
    assert opt.stats()["solved_batches"] == 6
    assert "another dataset" in warned()


def test_datasets_made_anew_take_the_place_of_those_that_are_gone():
    model = network()
    opt = fngd.FNGD(model, lr=0.0)
    for seed in range(3):
        dataset = data(seed=seed)
        assert_kept(opt, train(model, opt, fngd.track(DataLoader(dataset, SIZE), opt)), dataset)
        del dataset
    assert opt.stats()["solved_batches"] == 9
    assert opt.stats()["table_bytes"] == 2 * SAMPLES * 4


def test_subsets_name_the_samples_of_the_dataset():
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0)
    for _ in range(2):  # made anew each time
        drawn = []
        for part in random_split(dataset, [8, 4]):
            for view in (part, Subset(part, torch.arange(len(part)).flip(0))):
                drawn += train(model, opt, fngd.track(DataLoader(view, SIZE), opt))
    assert opt.stats()["seen_samples"] == SAMPLES
    assert opt.stats()["table_bytes"] == 2 * SAMPLES * 4
    known, _ = train(model, opt, fngd.track(DataLoader(Subset(dataset, range(8)), SIZE), opt))
    assert known == [0, 1, 2, 3]


def test_a_resumed_run_finds_the_weights_of_each_dataset_again():
    first, second, model = data(seed=1), data(10, seed=2), network()
    opt = fngd.FNGD(model, lr=0.0)
    for dataset in (first, second):
        train(model, opt, fngd.track(DataLoader(dataset, 5), opt))
    again = fngd.FNGD(model, lr=0.0)
    again.load_state_dict(opt.state_dict())
    train(model, again, fngd.track(DataLoader(second, 5), again))  # the first is not tracked any more
    assert again.stats()["solved_batches"] == opt.stats()["solved_batches"]


def test_a_dataset_without_a_length():
    class Endless(torch.utils.data.Dataset):
        def __getitem__(self, n):
            return data()[n]

    model = network()
    opt = fngd.FNGD(model, lr=0.0)
    drawn = train(model, opt, fngd.track(DataLoader(Endless(), batch_sampler=[[3, 1], [0, 7]]), opt))
    assert_kept(opt, drawn, data())


@pytest.mark.parametrize("kind", [torch.tensor, lambda ids: torch.tensor(ids).numpy()])
def test_samplers_of_arrays_name_whole_batches(kind):
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0)
    sampler = [kind([3, 1, 2]), kind([0, 5, 4])]
    drawn = train(model, opt, fngd.track(DataLoader(dataset, batch_sampler=sampler), opt))
    assert drawn == [[3, 1, 2], [0, 5, 4]]
    assert_kept(opt, drawn, dataset)


def test_ids_far_apart_are_named(warned):
    model = network()
    opt = fngd.FNGD(model, lr=0.0)
    opt.set_samples([0, 2**20])
    assert not warned()
    opt.set_samples([0, 20_000_000])
    assert "ids up to 20000000 make a table of 160,000,008 bytes" in warned()


# ---- A name is good for one step ----


def plain_gradients(model, x, y):
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    return [p.grad for p in twin.parameters()]


@pytest.mark.parametrize("phase", ["solving", "shared"])
def test_a_loop_without_names_has_the_plain_gradient(phase, warned):
    (_, x, y), model = data()[:SIZE], network()
    opt = fngd.FNGD(model, lr=0.1)
    for _ in range(2 if phase == "shared" else 1):
        opt.set_samples(range(SIZE))
        train(model, opt, [data()[:SIZE]])
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        other.zero_grad()
        expected = plain_gradients(model, x, y)
        F.cross_entropy(model(x), y).backward()
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        other.step()
    assert opt.stats()["solved_batches"] == 1
    assert "not named since the last step" in warned()
    assert "at times plain" in opt.coverage()["0.weight"]


def test_a_critic_keeps_the_weights_of_its_own_loss():
    """An ordinary adversarial loop: the generator's loss goes through the critic after the critic's step."""
    dataset, critic = data(), network()
    torch.manual_seed(3)
    generator = nn.Linear(2, 4).double()
    opt = fngd.FNGD(critic, lr=0.0)
    other = torch.optim.SGD(generator.parameters(), lr=0.1)
    for _ in range(2):
        drawn = []
        for ids, x, y in fngd.track(DataLoader(dataset, SIZE), opt):
            opt.zero_grad()
            F.cross_entropy(critic(x), y).backward()
            opt.step()
            other.zero_grad()
            F.cross_entropy(critic(generator(torch.randn(SIZE, 2).double())), y).backward()
            other.step()
            drawn.append(ids.tolist())
        assert_kept(opt, drawn, dataset)
    assert opt.stats()["solved_batches"] == 3


def test_gradients_that_were_zeroed_leave_no_weights():
    (_, x, y), model = data()[:SIZE], network()
    opt = fngd.FNGD(model, lr=0.0)
    opt.set_samples(range(SIZE))
    F.cross_entropy(model(3 * x), y).backward()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert_kept(opt, [list(range(SIZE))], data())


# ---- Epochs ----


def evaluated(model, loader):
    with torch.no_grad():
        return [model(x) for _, x, _ in loader]


@pytest.mark.parametrize("peek", ["evaluation", "first batch", "within", "inference mode"])
def test_passes_without_a_step_are_no_epochs(peek):
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0, refresh_every=2)
    loader = fngd.track(DataLoader(dataset, SIZE, shuffle=True), opt)
    for _ in range(4):
        if peek == "first batch":
            next(iter(loader))
        if peek == "inference mode":
            with torch.inference_mode():
                evaluated(model, loader)
        drawn = []
        for batch in loader:
            drawn += train(model, opt, [batch])
            if peek == "within":
                next(iter(loader))
        if peek == "evaluation":
            evaluated(model, loader)
    assert opt.stats()["epoch"] == 4
    assert opt.stats()["solved_batches"] == 6  # in the first and the third epoch
    assert opt.stats()["seen_samples"] == SAMPLES


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_that_stops_within_an_epoch_goes_on_in_it(stop):
    """Stopped after `stop` steps of three an epoch, with coefficients solved for in every other epoch."""

    def run(stops):
        model = network()
        opt, made = fngd.FNGD(model, lr=0.3, refresh_every=2), 0
        loader = fngd.track(DataLoader(data(), SIZE), opt)
        while made < 9:
            for batch in loader:
                if made in stops and batch[0][0] != SIZE * (made % 3):
                    continue  # those that were trained on before the stop
                train(model, opt, [batch])
                made += 1
                if made in stops:
                    state = opt.state_dict(), model.state_dict()
                    model = network()
                    opt = fngd.FNGD(model, lr=0.3, refresh_every=2)
                    opt.load_state_dict(copy.deepcopy(state[0]))
                    model.load_state_dict(state[1])
                    loader = fngd.track(DataLoader(data(), SIZE), opt)
                    break
        return model, opt

    (model, opt), (other, again) = run(()), run((stop,))
    assert opt.stats()["epoch"] == again.stats()["epoch"] == 3
    assert opt.stats()["solved_batches"] == again.stats()["solved_batches"] == 6
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- Several rows for one sample, layers that are left out ----


@pytest.mark.parametrize("share", ["sample", "none"])
@pytest.mark.parametrize("hooked", [False, True])
def test_rows_of_one_sample_have_one_weight_and_are_summed(share, hooked):
    """Two views of a sample side by side, as in contrastive training."""
    (_, x, y), model = data(6)[:], network()
    opt = fngd.FNGD(model, lr=0.0, share=share)
    if hooked:
        for p in model.parameters():
            p.register_hook(lambda gradient: gradient)
    ids = [0, 1, 2, 0, 2, 2]
    s = weights(network(), x, y, [[0, 3], [1], [2, 4, 5]])
    for _ in range(2):
        opt.set_samples(ids)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found = [p.grad.clone() for p in model.parameters()]
        opt.step()
        for layer, name in ((0, 0), (1, 2)):
            twin = network()
            losses = F.cross_entropy(twin(x), y, reduction="none") / 6
            (losses * s[layer][ids]).sum().backward()
            for p, gradient in zip(twin[name].parameters(), found[2 * layer :], strict=False):
                torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-7)
    assert opt.stats()["solved_batches"] == (1 if share == "sample" else 2)


def test_a_layer_that_was_left_out_while_samples_were_solved_for_says_so():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.use = True

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.head(torch.tanh(self.middle(x)) if self.use else x)

    (_, x, y), model = data()[:], Dropping().double()
    opt = fngd.FNGD(model, lr=0.1, refresh_every=2)
    for rows, use in ((slice(4), True), (slice(4, 8), False), (slice(4, 8), True)):
        model.use = use
        opt.set_samples(range(SAMPLES)[rows])
        train(model, opt, [(torch.arange(SAMPLES)[rows], x[rows], y[rows])])
    assert opt.coverage()["first.weight"] == "linear"
    assert opt.coverage()["middle.weight"] == (
        "linear, at times plain: it took no part when 4 samples were solved for"
    )
    again = fngd.FNGD(Dropping().double(), refresh_every=2)
    again.load_state_dict(opt.state_dict())
    assert "4 samples" in again.coverage()["middle.weight"]
    for _ in range(3):  # in the third epoch coefficients are solved for anew
        opt.start_epoch()
    opt.set_samples(range(8))
    train(model, opt, [(torch.arange(8), x[:8], y[:8])])
    assert opt.coverage()["middle.weight"] == "linear"


# ---- Modes of the whole process ----


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", ["sample", "mean"])
def test_the_table_does_not_follow_the_default_dtype(default, share):
    before, model, batch = torch.get_default_dtype(), network(), data()[:SIZE]
    torch.set_default_dtype(default)
    try:
        opt = fngd.FNGD(model, lr=0.0, share=share)
        opt.set_samples(range(SIZE))
        train(model, opt, [batch])
        state = opt.state_dict()
    finally:
        torch.set_default_dtype(before)
    if share == "sample":
        assert_kept(opt, [list(range(SIZE))], data())
    assert state["fngd"]["averaged"].dtype == state["fngd"]["values"].dtype == torch.float32
    fngd.FNGD(network(), share=share).load_state_dict(state)


def test_the_table_does_not_follow_the_default_device():
    torch.set_default_device("meta")
    try:
        model = nn.Linear(4, 3, device="cpu").double()
        opt = fngd.FNGD(model, lr=0.0)
        for _ in range(2):
            ids = torch.arange(SIZE, device="cpu")
            opt.set_samples(ids)
            x = torch.ones(SIZE, 4, dtype=torch.float64, device="cpu") * ids[:, None]
            model(x).square().mean().backward()
            opt.step()
    finally:
        torch.set_default_device("cpu")
    assert opt.stats()["solved_batches"] == 1


# ---- A tracked loader is the loader ----


def test_a_tracked_loader_is_a_copy_of_the_loaders_class():
    class Own(DataLoader):
        def extra(self):
            return self.batch_size

    loader = Own(data(), SIZE)
    tracked = fngd.track(loader, fngd.FNGD(network()))
    assert isinstance(tracked, Own)
    assert type(tracked).__name__ == "Own"
    assert tracked.extra() == SIZE
    tracked.note = "mine"
    assert tracked.note == "mine"
    assert not hasattr(loader, "note")
    assert [ids.tolist() for ids, _, _ in tracked] == [ids.tolist() for ids, _, _ in loader]


def test_a_loader_made_anew_from_a_tracked_one_is_tracked():
    """As frameworks do to put a sampler of theirs in."""
    dataset, model = data(), network()
    opt = fngd.FNGD(model, lr=0.0)
    tracked = fngd.track(DataLoader(dataset, SIZE), opt)
    again = type(tracked)(dataset, batch_size=3, sampler=[5, 2, 7, 1, 0, 3])
    drawn = train(model, opt, again)
    assert drawn == [[5, 2, 7], [1, 0, 3]]
    assert_kept(opt, drawn, dataset)
