"""Text from the network: greedy or sampled, many prompts at once, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.gpt2 import GPT2, KeyValueCache
from model.tokenizer import END_OF_TEXT, decode, encode


def sample(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """The next token of each sequence, B. Temperature 0 takes the likeliest.

    `top_k` keeps the k likeliest (Fan et al. 2018); `top_p` the fewest whose probabilities reach p (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= top_p
        logits_BV = logits_BV.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def next_tokens(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Each new token of every prompt (int64, one a prompt), until `max_new_tokens`, the end of the context, or all have ended their text.

    A prompt that leaves no room for `max_new_tokens` loses its beginning, but never more than half a context is kept free.
    Shorter prompts are padded on the left, out of sight.

    Raises:
        ValueError: no prompt, an empty one, or no room for a new token.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompts: give at least one, none of them empty")
    capacity = model.config.context_length
    if max_new_tokens < 1:
        raise ValueError("max_new_tokens: must be at least 1")
    prompts = [list(prompt)[-(capacity - min(max_new_tokens, capacity // 2)) :] for prompt in prompts]
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed) if temperature else None
    longest = max(map(len, prompts))
    max_new_tokens = min(max_new_tokens, capacity - longest)
    tokens_BT = torch.tensor([[END_OF_TEXT] * (longest - len(p)) + list(p) for p in prompts], device=device)
    real_BT = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    positions_BT = (real_BT.cumsum(dim=1) - 1).clamp(min=0)
    # A padded position may look at itself, so that no row of the softmax is empty; nobody looks at it.
    causal_TT = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask_BTS = causal_TT & real_BT[:, None] | torch.eye(longest, dtype=torch.bool, device=device)
    cache = KeyValueCache(model.config, longest + max_new_tokens)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        x_BD = model.hidden(tokens_BT, cache, positions_BT, mask_BTS)[:, -1]
        next_B = sample(model.logits(x_BD), temperature, top_k, top_p, generator)
        next_B = next_B.masked_fill(ended_B, END_OF_TEXT)
        yield next_B
        ended_B |= next_B == END_OF_TEXT
        if ended_B.all():
            return
        tokens_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
        mask_BTS = torch.cat([mask_BTS[:, -1:], torch.ones_like(mask_BTS[:, -1:, :1])], dim=2)


def generate(model: GPT2, prompts: Sequence[Sequence[int]], max_new_tokens: int, **sampling: float | int | None) -> list[list[int]]:
    """The new tokens of every prompt; a text that ended has `END_OF_TEXT` as its last token."""
    steps = torch.stack(list(next_tokens(model, prompts, max_new_tokens, **sampling)), dim=1).tolist()  # type: ignore[arg-type]
    return [row[: row.index(END_OF_TEXT) + 1] if END_OF_TEXT in row else row for row in steps]


def answer(
    model: GPT2,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """What the network writes after each prompt, without the end-of-text token."""
    rows = generate(
        model, [encode(prompt) for prompt in prompts], max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    return [decode([token for token in row if token != END_OF_TEXT]) for row in rows]


def stream(model: GPT2, prompt: str, max_new_tokens: int, **sampling: float | int | None) -> Iterator[str]:
    """The text after one prompt, piece by piece as it is made; a piece is always whole characters."""
    tokens: list[int] = []
    for next_B in next_tokens(model, [encode(prompt)], max_new_tokens, **sampling):  # type: ignore[arg-type]
        if int(next_B[0]) == END_OF_TEXT:
            break
        tokens.append(int(next_B[0]))
        text = decode(tokens)
        if not text.endswith("�"):
            yield text
            tokens = []
    if tokens:
        yield decode(tokens)
