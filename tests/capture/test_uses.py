"""Any network: steady state, modules that no rule can serve, checkpointing, real models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fngd
import oracles
from fngd.rules.generic import module as generic_module
from fngd_kernels import native
from fngd_kernels.ops.gram_embedding import gram_embedding_linear
from networks import Recurrent, blocks, make, sample_gradients
from trajectory import Definition

N = 7
KINDS = [
    "transposed-conv1d",
    "transposed-conv2d-groups",
    "transposed-conv3d",
    "tied-linear",
    "tied-conv",
    "language-model",
    "language-model-bias",
    "lstm",
    "gru-time-first",
    "own",
]


def gradients(model):
    return blocks(model, {name: p.grad[None] for name, p in model.named_parameters()})


def plain_gradients(model, x, y):
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    return {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize("network", KINDS)
def test_shared_coefficients_weigh_contributions_and_leave_input_gradients(network):
    model, x, y = make(network, N)
    opt = fngd.FNGD(model, lr=0.0, norms="weighted")
    differentiable = x.is_floating_point()
    x = x.requires_grad_() if differentiable else x
    for _ in range(2):  # solve, then share
        opt.set_samples(range(N))
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        dx, x.grad = x.grad, None
    assert opt.stats()["solved_batches"] == 1
    opt.detach()
    x = x.detach()
    truth = blocks(model, sample_gradients(model, x, y))
    for layer in opt._preconditioner.blocks:
        s = opt._report.last_coefficients[layer].float().double()  # the table keeps single precision
        torch.testing.assert_close(
            gradients(model)[layer.name][0], s @ truth[layer.name] / N, rtol=1e-9, atol=1e-12
        )
    if differentiable:
        x.requires_grad_()
        expected = torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]
        torch.testing.assert_close(dx, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("network", KINDS)
def test_nodes_without_the_extension_compute_the_same(network, monkeypatch):
    model, x, y = make(network, N)
    twin = copy.deepcopy(model)
    optimizers = [fngd.FNGD(net, share="none", norms="weighted") for net in (model, twin)]
    F.cross_entropy(model(x), y).backward()
    monkeypatch.setattr(native, "AVAILABLE", False)
    F.cross_entropy(twin(x), y).backward()
    assert [opt.stats()["solved_batches"] for opt in optimizers] == [1, 1]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", ["mlp", "reused", "tied-linear", "conv2d-groups-reflect", "own"])
def test_a_gradient_penalty_without_the_extension_is_the_same(network, monkeypatch):
    """The gradient of the inputs alone, taken first, must leave nothing in .grad."""
    model, x, y = make(network, N)
    twin = copy.deepcopy(model)

    def backward(net):
        opt = fngd.FNGD(net, share="none", norms="weighted")
        leaf = x.clone().requires_grad_()
        loss = F.cross_entropy(net(leaf), y)
        (dx,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert all(p.grad is None for p in net.parameters())
        (loss + dx.square().sum()).backward()
        assert opt.stats()["solved_batches"] == 1

    backward(model)
    monkeypatch.setattr(native, "AVAILABLE", False)
    backward(twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_the_cross_term_of_an_embedding_and_a_linear_layer_in_chunks():
    ids = torch.randint(0, 5, (4, 3))
    g, a, e = (torch.randn(4, t, d, dtype=torch.float64) for t, d in ((3, 2), (6, 2), (6, 5)))
    c = [e[j].T @ a[j] for j in range(4)]
    expected = torch.stack([torch.stack([(g[i] * c[j][ids[i]]).sum() for j in range(4)]) for i in range(4)])
    for workspace in (0, 2 * 8 * 3 * 6 * 5, 2**20):
        torch.testing.assert_close(gram_embedding_linear(ids, g, a, e, workspace), expected)


def test_a_shared_weight_has_one_name_one_row_and_one_rule():
    model, x, y = make("language-model", N)
    opt = fngd.FNGD(model, share="none")
    F.cross_entropy(model(x), y).backward()
    assert [layer.name for layer in opt._preconditioner.blocks] == ["embedding+head", "mix"]
    assert opt.coverage()["head.weight"] == opt.coverage()["embedding.weight"] == "embedding+linear"


@pytest.mark.parametrize("skip", [("head",), ("embedding",)])
def test_a_shared_weight_stays_plain_when_one_of_its_modules_is_skipped(skip):
    model, x, y = make("language-model-bias", N)
    expected = plain_gradients(model, x, y)
    opt = fngd.FNGD(model, share="none", skip=skip)
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(model.head.weight.grad, expected["embedding.weight"])
    assert opt.coverage()["embedding.weight"].startswith("plain: ")
    assert opt.coverage()["mix.weight"] == "linear"


@pytest.mark.parametrize("network", ["reused", "language-model-bias", "tied-conv", "transformer", "own"])
def test_hooks_see_the_weighted_gradient_of_a_weight_used_several_times(network):
    model, x, y = make(network, N)
    theirs, seen = Definition(model), {}
    opt = fngd.FNGD(model, share="none", norms="weighted")
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.setdefault(p, []).append(p.grad.clone()))
    theirs.name(range(N))
    theirs.backward(F.cross_entropy(theirs.model(x), y, reduction="none") / N)
    F.cross_entropy(model(x), y).backward()
    for p, q in zip(model.parameters(), theirs.model.parameters(), strict=True):
        (gradient,) = seen[p]
        torch.testing.assert_close(gradient, q.grad, rtol=1e-8, atol=1e-11)
    assert not any("plain" in reason for reason in opt.coverage().values())


def test_hooked_gradients_of_several_forwards_and_backwards_before_a_step():
    model, x, y = make("reused", 2 * N)
    plain, hooked = model, copy.deepcopy(model)
    for p in hooked.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
    for net in (plain, hooked):
        opt = fngd.FNGD(net, lr=0.0)
        opt.set_samples(range(N))
        (F.cross_entropy(net(x[:N]), y[:N]) + F.cross_entropy(net(x[:N].sin()), y[:N])).backward()
        with torch.no_grad():
            net.head.weight.mul_(2)
        loss = F.cross_entropy(net(x[:N].cos()), y[:N])
        loss.backward(retain_graph=True)
        loss.backward()
        opt.set_samples(range(N, 2 * N))
        for frozen in (True, False):
            net.linear.bias.requires_grad_(not frozen)
            F.cross_entropy(net(x[N:]), y[N:]).backward()
        opt.step()
        assert opt.stats()["seen_samples"] == 2 * N
        assert not opt._preconditioner._shields
    for p, q in zip(plain.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-13)


# ---- modules that cannot be served


class MeanOverBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (x - x.mean(0)) * self.scale


class Noisy(MeanOverBatch):
    def forward(self, x):
        return (x + torch.randn_like(x)) * self.scale


class InPlace(MeanOverBatch):
    def forward(self, x):
        return x.mul_(self.scale)


class Remembering(MeanOverBatch):
    def forward(self, x):
        return x * self.scale + self.memory


class Couples(MeanOverBatch):
    """Its parameter's gradient is a sum over samples, its output is not its own row's."""

    def forward(self, x):
        return x + self.scale + x.sum(0)


class Branching(MeanOverBatch):
    """A module that vmap has no rule for: it looks at a number."""

    def forward(self, x):
        return x * self.scale if float(x.detach().sum()) < float("inf") else x


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.first, self.module, self.head = nn.Linear(4, 4), module, nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if isinstance(self.module, Remembering):
            self.module.memory = x.sin()
        return self.head(torch.tanh(self.module(x * 1)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (MeanOverBatch, "plain: MeanOverBatch couples samples: its gradient is no sum over samples"),
        (Noisy, "plain: Noisy draws random numbers"),
        (InPlace, "plain: InPlace modifies its input"),
        (Couples, "plain: Couples couples samples"),
        (Remembering, "plain: Remembering depends on tensors that are not its arguments"),
    ],
)
def test_modules_that_mix_rows_keep_the_plain_gradient_and_say_so(kind, reason):
    model = Around(kind()).double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,))
    torch.manual_seed(1)
    expected = plain_gradients(model, x, y)
    opt = fngd.FNGD(model, share="none")
    torch.manual_seed(1)
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(model.module.scale.grad, expected["module.scale"])
    assert not torch.allclose(model.head.weight.grad, expected["head.weight"])
    assert opt.coverage()["module.scale"] == reason


def test_a_module_that_cannot_be_vectorized_is_run_sample_by_sample():
    model = Around(Branching()).double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,))
    rows = sample_gradients(model, x, y)["module.scale"] / N
    opt = fngd.FNGD(model, share="none")
    F.cross_entropy(model(x), y).backward()
    names = [block.name for block in opt._preconditioner.blocks]
    s = oracles.solved(opt)[names.index("module")]
    torch.testing.assert_close(model.module.scale.grad, s @ rows)
    assert opt.coverage()["module.scale"] == "generic"


def test_parameters_of_a_module_may_be_frozen_and_unfrozen():
    model, x, y = make("lstm", N)
    opt = fngd.FNGD(model, share="none", normalize="raw", damping=0.3)
    for frozen in (True, False):
        model.layer.weight_ih_l0.requires_grad_(not frozen)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        trained = [p for p in model.layer.parameters() if p.requires_grad]
        opt.detach()
        rows = [
            torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), trained) for n in range(N)
        ]
        opt.attach()
        g = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        v = torch.linalg.solve(
            g @ g.T / N + 0.3 * g.square().sum() / N * torch.eye(N, dtype=g.dtype),
            torch.ones(N, dtype=g.dtype),
        )
        found = torch.cat([p.grad.flatten() for p in trained])
        torch.testing.assert_close(found, v @ g / N, rtol=1e-9, atol=1e-12)
        assert (model.layer.weight_ih_l0.grad is None) == frozen


@pytest.mark.parametrize("network", ["lstm", "gru-time-first", "own"])
def test_per_sample_gradients_in_chunks_give_the_same(network, monkeypatch):
    model, x, y = make(network, N)
    expected = fngd.layer_grams(model, lambda: F.cross_entropy(model(x), y))
    model = copy.deepcopy(model)
    size = {"lstm": 304, "gru-time-first": 216, "own": 10}[network]
    two_samples = 2 * 2 * 8 * size  # of one module at a time
    monkeypatch.setattr(generic_module, "PER_SAMPLE_GRAD_BYTES", two_samples)
    found = fngd.layer_grams(model, lambda: F.cross_entropy(model(x), y))
    for name, k in expected.items():
        torch.testing.assert_close(found[name], k, rtol=1e-10, atol=1e-14)


def test_dropout_inside_a_module_is_named_and_evaluation_is_torchs_own():
    model = Recurrent(nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True))
    opt = fngd.FNGD(model, share="none")
    assert opt.coverage()["layer.weight_hh_l1"] == "plain: LSTM with dropout inside"
    model, x, _ = make("lstm", N)
    twin = copy.deepcopy(model).eval()
    opt = fngd.FNGD(model, share="none")
    torch.testing.assert_close(model.eval()(x), twin(x))
    assert opt.coverage()["layer.weight_hh_l1"] == "generic"


def test_packed_and_unbatched_sequences_keep_the_plain_gradient():
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4, batch_first=True)).double()
    opt = fngd.FNGD(model, share="none")
    x = torch.randn(N, 5, 3, dtype=torch.float64)
    packed = nn.utils.rnn.pack_sequence([x[n, : 5 - n // 2] for n in range(N)])
    for sequences in (packed, x[0]):
        opt.zero_grad()
        output = model[1](sequences)[0]
        (output if isinstance(output, torch.Tensor) else output.data).sum().backward()
        twin = copy.deepcopy(model[1])
        twin.zero_grad()
        output = twin(sequences)[0]
        (output if isinstance(output, torch.Tensor) else output.data).sum().backward()
        for p, q in zip(model[1].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    model(x)[0].sum().backward()
    assert opt.coverage()["1.weight_ih_l0"] == "generic, at times plain: its input has no row per sample"


@pytest.mark.parametrize("hooked", [False, True])
def test_a_differentiated_derivative_of_a_module_keeps_the_plain_gradient(hooked):
    model = Around(Branching()).double()
    x = torch.randn(N, 4, dtype=torch.float64)

    def loss(net):
        leaf = x.clone().requires_grad_()
        out = net(leaf).sin().sum()
        (dx,) = torch.autograd.grad(out, leaf, create_graph=True)
        return out + dx.square().sum()

    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, share="none", skip=["first", "head"])
    if hooked:
        model.module.scale.register_post_accumulate_grad_hook(lambda p: None)
    loss(model).backward()
    loss(twin).backward()
    assert opt.stats()["solved_batches"] == 0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_keeps_the_plain_gradient():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)).double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,))
    expected = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)).double()
    expected.load_state_dict(model.state_dict())
    opt = fngd.FNGD(model, share="none")
    for net in (model, expected):
        F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(model[0].weight_v.grad, expected[0].weight_v.grad)
    assert opt.coverage()["0.weight_g"] == "plain: its weight is computed before every forward"


def test_state_of_a_parametrization_keeps_the_plain_gradient():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    coverage = fngd.FNGD(model, share="none").coverage()
    reason = "plain: ParametrizedLinear with a parametrization that has a state"
    assert coverage["0.bias"] == coverage["0.parametrizations.weight.original"] == reason
    assert coverage["1.weight"] == "linear"


# ---- compiled, checkpointed, several optimizers, batches


@pytest.mark.parametrize("network", ["language-model", "transposed-conv1d", "lstm"])
def test_a_compiled_steady_state_has_the_eager_gradients(network):
    torch._dynamo.reset()
    model, x, y = make(network, N)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=network != "lstm")
    for net, steady in ((model, model), (twin, compiled)):
        opt = fngd.FNGD(net, lr=0.0)
        for forward in (net, steady):
            opt.set_samples(range(N))
            opt.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            opt.step()
        assert opt.stats()["solved_batches"] == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        if x.is_floating_point():
            x = x.requires_grad_()
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("network", ["mlp", "conv3d", "transformer", "tied-linear", "reused", "lstm"])
def test_checkpointing_changes_no_gradient(network, reentrant):
    model, x, y = make(network, N)
    twin = Checkpointed(copy.deepcopy(model), reentrant)
    optimizers = [fngd.FNGD(net, lr=0.0, share="none") for net in (model, twin)]
    for _ in range(2):
        for net, opt in zip((model, twin), optimizers, strict=True):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name.startswith("layer.") and not reentrant:
            assert "checkpointing" in optimizers[1].coverage()[f"model.{name}"]
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)
    assert not any(calls for opt in optimizers for calls in opt._preconditioner._open.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("network", "checkpointed"),
    [
        ("tied-linear", ["first"]),
        ("tied-linear", ["second"]),
        ("tied-linear", ["first", "second"]),
        ("language-model-bias", ["head"]),
        ("language-model-bias", ["mix"]),
        ("reused", ["linear"]),
        ("reused", ["conv", "linear"]),
    ],
)
def test_checkpointing_some_uses_of_a_weight_changes_no_gradient(network, checkpointed, reentrant):
    model, x, y = make(network, N)
    theirs = Definition(model)
    for name in checkpointed:
        setattr(model, name, Checkpointed(getattr(model, name), reentrant))
    opt = fngd.FNGD(model, lr=0.0)
    for _ in range(2):  # solves, then shares
        for side in (opt, theirs.model):
            side.zero_grad()
        opt.set_samples(range(N))
        theirs.name(range(N))
        F.cross_entropy(model(x), y).backward()
        theirs.backward(F.cross_entropy(theirs.model(x), y, reduction="none") / N)
        for p, q in zip(model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)
        opt.step()
    assert opt.stats()["solved_batches"] == 1
    assert not opt._preconditioner._backwards


@pytest.mark.parametrize("checkpointed", ["first", "second"])
def test_where_gradients_are_awaited_a_reentrant_checkpoint_solves_for_its_own_uses(checkpointed):
    model, x, y = make("tied-linear", N)
    untied = copy.deepcopy(model)
    untied.second.weight = nn.Parameter(untied.first.weight.detach().clone())
    theirs = Definition(untied)
    theirs.name(range(N))
    theirs.backward(F.cross_entropy(theirs.model(x), y, reduction="none") / N)
    setattr(model, checkpointed, Checkpointed(getattr(model, checkpointed), reentrant=True))
    opt = fngd.FNGD(model, share="none")
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
    F.cross_entropy(model(x), y).backward()
    expected = {name: p.grad for name, p in theirs.model.named_parameters()}
    expected["first.weight"] = expected["first.weight"] + expected.pop("second.weight")
    for (name, p), gradient in zip(model.named_parameters(), expected.values(), strict=True):
        torch.testing.assert_close(p.grad, gradient, msg=name)
    assert opt.coverage()["head.weight"] == "linear"


def test_optimizers_of_disjoint_parts_of_a_model_both_work():
    model, x, y = make("mlp", N)
    halves = list(model[0].parameters()), [p for layer in model[1:] for p in layer.parameters()]
    opts = [fngd.FNGD(model, params=half, share="none") for half in halves]
    F.cross_entropy(model(x), y).backward()
    assert [opt.stats()["solved_batches"] for opt in opts] == [1, 1]
    parts = {name: p.grad.clone() for name, p in model.named_parameters()}
    for opt in opts:
        opt.detach()
    model.zero_grad()
    whole = fngd.FNGD(model, share="none")
    F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(parts[name], p.grad)
    assert whole.stats()["solved_batches"] == 1


@pytest.mark.parametrize("network", ["mlp", "conv3d", "transformer", "language-model", "own"])
@pytest.mark.parametrize("share", ["none", "sample"])
def test_empty_batches_have_zero_gradients(network, share):
    model, x, _ = make(network, N)
    opt = fngd.FNGD(model, share=share)
    opt.set_samples([])
    model(x[:0]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    opt.step()
    assert opt.stats()["solved_batches"] == 0
