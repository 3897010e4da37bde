"""Generation: the cache, the padding and the batch change speed, never tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import generation
from model.config import DataConfig, ModelConfig
from model.generation import NOTHING, Frame, answer, as_text, generate, next_tokens, sample, stream
from model.gpt2 import GPT2
from model.tokenizer import END_OF_TEXT, decode, encode

CONFIG = ModelConfig(preset="nano", n_embd=64, n_head=4, dropout=0.3)
QUESTIONS = ("Q: one", "Q: What is the name of the river that runs through the town?", "x", "Q: héllo 日本", "a b c d e f g h", "1 2 3")
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}


def noisy(seed):
    """Weights that repeat no token for ever, and whose likeliest token is likeliest by far."""
    model = GPT2(CONFIG, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return noisy(5)


@pytest.fixture(scope="module")
def ending():
    """A network that ends each text after a while: some sooner, some later."""
    ending = noisy(2)
    with torch.no_grad():
        ending.wte.weight[END_OF_TEXT] *= 4
    return ending


def prompts():
    return [encode(text) for text in QUESTIONS]


def recomputed(model, prompt, count):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model.logits(model.hidden(torch.tensor([tokens]))[:, -1]).argmax()))
            if tokens[-1] == END_OF_TEXT:
                break
    return tokens[len(prompt) :]


def test_cached_and_padded_equals_recomputed(model):
    expected = [recomputed(model, prompt, 20) for prompt in prompts()]
    assert len({token for row in expected for token in row}) > 30, "a network that repeats itself would prove nothing"
    for composition in ([0], [1, 2], [2, 2, 2], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5] * 3):
        assert generate(model, [prompts()[i] for i in composition], 20) == [expected[i] for i in composition]
    for batch_size in (1, 2, 4, 100):
        assert generate(model, prompts(), 20, batch_size=batch_size) == expected


def test_ended_texts_leave_the_batch_and_change_nothing_in_the_others(ending, monkeypatch):
    expected = [recomputed(ending, prompt, 40) for prompt in prompts()]
    ends = [len(row) for row in expected]
    assert len(set(ends)) > 3, "they end at different steps"
    assert min(ends) < max(ends) == 40
    kept = []
    keep = generation.KeyValueCache.keep
    monkeypatch.setattr(generation.KeyValueCache, "keep", lambda cache, rows: (kept.append(len(rows)), keep(cache, rows)))
    for looks in (1, 7, 16):
        monkeypatch.setattr(generation, "STEPS_BETWEEN_LOOKS", {"cpu": looks})
        kept.clear()
        assert generate(ending, prompts(), 40) == expected
        assert kept
        assert kept[-1] <= 3


def test_what_ended_is_marked(ending):
    steps = torch.stack(list(next_tokens(ending, prompts(), 40)), dim=1)
    for row, length in zip(steps.tolist(), [len(recomputed(ending, prompt, 40)) for prompt in prompts()], strict=True):
        assert all(token >= 0 for token in row[:length])
        assert all(token == NOTHING for token in row[length:])


def test_stops_at_end_of_text_and_hides_it(model):
    forced = GPT2(CONFIG, seed=5).eval()
    with torch.no_grad():
        forced.ln_f.weight.zero_()
        forced.ln_f.bias.copy_(forced.wte.weight[END_OF_TEXT] * 1000)
    assert generate(forced, [encode("hello"), encode("a b c")], 9) == [[END_OF_TEXT], [END_OF_TEXT]]
    assert len(list(next_tokens(forced, [[1], [2, 3]], 9))) == 1
    assert answer(forced, ["hello"], 9) == [""]


def test_a_prompt_longer_than_the_context_loses_its_beginning(model):
    long = encode("word " * 400)
    room = CONFIG.context_length - 8
    expected = recomputed(model, long[-room:], 8)
    assert generate(model, [long], 8) == [expected]
    assert generate(model, [prompts()[0], long, long[-room:]], 8) == [recomputed(model, prompts()[0], 8), expected, expected]


@pytest.mark.slow
def test_asking_for_more_than_the_context_keeps_the_prompt_and_stops_at_the_end(model):
    """Each text at its own end, whatever is beside it."""
    lengths = [3, 40, CONFIG.context_length // 2, 500]
    long = [(encode("Q: What is the name of the river? ") * 60)[:length] for length in lengths]
    written = generate(model, long, 10_000)
    kept = [prompt[-(CONFIG.context_length // 2) :] for prompt in long]
    assert [len(row) for row in written] == [CONFIG.context_length - len(prompt) for prompt in kept]
    assert written == [recomputed(model, prompt, CONFIG.context_length - len(prompt)) for prompt in kept]


def test_a_text_ends_where_training_saw_no_more_positions(model, monkeypatch):
    prompt = encode("Q: What is the name of the river?")
    monkeypatch.setattr(model, "window", 20)
    (written,) = generate(model, [prompt], 10_000)
    assert written == recomputed(model, prompt, 20 - len(prompt))


def test_tokens_beyond_the_vocabulary_are_never_written(model):
    """A padded vocabulary, such as nanoGPT's 50,304."""
    padded = GPT2(CONFIG.model_copy(update={"vocab_size": 50_304})).eval()
    weights = model.state_dict()
    weights["wte.weight"] = torch.cat([weights["wte.weight"], 100 * torch.randn(47, CONFIG.n_embd).abs()])
    padded.load_state_dict(weights)
    assert generate(padded, prompts(), 12) == generate(model, prompts(), 12)


