"""Generation: the cache and the padding change speed, never tokens."""

import pytest
import torch

from model.config import ModelConfig
from model.generation import answer, generate, sample, stream
from model.gpt2 import GPT2
from model.tokenizer import END_OF_TEXT, decode, encode

CONFIG = ModelConfig(preset="nano", n_embd=64, n_head=4, dropout=0.3)


@pytest.fixture(scope="module")
def model():
    model = GPT2(CONFIG, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


def recomputed(model, prompt, count):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model.logits(model.hidden(torch.tensor([tokens]))[:, -1]).argmax()))
            if tokens[-1] == END_OF_TEXT:
                break
    return tokens[len(prompt) :]


def test_cached_and_padded_equals_recomputed(model):
    prompts = [encode(text) for text in ("Q: one", "Q: What is the name of the river that runs through the town?", "x")]
    assert generate(model, prompts, 20) == [recomputed(model, prompt, 20) for prompt in prompts]


def test_stops_at_end_of_text_and_hides_it(model):
    forced = GPT2(CONFIG, seed=5).eval()
    with torch.no_grad():
        forced.ln_f.weight.zero_()
        forced.ln_f.bias.copy_(forced.wte.weight[END_OF_TEXT] * 1000)
    assert generate(forced, [encode("hello"), encode("a b c")], 9) == [[END_OF_TEXT], [END_OF_TEXT]]
    assert answer(forced, ["hello"], 9) == [""]


def test_a_prompt_longer_than_the_context_loses_its_beginning(model):
    long = encode("word " * 400)
    room = CONFIG.context_length - 8
    assert generate(model, [long], 8) == generate(model, [long[-room:]], 8)


def test_asking_for_more_than_the_context_keeps_the_prompt_and_stops_at_the_end(model):
    prompt = encode("Q: What is the name of the river?")
    (written,) = generate(model, [prompt], 10_000)
    room = CONFIG.context_length - len(prompt)
    assert written == recomputed(model, prompt, room)


def test_sampling_is_repeatable_and_varies_with_the_seed(model):
    settings = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    first, again, other = (answer(model, ["Q: "], 12, seed=seed, **settings) for seed in (1, 1, 2))
    assert first == again != other


def test_top_k_and_top_p_keep_only_the_likeliest():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(0)
    draws = {int(sample(logits, 1.0, 2, None, generator)) for _ in range(200)}
    assert draws == {0, 1}
    draws = {int(sample(logits, 1.0, None, 0.79, generator)) for _ in range(200)}
    assert draws == {0, 1}
    draws = {int(sample(logits, 1.0, None, 0.81, generator)) for _ in range(300)}
    assert draws == {0, 1, 2}


def test_streamed_text_is_the_answer(model):
    assert "".join(stream(model, "Q: héllo 日本", 16)) == answer(model, ["Q: héllo 日本"], 16)[0]


def test_empty_prompts_are_refused(model):
    with pytest.raises(ValueError, match="prompts"):
        generate(model, [[]], 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, [[1]], 0)


def test_decode_round_trip():
    text = "Q: naïve 日本語\n\nA: <|endoftext|> is text"
    assert decode(encode(text)) == text
    assert END_OF_TEXT not in encode(text)
