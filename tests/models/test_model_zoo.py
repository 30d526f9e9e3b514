"""Models of the libraries that people take them from, unchanged: every parameter is weighted, or named.

Random weights, few and small inputs, float64; timm and torchvision are tried where they are installed.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from natural import call_rows, check, sample_rows, share_of_weighted

N = 4
NORM = 'plain: normalisation (norms="plain")'


def library(name):
    """Import a library, or skip: torchvision raises RuntimeError where its operators are of another torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


def rows_are(count):
    return f"plain: its input has {count} rows, the batch has {N} samples"


# ---- Hugging Face

LENGTH, VOCABULARY = 6, 30
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQ2SEQ = {
    "d_model": 8,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 12 for side in ("encoder", "decoder")},
    "pad_token_id": 0,
    "dropout": 0.0,
}


def tokens():
    return torch.randint(3, VOCABULARY, (N, LENGTH))


def images(size):
    return torch.randn(N, 3, size, size, dtype=torch.float64)


def classes():
    return torch.arange(N) % 3


HUGGING_FACE = {  # model, configuration, batch, reasons for plain gradients beside normalisation
    "mistral": ("MistralForCausalLM", "MistralConfig", {"num_key_value_heads": 1, **SIZES}, "text", set()),
    "gemma": (
        "GemmaForCausalLM",
        "GemmaConfig",
        {"num_key_value_heads": 1, "head_dim": 4, **SIZES},
        "text",
        set(),
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {
            "hidden_size": 8,
            "state_size": 3,
            "num_hidden_layers": 1,
            "time_step_rank": 2,
            "use_mambapy": False,
        },
        "text",
        {"plain: no rule for MambaMixer", "plain: its module took no part in a solving step"},
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {"max_position_embeddings": 16, **SIZES, **NO_DROPOUT},
        "label",
        set(),
    ),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {"embedding_size": 6, "classifier_dropout_prob": 0.0, **SIZES, **NO_DROPOUT, "num_hidden_layers": 2},
        "label",
        {rows_are(1)},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12}
        | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
        "label",
        {rows_are(1)},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"max_position_embeddings": 16, **SEQ2SEQ},
        "pair",
        {"plain: BartLearnedPositionalEmbedding cannot be run sample by sample"},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, **SEQ2SEQ},
        "speech",
        {"plain: frozen"},
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]}
        | {"window_size": 4, "drop_path_rate": 0.0, **NO_DROPOUT},
        "image",
        {rows_are(16), "plain: its input has no row per sample"},
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, **SIZES},
            "vision_config": {"image_size": 8, "patch_size": 4, **SIZES},
        },
        "text and image",
        {rows_are(1), "plain: no rule for CLIPModel", "plain: no rule for CLIPVisionEmbeddings"},
    ),
}


def batch_of(kind):
    ids = tokens()
    return {
        "text": lambda: {"input_ids": ids, "labels": ids},
        "label": lambda: {"input_ids": ids, "labels": classes()},
        "pair": lambda: {"input_ids": ids, "labels": tokens()},
        "image": lambda: {"pixel_values": images(16), "labels": classes()},
        "speech": lambda: {"input_features": torch.randn(N, 4, 16, dtype=torch.float64), "labels": ids},
        "text and image": lambda: {"input_ids": ids, "pixel_values": images(8)},
    }[kind]()


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name):
    transformers = library("transformers")
    model, config, options, kind, reasons = HUGGING_FACE[name]
    if name != "clip":
        options = {"vocab_size": VOCABULARY, "num_labels": 3, **options}
    model = getattr(transformers, model)(getattr(transformers, config)(**options)).double().train()
    batch, contrastive = batch_of(kind), {"return_loss": True} if name == "clip" else {}

    def loss(net, samples):
        return net(**{key: value[list(samples)] for key, value in batch.items()}, **contrastive).loss

    # These take their loss and norms in float32, whatever their own type is.
    coverage = check(model, loss, N, rows=call_rows if contrastive else sample_rows, tolerance=1e-5)
    found = {how.partition(" (Runtime")[0] for how in coverage.values() if how.startswith("plain: ")}
    assert found == {NORM} | reasons
    assert any(not how.startswith("plain: ") for how in coverage.values())


def test_a_weight_that_two_modules_keep_in_different_orders():
    conv1d = library("transformers").pytorch_utils.Conv1D

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), conv1d(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    x = torch.randn(N, 3, dtype=torch.float64)
    coverage = check(Tied().double(), lambda net, rows: net(x[list(rows)]).square().sum(1).mean(), N)
    assert coverage["first.weight"] == "linear+transposed linear"


# ---- torchvision and timm


def check_classifier(build, size):
    """Check a network on images, with BatchNorm in evaluation and then as it is in training."""
    model = build().double().train()
    for p in model.parameters():  # so that no branch begins at zero
        p.data.add_(torch.randn_like(p), alpha=0.03)
    for module in model.modules():
        for name in ("p", "drop_rate", "drop_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    x, labels = images(size), classes()

    def loss(net, samples):
        rows = list(samples)
        # The backward of torch's BatchNorm is wrong for one image in some memory formats.
        rows = rows * 2 if len(rows) == 1 else rows
        outputs = net(x[rows])
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y is not None]
        return sum(F.cross_entropy(y, labels[rows]) for y in outputs)

    normalised = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in normalised:
        module.eval()
    coverage = check(model, loss, N, tolerance=1e-8)
    if normalised:
        model.train()
        coverage = check(model, loss, N, rows=call_rows, tolerance=1e-7)
    return share_of_weighted(model, coverage)


TORCHVISION = {  # options, image size, least share of weighted parameters
    "resnet18": ({}, 32, 0.99),
    "resnet50": ({}, 32, 0.99),
    "densenet121": ({}, 32, 0.98),
    "mobilenet_v3_small": ({}, 32, 0.99),
    "efficientnet_b0": ({}, 32, 0.98),
    "squeezenet1_1": ({}, 48, 1.0),
    "googlenet": ({"aux_logits": True, "init_weights": False}, 64, 0.99),
    "VisionTransformer": (
        {
            "image_size": 32,
            "patch_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 16,
            "mlp_dim": 24,
        },
        32,
        0.95,
    ),
    "SwinTransformer": (
        {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4]},
        32,
        0.6,
    ),
}
TIMM = {
    "resnet18": (32, 0.99),
    "resnetv2_50": (32, 0.99),
    "nf_resnet26": (32, 0.99),
    "convnext_atto": (32, 0.99),
    "efficientnet_b0": (32, 0.98),
    "mixer_s32_224": (32, 0.98),
    "vit_tiny_patch16_224": (32, 0.98),
    "deit_tiny_distilled_patch16_224": (32, 0.98),
    "beit_base_patch16_224": (32, 0.6),
    "swin_tiny_patch4_window7_224": (56, 0.98),
    "maxvit_rmlp_pico_rw_256": (64, 0.85),
    "poolformer_s12": (32, 0.99),
}
SMALL = {"vit": {"depth": 2}, "deit": {"depth": 2}, "beit": {"depth": 2, "embed_dim": 24, "num_heads": 2}}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    models = library("torchvision").models
    options, size, least = TORCHVISION[name]
    assert check_classifier(lambda: getattr(models, name)(num_classes=3, **options), size) >= least


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = library("timm")
    size, least = TIMM[name]
    options = SMALL.get(name.partition("_")[0], {})
    if size != 32 or "224" in name:
        options = {"img_size": size} | options
    assert check_classifier(lambda: timm.create_model(name, num_classes=3, **options), size) >= least
