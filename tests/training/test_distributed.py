"""Data-parallel runs on gloo processes: gradients and coefficients against the definition, checkpoints."""

import copy
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fngd
import oracles
import paths
from networks import make
from ranks import run, torchrun
from trajectory import Definition

SAMPLES, N = 22, 3
OPTIONS = {"lr": 0.05, "momentum": 0.9}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


def dataset(network):
    torch.manual_seed(0)
    model, x, y = make(network, SAMPLES)
    return model, TensorDataset(x, y)


def loader(data, rank, ranks):
    return DataLoader(data, batch_size=N, sampler=DistributedSampler(data, ranks, rank))


def train(net, opt, batches, epochs):
    for epoch in epochs:
        batches.sampler.set_epoch(epoch)
        for x, y in batches:
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()


def averaged_backward(definitions, batches):
    """Leave the mean over the ranks of what each of them should have computed from its own batch."""
    for definition, (ids, x, y) in zip(definitions, batches, strict=True):
        definition.name(ids)
        losses = F.cross_entropy(definition.model(x), y, reduction="none")
        definition.backward(losses / len(ids))
    for p in definitions[0].model.parameters():
        p.grad /= len(definitions)


def definition_of(model, data, ranks, epochs):
    """Return each rank's definition, trained: they share one model, and merge after every epoch."""
    definitions = [Definition(model) for _ in range(ranks)]
    model = definitions[0].model
    for definition in definitions:
        definition.model = model
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    for epoch in epochs:
        samplers = [DistributedSampler(data, ranks, r) for r in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders = [list(sampler) for sampler in samplers]
        for first in range(0, len(orders[0]), N):
            optimizer.zero_grad()
            named = [order[first : first + N] for order in orders]
            averaged_backward(definitions, [(ids, *data[ids]) for ids in named])
            optimizer.step()
        merge(definitions)
    return definitions


def merge(definitions):
    for i in range(SAMPLES):
        known = [d.known[i] for d in definitions if i in d.known]
        mean = {m: (sum(s[m] for s in known) / len(known)).float().double() for m in known[0]}
        for definition in definitions:
            definition.known[i] = mean


def assert_same_on_all_ranks(tensor):
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor.contiguous())
    for other in everywhere:
        assert torch.equal(other, everywhere[0])


# ---- what the ranks check


