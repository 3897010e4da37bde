"""Text from the network: greedy or sampled, many prompts at once, with a key-value cache.

What is written after a prompt depends on the prompt, the settings and its seed; never on the prompts beside it. Shapes as in model/gpt2.py;
N are the rows of the batch that still write, at most B.
"""

from __future__ import annotations

import codecs
import math
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import DataConfig
from model.gpt2 import GPT2, KeyValueCache
from model.tokenizer import END_OF_TEXT, decode, encode, load_tokenizer

NOTHING = -1
"""In place of a token: this prompt's text has ended before."""
STEPS_BETWEEN_LOOKS = {"cpu": 1}
"""How often to ask which texts have ended. A CPU knows; a GPU would have to be waited for, and runs ahead instead."""
_STEPS_BETWEEN_LOOKS_ELSEWHERE = 16
_GREEDY_BELOW = 1e-5
"""Temperatures that leave no choice, and that fp32 could not divide by."""


def sample(logits_NV: Tensor, temperature: float, top_k: int | None, top_p: float | None, uniform_N: Tensor) -> Tensor:
    """The next token of each row, N, chosen by its number in [0, 1) (inverse of the distribution). Temperature 0 takes the likeliest.

    `top_k` keeps the k likeliest (Fan et al. 2018); `top_p` the fewest whose probabilities reach p (Holtzman et al. 2020), at least one.
    """
    if temperature < _GREEDY_BELOW:
        return logits_NV.argmax(dim=-1)
    logits_NV = logits_NV.float()
    logits_NV = (logits_NV - logits_NV.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits_NV.shape[-1]:
        kth = logits_NV.topk(top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits_NV.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= top_p
        beyond[:, 0] = False
        logits_NV = logits_NV.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    reached_NV = logits_NV.softmax(dim=-1).cumsum(dim=-1)
    # Rounding may not lift the number to the sum itself: beyond the last token there is none.
    return torch.searchsorted(reached_NV, uniform_N[:, None] * (1 - 1e-6) * reached_NV[:, -1:], right=True)[:, 0]


@torch.inference_mode()
def next_tokens(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Each new token of every prompt (int64 B), NOTHING after a text's end, until all have ended: by `END_OF_TEXT`, after `max_new_tokens`,
    or at the end of the network's `window`.

    A prompt that leaves no room for `max_new_tokens` loses its beginning, but never more than half a window is kept free.
    Shorter prompts are padded on the left, out of sight. When half of the rows have ended, the others go on in a batch of their own.
    `seeds` has one for each prompt (default 0, 1, …); equal seeds choose alike, on every device.

    Raises:
        ValueError: no prompt, an empty one, or a setting outside its bounds.
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    capacity, device = model.window, model.wte.weight.device
    prompts = [list(prompt)[-(capacity - min(max_new_tokens, capacity // 2)) :] for prompt in prompts]
    limits = [min(max_new_tokens, capacity - len(prompt)) for prompt in prompts]
    steps, longest = max(limits), max(map(len, prompts))
    uniform_NT = _uniform(range(len(prompts)) if seeds is None else seeds, steps if temperature >= _GREEDY_BELOW else 1).to(device)
    tokens_NT = torch.tensor([[END_OF_TEXT] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    padding_N = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    limits_N = torch.tensor(limits, device=device)
    rows_N = torch.arange(len(prompts), device=device)
    ended_N = torch.zeros_like(rows_N, dtype=torch.bool)
    cells_S = torch.arange(longest + steps, device=device)
    visible_NS = None if min(map(len, prompts)) == longest else cells_S >= padding_N[:, None]
    positions_NT = (cells_S[:longest] - padding_N[:, None]).clamp(min=0)
    mask_NTS = None
    if visible_NS is not None:
        # A padded position may look at itself, so that no row of the softmax is empty; nobody looks at it.
        causal_TS = cells_S[:longest, None] >= cells_S[:longest]
        mask_NTS = causal_TS & visible_NS[:, None, :longest] | torch.eye(longest, dtype=torch.bool, device=device)
    cache = KeyValueCache(model.config, longest + steps)
    for step in range(steps):
        x_ND = model.hidden(tokens_NT, cache, positions_NT, mask_NTS)[:, -1]
        logits_NV = model.logits(x_ND)[:, : END_OF_TEXT + 1]  # a vocabulary may be padded; those tokens mean nothing
        next_N = sample(logits_NV, temperature, top_k, top_p, uniform_NT[:, min(step, uniform_NT.shape[1] - 1)])
        next_B = torch.full((len(prompts),), NOTHING, device=device)
        next_B[rows_N] = next_N.masked_fill(ended_N, NOTHING)
        yield next_B
        ended_N = ended_N | (next_N == END_OF_TEXT) | (limits_N <= step + 1)
        if (step + 1) % STEPS_BETWEEN_LOOKS.get(device.type, _STEPS_BETWEEN_LOOKS_ELSEWHERE) == 0:
            writing = (~ended_N).nonzero()[:, 0]
            if len(writing) == 0:
                return
            if len(writing) <= len(ended_N) / 2:
                cache.keep(writing)
                visible_NS = None if visible_NS is None else visible_NS[writing]
                rows_N, next_N, ended_N, limits_N = (each[writing] for each in (rows_N, next_N, ended_N, limits_N))
                uniform_NT, positions_NT = uniform_NT[writing], positions_NT[writing]
        tokens_NT, positions_NT = next_N[:, None], (positions_NT[:, -1:] + 1).clamp(max=capacity - 1)  # an ended row may be past its end
        mask_NTS = None if visible_NS is None else visible_NS[:, None, : cache.length + 1]


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not prompts or not all(prompts):
        raise ValueError("prompts: give at least one, none of them empty")
    if max_new_tokens < 1:
        raise ValueError("max_new_tokens: must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: must be at least 1, not {top_k}")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p: must be between 0 and 1, not {top_p}")


def _uniform(seeds: Sequence[int], steps: int) -> Tensor:
    """Numbers in [0, 1), a row a seed: drawn on the CPU, so that every device chooses alike."""
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed % 2**63)) for seed in seeds])


def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt; a text that ended has `END_OF_TEXT` as its last token.

    Prompt i draws from `seed` + i. `batch_size` prompts are written at once, of like length (null: all); it changes no text. Raises as
    `next_tokens` does.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = batch_size or len(prompts) or 1
    written: dict[int, list[int]] = {}
    for chosen in [order[start : start + size] for start in range(0, len(order), size)] or [[]]:
        seeds = [seed + i for i in chosen]
        steps = list(next_tokens(model, [prompts[i] for i in chosen], max_new_tokens, temperature, top_k, top_p, seeds))
        rows = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in chosen]
        written |= {i: [token for token in row if token != NOTHING] for i, row in zip(chosen, rows, strict=True)}
    return [written[i] for i in range(len(prompts))]


def as_text(prompt: str) -> list[int]:
    """The tokens of a prompt; as in training, a text begins after the end of another."""
    return [END_OF_TEXT, *encode(prompt)]


def answer(
    model: GPT2,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[str]:
    """What the network writes after each prompt, without the end-of-text token. Settings as for `generate`."""
    tokens = [as_text(prompt) for prompt in prompts]
    rows = generate(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, batch_size)
    return [decode([token for token in row if token != END_OF_TEXT]) for row in rows]


def stream(
    model: GPT2,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The text after one prompt, piece by piece as it is made; a piece is always whole characters. Together they are `answer`'s text."""
    bytes_of = load_tokenizer().decode_single_token_bytes
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    for next_B in next_tokens(model, [as_text(prompt)], max_new_tokens, temperature, top_k, top_p, [seed]):
        token = int(next_B[0])
        if token == END_OF_TEXT:
            break
        if piece := characters.decode(bytes_of(token)):
            yield piece
    if rest := characters.decode(b"", final=True):
        yield rest


class Frame(NamedTuple):
    """How the texts of a run were made: where the question stands, where the answer begins, and how long they are."""

    before_question: str
    before_answer: str
    """What stands between reasoning and answer; empty where there is no reasoning."""
    window: int
    """Tokens. Positions beyond were never trained."""

    @classmethod
    def of(cls, data: DataConfig) -> Frame:
        """That of the run's template and windows."""
        pieces = [(literal, column) for literal, column, _, _ in string.Formatter().parse(data.text_template)]
        literals = [literal for literal, column in pieces if column]
        return cls(pieces[0][0], literals[-1] if len(literals) > 2 and literals[-1].strip() else "", data.max_length)

    def prompt(self, question: str) -> str:
        """What the network writes on from. Spaces behind are left to the network: with what follows they are other tokens than alone."""
        return f"{self.before_question}{question}".rstrip()

    def parts(self, pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
        """A streamed text in two: each piece with whether it belongs to the answer. The delimiter comes as a piece of the reasoning."""
        if not self.before_answer:
            yield from ((True, piece) for piece in pieces)
            return
        waiting, found = "", False
        for piece in pieces:
            if found:
                yield True, piece
                continue
            waiting += piece
            before, delimiter, after = waiting.partition(self.before_answer)
            found = bool(delimiter)
            # What may be the delimiter's beginning waits for the next piece.
            kept = 0 if found else max(n for n in range(len(self.before_answer)) if waiting.endswith(self.before_answer[:n]))
            shown, waiting = before[: len(before) - kept] + delimiter, waiting[len(waiting) - kept :] if kept else ""
            if shown:
                yield False, shown
            if after:
                yield True, after
        if waiting:
            yield False, waiting
