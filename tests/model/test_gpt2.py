"""The network is GPT-2: its size, and its logits and loss against an independent implementation."""

import pytest
import torch
from safetensors.torch import load_file

from model import gpt2
from model.config import PRESETS, ModelConfig
from model.gpt2 import GPT2
from model.huggingface import export, from_hugging_face, hugging_face_config, load_weights, save_weights, to_hugging_face
from model.tokenizer import encode

transformers = pytest.importorskip("transformers")

SMALL = ModelConfig(preset="nano", n_layer=3, n_head=4, n_embd=64, vocab_size=50_257, dropout=0.0)


def noisy(model):
    """Weights no initialisation gives: a bias that is dropped or a LayerNorm that is skipped shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def tokens(config, batch=2, length=40, seed=0):
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def their_model(config):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**hugging_face_config(config))).eval()


def test_the_124m_size_has_exactly_gpt2s_parameters():
    model = GPT2(ModelConfig(preset="small"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_our_weights_give_their_model_equal_logits(tmp_path):
    ours, theirs = noisy(GPT2(SMALL).eval()), their_model(SMALL)
    save_weights(ours, tmp_path / "model.safetensors")
    missing = theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert missing.unexpected_keys == []
    assert [k for k in missing.missing_keys if k != "lm_head.weight"] == []
    theirs.tie_weights()
    x = tokens(SMALL)
    with torch.no_grad():
        assert torch.allclose(ours.logits(ours.hidden(x)), theirs(x).logits, atol=1e-4)


def test_their_weights_give_our_model_equal_logits():
    theirs, ours = noisy(their_model(SMALL)), GPT2(SMALL).eval()
    ours.load_state_dict(from_hugging_face(theirs.state_dict()))
    x = tokens(SMALL)
    with torch.no_grad():
        difference = (ours.logits(ours.hidden(x)) - theirs(x).logits).abs().max()
    assert difference < 1e-4


def test_a_missing_bias_would_show():
    ours = noisy(GPT2(SMALL).eval())
    x = tokens(SMALL)
    with torch.no_grad():
        before = ours.logits(ours.hidden(x))
        ours.h[0].attn.c_proj.bias.zero_()
        assert (ours.logits(ours.hidden(x)) - before).abs().max() > 1e-3


def test_loss_and_gradients_are_theirs():
    ours = noisy(GPT2(SMALL))
    theirs = their_model(SMALL)
    theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=False)
    theirs.tie_weights()
    x = tokens(SMALL)
    loss, found = gradients(ours, x)
    their_loss = theirs(x, labels=x).loss
    their_loss.backward()
    assert abs(loss.item() - their_loss.item()) < 1e-5
    assert abs(loss.item() - ours.token_losses(x[:, :-1], x[:, 1:]).mean().item()) < 1e-5
    expected = from_hugging_face({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * gradient.abs().max(), name


def gradients(model, x, loss_of=None):
    """Of the mean loss, beside it: as computed by the model, or by a function of it."""
    model.zero_grad()
    loss = (model if loss_of is None else loss_of)(x[:, :-1], x[:, 1:]) / x[:, 1:].numel()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(found, expected, tolerance):
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


def whole_logits(model):
    def loss(tokens_BT, targets_BT):
        logits = model.logits(model.hidden(tokens_BT)).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets_BT.flatten(), reduction="sum")

    return loss


@pytest.mark.parametrize(("chunk", "multiple"), [(512, 1), (300, 1), (512, 128)], ids=["as it is", "other chunks", "padded vocabulary"])
def test_loss_and_gradients_are_those_of_the_whole_logits(monkeypatch, chunk, multiple):
    monkeypatch.setattr(gpt2, "LOSS_CHUNK", {"cpu": chunk})
    monkeypatch.setattr(gpt2, "VOCABULARY_MULTIPLE", {"cpu": multiple})
    model = noisy(GPT2(SMALL))
    x = tokens(SMALL, batch=8, length=120)
    assert_equal(gradients(model, x), gradients(model, x, whole_logits(model)), 1e-5)


def test_a_loss_that_softmax_cannot_hold_is_right():
    """exp(-200) is 0 in fp32: the loss may not be read off the probabilities."""
    model = GPT2(SMALL)
    with torch.no_grad():
        model.ln_f.weight.mul_(1000)
    x = tokens(SMALL)
    expected = whole_logits(model)(x[:, :-1], x[:, 1:])
    assert expected / x[:, 1:].numel() > 100
    assert model(x[:, :-1], x[:, 1:]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_gradients_the_loss_is_the_same():
    model = noisy(GPT2(SMALL))
    x = tokens(SMALL)
    with torch.no_grad():
        loss = model(x[:, :-1], x[:, 1:])
    assert not loss.requires_grad
    assert loss.item() == model(x[:, :-1], x[:, 1:]).item()


def test_bf16_autocast_keeps_the_loss_and_the_gradients_in_fp32():
    model = GPT2(SMALL)
    x = tokens(SMALL)
    exact = gradients(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients(model, x)
    assert_equal(rounded, exact, 3e-2)
    assert rounded[0] != exact[0]
    assert all(gradient.dtype == torch.float32 for gradient in rounded[1].values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_whole_model_compiles_into_one_graph(dropout):
    """`fullgraph` refuses a graph break; "aot_eager" is torch.compile without the C++ compiler."""
    model = noisy(GPT2(SMALL.model_copy(update={"dropout": dropout}))).train()
    x = tokens(SMALL)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if dropout:
        torch.manual_seed(3)
        found = gradients(model, x, compiled)
        torch.manual_seed(4)
        assert gradients(model, x, compiled)[0] != found[0]
    else:
        assert_equal(gradients(model, x, compiled), gradients(model, x), 1e-5)


def test_the_seed_decides_the_initial_weights_and_nothing_else_does():
    torch.manual_seed(7)
    first = GPT2(SMALL, seed=3)
    torch.manual_seed(8)
    again, other = GPT2(SMALL, seed=3), GPT2(SMALL, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.wte.weight, other.wte.weight)
    assert first.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert first.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / (2 * SMALL.n_layer) ** 0.5, rel=0.05)


def test_export_loads_in_transformers(tmp_path):
    ours = noisy(GPT2(SMALL).eval())
    export(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = tokens(SMALL)
    with torch.no_grad():
        assert torch.allclose(ours.logits(ours.hidden(x)), theirs(x).logits, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Q: What is 12 + 30?\n\nReasoning:\n", "naïve 日本語 <b>  spaces\n\n\n", "it's we'll 1234"):
        assert tokenizer(text)["input_ids"] == encode(text)


def test_loading_another_shape_is_refused(tmp_path):
    save_weights(GPT2(SMALL), tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(GPT2(ModelConfig(preset="nano", vocab_size=50_257)), tmp_path / "model.safetensors")


def test_presets_hold_their_promise():
    for preset in PRESETS:
        config = ModelConfig(preset=preset)
        assert config.n_embd % config.n_head == 0
