"""Ways to make checkpoints of one and the same training, for benchmarks/checkpoint.py: this project's, torch.save, and torch's DCP."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import CheckpointConfig, DataConfig, HardwareConfig, ModelConfig, TrainingConfig
from model.run_config import DatasetSummary, RunConfig

if TYPE_CHECKING:
    pass

BATCH, LENGTH = 8, 512
"""Of the step whose time says which share of training the stalls are."""


class Training:
    """A network in training, the same for all.

    Args:
        preset: its size.
    """

    def __init__(self, preset: str) -> None:
        import torch

        from model.device import pick_device
        from model.training.distributed import Ranks
        from model.training.engine import Engine

        model = ModelConfig(preset=preset)  # type: ignore[arg-type]
        self.config = RunConfig(
            seed=0,
            model=model,
            data=DataConfig(path="nowhere", max_length=min(LENGTH, model.context_length)),
            dataset=DatasetSummary(digest="", revision=None, files=0, samples=0, train_samples=0, tokens_per_sample=0.0),
            training=TrainingConfig(batch_size=BATCH, optimizer="adamw"),
            checkpoint=CheckpointConfig(),
            total_steps=1000,
        )
        self.device, self.ranks = pick_device("auto"), Ranks()
        self.engine = Engine(self.config, HardwareConfig(), self.device, self.ranks, None)
        shape, generator = (BATCH, self.config.data.max_length + 1), torch.Generator().manual_seed(0)
        self._windows = torch.randint(0, model.vocab_size, shape, generator=generator).to(torch.uint16)
        self.steps = 0

    def step(self, windows: int, tokens: int) -> float:
        """Take an optimizer step on so many windows of so many tokens; returns its seconds."""
        part = self._windows[:windows, : tokens + 1]
        self.synchronize()
        began = time.perf_counter()
        self.engine.accumulate(part, self.steps, part[:, 1:].numel(), 1)
        self.engine.update(1.0)
        self.synchronize()
        self.steps += 1
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def fingerprint(self) -> int:
        """Another one for weights or optimizer's state of which one bit differs."""
        import torch

        tensors = [*self.engine.weights().values(), *self.engine.optimizer_state().values()]
        return sum(int(tensor.view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors)

    def forget(self) -> None:
        """A network and an optimizer that know nothing: what is there after a load came from it."""
        import torch

        from model.training.optimizer import build_optimizer

        with torch.no_grad():
            for parameter in self.engine.model.parameters():
                parameter.zero_()
        self.engine.optimizer = build_optimizer(self.engine.model, self.config.training)


@dataclass
class Contestant:
    """One way to make checkpoints."""

    save: Callable[[int], Callable[[], Any] | None]
    """Begin the checkpoint with this number. Returns what waits until it is complete; None: it is already."""
    place: Callable[[int], Path]
    """The file or folder of the checkpoint with this number."""
    load: Callable[[Path], None]
    """Bring it back into the training."""
    fsync: str
    """What of it is durable then: all (yes), or only the data. DCP fsyncs `.metadata`, without which nothing loads, while its contents
    are still in Python's buffer (strace shows it), and does not fsync the folder."""
    verify: Callable[[Path], None] | None = None
    """Read all of it and raise if it is not what was written."""
    load_mapped: Callable[[Path], None] | None = None
    """The same as `load` through a memory map."""
    prepare: Callable[[], None] = field(default=lambda: None)
    """What a training does for it after its first step."""
    close: Callable[[], None] = field(default=lambda: None)


def ours(training: Training, folder: Path) -> Contestant:
    """The trainer's own way, journal included."""
    from safetensors.torch import load_file

    from model.checkpoint.store import MODEL, OPTIMIZER, name_of, open_checkpoint
    from model.huggingface import read_weights
    from model.run_folder import RunFolder
    from model.training.bad_steps import BadSteps
    from model.training.journal import Journal
    from model.training.lock import no_fence
    from model.training.saving import Saver

    run = RunFolder(folder)
    journal = Journal(run.journal)
    saver = Saver(run, training.config, training.engine, training.ranks, journal, None, no_fence)
    bad_steps = BadSteps(training.config.training)

    def wait() -> None:
        if saver.wait() is None:
            raise RuntimeError(f"the disk did not take a checkpoint within a minute: {run.journal.read_text(encoding='utf-8')}")

    def save(number: int) -> Callable[[], Any]:
        saver.save(number, 0, None, None, bad_steps)
        return wait

    def load(path: Path) -> None:
        checkpoint = open_checkpoint(path)
        checkpoint.verify()
        checkpoint.state()
        training.engine.load(read_weights(path / MODEL), load_file(path / OPTIMIZER))

    def close() -> None:
        saver.close()
        journal.close()

    def verify(path: Path) -> None:
        open_checkpoint(path).verify()

    return Contestant(save, lambda number: run.checkpoints / name_of(number), load, "yes", verify, prepare=saver.prepare, close=close)


def torch_save(training: Training, folder: Path) -> Contestant:
    """One file, written while training waits: to another name, fsync, rename."""
    import torch

    from model import disk

    def place(number: int) -> Path:
        return folder / f"{number}.pt"

    def save(number: int) -> None:
        partial = folder / "partial"
        torch.save({"model": training.engine.model.state_dict(), "optimizer": training.engine.optimizer.state_dict()}, partial)
        disk.fsync(partial)
        disk.rename(partial, place(number))
        disk.fsync(folder)

    def load(path: Path, mapped: bool = False) -> None:
        saved = torch.load(path, map_location=training.device, weights_only=True, mmap=mapped)
        training.engine.model.load_state_dict(saved["model"])
        training.engine.optimizer.load_state_dict(saved["optimizer"])

    return Contestant(save, place, load, "yes", load_mapped=lambda path: load(path, mapped=True))


def dcp(training: Training, folder: Path) -> Contestant:
    """`async_save` as it comes."""
    return _dcp(training, folder, cached=False)


def dcp_cached(training: Training, folder: Path) -> Contestant:
    """`async_save` with a stager that keeps its memory; page-locked for a GPU.

    Its other option, staging while training goes on, is for GPUs only, and the trainer must wait before it updates the weights; here the
    call waits.
    """
    return _dcp(training, folder, cached=True)


def _dcp(training: Training, folder: Path, cached: bool) -> Contestant:
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    on_gpu = training.device.type == "cuda"
    stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu)) if cached else None

    def state() -> dict[str, Any]:
        model, optimizer = get_state_dict(training.engine.model, training.engine.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(number: int) -> Callable[[], Any]:
        return checkpoint.async_save(state(), checkpoint_id=folder / str(number), async_stager=stager).result

    def load(path: Path) -> None:
        found = state()
        checkpoint.load(found, checkpoint_id=path)
        set_state_dict(
            training.engine.model,
            training.engine.optimizer,
            model_state_dict=found["model"],
            optim_state_dict=found["optimizer"],
        )

    def close() -> None:
        if stager is not None:
            stager.close()
        dist.destroy_process_group()

    return Contestant(save, lambda number: folder / str(number), load, "data", close=close)


CONTESTANTS: dict[str, Callable[[Training, Path], Contestant]] = {
    "ours": ours,
    "torch.save": torch_save,
    "dcp.async": dcp,
    "dcp.async cached": dcp_cached,
}
