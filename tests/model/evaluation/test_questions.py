"""Answers and their grades."""

import pytest
import torch

from model.config import DataConfig, ModelConfig
from model.evaluation.items import Template
from model.evaluation.questions import ask, checkable, grade, token_f1
from model.gpt2 import GPT2
from model.stream.validation import HeldOutRow
from model.tokenizer import END_OF_TEXT, encode

TEMPLATE = Template(DataConfig(path="x").text_template)
R = "\n\nReasoning:\ntwo and two"


def item(answer="4", template=TEMPLATE):
    return template.item(HeldOutRow("1", "a", "sum", dict.fromkeys(template.columns, "x") | {template.columns[-1]: answer}), "report")


@pytest.mark.parametrize(
    ("text", "ended", "well_formed", "exact"),
    [
        (f"{R}\n\nA: 4", True, True, True),
        (f"{R}\n\nA: 4.", True, True, True),
        (f"{R}\n\nA:  4 ", True, True, True),
        (f"{R}\n\nA: 5", True, True, False),
        (f"{R}\n\nA: 44", True, True, False),
        ("\n\nReasoning:\n\n\nA: 4", True, True, True),
        (f"{R}\n\nA: 4", False, False, True),
        (R, True, False, False),
        (f"{R}\n\nA: 4\n\nA: 5", True, False, True),
        (f"{R}{R}\n\nA: 4", True, False, True),
        (f"{R}\n\nA: ", True, False, False),
        (f"\n\nA: 4{R}", True, False, False),
        (" And 3 + 3?" + R + "\n\nA: 4", True, False, True),
        ("\n\nA: 4", True, False, True),
        ("", True, False, False),
    ],
)
def test_grades(text, ended, well_formed, exact):
    graded = grade(item(), TEMPLATE, text, ended)
    assert (graded.well_formed, graded.exact_match, graded.text) == (well_formed, exact, text)
    assert (graded.token_f1 == 1) == exact


@pytest.mark.parametrize(
    ("template", "text", "answer", "well_formed"),
    [
        ("{t}", " flows on", " flows on", True),
        ("{t}", " ", " ", False),
        ("{q} {a}", " four", " four", True),
        ("{q}\nA: {a}\nEND", "\nA: four\nEND", "four", True),
        ("{q}\nA: {a}\nEND", "\nA: four", "four", False),
        ("{q}\nA: {a}\nEND", "\nEND\nA: four", "four", False),
        ("{q} | {r} | {a}", " | so | four", "four", True),
        ("{q} | {r} | {a}", " | four", None, False),
    ],
)
def test_any_template_is_graded(template, text, answer, well_formed):
    template = Template(template)
    graded = grade(item("four", template), template, text, True)
    assert (graded.answer, graded.well_formed) == (answer, well_formed)
    assert not grade(item("four", template), template, text, False).well_formed


def test_only_short_answers_are_checked():
    long = "This one has got nine words, one too many."
    answers = ["4", "It is one of eight short words, yes.", "Bern\n", "", " ", ".", "two\nlines", long]
    assert [checkable(answer) for answer in answers] == [True, True, True, False, False, False, False, False]
    graded = grade(item(long), TEMPLATE, f"{R}\n\nA: {long}", True)
    assert (graded.exact_match, graded.token_f1) == (None, 1.0)


@pytest.mark.parametrize(
    ("answer", "gold", "f1"),
    [
        ("The river Aare", "river aare.", 1.0),
        ("the Aare", "the river Aare", 2 / 3),
        ("red red blue", "red", 0.5),
        ("nothing", "something", 0.0),
        ("the", "a", 1.0),
        ("", "four", 0.0),
    ],
)
def test_token_f1(answer, gold, f1):
    assert token_f1(answer, gold) == pytest.approx(f1)


def writer(text, prompt_tokens):
    """A network that writes `text` and ends it after any prompt of so many tokens: each position's embedding says what comes next."""
    model = GPT2(ModelConfig(n_layer=1, n_head=1, n_embd=64, context_length=64, dropout=0.0, initializer_range=1.0), seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name:
                parameter.zero_()
        tokens = [*encode(text), END_OF_TEXT]
        model.wpe.weight.zero_()
        model.wpe.weight[prompt_tokens - 1 : prompt_tokens - 1 + len(tokens)] = 20 * model.wte.weight[tokens]
    return model


def test_what_a_network_writes_is_read():
    text = f"{R}\n\nA: 4"
    prompt = "Q: 2 + 2?"
    (answer,) = ask(writer(text, 1 + len(encode(prompt))), [prompt], 40, 1)
    assert answer == (text, True)
    assert ask(writer(text, 1 + len(encode(prompt))), [prompt + " "], 40, 1) == [answer]
    assert ask(writer(text, 1 + len(encode(prompt))), [prompt], 3, 1) == [("\n\nReason", False)]


@pytest.mark.parametrize("batch_size", [2, 7, 32])
def test_what_is_written_does_not_depend_on_the_batch(batch_size):
    model = GPT2(ModelConfig(preset="nano", context_length=48, dropout=0.0, initializer_range=0.3), seed=2).eval()
    prompts = ["Q: " + " word" * (i * 7 % 45) for i in range(11)]
    assert ask(model, prompts, 20, batch_size) == ask(model, prompts, 20, 1)
