"""The optimizer's groups, and its state through a file."""

import pytest
import torch

from model.config import ModelConfig, TrainingConfig
from model.gpt2 import GPT2
from model.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate

SHAPE = ModelConfig(preset="nano", vocab_size=100, dropout=0.0)
CONFIG = TrainingConfig(learning_rate=1e-3, embedding_learning_rate=4e-3, weight_decay=0.1)


def step(model, optimizer, seed):
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_embeddings_matrices_and_vectors():
    model = GPT2(SHAPE)
    optimizer = build_optimizer(model, CONFIG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [sorted(names[id(parameter)] for parameter in group["params"]) for group in optimizer.param_groups]
    assert groups[0] == ["wpe.weight", "wte.weight"]
    assert all(name.endswith(".weight") and ".ln_" not in name for name in groups[1])
    assert all(name.endswith(".bias") or "ln_" in name for name in groups[2])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 5e-4, 5e-4]


def test_state_put_back_gives_equal_steps():
    model = GPT2(SHAPE, seed=1)
    optimizer = build_optimizer(model, CONFIG)
    for seed in range(3):
        step(model, optimizer, seed)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = {name: value.clone() for name, value in optimizer_state(model, optimizer).items()}
    step(model, optimizer, 9)
    again = GPT2(SHAPE, seed=2)
    again.load_state_dict(weights)
    resumed = build_optimizer(again, CONFIG)
    load_optimizer_state(again, resumed, state)
    step(again, resumed, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_state_of_another_network_is_refused():
    model = GPT2(SHAPE)
    optimizer = build_optimizer(model, CONFIG)
    step(model, optimizer, 0)
    state = optimizer_state(model, optimizer)
    with pytest.raises(ValueError, match="belongs to no parameter"):
        load_optimizer_state(model, build_optimizer(model, CONFIG), {**state, "exp_avg.h.9.x": torch.zeros(1)})
    partial = {name: value for name, value in state.items() if not name.endswith("ln_f.bias")}
    with pytest.raises(ValueError, match=r"missing for ln_f\.bias"):
        load_optimizer_state(model, build_optimizer(model, CONFIG), partial)
