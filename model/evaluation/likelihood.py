"""How well the network predicts held-out text, in bits per byte: independent of the tokenizer, comparable across models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from model.gpt2 import GPT2
from model.stream.row_packing import IGNORED
from model.tokenizer import END_OF_TEXT, bytes_per_token, encode_to_numpy, first_token_after


def validation_loss(
    model: GPT2, windows: np.ndarray, batch_size: int, should_stop: Callable[[], bool] = lambda: False, autocast: bool = False
) -> tuple[float, float] | None:
    """Mean loss (nats a token) and bits per byte over windows: uint16 [windows, max_length + 1], or of rows [windows, 2, max_length], and
    then of their completions alone.

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
            some = windows[start : start + batch_size]
            rows = some.ndim == 3
            inputs, targets = (some[:, 0], some[:, 1]) if rows else (some[:, :-1], some[:, 1:])
            wanted = targets != IGNORED
            inputs_BT, targets_BT = (torch.from_numpy(part.astype(np.int64)).to(device) for part in (inputs, targets))
            with torch.autocast(device.type, dtype=torch.bfloat16) if autocast else nullcontext():
                losses = model.token_losses(inputs_BT, targets_BT, torch.from_numpy(wanted).to(device) if rows else None, apart=rows)
            nats += float(losses.double().sum())
            targets_seen += losses.numel()
            bytes_seen += int(bytes_per_token()[targets[wanted]].sum())
    finally:
        model.train(was_training)
    return nats / targets_seen, nats / math.log(2) / max(1, bytes_seen)


def continuation_bits(model: GPT2, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float]:
    """Bits the network needs for each continuation and the end of text behind it, given its context.

    A pair is one text to the tokenizer, as in training, with an end of text before it. The continuation begins at the first token that is
    not wholly in the context, without the context's last spaces: those belong to the continuation's first token, as in
    lm-evaluation-harness. (Encoded apart, "A: " and "4" are tokens that never stood there in training.)

    What is longer than the network looks back is scored in pieces, every token once: a piece that all fits sees all, another one has at
    least half of what fits for its context. Texts of like length share a batch; of equal pieces one is computed.
    """
    wanted: dict[tuple[int, ...], int] = {}  # the tokens of a piece, and the first that is scored
    pieces: list[list[tuple[tuple[int, ...], int, int]]] = []
    for context, continuation in pairs:
        tokens, first = tokens_and_cut(context, continuation)
        found = []
        for low, start, stop in _spans(first, len(tokens), model.window):
            piece = tuple(tokens[low:stop])
            wanted[piece] = min(start - low, wanted.get(piece, start - low))
            found.append((piece, start - low, stop - low))
        pieces.append(found)
    nats = _token_nats(model, wanted, batch_size)
    return [
        float(sum(nats[piece][start - wanted[piece] : stop - wanted[piece]].sum() for piece, start, stop in found)) / math.log(2)
        for found in pieces
    ]


def tokens_and_cut(context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both as one text between two ends of text, and the number of the first that belongs to the continuation.

    A token that has bytes of both belongs to the continuation.
    """
    tokens = encode_to_numpy(context + continuation)
    return [END_OF_TEXT, *tokens.tolist(), END_OF_TEXT], 1 + first_token_after(tokens, context)


def _spans(first: int, count: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Pieces of a text of `count` tokens that score those from `first` on, each once: (first token of the piece, first one scored, the one
    after its last). A piece has `window + 1` tokens at most, because nothing follows its last."""
    start = first
    while start < count:
        stop = min(count, start - min(start, window // 2) + window + 1)
        yield max(0, stop - window - 1), start, stop
        start = stop


def _token_nats(model: GPT2, wanted: dict[tuple[int, ...], int], batch_size: int) -> dict[tuple[int, ...], np.ndarray]:
    """Of each piece the nats, float64, of its tokens from the wanted one on."""
    device = model.wte.weight.device
    order = sorted(wanted, key=len)
    nats: dict[tuple[int, ...], np.ndarray] = {}
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        longest = len(batch[-1])
        padded_BT = torch.tensor([[*piece, *[END_OF_TEXT] * (longest - len(piece))] for piece in batch], device=device)
        wanted_BT = torch.zeros((len(batch), longest - 1), dtype=torch.bool)
        for row, piece in enumerate(batch):
            wanted_BT[row, wanted[piece] - 1 : len(piece) - 1] = True
        losses = model.token_losses(padded_BT[:, :-1], padded_BT[:, 1:], wanted_BT.to(device)).double().cpu()
        lengths: list[int] = wanted_BT.sum(dim=1).tolist()
        nats.update(zip(batch, [part.numpy() for part in losses.split(lengths)], strict=True))
    return nats


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Matrix products in fp32, not TF32, whatever the process has allowed: scores of CPU and GPU are to agree."""
    products = torch.backends.cuda.matmul  # the older torch.set_float32_matmul_precision fails beside model/device.py's setting
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
