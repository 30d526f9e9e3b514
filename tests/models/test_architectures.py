"""Small networks of the kinds that users bring, unchanged: every parameter is weighted, or named."""

import pytest
import torch
from torch import nn

import architectures as kinds
from natural import check

N = kinds.N


def floats(*shape):
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


def tokens(length):
    return lambda: torch.randint(0, 8, (N, length))


def quantized():
    return nn.Sequential(kinds.QuantizedLinear(4, 5), nn.Tanh(), kinds.QuantizedLinear(5, 3))


def few(rows):
    return f"plain: its input has {rows} rows, the batch has {N} samples"


CASES = {  # network, inputs, parameters that stay plain and why
    "u-net": (kinds.UNet, [floats(1, 6, 6)], {}),
    "squeeze-excite": (kinds.SqueezeExcite, [floats(3, 5, 5)], {}),
    "autoencoder": (kinds.Autoencoder, [floats(5), floats(2)], {}),
    "triplet": (kinds.Triplet, [floats(2, 6)] * 3, {}),
    "translator": (kinds.Translator, [tokens(5), tokens(3)], {}),
    "experts": (
        kinds.Experts,
        [floats(4), lambda: torch.tensor([0, 1, 1, 1])],
        {"experts.0": few(1), "experts.1": few(3)},
    ),
    "one-expert": (
        kinds.Experts,
        [floats(4), lambda: torch.zeros(N, dtype=torch.int64)],
        {"experts.1": "plain: its input has 0 rows, the batch has 4 samples"},
    ),
    "set": (kinds.DeepSet, [floats(6, 3)], {}),
    "radiance-field": (kinds.DeepSet, [floats(3, 5, 3)], {}),
    "conv-lstm": (kinds.ConvLSTM, [floats(3, 1, 4, 4)], {}),
    "highway": (kinds.Highway, [floats(4)], {}),
    "normed-weights": (
        kinds.Normed,
        [floats(2, 4)],
        {
            name: "plain: ParametrizedLinear with a parametrization that has a state"
            for name in ("second", "third")
        },
    ),
    "adapters": (kinds.Adapted, [floats(5)], {"base": "plain: frozen"}),
    "bilinear": (kinds.Pair, [floats(3), floats(2)], {}),
    "bag-of-words": (kinds.Bag, [tokens(5)], {}),
    "quantized": (quantized, [floats(4)], {}),
    "raw-parameters": (
        kinds.Raw,
        [floats(4)],
        {
            "list": "plain: no rule for ParameterList",
            "named": "plain: no rule for ParameterDict",
            "shift": "plain: no rule for Raw",
        },
    ),
    "frequency-domain": (
        kinds.Filtered,
        [floats(4)],
        {"spectral": "plain: complex parameters"},
    ),
    "structured": (kinds.Structured, [floats(4)], {}),
    "multi-task": (kinds.MultiTask, [floats(4)], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_natural_or_named(name):
    build, inputs, plain = CASES[name]
    model = build().double().train()
    batch = [draw() for draw in inputs]

    def loss(net, samples):
        return net(*(x[list(samples)] for x in batch)).sin().square().flatten(1).sum(1).mean()

    coverage = check(model, loss, N, norms="weighted")
    for key, how in coverage.items():
        reasons = [reason for start, reason in plain.items() if f"{key}.".startswith(f"{start}.")]
        assert how.startswith("plain: ") == bool(reasons), (key, how)
        assert not reasons or how == reasons[0]


@pytest.mark.parametrize("name", ["u-net", "squeeze-excite", "conv-lstm"])
def test_channels_last(name):
    build, inputs, _ = CASES[name]
    model = build().double().to(memory_format=torch.channels_last)
    batch = inputs[0]()

    def loss(net, samples):
        x = batch[list(samples)]
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return net(x).sin().square().flatten(1).sum(1).mean()

    assert not any(how.startswith("plain: ") for how in check(model, loss, N).values())


def test_a_stack_of_layers_without_attention():
    class Stack(nn.TransformerEncoder):
        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.norm(x)

    x = torch.randn(N, 3, 4, dtype=torch.float64)
    model = Stack(nn.Linear(4, 4), 2, nn.LayerNorm(4), enable_nested_tensor=False).double()

    def loss(net, samples):
        return net(x[list(samples)]).sin().square().sum((1, 2)).mean()

    assert set(check(model, loss, N, norms="weighted").values()) == {"linear", "affine"}