def test_sampling_is_repeatable_and_varies_with_the_seed(model):
    first, again, other = (answer(model, ["Q: "], 12, seed=seed, **SAMPLED) for seed in (1, 1, 2))
    assert first == again != other
    twice = answer(model, ["Q: ", "Q: "], 12, seed=1, **SAMPLED)
    assert twice == [first[0], other[0]], "prompt i draws from seed + i"
    assert answer(model, ["Q: "], 12, seed=-(10**30), **SAMPLED), "any whole number is a seed"


@pytest.mark.slow
def test_sampled_text_depends_on_no_other_prompt_and_no_batch(ending, monkeypatch):
    together = generate(ending, prompts(), 24, seed=9, **SAMPLED)
    assert len({len(row) for row in together}) > 1
    assert together == [generate(ending, [prompt], 24, seed=9 + i, **SAMPLED)[0] for i, prompt in enumerate(prompts())]
    assert together == generate(ending, prompts(), 24, seed=9, batch_size=2, **SAMPLED)
    assert [row[:5] for row in together] == [row[:5] for row in generate(ending, prompts(), 5, seed=9, **SAMPLED)]


def test_samples_are_as_frequent_as_they_are_probable():
    probability = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = sample(torch.log(probability).expand(len(uniform), -1), 1.0, None, None, uniform)
    assert torch.allclose(drawn.bincount(minlength=5) / len(uniform), probability, atol=0.012)
    halved = sample(torch.log(probability).expand(len(uniform), -1), 0.5, None, None, uniform)
    assert torch.allclose(halved.bincount(minlength=5) / len(uniform), probability**2 / (probability**2).sum(), atol=0.012)


def test_top_k_and_top_p_keep_only_the_likeliest():
    logits = torch.log(torch.tensor([[0.15, 0.5, 0.05, 0.3]])).expand(1000, -1)
    uniform = torch.linspace(0, 1, 1001)[:-1]

    def drawn(top_k, top_p):
        return set(sample(logits, 1.0, top_k, top_p, uniform).tolist())

    assert drawn(None, None) == {0, 1, 2, 3}
    assert drawn(2, None) == {1, 3}
    assert drawn(None, 0.79) == {1, 3}
    assert drawn(None, 0.81) == {0, 1, 3}
    assert drawn(None, 0.0) == {1}
    assert drawn(1, 1.0) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-6, 1e-4])
def test_a_temperature_of_nothing_or_next_to_it_takes_the_likeliest(temperature):
    logits = torch.randn(8, 50_257, generator=torch.Generator().manual_seed(1)) * 30
    highest = torch.full((8,), 1 - 2**-24)
    assert torch.equal(sample(logits, temperature, None, None, highest), logits.argmax(dim=-1))


def test_the_highest_draw_is_a_token_that_is_possible():
    logits = torch.zeros(1, 50_257)
    logits[:, 40_000:] = -torch.inf
    assert int(sample(logits, 1.0, None, None, torch.tensor([1 - 2**-24]))) < 40_000
    assert int(sample(logits, 1.0, None, None, torch.tensor([0.0]))) == 0


def test_streamed_text_is_the_answer(model):
    assert "".join(stream(model, "Q: héllo 日本", 16)) == answer(model, ["Q: héllo 日本"], 16)[0]
    assert "".join(stream(model, "", 16, seed=3, **SAMPLED)) == answer(model, [""], 16, seed=3, **SAMPLED)[0]


@pytest.mark.parametrize("text", ["日本語 naïve 👩‍👩‍👧 \ufffd!", "plain"])
def test_pieces_are_whole_characters(model, monkeypatch, text):
    """Most of these characters take several tokens. A text that breaks off within one ends with U+FFFD, as `decode` has it."""
    tokens = encode(text) + encode("日")[:1]
    monkeypatch.setattr(generation, "next_tokens", lambda *_: iter(torch.tensor([[token] for token in tokens])))
    *pieces, last = stream(model, "Q:", 99)
    assert "".join(pieces) == text
    assert all(pieces)
    assert last == "\ufffd"


def test_a_text_begins_after_the_end_of_another(model):
    assert as_text("a b") == [END_OF_TEXT, *encode("a b")]
    (row,) = generate(model, [as_text("Q: one")], 8)
    assert answer(model, ["Q: one"], 8) == [decode(row)]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [[1], []]}, "prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(model, wrong, named):
    with pytest.raises(ValueError, match=named):
        generate(model, **{"prompts": [[1]], "max_new_tokens": 3, **wrong})


def test_decode_round_trip():
    text = "Q: naïve 日本語\n\nA: <|endoftext|> is text"
    assert decode(encode(text)) == text
    assert END_OF_TEXT not in encode(text)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Q: {q}\n\nReasoning:\n{r}\n\nA: {a}", ("Q: ", "\n\nA: ", 512)),
        ("{title}\n\n{body}", ("", "", 512)),
        ("{text}", ("", "", 512)),
        ("# {a}\n{b}\n{c}\n", ("# ", "", 512)),
    ],
)
def test_a_frame_is_what_the_template_says(template, expected):
    frame = Frame.of(DataConfig(path="x", text_template=template))
    assert frame == expected
    assert frame.prompt("What? \n") == f"{expected[0]}What?"


@given(st.lists(st.text(alphabet=["\n", "A", ":", " ", "x"], min_size=1, max_size=4), max_size=20))
@settings(max_examples=300, deadline=None)
def test_reasoning_and_answer_are_told_apart_however_the_text_is_cut(pieces):
    parts = list(Frame("Q: ", "\n\nA: ", 512).parts(pieces))
    reasoning, delimiter, rest = "".join(pieces).partition("\n\nA: ")
    assert "".join(piece for is_answer, piece in parts if not is_answer) == reasoning + delimiter
    assert "".join(piece for is_answer, piece in parts if is_answer) == rest
    assert all(piece for _, piece in parts)
