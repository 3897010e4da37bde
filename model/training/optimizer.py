"""AdamW over three groups of parameters, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import TrainingConfig
from model.gpt2 import GPT2

EMBEDDINGS = ("wte.weight", "wpe.weight")


def build_optimizer(model: GPT2, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW for the network: embeddings (own rate), matrices (decayed), biases and LayerNorms (not decayed).

    Each group carries its `peak_learning_rate`; `set_learning_rate` scales all of them.
    """
    named = dict(model.named_parameters())
    embeddings = [named[name] for name in EMBEDDINGS]
    matrices = [parameter for name, parameter in named.items() if parameter.dim() == 2 and name not in EMBEDDINGS]
    vectors = [parameter for parameter in named.values() if parameter.dim() < 2]
    grouped = [*embeddings, *matrices, *vectors]
    assert len({id(parameter) for parameter in grouped}) == len(grouped) == len(named), "each parameter in exactly one group"
    groups = [
        {"params": embeddings, "weight_decay": config.weight_decay, "peak_learning_rate": config.embedding_learning_rate},
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    for group in groups:
        group["peak_learning_rate"] = group.get("peak_learning_rate") or config.learning_rate
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * factor


def optimizer_state(model: GPT2, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments by name, such as `exp_avg.h.0.attn.c_attn.weight`; on the CPU, sharing memory where they already are."""
    return {
        f"{key}.{name}": value.detach().cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_state(model: GPT2, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave.

    Raises:
        ValueError: a parameter without its state, or state without its parameter.
    """
    named = dict(model.named_parameters())
    for full_name, value in state.items():
        key, _, name = full_name.partition(".")
        if name not in named:
            raise ValueError(f"optimizer state {full_name!r} belongs to no parameter of this network")
        device = "cpu" if key == "step" and named[name].device.type == "cpu" else named[name].device
        optimizer.state[named[name]][key] = value.clone().to(device)
    without = [name for name, parameter in named.items() if not optimizer.state[parameter]]
    if without:
        raise ValueError(f"optimizer state is missing for {', '.join(without[:3])}")
