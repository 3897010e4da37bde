"""GPT-2 (Radford et al. 2019), in one sitting.

Shapes are in the names: B sequences, T positions, S positions seen (cached ones included), N positions of all sequences, D width, H heads,
K width of a head, V vocabulary. Parameter names are Hugging Face's without their `transformer.`; `model/huggingface.py` maps the two.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.device import for_small_products
from model.tokenizer import END_OF_TEXT

LOSS_CHUNK = {"cpu": 512, "cuda": 16_384}
"""Positions whose logits exist at once: 512 x 50,257 fp32 logits are 100 MB. Measured fastest on CPUs (docs/experiments.md)."""
VOCABULARY_MULTIPLE = {"cuda": 128}
"""Tensor cores want one: the head computes with columns of no probability beside the 50,257; the parameter has none of them."""


class KeyValueCache:
    """Keys and values of the positions already seen, so that generating a token costs one position, not all of them."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.keys: list[Tensor | None] = [None] * config.n_layer
        self.values: list[Tensor | None] = [None] * config.n_layer

    def attend(self, layer: int, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask_BTS: Tensor | None) -> Tensor:
        """Remember the new positions, and look from them at all so far; BHTK. Without a mask it is used once for the first positions, then
        for one position after the other."""
        B, H, T, K = k_BHTK.shape
        assert mask_BTS is not None or self.length == 0 or T == 1
        keys, values, end = self.keys[layer], self.values[layer], self.length + T
        if keys is None or values is None:
            keys = self.keys[layer] = k_BHTK.new_empty((B, H, self.capacity, K))
            values = self.values[layer] = v_BHTK.new_empty((B, H, self.capacity, K))
        keys[:, :, self.length : end] = k_BHTK
        values[:, :, self.length : end] = v_BHTK
        mask_BHTS = None if mask_BTS is None else mask_BTS[:, None]
        with for_small_products() if T == 1 else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                q_BHTK, keys[:, :, :end], values[:, :, :end], attn_mask=mask_BHTS, is_causal=mask_BTS is None and T > 1
            )

    def keep(self, rows_N: Tensor) -> None:
        """Forget all sequences but these."""
        self.keys = [None if keys is None else keys[rows_N] for keys in self.keys]
        self.values = [None if values is None else values[rows_N] for values in self.values]


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x_BTD: Tensor, layer: int, cache: KeyValueCache | None, mask_BTS: Tensor | None) -> Tensor:
        """`mask_BTS` is True where a position may look; None means causal."""
        B, T, D = x_BTD.shape
        q_BHTK, k_BHSK, v_BHSK = (
            part.view(B, T, self.n_head, D // self.n_head).transpose(1, 2) for part in self.c_attn(x_BTD).split(D, dim=2)
        )
        if cache is not None:
            y_BHTK = cache.attend(layer, q_BHTK, k_BHSK, v_BHSK, mask_BTS)
        else:
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


def rows_apart(tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The positions BT and the mask BTS under which rows side by side do not see each other: each begins with an end of text."""
    T = tokens_BT.shape[1]
    place_T = torch.arange(T, device=tokens_BT.device)
    begins_BT = torch.where(tokens_BT == END_OF_TEXT, place_T, 0).cummax(dim=1).values
    causal_TS = place_T[:, None] >= place_T
    return place_T - begins_BT, (begins_BT[:, :, None] == begins_BT[:, None, :]) & causal_TS


class GPT2(nn.Module):
    """The network. Its head is the token embedding itself (tied)."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.window = config.context_length
        """Positions that a text may take: fewer than the context, where training saw fewer."""
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
        apart: bool = False,
    ) -> Tensor:
        """The residual stream after the last layer, BTD. With a cache, `tokens_BT` are the positions that follow the cached ones. `apart`:
        they are rows side by side, and to each it is as if it stood alone."""
        if apart:
            positions_BT, mask_BTS = rows_apart(tokens_BT)
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

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, wanted_N: Tensor | None = None) -> Tensor:
        """Sum of the cross-entropies (nats) of predicting each target; the whole logits never exist at once.

        With `wanted_N`, only of the targets at these places (numbers into the flattened B x T), and the tokens are rows side by side, none
        of which sees another.
        """
        x_ND, device = self.hidden(tokens_BT, apart=wanted_N is not None).flatten(0, 1), tokens_BT.device.type
        targets_N = targets_BT.flatten()
        if wanted_N is not None:
            x_ND, targets_N = x_ND[wanted_N], targets_N[wanted_N]
        if torch.is_autocast_enabled(device):
            x_ND = x_ND.to(torch.get_autocast_dtype(device))
        return SummedCrossEntropy.apply(x_ND, self.wte.weight, targets_N, torch.is_grad_enabled())

    @torch.no_grad()
    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor, wanted_BT: Tensor | None = None, apart: bool = False) -> Tensor:
        """Cross-entropy (nats, fp32) of each target that is `wanted` (all by default), in one row; for evaluation. `apart`: the tokens are
        rows side by side, none of which sees another."""
        wanted_BT = torch.ones_like(targets_BT, dtype=torch.bool) if wanted_BT is None else wanted_BT
        x_ND, targets_N = self.hidden(tokens_BT, apart=apart)[wanted_BT], targets_BT[wanted_BT]
        parts = [
            F.cross_entropy(self.logits(x).float(), targets, reduction="none")
            for x, targets in zip(x_ND.split(LOSS_CHUNK["cpu"]), targets_N.split(LOSS_CHUNK["cpu"]), strict=True)
        ]
        return torch.cat(parts)


