"""Hugging Face's models from small configurations: every layer's gradient against per-sample autograd."""

import pytest
import torch

import fngd
from networks import blocks

transformers = pytest.importorskip("transformers")

N, T, VOCABULARY = 5, 7, 40
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NORM = 'plain: normalisation (norms="plain")'
ONE_ROW = f"plain: its input has 1 rows, the batch has {N} samples"


def tokens():
    return torch.randint(2, VOCABULARY, (N, T))


def bert():
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=3, **SIZES, **NO_DROPOUT)
    return transformers.BertForSequenceClassification(config), {
        "input_ids": tokens(),
        "labels": torch.randint(0, 3, (N,)),
    }


def gpt2():
    sizes = {"n_positions": T, "n_embd": 8, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, **sizes, **dropout, loss_type="ForCausalLM"
    )
    ids = tokens()
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def llama():
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **SIZES)
    ids = tokens()
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def t5():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    config = transformers.T5Config(
        vocab_size=VOCABULARY, pad_token_id=0, decoder_start_token_id=0, tie_word_embeddings=True, **sizes
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": tokens(), "labels": tokens()}


def vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES, **NO_DROPOUT)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(N, 3, 8, 8, dtype=torch.float64),
        "labels": torch.randint(0, 3, (N,)),
    }


MODELS = {
    "bert": (bert, {"bert.embeddings.position_embeddings.weight": ONE_ROW}),
    "gpt2": (gpt2, {"transformer.wpe.weight": ONE_ROW, "lm_head.weight": "embedding+linear"}),
    "llama": (llama, {"lm_head.weight": "linear"}),
    "t5": (t5, {"lm_head.weight": "embedding+linear"}),
    "vit": (vit, {"vit.embeddings.cls_token": "plain: no rule for ViTEmbeddings"}),
}


def build(name):
    model, batch = MODELS[name][0]()
    return model.double().train(), batch


def sample_rows(model, batch):
    """Return {parameter: (N, *shape)}, the gradient of each sample's own loss."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(model(**{key: value[n : n + 1] for key, value in batch.items()}).loss, parameters)
        for n in range(N)
    ]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_the_natural_gradient_or_is_named(name):
    model, batch = build(name)
    truth = sample_rows(model, batch)
    opt = fngd.FNGD(model, lr=0.0, normalize="raw", damping=0.3)
    opt.set_samples(range(N))
    model(**batch).loss.backward()
    coverage = opt.coverage()
    assert MODELS[name][1].items() <= coverage.items()
    served = {layer.name for layer in opt._preconditioner.blocks if opt._report.solves[layer.index]}
    found = blocks(model, {key: p.grad[None] for key, p in model.named_parameters()})
    for layer, g in blocks(model, truth).items():
        expected = g.mean(0)
        if layer in served:
            damping = 0.3 * g.square().sum() / N
            k = g @ g.T / N + damping * torch.eye(N, dtype=g.dtype)
            expected = torch.linalg.solve(k, torch.ones(N, dtype=g.dtype)) @ g / N
        # Of networks in float64 too, these models take loss and norms in float32.
        assert (found[layer][0] - expected).norm() <= 1e-5 * expected.norm(), layer
    for key, how in coverage.items():
        assert how.startswith("plain: ") == (key.rpartition(".")[0] not in "+".join(served).split("+")), key


@pytest.mark.parametrize("name", MODELS)
def test_models_train_without_a_change(name):
    model, batch = build(name)
    opt = fngd.FNGD(model, lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        opt.set_samples(range(N))
        opt.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert min(losses[2:]) < losses[0]
    assert opt.stats()["solved_batches"] == 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_language_model(reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, batch = build("gpt2")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        opt = fngd.FNGD(model, share="none")
        opt.set_samples(range(N))
        model(**batch).loss.backward()
        assert opt.coverage()["transformer.h.1.mlp.c_fc.weight"] == "transposed linear"
        gradients.append([p.grad for p in model.parameters()])
    for p, q in zip(*gradients, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)
