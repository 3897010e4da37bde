"""Bits per byte, against sums done by hand."""

import math

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.evaluation.likelihood import continuation_bits, validation_loss
from model.gpt2 import GPT2
from model.tokenizer import END_OF_TEXT, encode


@pytest.fixture(scope="module")
def model():
    model = GPT2(ModelConfig(preset="nano", dropout=0.5), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.train()


def nats(model, tokens, first):
    """Of tokens[first:], each from all before it, one at a time."""
    model.eval()
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.tensor([tokens[:-1]])))[0].log_softmax(-1)
    model.train()
    return -sum(float(logits[i - 1, tokens[i]]) for i in range(first, len(tokens)))


def test_validation_loss_is_the_mean_and_bytes_are_the_texts(model):
    text = "naïve 日本 words, many words. "
    tokens = [*encode(text * 8), END_OF_TEXT][:33]
    windows = np.array([tokens, tokens[::-1]], dtype=np.uint16)
    expected = sum(nats(model, row.tolist(), 1) for row in windows)
    loss, bits_per_byte = validation_loss(model, windows, batch_size=1)
    assert loss == pytest.approx(expected / 64, rel=1e-5)
    from model.tokenizer import load_tokenizer

    count = sum(len(load_tokenizer().decode_bytes([t for t in row[1:].tolist() if t != END_OF_TEXT])) for row in windows)
    assert bits_per_byte == pytest.approx(expected / math.log(2) / count, rel=1e-5)
    assert validation_loss(model, windows, batch_size=2)[0] == pytest.approx(loss, rel=1e-5)
    assert model.training


def test_validation_can_be_cut_short(model):
    assert validation_loss(model, np.zeros((4, 9), dtype=np.uint16), 1, should_stop=lambda: True) is None


def test_continuations_are_scored_given_their_prompt_whatever_the_batch(model):
    prompts = [encode(text) for text in ("Q: a?", "Q: what is the longest river of all?", "x")]
    golds = [[*encode(text), END_OF_TEXT] for text in (" yes it is", " no", " a much longer answer than that")]
    model.eval()
    expected = [nats(model, p + g, len(p)) / math.log(2) for p, g in zip(prompts, golds, strict=True)]
    model.eval()
    for batch_size in (1, 2, 3):
        assert continuation_bits(model, prompts, golds, batch_size) == pytest.approx(expected, rel=1e-4)
    model.train()


def test_a_pair_too_long_keeps_its_end(model):
    model.eval()
    prompt, gold = encode("word " * 300), [*encode(" end"), END_OF_TEXT]
    kept = (prompt + gold)[-129:]
    assert continuation_bits(model, [prompt], [gold], 1) == pytest.approx([nats(model, kept, 129 - len(gold)) / math.log(2)], rel=1e-4)
    assert all(math.isfinite(b) for b in continuation_bits(model.eval(), [prompt], [encode("x " * 400)], 1))
