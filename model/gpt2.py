"""GPT-2 (Radford et al. 2019), in one sitting.

Shapes are in the names: B sequences, T positions, S positions seen (cached ones included), N positions of all sequences, D width, H heads,
K width of a head, V vocabulary. Parameter names are Hugging Face's without their `transformer.`; `model/huggingface.py` maps the two.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from model.config import ModelConfig

LOSS_CHUNK = 512
"""Positions whose logits exist at once: 512 x 50,257 fp32 logits are 100 MB. Measured fastest on CPUs (docs/experiments.md)."""


class KeyValueCache:
    """Keys and values of the positions already seen, so that generating a token costs one position, not all of them."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (batch, config.n_head, capacity, config.n_embd // config.n_head)
        self.keys = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.length = 0

    def extend(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the new positions; returns keys and values of all so far, BHSK."""
        end = self.length + k_BHTK.shape[2]
        self.keys[layer][:, :, self.length : end] = k_BHTK
        self.values[layer][:, :, self.length : end] = v_BHTK
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x_BTD: Tensor, layer: int, cache: KeyValueCache | None, mask_BTS: Tensor | None) -> Tensor:
        """`mask_BTS` is True where a position may look; None means causal, which with a cache holds for its first use only."""
        B, T, D = x_BTD.shape
        q_BHTK, k_BHSK, v_BHSK = (
            part.view(B, T, self.n_head, D // self.n_head).transpose(1, 2) for part in self.c_attn(x_BTD).split(D, dim=2)
        )
        if cache is not None:
            assert mask_BTS is not None or cache.length == 0
            k_BHSK, v_BHSK = cache.extend(layer, k_BHSK, v_BHSK)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHSK,
            v_BHSK,
            attn_mask=None if mask_BTS is None else mask_BTS[:, None],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_BTS is None,
        )
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two layers, four times as wide inside, with the tanh approximation of GELU that GPT-2 was trained with."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Position by position."""
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, layer: int, cache: KeyValueCache | None, mask_BTS: Tensor | None) -> Tensor:
        """One layer of the network."""
        x_BTD = x_BTD + self.dropout(self.attn(self.ln_1(x_BTD), layer, cache, mask_BTS))
        return x_BTD + self.dropout(self.mlp(self.ln_2(x_BTD)))


class GPT2(nn.Module):
    """The network. Its head is the token embedding itself (tied)."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """N(0, initializer_range); what is added to the residual stream is scaled by 1/sqrt(additions), section 2.3 of the paper."""
        generator, deviation = torch.Generator().manual_seed(seed), self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, deviation / math.sqrt(2 * self.config.n_layer), generator=generator)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, deviation, generator=generator)
            elif name.endswith(".bias"):
                parameter.zero_()

    def hidden(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache | None = None,
        positions_BT: Tensor | None = None,
        mask_BTS: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the last layer, BTD. With a cache, `tokens_BT` are the positions that follow the cached ones."""
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.dropout(self.wte(tokens_BT) + self.wpe(positions_BT))
        for layer, block in enumerate(self.h):
            x_BTD = block(x_BTD, layer, cache, mask_BTS)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.ln_f(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Scores of every next token, BTV."""
        return F.linear(x_BTD, self.wte.weight)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum of the cross-entropies (nats) of predicting each target; the whole logits never exist at once."""
        x_ND, targets_N = self.hidden(tokens_BT).flatten(0, 1), targets_BT.flatten()
        if hasattr(F, "linear_cross_entropy"):  # torch 2.12 and later
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK)
            return F.linear_cross_entropy(x_ND, self.wte.weight, targets_N, reduction="sum", options=options)
        parts = [
            recompute(_chunk_loss, x, self.wte.weight, targets, use_reentrant=False)
            for x, targets in zip(x_ND.split(LOSS_CHUNK), targets_N.split(LOSS_CHUNK), strict=True)
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor, wanted_BT: Tensor | None = None) -> Tensor:
        """Cross-entropy (nats, fp32) of each target that is `wanted` (all by default), in one row; for evaluation."""
        wanted_BT = torch.ones_like(targets_BT, dtype=torch.bool) if wanted_BT is None else wanted_BT
        x_ND, targets_N = self.hidden(tokens_BT)[wanted_BT], targets_BT[wanted_BT]
        parts = [
            F.cross_entropy(self.logits(x).float(), targets, reduction="none")
            for x, targets in zip(x_ND.split(LOSS_CHUNK), targets_N.split(LOSS_CHUNK), strict=True)
        ]
        return torch.cat(parts)


def _chunk_loss(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_ND, weight_VD).float(), targets_N, reduction="sum")


def parameter_count(config: ModelConfig) -> int:
    """Trainable parameters of a network of this shape, without building it."""
    D, block = config.n_embd, 12 * config.n_embd**2 + 13 * config.n_embd
    return (config.vocab_size + config.context_length) * D + config.n_layer * block + 2 * D