def _loss_and_gradients(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies, and its gradients by `x_ND` and `weight_VD` (empty without), chunk by chunk: few logits exist at once."""
    (N, D), V, chunk = x_ND.shape, len(weight_VD), LOSS_CHUNK.get(x_ND.device.type, 4096)
    weight_VD = weight_VD.to(x_ND.dtype)
    if missing := -V % VOCABULARY_MULTIPLE.get(x_ND.device.type, 1):
        weight_VD = F.pad(weight_VD, (0, 0, 0, missing))
    total, logits_NV = x_ND.new_zeros((), dtype=torch.float32), x_ND.new_empty(min(chunk, N), len(weight_VD))
    grad_x_ND = x_ND.new_empty((N, D) if with_gradients else (0, D))
    grad_weight_VD = torch.zeros(weight_VD.shape if with_gradients else (0, D), dtype=torch.float32, device=x_ND.device)
    for start in range(0, N, chunk):
        x, targets = x_ND[start : start + chunk], targets_N[start : start + chunk, None]
        logits = torch.mm(x, weight_VD.T, out=logits_NV[: len(x)])
        logits[:, V:] = -math.inf
        correct, largest = logits.gather(1, targets).float(), logits.amax(1, keepdim=True).float()
        softmax = torch.softmax(logits, 1, out=logits) if x.dtype == torch.float32 else torch.softmax(logits, 1, dtype=torch.float32)
        total += (largest - softmax.amax(1, keepdim=True).log() - correct).sum()  # log-sum-exp, by way of the largest
        if with_gradients:
            grad_logits = softmax.scatter_(1, targets, softmax.gather(1, targets) - 1).to(x.dtype)
            torch.mm(grad_logits, weight_VD, out=grad_x_ND[start : start + chunk])
            if x.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_logits.T, x)
            else:
                grad_weight_VD += grad_logits.T @ x
    return total, grad_x_ND, grad_weight_VD[:V].contiguous()


_compiled_as_is = torch.library.custom_op("gpt2::loss_and_gradients", _loss_and_gradients, mutates_args=())
"""The same for CPUs: torch.compile makes it slower there, because it takes the sums over the chunks apart."""


@_compiled_as_is.register_fake
def _(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = slice(None) if with_gradients else slice(0)
    total = x_ND.new_empty((), dtype=torch.float32)
    return total, torch.empty_like(x_ND[rows]), torch.empty_like(weight_VD[rows], dtype=torch.float32)


class SummedCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy at once: the whole logits never exist, and the gradients wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, with_gradients: bool) -> Tensor:
        """The sum over the positions, fp32 whatever the inputs are."""
        head = _loss_and_gradients if x_ND.is_cuda else _compiled_as_is
        total, grad_x_ND, grad_weight_VD = head(x_ND, weight_VD, targets_N, with_gradients)
        ctx.save_for_backward(grad_x_ND, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """In place, because the head's gradient is as large as the head: a second backward pass raises RuntimeError."""
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        return grad_x_ND.mul_(grad_total), grad_weight_VD.mul_(grad_total), None, None
