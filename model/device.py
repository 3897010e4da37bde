"""The device that computes, and how it multiplies."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from model.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device `hardware.device` names; `auto` is CUDA where there is one, else the CPU. Sets this process up for it.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"hardware.device: cuda is not there (torch {torch.__version__}); use --set hardware.device=cpu, or a machine with a GPU"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("hardware.device: mps is not there; use --set hardware.device=cpu")
    if name == "cpu":
        use_fast_exact_products()
    return torch.device(name)


@functools.cache
def use_fast_exact_products() -> None:
    """Let oneDNN multiply fp32 matrices on CPUs where it does so exactly: on AMD's with AVX-512 it is twice as fast as MKL.

    torch takes oneDNN for fp32 only where bf16 would do, too. Without matrix units (AMX) oneDNN makes no use of that; one product tells.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None)
    if products is None:  # torch before 2.9
        return
    setting, products.fp32_precision = products.fp32_precision, "bf16"
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    if ((a @ a).double() - a.double() @ a.double()).abs().max() > 1e-3:  # fp32 is off by 1e-5, bf16 by 0.1
        products.fp32_precision = setting


@contextlib.contextmanager
def for_small_products() -> Iterator[None]:
    """Without oneDNN on CPUs while it lasts: to set a product up takes it 15 µs, ten times as long as a small one takes MKL. Attention from
    one position is made of hundreds of those."""
    products = getattr(torch.backends.mkldnn, "matmul", None)
    if products is None or products.fp32_precision != "bf16":
        yield
        return
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = "bf16"
