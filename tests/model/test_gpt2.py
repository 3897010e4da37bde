"""The network is GPT-2: its size, and its logits and loss against an independent implementation."""

import pytest
import torch
from safetensors.torch import load_file

from model.config import PRESETS, ModelConfig
from model.gpt2 import GPT2, parameter_count
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


@pytest.mark.parametrize("preset", ["nano", "tiny"])
def test_parameter_count_is_what_the_network_has(preset):
    config = ModelConfig(preset=preset)
    assert parameter_count(config) == sum(parameter.numel() for parameter in GPT2(config).parameters())


@pytest.mark.parametrize(("preset", "millions"), [("small", 124), ("medium", 355), ("large", 774), ("xl", 1558)])
def test_published_sizes(preset, millions):
    assert parameter_count(ModelConfig(preset=preset)) / 1e6 == pytest.approx(millions, abs=0.5)


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


def test_loss_is_theirs():
    ours = noisy(GPT2(SMALL))
    theirs = their_model(SMALL)
    theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=False)
    theirs.tie_weights()
    x = tokens(SMALL)
    loss = ours(x[:, :-1], x[:, 1:]) / x[:, 1:].numel()
    assert abs(loss.item() - theirs(x, labels=x).loss.item()) < 1e-5
    assert abs(loss.item() - ours.token_losses(x[:, :-1], x[:, 1:]).mean().item()) < 1e-5


def test_chunks_change_no_gradient(monkeypatch):
    model = noisy(GPT2(SMALL))
    x = tokens(SMALL, batch=8, length=120)

    def gradients():
        model.zero_grad()
        model(x[:, :-1], x[:, 1:]).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    chunked = gradients()
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
        fallback = gradients()
    else:
        fallback = chunked
    whole = torch.nn.functional.cross_entropy
    model.zero_grad()
    whole(model.logits(model.hidden(x[:, :-1])).flatten(0, 1), x[:, 1:].flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (chunked[name] - parameter.grad).abs().max() <= 1e-4 * scale, name
        assert (fallback[name] - parameter.grad).abs().max() <= 1e-4 * scale, name


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