def check_ddp(rank, ranks, folder):
    """Three epochs of DDP, reshuffled, with padded duplicates and a short last batch."""
    cases = {"conv2d-groups-reflect": {"gradient_as_bucket_view": True}, "sequence": {"static_graph": True}}
    for network, options in list(cases.items())[: 4 // ranks]:
        model, data = dataset(network)
        definition = definition_of(model, data, ranks, range(3))[rank]
        net = DistributedDataParallel(model, **options)
        opt = fngd.FNGD(model, norms="weighted", **OPTIONS)
        batches = fngd.track(loader(data, rank, ranks), opt)
        train(net, opt, batches, range(3))
        for p, q in zip(model.parameters(), definition.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
        assert_same_on_all_ranks(opt._schedule.table.values)
        for layer in opt._preconditioner.blocks:
            expected = torch.stack([definition.known[i][layer.name] for i in range(SAMPLES)])
            torch.testing.assert_close(
                opt._schedule.table.values[layer.index].double(), expected, rtol=1e-5, atol=1e-6
            )
        stats = opt.stats()
        assert stats["seen_samples"] == SAMPLES
        assert stats["solved_batches"] == len(batches)  # in the first epoch alone


def check_accumulation(rank, ranks, folder):
    """Micro-batches without a reduction, then one with it."""
    model, data = dataset("mlp")
    definitions = [Definition(model) for _ in range(ranks)]
    for definition in definitions:
        definition.model = definitions[0].model
    net, opt = DistributedDataParallel(model), fngd.FNGD(model, **OPTIONS)
    for micro in range(2):
        batches = [range(4 * r + 2 * micro, 4 * r + 2 * micro + 2) for r in range(ranks)]
        for definition, ids in zip(definitions, batches, strict=True):
            x, y = data[list(ids)]
            definition.name(ids)
            losses = F.cross_entropy(definition.model(x), y, reduction="none")
            definition.backward(losses / len(ids) / ranks)
        x, y = data[list(batches[rank])]
        opt.set_samples(batches[rank])
        if micro == 0:
            with net.no_sync():
                F.cross_entropy(net(x), y).backward()
        else:
            F.cross_entropy(net(x), y).backward()
    for p, q in zip(model.parameters(), definitions[0].model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def check_uneven_ranks(rank, ranks, folder):
    """Each rank a number of batches of its own, in tables of their own sizes; sample 0 is everybody's."""
    model, data = dataset("mlp")
    opt = fngd.FNGD(model, lr=0.0)
    net = DistributedDataParallel(model)
    first = 1 + rank * (rank + 1) // 2
    with net.join():
        for i in range(rank + 1):
            ids = [0, first + i]
            opt.set_samples(ids)
            x, y = data[ids]
            F.cross_entropy(net(x), y).backward()
            opt.step()
    opt.start_epoch()
    last = ranks * (ranks + 1) // 2
    assert opt.stats()["seen_samples"] == last + 1
    definitions = [Definition(model) for _ in range(ranks)]
    for r, definition in enumerate(definitions):
        for i in range(r + 1):
            ids = [0, 1 + r * (r + 1) // 2 + i]
            x, y = data[ids]
            definition.name(ids)
            definition.backward(F.cross_entropy(definition.model(x), y, reduction="none") / 2)
    table = opt._schedule.table
    assert_same_on_all_ranks(table.values)
    for layer in opt._preconditioner.blocks:
        known = [[d.known[i][layer.name] for d in definitions if i in d.known] for i in range(last + 1)]
        expected = torch.stack([sum(weights) / len(weights) for weights in known])
        torch.testing.assert_close(
            table.values[layer.index, : last + 1].double(), expected, rtol=1e-6, atol=0
        )
    merged = table.values.clone()
    opt.merge_coefficients()
    assert torch.equal(table.values, merged)
    # What one rank solves for again replaces what all ranks knew.
    if rank == 1:
        opt.set_samples([0, last + 1])
        x, y = data[[0, 1]]
        F.cross_entropy(model(x), y).backward()
        opt.step()
    expected = table.values.clone() if rank == 1 else torch.zeros_like(merged)
    dist.broadcast(expected, 1)
    assert not torch.equal(expected, merged)
    opt.merge_coefficients()
    assert torch.equal(table.values, expected)


def check_means(rank, ranks, folder):
    """Sharing by position and by mean: the mean over the batches of all ranks."""
    for share in ("position", "mean"):
        model, data = dataset("mlp")
        opt = fngd.FNGD(model, lr=0.0, share=share)
        opt.start_epoch()
        solved = []
        for i in range(1 + rank):
            x, y = data[list(range(rank + i, rank + i + 4 - i))]
            F.cross_entropy(model(x), y).backward()
            opt.step()
            s = torch.ones(len(opt._preconditioner.blocks), 4, dtype=torch.float64) * float("nan")
            weights = torch.stack(oracles.solved(opt))
            s[:, : weights.shape[1]] = weights
            solved.append(s if share == "position" else weights.mean(1, keepdim=True))
        everywhere = [None] * ranks
        dist.all_gather_object(everywhere, solved)
        opt.start_epoch()
        expected = torch.stack([s for one in everywhere for s in one]).nanmean(0).float()
        torch.testing.assert_close(opt._schedule.table.values, expected)
        assert_same_on_all_ranks(opt._schedule.table.values)
        assert not opt.solving
        before = opt._schedule.table.values.clone()
        opt.merge_coefficients()
        torch.testing.assert_close(opt._schedule.table.values, before)


def check_groups(rank, ranks, folder):
    """Ranks that do not train together keep their coefficients to themselves."""
    alone = [dist.new_group([r]) for r in range(ranks)]
    model, data = dataset("mlp")
    opt = fngd.FNGD(model, lr=0.0, process_group=alone[rank])
    opt.set_samples([rank])
    F.cross_entropy(model(data[[rank]][0]), data[[rank]][1]).backward()
    opt.step()
    opt.start_epoch()
    assert opt.stats()["seen_samples"] == 1
    assert opt._schedule.table.knows(torch.tensor([rank]))


def sharded_by_layer(model):
    for child in model.children():
        fully_shard(child)
    return fully_shard(model)


def check_weights_used_several_times(rank, ranks, folder):
    """Layers called twice and tied ones, with biases of their own: solved for after the last use."""
    cases = [
        ("reused", DistributedDataParallel),
        ("reused", sharded_by_layer),
        ("language-model-bias", DistributedDataParallel),
        ("language-model-bias", fully_shard),
        ("own", DistributedDataParallel),
    ]
    for network, wrap in cases:
        model, data = dataset(network)
        definitions = [Definition(model) for _ in range(ranks)]
        for definition in definitions:
            definition.model = definitions[0].model
        net, opt = wrap(model), fngd.FNGD(model, norms="weighted", **OPTIONS | {"lr": 0.0})
        named = [range(N * r, N * r + N) for r in range(ranks)]
        x, y = data[list(named[rank])]
        for _ in range(2):  # solved for, then shared
            opt.zero_grad()
            definitions[0].model.zero_grad()
            averaged_backward(definitions, [(ids, *data[list(ids)]) for ids in named])
            opt.set_samples(named[rank])
            F.cross_entropy(net(x), y).backward()
            for p, q in zip(model.parameters(), definitions[0].model.parameters(), strict=True):
                gradient = p.grad if wrap is DistributedDataParallel else p.grad.full_tensor()
                torch.testing.assert_close(gradient, q.grad, rtol=1e-6, atol=1e-9)
            opt.step()
        assert opt.stats()["solved_batches"] == 1
        assert not any("plain" in reason for reason in opt.coverage().values())


def check_unused_and_frozen(rank, ranks, folder):
    """A layer that takes no part, and a frozen bias of one that is called twice."""
    model, data = dataset("reused")
    definitions = [Definition(model) for _ in range(ranks)]
    model.unused = nn.Linear(2, 2)
    model.linear.bias.requires_grad_(False)
    for definition in definitions:
        definition.model = definitions[0].model
        definition.model.linear.bias = None  # the forward of a zero bias
    with torch.no_grad():
        model.linear.bias.zero_()
    net, opt = DistributedDataParallel(model, find_unused_parameters=True), fngd.FNGD(model, **OPTIONS)
    named = [range(N * r, N * r + N) for r in range(ranks)]
    averaged_backward(definitions, [(ids, *data[list(ids)]) for ids in named])
    opt.set_samples(named[rank])
    x, y = data[list(named[rank])]
    F.cross_entropy(net(x), y).backward()
    expected = dict(definitions[0].model.named_parameters())
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-9, atol=1e-12)
        else:
            assert p.grad is None or not p.grad.any(), name
    assert opt.coverage()["unused.weight"].startswith("plain: its module took no part")


def check_scaler(rank, ranks, folder):
    """One rank's overflow has all of them skip the step."""
    model, data = dataset("mlp")
    net, opt = DistributedDataParallel(model), fngd.FNGD(model, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    named = range(N * rank, N * rank + N)
    x, y = data[list(named)]
    before = copy.deepcopy(list(model.parameters()))
    for overflows in (True, False):
        opt.zero_grad()
        opt.set_samples(named)
        loss = F.cross_entropy(net(x), y)
        scaler.scale(loss * float("inf") if overflows and rank == 0 else loss).backward()
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 1.0
        for p, q in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, q) == overflows
            assert_same_on_all_ranks(p.detach())
        assert opt.stats()["seen_samples"] == (0 if overflows else N)  # what no step has kept is dropped


def check_tensor_parallel(rank, ranks, folder):
    """What tensor parallelism splits keeps the plain gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    styles = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (ranks,)), styles)
    opt, x = fngd.FNGD(model, share="none", **OPTIONS), torch.ones(N, 6, dtype=torch.float64)
    model(x).square().mean().backward()
    twin(x).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    assert all(reason.startswith("plain: ") for reason in opt.coverage().values())


PLAIN = [
    "encoder.layers.0.norm1",
    "encoder.layers.0.norm2",
    "encoder.norm",
    "decoder.layers.0.norm1",
    "decoder.layers.0.norm2",
    "decoder.layers.0.norm3",
]


def check_fully_sharded(rank, ranks, folder):
    """FSDP2: gradients are those of DDP, and a rank's non-finite gradient stops the step of all."""
    model, data = dataset("transformer")
    definitions = [Definition(model, plain=PLAIN) for _ in range(ranks)]
    for definition in definitions:
        definition.model = definitions[0].model
    fully_shard(model.encoder.layers[0])
    fully_shard(model.decoder.layers[0])
    fully_shard(model.head)
    fully_shard(model)
    opt = fngd.FNGD(model, **OPTIONS)
    named = [range(N * r, N * r + N) for r in range(ranks)]
    batches = [(ids, *data[list(ids)]) for ids in named]
    optimizer = torch.optim.SGD(definitions[0].model.parameters(), **OPTIONS)
    for _ in range(3):
        optimizer.zero_grad()
        averaged_backward(definitions, batches)
        optimizer.step()
        opt.zero_grad()
        opt.set_samples(named[rank])
        F.cross_entropy(model(batches[rank][1]), batches[rank][2]).backward()
        opt.step()
    for p, (name, q) in zip(model.parameters(), definitions[0].model.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-6, atol=1e-9, msg=name)
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-6, atol=1e-9, msg=name)
    assert opt.stats()["solved_batches"] == 1

    check_that_all_skip(model, opt, rank)


def check_hybrid_sharding(rank, ranks, folder):
    """Replicas of sharded models, in low precision, with clipping and a fused update."""
    model, data = dataset("mlp")
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(model.float(), mesh=mesh, mp_policy=policy)
    opt = fngd.FNGD(model, base="adamw", lr=0.01, fused=True)
    ids = list(range(N * rank, N * rank + N))
    x, y = data[ids]
    losses = []
    for _ in range(5):
        opt.zero_grad()
        opt.set_samples(ids)
        losses.append(F.cross_entropy(model(x.float()).float(), y))
        losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    losses = torch.stack(losses).detach()
    dist.all_reduce(losses)
    assert (losses.diff() < 0).all()
    assert opt.stats()["solved_batches"] == 1
    check_that_all_skip(model, opt, rank)


def check_that_all_skip(model, opt, rank):
    before = [p.full_tensor().clone() for p in model.parameters()]
    weights = [p.grad.to_local() for p in model.parameters()]
    if rank == 0:
        next(w for w in weights if w.numel()).view(-1)[0] = float("nan")
    opt.step()
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.full_tensor(), value)
    assert opt.stats()["skipped_steps"] == 1


def sharded(rank, ranks):
    """Return (model, tracked loader, optimizer) of an FSDP2 run."""
    model, data = dataset("mlp")
    fully_shard(model)
    opt = fngd.FNGD(model, base="adamw", lr=0.01)
    return model, fngd.track(loader(data, rank, ranks), opt), opt


def check_writing(rank, ranks, folder):
    """Two steps of the solving epoch, and checkpoints of both kinds."""
    model, batches, opt = sharded(rank, ranks)
    for (x, y), _ in zip(batches, range(1), strict=False):
        F.cross_entropy(model(x), y).backward()
        opt.step()
    opt.merge_coefficients()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    folder = folder / f"of-{ranks}"
    dcp.save(state, checkpoint_id=folder / "sharded")
    if rank == 0:
        torch.save(opt.state_dict()["fngd"], folder / "fngd.pt")
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    moments = {name: opt.state[p]["exp_avg"].full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save([whole, moments, opt._schedule.table.values], folder / "truth.pt")


def check_reading(rank, ranks, folder):
    """What another number of ranks wrote is there again, and what was solved for is not solved for again."""
    model, batches, opt = sharded(rank, ranks)
    wrote = {2: 4, 4: 2}[ranks]
    folder = folder / f"of-{wrote}"
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=folder / "sharded")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, opt, state["optimizer"])
    opt.load_state_dict({**opt.state_dict(), "fngd": torch.load(folder / "fngd.pt", weights_only=True)})
    whole, moments, values = torch.load(folder / "truth.pt", weights_only=True)
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), whole[name])
        assert torch.equal(opt.state[p]["exp_avg"].full_tensor(), moments[name])
    assert torch.equal(opt._schedule.table.values, values)
    assert opt.param_groups[0].keys() == fngd.FNGD(nn.Linear(1, 1), base="adamw").param_groups[0].keys()
    seen = opt.stats()["seen_samples"]
    assert seen == wrote * N  # one batch of each rank that wrote
    known = opt._schedule.table.seen.nonzero().flatten()[:N]
    opt.set_samples(known)
    assert not opt.solving
    train(model, opt, batches, [1])
    opt.start_epoch()
    assert opt.stats()["seen_samples"] == SAMPLES
    assert_same_on_all_ranks(opt._schedule.table.values)


