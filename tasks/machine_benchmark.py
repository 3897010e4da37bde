"""How fast this machine trains: whole optimizer steps on random tokens, timed, with the share of the GPU's peak that they reach."""

from __future__ import annotations

import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from model.config import PRESETS, ModelConfig, TrainingConfig
from model.device import pick_device
from model.errors import UserError
from model.flops import flops_per_token, mfu, peak_flops
from model.gpt2 import GPT2
from model.training.optimizer import build_optimizer

_WARM_UP = 3
"""Steps before the clock starts: compilation, the allocator's growth, the optimizer's first state."""
_QUEUED = 8
"""Steps that a GPU is given before the program waits for it."""
_CPU_BATCH = 8


@dataclass(frozen=True)
class Measurement:
    """One micro-batch size; `--json` prints these fields by their names."""

    device: str
    torch: str
    preset: str
    parameters: int
    window: int
    """Tokens a window."""
    batch: int
    """Windows a step, in one micro-batch."""
    dropout: float
    precision: str
    compiled: bool
    steps: int
    """That were timed."""
    step_time_s: float
    """Median."""
    tokens_per_s: float
    """Over all timed steps."""
    mfu: float | None
    """Share of the device's dense peak at this precision; None: a CPU, or a GPU whose peak is not known."""
    memory_mb: float
    """Peak, 10^6 bytes: what tensors took on a GPU; resident memory of this process on a CPU."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def measure(preset: str, window: int | None, batch: str, dropout: float, compile_model: bool, seconds: float) -> list[Measurement]:
    """Time training steps: forward, backward, clipping, AdamW; bf16 autocast on CUDA, fp32 elsewhere.

    Args:
        preset: the network's size.
        window: tokens a window; None: the preset's context.
        batch: windows a step, or `auto`: powers of two until a GPU's memory is full (on a CPU, 8).
        dropout: while training.
        compile_model: torch.compile the network.
        seconds: to time each micro-batch size for; at least one step is.

    Returns:
        One for each micro-batch size.

    Raises:
        UserError: an unknown preset, a window that it cannot take, a batch that is no number or does not fit.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset: no {preset!r}; there are {', '.join(PRESETS)}")
    context = PRESETS[preset]["context_length"]
    window = window or context
    if window > context:
        raise UserError(f"--window: {window:,} is longer than the {context:,} tokens that {preset} looks back on")
    config, device = ModelConfig.model_validate({"preset": preset, "dropout": dropout}), pick_device("auto")
    found: list[Measurement] = []
    for size in _sizes(batch, device):
        try:
            found.append(_measure_one(config, device, window, size, compile_model, seconds))
        except torch.OutOfMemoryError:
            break
        finally:
            _forget(device, compile_model)
    if not found:
        raise UserError(f"--batch: {batch} does not fit this GPU's memory with --preset {preset} and --window {window}")
    return found


def _sizes(batch: str, device: torch.device) -> Iterator[int]:
    if batch == "auto":
        return (2**power for power in itertools.count()) if device.type == "cuda" else iter([_CPU_BATCH])
    if not batch.isdecimal() or int(batch) < 1:
        raise UserError(f"--batch: should be a number of windows or auto, not {batch!r}")
    return iter([int(batch)])


def _measure_one(config: ModelConfig, device: torch.device, window: int, batch: int, compile_model: bool, seconds: float) -> Measurement:
    torch.manual_seed(0)
    half = device.type == "cuda"
    network = GPT2(config).to(device).train()
    optimizer = build_optimizer(network, TrainingConfig())
    forward: Any = torch.compile(network) if compile_model else network
    tokens_BT = torch.randint(0, config.vocab_size, (batch, window + 1), device=device)
    targets = batch * window

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss = forward(tokens_BT[:, :-1], tokens_BT[:, 1:]) / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(_WARM_UP):
        step()
    times = (_times_on_cuda if half else _times_on_cpu)(step, seconds)
    speed, cost = targets * len(times) / sum(times), flops_per_token(config, window)
    name = torch.cuda.get_device_name(device) if half else f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"
    share = mfu(speed, cost, peak_flops(name, "bf16")) if half else None
    return Measurement(
        device=name,
        torch=torch.__version__,
        preset=config.preset,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        window=window,
        batch=batch,
        dropout=config.dropout,
        precision="bf16" if half else "fp32",
        compiled=compile_model,
        steps=len(times),
        step_time_s=round(statistics.median(times), 5),
        tokens_per_s=round(speed, 1),
        mfu=None if share is None else round(share, 4),
        memory_mb=round(_peak_bytes(device) / 1e6, 1),
    )


def _times_on_cpu(step: Callable[[], None], seconds: float) -> list[float]:
    times: list[float] = []
    while sum(times) < seconds:
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times


def _times_on_cuda(step: Callable[[], None], seconds: float) -> list[float]:
    """Seconds from the end of one step to the end of the next, by the GPU's own clock; the program runs ahead, as in training."""
    ends = [torch.cuda.Event(enable_timing=True)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    ends[0].record()
    while time.perf_counter() - began < seconds:
        for _ in range(_QUEUED):
            step()
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        ends[-1].synchronize()
    return [first.elapsed_time(second) / 1000 for first, second in itertools.pairwise(ends)]


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget(device: torch.device, compiled: bool) -> None:
    """The next size begins with an empty GPU, and is compiled for its own shapes."""
    if compiled:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
