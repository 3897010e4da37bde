"""What a training step costs in floating-point operations, and what share of a GPU's peak a speed is (MFU). Needs no torch."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from model.config import ModelConfig

Precision = Literal["bf16", "tf32", "fp32"]


class Parameters(NamedTuple):
    """The parameters of a network by kind, as the optimizers tell them apart."""

    tokens: int
    """`wte`, which is the head, too."""
    positions: int
    """`wpe`."""
    matrices: int
    """The blocks' matrices."""
    vectors: int
    """Biases and LayerNorms."""

    @property
    def total(self) -> int:
        """All of them; 124,439,808 for `small`."""
        return sum(self)


def parameters_by_kind(config: ModelConfig) -> Parameters:
    """The parameters of a network of this shape, without building it."""
    D, L = config.n_embd, config.n_layer
    return Parameters(
        tokens=config.vocab_size * D,
        positions=config.context_length * D,
        matrices=L * 12 * D**2,
        vectors=L * 13 * D + 2 * D,
    )


def flops_per_token(config: ModelConfig, window: int) -> float:
    """Operations that forward and backward pass need a token, in windows of `window` tokens: 6·N + 12·L·H·Q·T.

    N are the parameters without `wpe`, which is only looked up; `wte` counts, because it is the head. L layers, H heads of width Q, T the
    window. Recomputation, the optimizer and what LayerNorm, GELU and softmax take are left out, and attention counts as if it were not
    causal: the convention of PaLM (Chowdhery et al. 2022, appendix B), so that figures compare.
    """
    parameters = parameters_by_kind(config)
    return float(6 * (parameters.total - parameters.positions) + 12 * config.n_layer * config.n_embd * window)


class _Peak(NamedTuple):
    """Peaks of one GPU in TFLOP/s, dense (data sheets' figures "with sparsity" are twice these); None: it has no such units."""

    words: str
    """All of them are in the name that the driver gives."""
    bf16: float | None
    tf32: float | None
    fp32: float


_PEAKS = (
    # AMD Instinct MI300X data sheet
    _Peak("MI300X", 1307.4, 653.7, 163.4),
    # NVIDIA HGX platform page and Blackwell architecture brief: HGX B200 is 36 PFLOP/s of sparse bf16 in 8 GPUs, GB200 NVL72 360 in 72
    _Peak("GB200", 2500, 1250, 80),
    _Peak("B200", 2250, 1125, 75),
    # NVIDIA H200 data sheet
    _Peak("H200 NVL", 835.5, 417.5, 60),
    _Peak("H200", 989.4, 494.7, 66.9),
    # NVIDIA H100 architecture white paper, table 3 (SXM5, PCIe); H100 NVL: H100 data sheet
    _Peak("H100 NVL", 835.5, 417.5, 60),
    _Peak("H100 PCIE", 756, 378, 51.2),
    _Peak("H100", 989.4, 494.7, 66.9),
    _Peak("GH200", 989.4, 494.7, 66.9),
    # NVIDIA A100 data sheet (40 and 80 GB, SXM and PCIe alike), A40, A30, A10 data sheets
    _Peak("A100", 312, 156, 19.5),
    _Peak("A40", 149.7, 74.8, 37.4),
    _Peak("A30", 165, 82, 10.3),
    _Peak("A10", 125, 62.5, 31.2),
    # NVIDIA L40S, L40, L4 data sheets
    _Peak("L40S", 362.05, 183, 91.6),
    _Peak("L40", 181.05, 90.5, 90.5),
    _Peak("L4", 121, 60, 30.3),
    # NVIDIA RTX Blackwell, Ada and GA102 white papers; 16-bit with fp32 accumulation, which is what torch asks for
    _Peak("RTX 5090", 209.5, 104.8, 104.8),
    _Peak("RTX 4090", 165.2, 82.6, 82.6),
    _Peak("RTX 4080", 97.5, 48.7, 48.7),
    _Peak("RTX 3090 TI", 80, 40, 40),
    _Peak("RTX 3090", 71, 35.6, 35.6),
    _Peak("RTX A6000", 154.8, 77.4, 38.7),
    _Peak("RTX 6000 ADA", 364.2, 182.1, 91.1),
    # NVIDIA T4 and V100 data sheets: tensor cores for fp16 only
    _Peak("T4", None, None, 8.1),
    _Peak("V100 PCIE", None, None, 14),
    _Peak("V100", None, None, 15.7),
)
"""The first whose words are in the name counts."""
_OTHER_CARDS = {"MIG", "LAPTOP", "MOBILE", "MAX", "SUPER", "TI", "D"}
"""A slice of a GPU, or another one of nearly the same name: no peak is better than a wrong one."""


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """The dense peak of a GPU in operations a second, by the vendor's data sheet.

    Args:
        device_name: what `torch.cuda.get_device_name()` says, such as `NVIDIA H100 80GB HBM3`, or the bare model, such as `H100`.
        precision: of the operands; fp32 is without tensor cores.

    Returns:
        None for a GPU that is not in the table, a slice of one (MIG), one without such units, and a CPU.
    """
    words = set(re.split(r"[\s-]+", device_name.upper()))
    for peak in _PEAKS:
        wanted = set(peak.words.split())
        if wanted <= words:
            tera = getattr(peak, precision)
            return None if tera is None or (_OTHER_CARDS - wanted) & words else float(round(tera * 1e12))
    return None


def mfu(tokens_per_s: float, flops_per_token: float, peak: float | None, ranks: int = 1) -> float | None:
    """Model FLOPs utilisation: which share of the ranks' peak the network's own operations take (Chowdhery et al. 2022, appendix B).

    Args:
        tokens_per_s: of all ranks together.
        flops_per_token: see `flops_per_token`.
        peak: of one rank's device, operations a second; None: not known, and the answer is None, too.
        ranks: devices that train together.
    """
    return tokens_per_s * flops_per_token / (peak * ranks) if peak else None
