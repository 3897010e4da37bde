"""What is counted is what is there: autograd's saved tensors, the allocator's peak, the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save
from torch.profiler import ProfilerActivity, profile

from model import gpt2, memory
from model.checkpoint.store import MODEL, OPTIMIZER, STATE, CheckpointStore
from model.config import ModelConfig, TrainingConfig
from model.gpt2 import GPT2
from model.huggingface import METADATA, to_hugging_face
from model.memory import activation_bytes, checkpoint_size, optimizer_bytes, training_memory
from model.training.optimizer import build_optimizer, optimizer_state

BATCH, WINDOW = 3, 96


def a_config(**fields: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {"preset": "nano", "n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "dropout": 0.0, **fields}
    )


def tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (BATCH, WINDOW), generator=torch.Generator().manual_seed(0))


def loss_of(network: GPT2, half: bool) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        return network(tokens(network.config), tokens(network.config))


def kept_for_backward(config: ModelConfig, half: bool) -> int:
    """Bytes of the storages that autograd keeps, parameters and their bf16 copies left out."""
    network = GPT2(config).train()
    copies = {tuple(p.shape) for p in network.parameters()} | {tuple(p.t().shape) for p in network.parameters() if p.dim() == 2}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in copies:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        x_BTD = network.hidden(tokens(config))  # kept by the head
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + x_BTD.numel() * (2 if half else 4)


# (bf16 with dropout is for GPUs: a CPU takes attention through fp32 then.)
@pytest.mark.parametrize(("half", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.1)])
def test_the_activations_are_what_autograd_keeps(half: bool, dropout: float) -> None:
    config = a_config(dropout=dropout)
    assert kept_for_backward(config, half) == pytest.approx(activation_bytes(config, BATCH, WINDOW, half, cpu=True), rel=0.005)


def test_activations_grow_with_the_micro_batch() -> None:
    config = ModelConfig(preset="small")
    one = activation_bytes(config, 1, 1024, half=True)
    assert activation_bytes(config, 16, 1024, half=True) == 16 * one
    assert activation_bytes(config, 2, 512, half=True) == one, "fused attention keeps nothing that grows with the window squared"


@pytest.mark.parametrize(("micro_batches", "half", "most"), [(1, False, 1.1), (2, False, 1.02), (1, True, 1.1), (2, True, 1.02)])
def test_the_whole_is_the_peak_of_a_step(micro_batches: int, half: bool, most: float) -> None:
    """In a step of one micro-batch, a tenth too much: its last activations go before the last gradients come."""
    config = a_config(n_embd=128, vocab_size=4000)
    network = GPT2(config).train()
    optimizer = build_optimizer(network, TrainingConfig())

    def step() -> None:
        for _ in range(micro_batches):
            loss_of(network, half).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    held = 3 * sum(parameter.numel() * 4 for parameter in network.parameters())  # weights and two moments: there before the step begins
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = held
    results: Any = profiler.profiler
    for event in sorted((e for e in results.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    estimate = training_memory(config, "adamw", BATCH, WINDOW, half, accumulate=micro_batches > 1, cpu=True)
    assert 0.96 <= estimate.total / peak <= most


def test_the_head_takes_as_many_positions_at_once_as_we_count() -> None:
    assert memory.LOSS_POSITIONS == gpt2.LOSS_CHUNK


def test_gpt2_small_with_adamw() -> None:
    found = training_memory(ModelConfig(preset="small"), "adamw", 8, 1024, half=True)
    weights = 4 * 124_439_808
    assert (found.weights, found.gradients, found.optimizer) == (weights, weights, 2 * weights)
    assert found.total == sum(found)
    shared = training_memory(ModelConfig(preset="small"), "adamw", 8, 1024, half=True, shards=4)
    assert (shared.optimizer, shared.activations) == (2 * weights // 4, found.activations)


def test_muon_needs_one_moment_of_the_matrices() -> None:
    config = ModelConfig(preset="small")
    assert optimizer_bytes(config, "adamw") - optimizer_bytes(config, "muon") == 4 * 12 * 12 * 768**2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_is_as_large_as_written(tmp_path: Path, name: Literal["adamw", "muon"]) -> None:
    config = ModelConfig(preset="nano", n_layer=3, n_embd=128, vocab_size=1000)
    network = GPT2(config)
    optimizer = build_optimizer(network, TrainingConfig(optimizer=name))
    loss_of(network, half=False).backward()
    optimizer.step()
    written = CheckpointStore(tmp_path).write(
        1,
        {
            MODEL: [save(to_hugging_face(dict(network.named_parameters())), metadata=METADATA)],
            OPTIMIZER: [save(optimizer_state(network, optimizer))],
            STATE: [b"{}"],
        },
    )
    found = checkpoint_size(config, name)
    assert found.weights == pytest.approx((written.path / MODEL).stat().st_size, rel=0.002)
    assert found.optimizer == pytest.approx((written.path / OPTIMIZER).stat().st_size, rel=0.002)
    assert found.total == pytest.approx(sum(file.stat().st_size for file in written.path.iterdir()), rel=0.01)
