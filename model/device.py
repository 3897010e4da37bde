"""The device that computes."""

from __future__ import annotations

import torch

from model.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device `hardware.device` names; `auto` is CUDA where there is one, else the CPU.

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
    return torch.device(name)
