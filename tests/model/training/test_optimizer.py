"""The optimizer's groups, and its state through a file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig, TrainingConfig
from model.errors import UserError
from model.gpt2 import GPT2
from model.params import read_yaml
from model.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate

ROOT = Path(__file__).parents[3]
SHAPE = ModelConfig(preset="nano", vocab_size=100, dropout=0.0)
RATES = {"learning_rate": 1e-3, "embedding_learning_rate": 4e-3, "matrix_learning_rate": 2e-3, "weight_decay": 0.1}
BOTH = pytest.mark.parametrize("kind", ["adamw", "muon"])


def of(kind):
    return TrainingConfig(optimizer=kind, **RATES)


def step(model, optimizer, seed):
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    set_learning_rate(optimizer, 1 / (1 + seed))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def is_block_matrix(name):
    return name.startswith("h.") and name.endswith(".weight") and ".ln_" not in name


@BOTH
def test_embeddings_matrices_and_vectors(kind):
    model = GPT2(SHAPE)
    optimizer = build_optimizer(model, of(kind))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["peak_learning_rate"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found) == len(names)
    for name, rate_and_decay in found.items():
        if name in ("wte.weight", "wpe.weight"):
            assert rate_and_decay == (4e-3, 0.1)
        else:
            assert rate_and_decay == ((2e-3, 0.1) if is_block_matrix(name) else (1e-3, 0.0)), name
    set_learning_rate(optimizer, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [5e-4, 1e-3, 2e-3]


@BOTH
def test_a_rate_that_is_not_given_is_the_learning_rate(kind):
    optimizer = build_optimizer(GPT2(SHAPE), TrainingConfig(optimizer=kind, learning_rate=5e-3))
    assert {group["peak_learning_rate"] for group in optimizer.param_groups} == {5e-3}


def test_muon_moves_the_blocks_matrices_and_nothing_else():
    model = GPT2(SHAPE)
    optimizer = build_optimizer(model, of("muon"))
    step(model, optimizer, 0)
    kinds = {}
    for name in optimizer_state(model, optimizer):
        kind, _, parameter = name.partition(".")
        kinds.setdefault(parameter, set()).add(kind)
    assert kinds.keys() == dict(model.named_parameters()).keys()
    for name, found in kinds.items():
        assert found == ({"momentum_buffer"} if is_block_matrix(name) else {"exp_avg", "exp_avg_sq", "step"}), name


def test_muons_update_has_adamws_size_and_no_favourite_direction():
    model = GPT2(SHAPE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        scale = torch.logspace(0, -1, parameter.shape[-1])  # directions whose gradients differ ten-fold
        parameter.grad = scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(optimizer="muon", learning_rate=1e-3, matrix_learning_rate=0.5, weight_decay=0.0)
    build_optimizer(model, config).step()
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        if is_block_matrix(name):
            assert change.square().mean().sqrt() == pytest.approx(0.2 * 0.5, rel=0.25), name
            singular = torch.linalg.svdvals(change)
            assert singular[singular.numel() // 2] > 0.5 * singular[0], name
        else:
            assert change.abs().mean() == pytest.approx(1e-3, rel=0.01), name


@BOTH
def test_a_run_resumed_from_its_file_is_the_run(kind, tmp_path):
    through = GPT2(SHAPE, seed=1)
    optimizer = build_optimizer(through, of(kind))
    for seed in range(6):
        step(through, optimizer, seed)

    first = GPT2(SHAPE, seed=1)
    optimizer = build_optimizer(first, of(kind))
    for seed in range(3):
        step(first, optimizer, seed)
    save_file(optimizer_state(first, optimizer), tmp_path / "optimizer.safetensors")

    second = GPT2(SHAPE, seed=2)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, of(kind))
    load_optimizer_state(second, resumed, load_file(tmp_path / "optimizer.safetensors"))
    for seed in range(3, 6):
        step(second, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), second.parameters(), strict=True))


@BOTH
def test_going_on_does_not_change_the_state_that_was_put_back(kind):
    model = GPT2(SHAPE)
    optimizer = build_optimizer(model, of(kind))
    step(model, optimizer, 0)
    state = {name: value.clone() for name, value in optimizer_state(model, optimizer).items()}
    kept = {name: value.clone() for name, value in state.items()}
    again = build_optimizer(model, of(kind))
    load_optimizer_state(model, again, state)
    step(model, again, 1)
    assert all(torch.equal(state[name], value) for name, value in kept.items())


@BOTH
def test_state_of_another_network_is_refused(kind):
    model = GPT2(SHAPE)
    optimizer = build_optimizer(model, of(kind))
    step(model, optimizer, 0)
    state = optimizer_state(model, optimizer)
    with pytest.raises(ValueError, match="belongs to no parameter"):
        load_optimizer_state(model, build_optimizer(model, of(kind)), {**state, "exp_avg.h.9.x": torch.zeros(1)})
    partial = {name: value for name, value in state.items() if not name.endswith("ln_f.bias")}
    with pytest.raises(ValueError, match=r"missing for ln_f\.bias"):
        load_optimizer_state(model, build_optimizer(model, of(kind)), partial)


def test_a_torch_without_muon_is_told_in_one_line(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"^training\.optimizer: .* has no Muon; .* or choose adamw$"):
        build_optimizer(GPT2(SHAPE), of("muon"))
    build_optimizer(GPT2(SHAPE), of("adamw"))


def test_samples2m_muon_is_samples2m_but_for_the_optimizer():
    experiments = read_yaml(ROOT / "params.yaml")["experiments"]
    muon, adamw = experiments["samples2m-muon"], experiments["samples2m"]
    own = {"optimizer", "matrix_learning_rate", "embedding_learning_rate"}
    assert {**muon, "training": {name: value for name, value in muon["training"].items() if name not in own}} == adamw
    assert muon["training"]["optimizer"] == "muon"
