"""What a training run takes in memory and a checkpoint on disk, by counting tensors. Needs no torch.

Counted for `model/gpt2.py` as it stands, run eagerly; tests compare it with what autograd really keeps. torch.compile keeps less.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from model.config import ModelConfig
from model.flops import parameters_by_kind

LOSS_POSITIONS = {"cpu": 512, "cuda": 16_384}
"""`LOSS_CHUNK` of model/gpt2.py (which imports torch)."""
_FILE_OVERHEAD, _TENSOR_OVERHEAD = 4_000, 130
"""Bytes of state.json and manifest.json, and of a tensor's entry in a safetensors header: about."""


class Memory(NamedTuple):
    """Bytes that one rank holds when the forward pass of a step's last micro-batch ends: the most that it ever does.

    At most, to be exact: in a step of one micro-batch the gradients of the blocks come as the activations go.
    """

    weights: int
    """fp32."""
    gradients: int
    """fp32."""
    optimizer: int
    """Moments, fp32: two a parameter with AdamW; with Muon one of the blocks' matrices and two of the rest."""
    half_weights: int
    """bf16 copies of the blocks' matrices, which autocast makes once a micro-batch."""
    activations: int
    """What the forward pass of a micro-batch keeps for the backward pass."""
    loss: int
    """The head's: one chunk's logits, softmax and their gradient, and copies of the embedding; where gradients are accumulated, its own
    gradient of this micro-batch, too."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def optimizer_bytes(config: ModelConfig, optimizer: Literal["adamw", "muon"]) -> int:
    """Bytes of the moments."""
    parameters = parameters_by_kind(config)
    return 4 * (2 * parameters.total - (parameters.matrices if optimizer == "muon" else 0))


def activation_bytes(config: ModelConfig, windows: int, window: int, half: bool, cpu: bool = False) -> int:
    """Bytes that autograd keeps from the forward pass of `windows` windows of `window` tokens.

    A block keeps for each token, in units of its width D: both LayerNorms' inputs (2, the residual stream, always fp32) and outputs (2),
    q, k, v (3), attention's output (1), the MLP's hidden layer before and after GELU (4 + 4); the last three in bf16 with `half`, as is
    what the LayerNorms give. Beside that four statistics of the LayerNorms and one of each head. Dropout keeps two masks of D.

    Args:
        config: the network.
        windows: a micro-batch.
        window: tokens of each.
        half: bf16 autocast.
        cpu: where dropout keeps fp32 masks, and attention with dropout keeps three matrices of window x window a head.
    """
    D, L, H, dropout = config.n_embd, config.n_layer, config.n_head, config.dropout > 0
    narrow = 2 if half else 4
    token = 4 * 2 * D + narrow * (2 + 3 + 1 + 8) * D + 4 * (4 + H)
    final = 4 * D + narrow * D + 4 * 2 + 8
    if dropout:
        mask = 1
        if cpu:
            mask = 4
            token += 4 * 3 * H * window
        token += 2 * mask * D
        final += mask * D
    return windows * window * (L * token + final)


def training_memory(
    config: ModelConfig,
    optimizer: Literal["adamw", "muon"],
    windows: int,
    window: int,
    half: bool,
    accumulate: bool = False,
    cpu: bool = False,
    shards: int = 1,
) -> Memory:
    """What one rank holds with micro-batches of `windows` windows of `window` tokens.

    Args:
        config: the network.
        optimizer: `training.optimizer`.
        windows: a micro-batch.
        window: tokens of each.
        half: bf16 autocast.
        accumulate: a step has several micro-batches.
        cpu: see `activation_bytes`.
        shards: ranks that share weights, gradients and moments (FSDP).
    """
    parameters = parameters_by_kind(config)
    return Memory(
        weights=4 * parameters.total // shards,
        gradients=4 * parameters.total // shards,
        optimizer=optimizer_bytes(config, optimizer) // shards,
        half_weights=2 * parameters.matrices // shards if half else 0,
        activations=activation_bytes(config, windows, window, half, cpu),
        loss=_loss_bytes(config, windows * window, half, accumulate, cpu),
    )


def _loss_bytes(config: ModelConfig, positions: int, half: bool, accumulate: bool, cpu: bool) -> int:
    """In fp32 the logits become softmax and gradient where they lie; with bf16 autocast softmax is fp32 beside logits and gradient."""
    vocabulary = config.vocab_size if cpu else config.vocab_size + -config.vocab_size % 128
    padded = vocabulary * config.n_embd
    found = min(LOSS_POSITIONS["cpu" if cpu else "cuda"], positions) * vocabulary * (2 + 4 + 2 if half else 4)
    if half:
        found += 2 * config.vocab_size * config.n_embd + 2 * padded  # the embedding in bf16, and a chunk's gradient of it …
        found += 4 * padded if cpu else 0  # … which a CPU widens to fp32 before it adds
    if not cpu:
        found += (2 if half else 4) * padded
    return found + (4 * padded if accumulate else 0)


class CheckpointSize(NamedTuple):
    """Bytes of one checkpoint."""

    weights: int
    """model.safetensors."""
    optimizer: int
    """optimizer.safetensors."""

    @property
    def total(self) -> int:
        """With state.json and manifest.json."""
        return self.weights + self.optimizer + _FILE_OVERHEAD


def checkpoint_size(config: ModelConfig, optimizer: Literal["adamw", "muon"]) -> CheckpointSize:
    """What model/checkpoint writes: fp32 weights (the tied head once) and the moments."""
    tensors = 12 * config.n_layer + 4
    return CheckpointSize(
        weights=4 * parameters_by_kind(config).total + tensors * _TENSOR_OVERHEAD,
        optimizer=optimizer_bytes(config, optimizer) + 3 * tensors * _TENSOR_OVERHEAD,
    )
