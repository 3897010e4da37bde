"""Bits per byte, against sums done by hand."""

import copy
import math
import random

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.evaluation.likelihood import continuation_bits, exact_fp32, tokens_and_cut, validation_loss
from model.gpt2 import GPT2
from model.stream.reader import document
from model.tokenizer import END_OF_TEXT, decode, encode, load_tokenizer


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
    count = sum(len(load_tokenizer().decode_bytes([t for t in row[1:].tolist() if t != END_OF_TEXT])) for row in windows)
    assert bits_per_byte == pytest.approx(expected / math.log(2) / count, rel=1e-5)
    assert validation_loss(model, windows, batch_size=2)[0] == pytest.approx(loss, rel=1e-5)
    assert model.training


def test_validation_can_be_cut_short(model):
    assert validation_loss(model, np.zeros((4, 9), dtype=np.uint16), 1, should_stop=lambda: True) is None


def one_by_one(model, tokens, first, context_length):
    """Bits of tokens[first:], each from the `context_length` tokens before it, in a pass of its own."""
    bits = 0.0
    with torch.no_grad():
        for i in range(first, len(tokens)):
            seen = torch.tensor([tokens[max(0, i - context_length) : i]])
            bits -= float(model.logits(model.hidden(seen))[0, -1].log_softmax(-1)[tokens[i]]) / math.log(2)
    return bits


PAIRS = [
    ("Q: a?", " yes it is"),
    ("Q: what is the longest river of all?\n\nA: ", "no"),
    ("", "naïve 日本 words"),
    ("Q: one two three\n\nA:  ", " a much longer answer than that"),
    ("hel", "lo world"),
    ("no answer: ", ""),
    ("", ""),
    ("Q: a?", " yes it is"),
    *((f"{'word ' * i}then", f" {'another ' * (i % 5)}") for i in range(1, 28)),
]


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_bits_are_those_of_a_token_at_a_time_whatever_the_batch(model, batch_size):
    model.eval()
    expected = [one_by_one(model, *tokens_and_cut(*pair), 128) for pair in PAIRS]
    assert continuation_bits(model, PAIRS, batch_size) == pytest.approx(expected, rel=1e-5)


def test_both_are_one_text_to_the_tokenizer():
    for context, continuation in PAIRS:
        tokens, _ = tokens_and_cut(context, continuation)
        assert tokens[1:] == document(context + continuation).tolist()
        assert tokens[0] == END_OF_TEXT


@pytest.mark.parametrize(
    ("context", "continuation", "scored"),
    [
        ("A: ", "4", " 4"),
        ("A:", " 4", " 4"),
        ("A:\n\n", "four", "\n\nfour"),
        ("Q: hel", "lo", " hello"),  # "hel" and "hello" are different tokens: the whole word is scored
        ("is it", "?! yes", "?! yes"),
        ("is it?", "! yes", "?! yes"),
        ("A: ", "", " "),
        ("日", "本", "本"),
        ("", "all", "all"),
        (" ", "all", " all"),
        ("all", "", ""),
    ],
)
def test_a_continuation_begins_with_the_first_token_not_wholly_in_the_context(context, continuation, scored):
    tokens, first = tokens_and_cut(context, continuation)
    assert decode(tokens[first:-1]) == scored


def test_no_byte_of_a_continuation_goes_unscored():
    rng, letters = random.Random(3), "ab AB.\n\n  é日1"
    for _ in range(300):
        text = "".join(rng.choices(letters, k=rng.randrange(1, 30)))
        cut = rng.randrange(len(text))
        tokens, first = tokens_and_cut(text[:cut], text[cut:])
        context, ends = text[:cut].rstrip().encode(), load_tokenizer().decode_bytes
        assert len(ends(tokens[1:first])) <= len(context)
        assert first == len(tokens) - 1 or len(ends(tokens[1 : first + 1])) > len(context)


@pytest.mark.parametrize("words", [50, 126, 127, 128, 129, 191, 192, 193, 300, 1000])
def test_every_token_of_a_long_text_is_scored_once(words):
    """A network that knows nothing needs log2(50257) bits a token."""
    ignorant = GPT2(ModelConfig(preset="nano", dropout=0.0)).eval()
    with torch.no_grad():
        ignorant.wte.weight.zero_()
    for context in ("", "before" + " then" * 20, " then" * 400):
        (bits,) = continuation_bits(ignorant, [(context, " word" * words)], 2)
        assert bits / math.log2(50257) == pytest.approx(words + 1, rel=1e-6)


def test_a_long_text_is_scored_with_as_much_context_as_fits(model):
    model.eval()
    context = "".join(f" word {i}," for i in range(54))  # more than the 128 tokens that the network sees
    for continuation in (" end", " and so on" * 10):
        tokens, first = tokens_and_cut(context, continuation)
        seen = tokens[-129:]
        expected = one_by_one(model, seen, len(seen) - (len(tokens) - first), 128)
        assert continuation_bits(model, [(context, continuation)], 1) == pytest.approx([expected], rel=1e-5)


def test_a_long_text_is_scored_in_pieces_that_see_half_a_window_or_more(model):
    text = "".join(f" word {i}," for i in range(95))
    tokens, _ = tokens_and_cut("", text)
    assert 259 < len(tokens) < 324
    pieces = [(0, 1, 129), (65, 129, 194), (130, 194, 259), (len(tokens) - 129, 259, len(tokens))]
    expected = sum(nats(model.eval(), tokens[low:stop], start - low) for low, start, stop in pieces) / math.log(2)
    assert continuation_bits(model.eval(), [("", text)], 1) == pytest.approx([expected], rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_needs_the_same_bits(model):
    on_gpu = copy.deepcopy(model).cuda().eval()
    pairs = [*PAIRS, ("", "a long text " * 100)]
    with exact_fp32():
        assert continuation_bits(on_gpu, pairs, 7) == pytest.approx(continuation_bits(model.eval(), pairs, 7), rel=1e-4)


def test_products_are_exact_whatever_the_process_allows():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        with exact_fp32():
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
