"""AdamW, or Muon and AdamW, over groups of parameters; and their state as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from model.config import TrainingConfig
from model.errors import UserError
from model.gpt2 import GPT2
from model.training.distributed import placed_like

EMBEDDINGS = ("wte.weight", "wpe.weight")


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers, driven as one: each updates its own groups, and all groups and all state are this one's."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each part; there is no closure."""
        assert closure is None
        for part in self._parts:
            part.step()


def build_optimizer(model: GPT2, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer over three groups: embeddings (own rate), the blocks' matrices (own rate), biases and LayerNorms (not decayed).

    `adamw` updates all of them with fused AdamW (Loshchilov & Hutter 2019). `muon` updates the matrices with Muon (Jordan et al. 2024),
    scaled so that an update is as large as AdamW's at the same rate (Liu et al. 2025, "Muon is Scalable for LLM Training"), the rest with
    AdamW. Each group carries its `peak_learning_rate`; `set_learning_rate` scales all of them.

    Raises:
        UserError: `muon` with a torch that has none (before 2.9).
    """
    named = dict(model.named_parameters())
    embeddings = [named[name] for name in EMBEDDINGS]
    matrices = [parameter for name, parameter in named.items() if parameter.dim() == 2 and name not in EMBEDDINGS]
    vectors = [parameter for parameter in named.values() if parameter.dim() < 2]
    grouped = [*embeddings, *matrices, *vectors]
    assert len({id(parameter) for parameter in grouped}) == len(grouped) == len(named), "each parameter in exactly one group"
    for_embeddings = _group(embeddings, config.embedding_learning_rate or config.learning_rate, config.weight_decay)
    for_matrices = _group(matrices, config.matrix_learning_rate or config.learning_rate, config.weight_decay)
    for_vectors = _group(vectors, config.learning_rate, 0.0)
    if config.optimizer == "adamw":
        return _adamw([for_embeddings, for_matrices, for_vectors], config)
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"training.optimizer: torch {torch.__version__} has no Muon; install torch 2.9 or later, or choose adamw")
    muon = torch.optim.Muon([for_matrices], adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(_adamw([for_embeddings, for_vectors], config), muon)


def _group(parameters: list[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": learning_rate, "peak_learning_rate": learning_rate, "weight_decay": weight_decay}


def _adamw(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * factor


def optimizer_state(model: GPT2, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers by name, such as `exp_avg.h.0.attn.c_attn.weight`: its own tensors, where and as distributed as they
    are."""
    return {
        f"{key}.{name}": value.detach() for name, parameter in model.named_parameters() for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_state(model: GPT2, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave. Where parameters are distributed over ranks, all of them must call this, with the same state.

    Raises:
        ValueError: a parameter without its state, or state without its parameter.
    """
    named = dict(model.named_parameters())
    for full_name, value in state.items():
        key, _, name = full_name.partition(".")
        if name not in named:
            raise ValueError(f"optimizer state {full_name!r} belongs to no parameter of this network")
        optimizer.state[named[name]][key] = placed_like(value, named[name])
    without = [name for name, parameter in named.items() if not optimizer.state[parameter]]
    if without:
        raise ValueError(f"optimizer state is missing for {', '.join(without[:3])}")