def test_two_ranks_then_four_then_two(tmp_path):
    run(2, tmp_path, check_writing, check_ddp, check_accumulation, check_means, check_groups)
    run(4, tmp_path, check_reading, check_ddp, check_uneven_ranks, check_hybrid_sharding, check_writing)
    checks = (check_weights_used_several_times, check_unused_and_frozen, check_scaler)
    run(2, tmp_path, check_reading, *checks, check_tensor_parallel, check_fully_sharded)


def wait_for_ever(rank, ranks, folder):
    time.sleep(3600)


def test_ranks_that_hang_are_ended(tmp_path):
    with pytest.raises(TimeoutError, match=r"2 ranks took longer than 0\.5 s"):
        run(2, tmp_path, wait_for_ever, seconds=0.5)
    assert not torch.multiprocessing.active_children()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_rank_ends_with_its_launcher_however_that_ended(tmp_path):
    program = "import time; print(flush=True); time.sleep(30); print('still there')"
    (tmp_path / "train.py").write_text(program)
    watched = [sys.executable, str(paths.TESTS / "ranks.py"), "train.py"]
    launcher = f"import subprocess, time; subprocess.Popen({watched}), time.sleep(3600)"
    with subprocess.Popen([sys.executable, "-c", launcher], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # the rank runs
        process.kill()
        assert process.stdout.read() == b""  # it holds the pipe until it ends


@pytest.mark.parametrize(("number", "samples", "solved"), [(0, 50, 4), (1, 48, 2)])
def test_programs_of_the_guide_page(tmp_path, number, samples, solved):
    page = (paths.DOCS / "distributed.md").read_text()
    program = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[number]
    (tmp_path / "train.py").write_text(program)
    printed = torchrun(tmp_path / "train.py")
    # Both ranks print at once: a line may begin where the other's ends.
    lines = re.findall(rf"rank ([01]) knows {samples} samples, solved {solved}(?!\d)", printed)
    assert sorted(lines) == ["0", "1"]
