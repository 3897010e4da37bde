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
from model.config import ModelConfig
from model.generation import Frame
from model.gpt2 import GPT2
from model.run_config import RunConfig
from model.tokenizer import END_OF_TEXT, END_OF_TEXT_NAME, vocabulary_files

CONFIG = "config.json"
"""The network's shape, in a folder of Hugging Face's format."""
OURS = "gpt2_from_scratch"
"""The key in it under which `export` says what Hugging Face's format has no field for."""

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
    model.window = config.data.max_length
    load_weights(model, checkpoint / MODEL)
    return model.to(device).eval()


_SHAPE = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "initializer_range": "initializer_range",
}
"""Our fields of the shape, and what Hugging Face calls them."""


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of `GPT2LMHeadModel`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()},
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def model_config(theirs: Mapping[str, Any]) -> ModelConfig:
    """The network's shape from a `config.json` of Hugging Face's GPT-2.

    Raises:
        ValueError: it is another network than GPT-2 as published; the message names the field.
    """
    if theirs.get("model_type") != "gpt2":
        raise ValueError(f"model_type: {theirs.get('model_type')!r}, not 'gpt2'")
    as_published: dict[str, tuple[Any, ...]] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * theirs.get("n_embd", 768)),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for field, values in as_published.items():
        if theirs.get(field, values[0]) not in values:
            raise ValueError(f"{field}: {theirs[field]!r}, not {values[0]!r} as GPT-2 was published with")
    shape = {ours: theirs.get(name) for ours, name in _SHAPE.items()}
    return ModelConfig.model_validate({ours: value for ours, value in shape.items() if value is not None} | {"dropout": 0.0})


def load_export(folder: Path, device: str | torch.device = "cpu") -> GPT2:
    """The network of a folder in Hugging Face's format, ready to be used (evaluation mode): ours, or any GPT-2 with `model.safetensors`.

    Raises:
        OSError: a file is not there.
        ValueError: the files are not a GPT-2 with GPT-2's vocabulary.
        safetensors.SafetensorError: the weights are not in that format.
        RuntimeError: a weight is missing, unknown, or has another shape.
    """
    theirs = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(theirs, dict):
        raise ValueError(f"{CONFIG} is not a group of fields")
    config = model_config(theirs)
    _, encoder_json = vocabulary_files()
    vocabulary = folder / "vocab.json"
    if config.vocab_size <= END_OF_TEXT or (
        vocabulary.exists() and json.loads(vocabulary.read_bytes()) != json.loads(encoder_json.read_bytes())
    ):
        raise ValueError("another vocabulary than GPT-2's")
    state = load_file(folder / MODEL)
    head, weights = state.get("lm_head.weight"), from_hugging_face(state)
    if head is not None and not torch.equal(head, weights.get("wte.weight", head)):
        raise ValueError("lm_head.weight is not wte.weight: a head of its own")
    found = [tuple(weights[name].shape) if name in weights else None for name in ("wte.weight", "wpe.weight")]
    expected = [(config.vocab_size, config.n_embd), (config.context_length, config.n_embd)]
    if found != expected or len(weights) != 4 + 12 * config.n_layer:  # before a network of that size is made
        raise ValueError(f"{MODEL} does not hold the weights that {CONFIG} describes")
    model = GPT2(config)
    if frame := read_frame(folder):
        model.window = min(frame.window, config.context_length)
    model.load_state_dict(weights)
    return model.to(device).eval()


def read_frame(folder: Path) -> Frame | None:
    """How an exported folder says that texts are made; None if it does not say."""
    match json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(OURS):
        case {"before_question": str(before_question), "before_answer": str(before_answer), "window": int(window)} if window > 1:
            return Frame(before_question, before_answer, window)
    return None


def read_split(folder: Path) -> dict[str, Any]:
    """How an exported folder says that rows were held out when it was trained: `seed`, and fields of the data config; nothing if it does
    not say."""
    ours = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(OURS)
    found = ours.get("split") if isinstance(ours, dict) else None
    return {key: found[key] for key in ("seed", "split_by", "train_ratio") if key in found} if isinstance(found, dict) else {}


def export(
    model: GPT2, folder: Path, frame: Frame | None = None, readme: str | None = None, split: Mapping[str, Any] | None = None
) -> None:
    """Write what `AutoModelForCausalLM` and `AutoTokenizer` load: weights, config, generation config, tokenizer, and `readme` as README.md.

    With a `frame` the folder also says how a question is put: to `gpt2 chat`, and as the tokenizer's chat template. With a `split`, how
    rows were held out: to a post-training that begins with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / MODEL)
    (folder / MODEL).chmod(0o644)
    vocab_bpe, encoder_json = vocabulary_files()
    (folder / "merges.txt").write_bytes(vocab_bpe.read_bytes())
    (folder / "vocab.json").write_bytes(encoder_json.read_bytes())
    config = hugging_face_config(model.config)
    tokenizer = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": END_OF_TEXT_NAME,
        "eos_token": END_OF_TEXT_NAME,
        "unk_token": END_OF_TEXT_NAME,
        "pad_token": END_OF_TEXT_NAME,
        "padding_side": "left",
        "model_max_length": model.config.context_length,
        "split_special_tokens": True,  # as in training: a text that spells out <|endoftext|> is only text
        "clean_up_tokenization_spaces": False,
    }
    generation = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    if frame is not None:
        config[OURS] = frame._asdict() | ({"split": dict(split)} if split is not None else {})
        tokenizer["chat_template"] = _chat_template(frame)
    for name, value in (
        (CONFIG, config),
        ("tokenizer_config.json", tokenizer),
        ("tokenizer.json", _fast_tokenizer()),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if readme is not None:
        (folder / "README.md").write_text(readme, encoding="utf-8")


def _fast_tokenizer() -> dict[str, Any]:
    """`tokenizer.json`: GPT-2's vocabulary, merges and cutting, said in full. Which of the other files a version of `transformers` reads,
    and how, has changed."""
    vocab_bpe, encoder_json = vocabulary_files()
    merges = [line.split(" ") for line in vocab_bpe.read_text(encoding="utf-8").split("\n")[1:] if line]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {"id": END_OF_TEXT, "content": END_OF_TEXT_NAME, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [end_of_text | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": json.loads(encoder_json.read_bytes()), "merges": merges},
    }


def _chat_template(frame: Frame) -> str:
    """Jinja that makes the last message the question: each stands alone, as in the data."""
    return f"{{{{- {json.dumps(frame.before_question, ensure_ascii=False)} + messages[-1]['content'] -}}}}"
