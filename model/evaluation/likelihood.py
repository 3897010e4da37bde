"""How well the network predicts held-out text, in bits per byte: independent of the tokenizer, comparable across models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch

from model.gpt2 import GPT2
from model.tokenizer import END_OF_TEXT, bytes_per_token


def validation_loss(
    model: GPT2, windows: np.ndarray, batch_size: int, should_stop: Callable[[], bool] = lambda: False, autocast: bool = False
) -> tuple[float, float] | None:
    """Mean loss (nats a token) and bits per byte over windows (uint16, [windows, max_length + 1]).

    None if `should_stop` said so half-way. Dropout is off meanwhile, and nothing random is drawn.
    """
    device = model.wte.weight.device
    was_training = model.training
    model.eval()
    nats, targets_seen, bytes_seen = 0.0, 0, 0
    try:
        for start in range(0, len(windows), batch_size):
            if should_stop():
                return None
            batch = torch.from_numpy(windows[start : start + batch_size].astype(np.int64)).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16) if autocast else nullcontext():
                losses = model.token_losses(batch[:, :-1], batch[:, 1:])
            nats += float(losses.double().sum())
            targets_seen += losses.numel()
            bytes_seen += int(bytes_per_token()[windows[start : start + batch_size, 1:]].sum())
    finally:
        model.train(was_training)
    return nats / targets_seen, nats / math.log(2) / max(1, bytes_seen)


def continuation_bits(
    model: GPT2, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """Bits the network needs for each continuation given its prompt, end-of-text included.

    A pair too long for the context loses the beginning of its prompt; a continuation longer than the context its own end.
    """
    capacity = model.config.context_length
    device = model.wte.weight.device
    bits: list[float] = []
    for start in range(0, len(prompts), batch_size):
        rows, firsts = [], []
        for prompt, continuation in zip(prompts[start : start + batch_size], continuations[start : start + batch_size], strict=True):
            kept = list(continuation)[:capacity] if len(continuation) >= capacity else list(continuation)
            context = list(prompt)[-(capacity + 1 - len(kept)) :]
            rows.append(context + kept)
            firsts.append(len(context) - 1)
        longest = max(map(len, rows))
        padded_BT = torch.tensor([row + [END_OF_TEXT] * (longest - len(row)) for row in rows], device=device)
        wanted_BT = torch.tensor(
            [[first <= i < len(row) - 1 for i in range(longest - 1)] for row, first in zip(rows, firsts, strict=True)], device=device
        )
        losses = model.token_losses(padded_BT[:, :-1], padded_BT[:, 1:], wanted_BT).double().cpu()
        lengths = wanted_BT.sum(dim=1).tolist()
        bits += [float(part.sum()) / math.log(2) for part in losses.split(lengths)]
    return bits
