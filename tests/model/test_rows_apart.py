"""Rows side by side in a window: each is to the network as if it stood alone, and only completions are learned."""

import pytest
import torch
from torch.nn import functional as F

from model.config import ModelConfig
from model.gpt2 import GPT2, rows_apart
from model.tokenizer import END_OF_TEXT

E = END_OF_TEXT
SMALL = ModelConfig(preset="nano", n_layer=3, n_head=4, n_embd=64, vocab_size=50_257, dropout=0.0)
LENGTHS = (7, 12, 5)
"""Tokens of three rows in a window of 32: eight positions are left over."""


@pytest.fixture(scope="module")
def network():
    network = GPT2(SMALL, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network


def rows(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, E, (length - 1,), generator=generator).tolist() for length in LENGTHS]


def window(*rows, length=32):
    inputs = [token for row in rows for token in (E, *row)]
    return torch.tensor([inputs + [E] * (length - len(inputs))])


def logits(network, tokens):
    with torch.no_grad():
        return network.logits(network.hidden(tokens, apart=True))


def test_positions_and_mask_by_hand():
    positions, mask = rows_apart(torch.tensor([[E, 1, 2, E, 3, E, E]]))
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert mask[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_rows_logits_do_not_depend_on_its_neighbours_to_the_bit(network, number):
    ours, others = rows(1), rows(2)
    beside = [ours[n] if n == number else others[n] for n in range(3)]
    place = slice(sum(LENGTHS[:number]), sum(LENGTHS[: number + 1]))
    one, other = (logits(network, window(*each))[0] for each in (ours, beside))
    assert torch.equal(one[place], other[place])
    assert not torch.equal(one, other), "the neighbours' own do"


@pytest.mark.parametrize("number", range(3))
def test_a_row_in_a_window_is_what_it_is_alone(network, number):
    ours = rows(1)
    place = slice(sum(LENGTHS[:number]), sum(LENGTHS[: number + 1]))
    with torch.no_grad():
        alone = network.logits(network.hidden(torch.tensor([[E, *ours[number]]])))[0]
    assert (logits(network, window(*ours))[0, place] - alone).abs().max() < 1e-4
    together = network.hidden(window(*ours))  # as in pre-training: attention across rows, positions that run on
    if number:
        assert (network.logits(together)[0, place] - alone).abs().max() > 1e-2


def completions(*asked):
    """Where the targets lie that are learned, of rows of which so many tokens are the question."""
    places, start = [], 0
    for length, question in zip(LENGTHS, asked, strict=True):
        places += range(start + question, start + length)
        start += length
    return torch.tensor(places)


def targets_of(tokens):
    return torch.cat([tokens[:, 1:], torch.full((1, 1), E)], dim=1)


def test_the_loss_is_that_of_the_completions_of_rows_alone(network):
    ours, asked = rows(1), (3, 5, 2)
    tokens = window(*ours)
    wanted = completions(*asked)
    expected = 0.0
    for row, question in zip(ours, asked, strict=True):
        with torch.no_grad():
            scores = network.logits(network.hidden(torch.tensor([[E, *row]])))[0]
        expected += F.cross_entropy(scores[question:], torch.tensor([*row, E])[question:], reduction="sum")
    assert network(tokens, targets_of(tokens), wanted).item() == pytest.approx(expected.item(), rel=1e-5)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, wanted] = True
    assert network.token_losses(tokens, targets_of(tokens), mask, apart=True).sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_question_is_no_target_to_the_bit(network):
    tokens = window(*rows(1))
    wanted, targets = completions(3, 5, 2), targets_of(tokens)
    others = targets.clone()
    others[0, [0, 1, 2, 7, 8, 30]] = torch.tensor([11, 12, 13, 14, 15, 16])  # questions', and one behind the last row

    def loss_and_gradient(of):
        network.zero_grad()
        loss = network(tokens, of, wanted)
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in network.parameters()]

    (loss, gradients), (same, same_gradients) = loss_and_gradient(targets), loss_and_gradient(others)
    assert loss == same
    assert all(torch.equal(one, other) for one, other in zip(gradients, same_gradients, strict=True))
    others[0, 3] = 17  # a completion's first
    assert loss_and_gradient(others)[0] != loss


def test_a_question_changes_its_own_rows_loss_alone(network):
    ours, wanted = rows(1), torch.arange(LENGTHS[0], LENGTHS[0] + LENGTHS[1])  # of the second row
    asked_otherwise = [[ours[0][0] + 1, *ours[0][1:]], ours[1], ours[2]]
    one, other = window(*ours), window(*asked_otherwise)
    with torch.no_grad():
        assert network(one, targets_of(one), wanted).item() == network(other, targets_of(other), wanted).item()
        own = torch.arange(3, LENGTHS[0])
        assert network(one, targets_of(one), own).item() != network(other, targets_of(other), own).item()
