"""The network is GPT-2: its size, and its logits and loss against an independent implementation."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import gpt2
from model.config import PRESETS, ModelConfig
from model.generation import Frame, generate
from model.gpt2 import GPT2
from model.huggingface import (
    export,
    from_hugging_face,
    hugging_face_config,
    load_export,
    load_weights,
    read_frame,
    save_weights,
    to_hugging_face,
)
from model.tokenizer import END_OF_TEXT, encode

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


@pytest.mark.slow
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


ODD_TEXTS = (
    "Q: What is 12 + 30?\n\nReasoning:\n",
    "naïve 日本語 <b>  spaces\n\n\n",
    "it's WE'LL don\u2019t 1234 １２３ ½ ²",
    "a <|endoftext|> b<|endoftext|>",
    "<|endoftext|>",
    "   ",
    " leading, trailing ",
    "\t\n x\u00a0\u2003y\u0085z\u180e\r\n",
    "😀👩‍👩‍👧 e\u0301 ﷺ 𝔘 \U000e0001",
    "\ufffd\x00\x01 \u200b\ufeff",
    "",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network and the folder that it was exported to."""
    ours, folder = noisy(GPT2(SMALL).eval()), tmp_path_factory.mktemp("exported")
    with torch.no_grad():
        for block in ours.h:
            block.mlp.c_fc.weight.mul_(5)  # so that it does not repeat itself
    export(ours, folder, Frame("Q: ", "\n\nA: ", 100), "# A card\n")
    return ours, folder


def test_export_loads_in_transformers(exported):
    ours, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    x = tokens(SMALL)
    with torch.no_grad():
        assert torch.allclose(ours.logits(ours.hidden(x)), theirs(x).logits, atol=1e-4)


@pytest.mark.slow
def test_transformers_writes_what_we_write(exported):
    """Greedily, with its own cache and its own padding."""
    ours, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Q: What is 12 + 30?", "naïve", "Which of these rivers is the longest?"]
    prompts = tokenizer(texts, padding=True, return_tensors="pt")
    written = theirs.generate(**prompts, max_new_tokens=24)[:, prompts["input_ids"].shape[1] :].tolist()
    expected = generate(ours, [encode(text) for text in texts], 24)
    assert [row[: len(ours_row)] for row, ours_row in zip(written, expected, strict=True)] == expected
    assert len({token for row in expected for token in row}) > 30


def test_the_exported_tokenizer_gives_equal_ids(exported):
    _, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ODD_TEXTS:
        assert tokenizer(text)["input_ids"] == encode(text), text
        assert tokenizer.decode(encode(text)) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (END_OF_TEXT,) * 3
    assert tokenizer.decode([END_OF_TEXT, *encode("A : b")], skip_special_tokens=True) == "A : b"


def test_tokenizer_json_alone_gives_equal_ids(exported):
    """What other programs read (`tokenizers`, servers in Rust). Every character, at the beginning of a word and within."""
    _, folder = exported
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    for code in [*range(1, 0x3100), *range(0xA000, 0xA100), *range(0xF900, 0x10000), *range(0x1D400, 0x1D800), *range(0x1F300, 0x1F700)]:
        text = f"a{chr(code)}1 {chr(code)}b"
        assert tokenizer.encode(text).ids == encode(text), hex(code)


def test_a_question_is_put_as_the_export_says(exported):
    _, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = 'Say "{hi}" {{ twice }}\n'
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "first"}, {"role": "user", "content": question}], tokenize=False)
    assert read_frame(folder) == Frame("Q: ", "\n\nA: ", 100)
    assert prompt == f"Q: {question}"
    assert (folder / "README.md").read_text() == "# A card\n"


def test_an_export_is_loaded_back(exported):
    ours, folder = exported
    again = load_export(folder)
    assert again.window == 100
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_their_own_export_is_loaded(tmp_path):
    theirs = noisy(their_model(SMALL))
    theirs.save_pretrained(tmp_path)
    x, ours = tokens(SMALL), load_export(tmp_path)
    assert read_frame(tmp_path) is None
    assert ours.window == SMALL.context_length
    with torch.no_grad():
        assert torch.allclose(ours.logits(ours.hidden(x)), theirs(x).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", "llama", "model_type"),
        ("activation_function", "relu", "activation_function"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon"),
        ("n_inner", 100, "n_inner"),
        ("tie_word_embeddings", False, "tie_word_embeddings"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx"),
        ("n_layer", 10**9, "does not hold the weights"),
        ("n_embd", 10**9, "does not hold the weights"),
        ("n_layer", 2, "does not hold the weights"),
        ("vocab_size", 21_128, "vocabulary"),
        ("n_head", 7, "n_head"),
    ],
)
def test_another_network_than_gpt2_is_refused_by_name(exported, tmp_path, field, value, named):
    """Before a network of the size that it claims is made."""
    _, folder = exported
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=named):
        load_export(tmp_path)


def test_another_vocabulary_of_the_same_size_is_refused(exported, tmp_path):
    _, folder = exported
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "!": 1, '"': 0}))
    with pytest.raises(ValueError, match="vocabulary"):
        load_export(tmp_path)


def test_a_head_of_its_own_is_refused(exported, tmp_path):
    _, folder = exported
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": state["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head"):
        load_export(tmp_path)


def test_loading_another_shape_is_refused(tmp_path):
    save_weights(GPT2(SMALL), tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(GPT2(ModelConfig(preset="nano", vocab_size=50_257)), tmp_path / "model.safetensors")


def test_presets_hold_their_promise():
    for preset in PRESETS:
        config = ModelConfig(preset=preset)
        assert config.n_embd % config.n_head == 0
