"""Hugging Face's GPT-2 format: names, layout, and the folder that `transformers` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint.store import MODEL, STATE
from model.config import ModelConfig, RunConfig
from model.gpt2 import GPT2
from model.tokenizer import END_OF_TEXT, vocabulary_files

METADATA = {"format": "pt"}
"""What `transformers` wants to read in the header of a safetensors file."""

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Hugging Face keeps OpenAI's Conv1D layout [in, out] for these; torch's Linear has [out, in]."""


def seen_by_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by name as views that `GPT2LMHeadModel` names and lays out (the tied head is not repeated)."""
    return {f"transformer.{name}": (w.t() if name.endswith(_TRANSPOSED) else w) for name, w in state.items()}


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, ready to be written."""
    return {name: w.contiguous() for name, w in seen_by_hugging_face(state).items()}


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back. Accepts names with or without `transformer.`, a repeated head, and old checkpoints' causal masks."""
    ours = {}
    for full_name, weight in state.items():
        name = full_name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        ours[name] = weight.t().contiguous() if name.endswith(_TRANSPOSED) else weight
    return ours


def read_weights(path: Path) -> dict[str, Tensor]:
    """Our weights by name from model.safetensors: ours, or any GPT-2 in Hugging Face's format."""
    return from_hugging_face(load_file(path))


def save_weights(model: GPT2, path: Path) -> None:
    """Write a network's model.safetensors. Equal weights give equal bytes."""
    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    save_file(to_hugging_face(weights), path, metadata=METADATA)


def load_weights(model: GPT2, path: Path) -> None:
    """Read model.safetensors into a network of that shape.

    Raises:
        RuntimeError: a weight is missing, unknown, or has another shape.
    """
    model.load_state_dict(read_weights(path))


def load_model(checkpoint: Path, device: str | torch.device = "cpu") -> GPT2:
    """The network of a checkpoint's folder, ready to be used (evaluation mode). Digests are the caller's to verify."""
    config = RunConfig.model_validate(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["config"])
    model = GPT2(config.model)
    load_weights(model, checkpoint / MODEL)
    return model.to(device).eval()


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of `GPT2LMHeadModel`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": config.initializer_range,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def export(model: GPT2, folder: Path) -> None:
    """Write what `AutoModelForCausalLM` and `AutoTokenizer` load: weights, config, generation config, vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    vocab_bpe, encoder_json = vocabulary_files()
    (folder / "merges.txt").write_bytes(vocab_bpe.read_bytes())
    (folder / "vocab.json").write_bytes(encoder_json.read_bytes())
    tokenizer = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": model.config.context_length,
    }
    generation = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    for name, value in (
        ("config.json", hugging_face_config(model.config)),
        ("tokenizer_config.json", tokenizer),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
