"""The training loop: windows in, checkpoints and journal out. It talks to no server.

Exactness: the weights after step n are a pure function of the config. The data order is (model/stream), and so are the randomness of
dropout (model/training/engine.py) and what happens to bad steps (model/training/bad_steps.py).

Several ranks run this same loop. At each step they tell each other what they have got and whether one was asked to stop, so all of them
do the same; the first one alone writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import load_file

from model import disk
from model.background import wait_for
from model.checkpoint.store import MODEL, OPTIMIZER, Checkpoint, name_of
from model.errors import Interrupted, NotSaved, Stopped, TooManyBadSteps
from model.flops import flops_per_token, mfu, peak_flops
from model.huggingface import read_weights
from model.run_folder import RunFolder
from model.stop import StopRequest
from model.stream.batches import Batch, State, TrainingWindows
from model.stream.packing import OddRows
from model.training.bad_steps import BadSteps
from model.training.distributed import Ranks
from model.training.energy import Meter, machine_meter
from model.training.engine import Engine
from model.training.identity import code_identity, versions
from model.training.journal import Journal, Silence, read_current
from model.training.lock import Fence, no_fence
from model.training.norms import Norms
from model.training.resume import Start, find_start, rewind_after_spike
from model.training.run import Machine, read_run
from model.training.saving import Saver
from model.training.schedule import learning_rate_factor
from model.training.validating import Validator

_LOADER_THREADS = 4
"""At most, a rank. One tokenizes about 4 M tokens/s."""
_LAST_SAVE_S = float(os.environ.get("GPT2_LAST_SAVE_S", "600"))
"""How long a finished training tries to write its last checkpoint: somebody may make room on the disk."""


class Trainer:
    """One training run, from wherever its folder says it stands, to its end or to a stop request.

    Args:
        folder: the run's.
        machine: what it is computed with.
        device: this rank's own.
        ranks: who trains together.
        stop: asks this rank to stop.
        fence: asked before anything is written.
        named: where that lies which `checkpoint_to_resume`, `fork_of` or `post_training` names, if not in this run.
    """

    def __init__(
        self,
        folder: RunFolder,
        machine: Machine,
        device: torch.device,
        ranks: Ranks,
        stop: StopRequest,
        fence: Fence = no_fence,
        named: Path | None = None,
    ) -> None:
        self.folder, self.machine, self.device, self.ranks, self.stop = folder, machine, device, ranks, stop
        self.config, self.manifest = ranks.from_first(lambda: read_run(folder))
        start = ranks.from_first(lambda: find_start(folder, self.config, named))
        state = start.checkpoint.state() if start.checkpoint is not None else {}
        self.engine = Engine(self.config, machine.hardware, device, ranks, state.get("micro_batches", {}).get(str(ranks.size)))
        self.bad_steps = BadSteps(self.config.training)
        self.step, self.tokens = 0, 0
        self.stream_state: State | None = None
        self.odd_rows: OddRows | None = None
        if start.checkpoint is not None:
            self._load(start.checkpoint, start.same_optimizer)
            self.stream_state = state["stream"] if start.same_data else None
        self.flops_per_token = flops_per_token(self.config.model, self.config.data.max_length)
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.peak_flops = peak_flops(self.device_name, "bf16" if self.engine.autocast else "fp32")
        self.meter = machine_meter(device) if ranks.first else Meter([])
        self.journal = Journal(folder.journal, fence) if ranks.first else Silence()
        self._stop_told = threading.Lock()
        self._warm = False
        """Whether this process has taken a step."""
        if start.base is not None:
            self.engine.load(read_weights(start.base / MODEL), {})
        own = start.checkpoint if start.fork is None else None
        self.resumed_from = own.name if own is not None else None
        self.saver = Saver(folder, self.config, self.engine, ranks, self.journal, own, fence)
        self.validator = Validator(folder, self.config, self.manifest, self.engine, self.journal)
        self._tell_start(start)
        self.losses: dict[int, float] = ranks.from_first(self._read_losses)
        if start.fork is not None or start.base is not None:
            self._save()

    def _tell_start(self, start: Start) -> None:
        fork = {"forked_from": start.fork.model_dump()} if start.fork is not None else {}
        self._record_start(start.checkpoint if start.fork is None else None, **fork)
        for kind, message in start.messages + ([("journal", self.journal.damage)] if self.journal.damage else []):
            self.journal.warn(self.step, kind, message)

    def _read_losses(self) -> dict[int, float]:
        """On the validation windows, by step."""
        return {event["step"]: event["loss"] for event in read_current(self.folder.journal) if event["event"] == "validation"}

    def _load(self, checkpoint: Checkpoint, with_optimizer: bool = True) -> None:
        """Weights, optimizer and counts. The stream's position is another matter."""
        state = checkpoint.state()
        self.engine.load(read_weights(checkpoint.path / MODEL), load_file(checkpoint.path / OPTIMIZER) if with_optimizer else {})
        self.step, self.tokens = state["step"], state["tokens"]
        self.bad_steps.load(state["bad_steps"])

    def _record_start(self, start: Checkpoint | None, **more: Any) -> None:
        self.journal.append(
            "started",
            step=self.step,
            config_digest=self.config.digest,
            resumed_from=start.name if start else None,
            checkpoint_to_resume=self.config.checkpoint.checkpoint_to_resume,
            total_steps=self.config.total_steps,
            device=str(self.device),
            device_name=self.device_name,
            ranks=self.ranks.size,
            micro_batch=self.engine.micro_batch,
            precision="bf16" if self.engine.autocast else "fp32",
            parameters=sum(parameter.numel() for parameter in self.engine.model.parameters()),
            flops_per_token=self.flops_per_token,
            versions=versions(),
            code=code_identity(),
            threads=torch.get_num_threads(),
            **self.meter.about(),
            **({"post_trains": self.config.post_training.base.model_dump()} if self.config.post_training is not None else {}),
            **more,
        )

    def run(self) -> None:
        """Train to the end.

        Raises:
            Stopped: somebody asked; everything is saved.
            TooManyBadSteps: training does not get better by going on.
        """
        try:
            with contextlib.ExitStack() as warming_up:
                if self.ranks.size == 1:  # ranks must agree on when to leave
                    self.stop.last_words = lambda: self._record_stop(self.resumed_from)
                    warming_up.enter_context(self.stop.interruptible())
                self._train(warming_up)
        except (Exception, Interrupted):
            if not self.stop.interrupted:
                raise
            self._tell_stopped(self.resumed_from)
        finally:
            self.saver.close()

    def _train(self, warming_up: contextlib.ExitStack) -> None:
        training = self.config.training
        self.validator.windows = self.ranks.from_first(self._read_validation_windows)
        if self.validator.windows is None:
            self._leave()
        windows = TrainingWindows(
            self.manifest,
            self.config.data,
            self.config.seed,
            self.config.global_batch,
            training.num_epochs,
            self.stream_state,
            windows=self.config.windows,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            threads=_loader_threads(),
            cache=self.folder.token_caches if self.config.data.cache else None,
            stopping=lambda: bool(self.stop),
        )
        if (self.step or self.config.post_training is not None) and self._validation_due():
            self._validate()  # of the base, or what the stop that we resume from may have cut short
        with contextlib.closing(windows):
            while not self._finished():
                began = time.perf_counter()
                batch = self._next(windows)
                waited = time.perf_counter() - began
                epoch = batch.epoch if batch is not None else training.num_epochs
                mine = (len(batch.windows), batch.read, batch.learned) if batch is not None else (0, 0, 0)
                told = self.ranks.gather(*mine, epoch, bool(self.stop), len(windows.warnings))
                counts, read, learned, epochs, stops, warnings = zip(*told, strict=True)
                if any(warnings):
                    self._warn(windows)
                if any(stops):
                    self._leave()
                if batch is None or not any(counts):
                    break
                self._train_step(batch, list(counts), sum(read), sum(learned), min(epochs), began, waited)
                if not self._warm:
                    warming_up.close()  # from now on there is something to save
                    self.saver.prepare()
                    self._warm = True
                save = self._due(self.config.checkpoint.save_every_n_iterations)
                if save:
                    self._save()
                if self._validation_due():
                    self._validate()
                if save:
                    self.saver.retain(self.losses)
        warming_up.close()
        self._finish()

    def _next(self, windows: TrainingWindows) -> Batch | None:
        """This rank's share of the next global batch. None: there is none, or this rank stops for a source that does not answer."""
        try:
            return next(windows, None)
        except Stopped as fault:
            self._stop_for(fault)
            return None

    def _warn(self, windows: TrainingWindows) -> None:
        own = [windows.warnings.popleft() for _ in range(len(windows.warnings))]
        for messages in self.ranks.gather_objects(own):
            for message in messages:
                self.journal.warn(self.step, "stream", message)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _validation_due(self) -> bool:
        due = self._due(self.config.training.eval_freq) or self._due(self.config.checkpoint.save_every_n_iterations)
        return due and self.step not in self.losses

    def _finished(self) -> bool:
        return self.config.training.max_steps is not None and self.step >= self.config.training.max_steps

    def _train_step(self, batch: Batch, counts: list[int], read: int, learned: int, epoch: int, began: float, waited: float) -> None:
        """One optimizer step on a global batch of which each rank has `counts` windows, and all of them so many tokens that are `read`, of
        which so many are `learned`; `began` is when it began to wait for it."""
        training, engine = self.config.training, self.engine
        factor = learning_rate_factor(self.step, training, self.config.total_steps)
        rounds = math.ceil(max(counts) / engine.micro_batch)
        loss, norm = engine.accumulate(batch.windows, self.step, learned, rounds)
        try:
            verdict = self.bad_steps.judge(self.step + 1, loss, norm)
        except TooManyBadSteps as error:
            self.journal.append("warning", step=self.step, kind="bad step", message=str(error))
            raise
        self.stream_state, self.odd_rows = batch.state, batch.odd_rows
        if verdict == "rollback":
            engine.discard()
            self._roll_back(norm)
            return
        norms: dict[str, Any] = {}
        self.step += 1
        self.tokens += read
        if verdict == "skip":
            engine.discard()
            self.journal.warn(self.step, "bad step", f"skipped: loss {loss:.4g}, gradient norm {norm:.4g}")
        elif self._due(self.machine.journal.norms_every):
            before = Norms(engine.model)
            engine.update(factor)
            norms = before.fields(self.machine.journal.per_layer)
        else:
            engine.update(factor)
        if self._due(self.config.checkpoint.save_every_n_iterations):
            self.bad_steps.regular_checkpoint()
        seconds = time.perf_counter() - began
        self.journal.append(
            "step",
            step=self.step,
            epoch=epoch,
            loss=_finite(loss),
            learning_rate=training.learning_rate * factor,
            gradient_norm=_finite(norm),
            skipped_steps=self.bad_steps.skipped,
            tokens=self.tokens,
            tokens_per_s=round(read / seconds),
            **({"completion_tokens": learned} if self.config.post_training is not None else {}),
            step_time_s=round(seconds, 4),
            data_wait_share=round(waited / seconds, 4),
            **self._utilisation(read / seconds),
            **norms,
        )

    def _utilisation(self, tokens_per_s: float) -> dict[str, float]:
        """What is known on some machines only."""
        found = {}
        if (joules := self.meter.joules()) is not None:
            found["energy_j"] = joules
        if (share := mfu(tokens_per_s, self.flops_per_token, self.peak_flops, self.ranks.size)) is not None:
            found["mfu"] = round(share, 4)
        if self.device.type == "cuda":
            found["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
        return found

    def _roll_back(self, norm: float) -> None:
        """Go back to the weights of the last regular checkpoint, and on with the batches after this one."""
        spike = self.step + 1
        self.saver.wait()
        target = self.ranks.from_first(lambda: rewind_after_spike(self.folder, self.config, self.step))
        if target is None:
            self.engine.load_initial()
            self.step, self.tokens = 0, 0
        else:
            self._load(target)
        self.bad_steps.rolled_back(target.state()["bad_steps"] if target is not None else None)
        self.saver.went_back_to(target)
        self._record_start(target, rolled_back_from=spike)
        message = f"step {spike}: a gradient norm of {norm:.4g}; went back to step {self.step} and passed over the batches up to it"
        self.journal.warn(self.step, "bad step", message)
        self.losses = {step: loss for step, loss in self.losses.items() if step <= self.step}

    def _read_validation_windows(self) -> np.ndarray | None:
        """None when they could not be had before a stop."""
        try:
            return wait_for(self.validator.read_windows, lambda: Stopped(str(self.stop.reason)) if self.stop else None)
        except Stopped as fault:
            self._stop_for(fault)
            return None

    def _stop_for(self, fault: Stopped) -> None:
        """A source does not answer, or somebody had asked for a stop before: this rank stops at the end of the step."""
        if not self.stop:
            self.journal.append("warning", step=self.step, kind="stream", message=str(fault))
        self.stop.ask(str(fault))

    def _validate(self) -> None:
        """Every rank computes the same: some seconds, and no sum that depends on their number. They stop it together, too."""
        loss = self.validator.validate(self.step, lambda: any(stop for (stop,) in self.ranks.gather(bool(self.stop))))
        if loss is not None:
            self.losses[self.step] = loss

    def _save(self) -> None:
        self.saver.save(self.step, self.tokens, self.stream_state, self.odd_rows, self.bad_steps)

    def _leave(self) -> NoReturn:
        """Save and stop, because at least one rank was asked to."""
        self.stop.ask(next(reason for reason in self.ranks.gather_objects(self.stop.reason) if reason is not None))
        checkpoint = None
        if self.step:
            self._save()
            checkpoint = self.saver.wait()
        self._tell_stopped(checkpoint.name if checkpoint is not None else None)

    def _tell_stopped(self, checkpoint: str | None) -> NoReturn:
        reason = self.stop.reason
        self._record_stop(checkpoint)
        self._close()
        saved = "" if checkpoint == name_of(self.step) or not self.step else ", which could not be saved"
        raise Stopped(f"stopped at step {self.step}{saved} ({reason}); the same command goes on from {checkpoint or 'the last checkpoint'}")

    def _record_stop(self, checkpoint: str | None) -> None:
        """Once: a process that is left because it does not end may be doing this already."""
        if not self._stop_told.acquire(blocking=False):
            return
        self.journal.append("stopped", step=self.step, reason=self.stop.reason, checkpoint=checkpoint)

    def _close(self) -> None:
        """The journal is whole before any rank leaves: the launcher ends all when one has gone."""
        self.saver.close()
        self.journal.close()
        self.ranks.gather()

    def _finish(self) -> None:
        checkpoint = self._last_checkpoint()
        if self.step not in self.losses:
            self._validate()
        if self.step not in self.losses:
            self._leave()
        self.saver.retain(self.losses)
        if self.ranks.first:
            self._write_metrics()
        self.journal.append(
            "finished",
            step=self.step,
            tokens=self.tokens,
            checkpoint=checkpoint.name,
            digest=checkpoint.digest,
            model_sha256=checkpoint.model_sha256,
        )
        self._close()

    def _last_checkpoint(self) -> Checkpoint:
        """The checkpoint of the last step. Whoever trained for a week gets some minutes to make room on the disk.

        Raises:
            NotSaved: it could not be written.
        """
        deadline, pause = time.monotonic() + _LAST_SAVE_S, 1.0
        while True:
            self._save()
            checkpoint = self.saver.wait()
            if checkpoint is not None and checkpoint.step == self.step:  # not the one before, if this one was not even begun
                return checkpoint
            ((stop,), *_) = self.ranks.gather(bool(self.stop) or time.monotonic() > deadline)
            if stop:
                raise NotSaved(
                    f"the last checkpoint, {name_of(self.step)}, could not be written; make room on the disk of {self.folder.path}, and "
                    "the same command trains the steps since the one before again"
                )
            self._sleep(pause)
            pause = min(2 * pause, 30.0)

    def _sleep(self, seconds: float) -> None:
        """Somewhat shorter if a stop is asked for."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stop:
            time.sleep(0.1)

    def _write_metrics(self) -> None:
        last = {event["event"]: event for event in read_current(self.folder.journal)}
        metrics = {
            "step": self.step,
            "tokens": self.tokens,
            "train_loss": last["step"]["loss"] if "step" in last else None,
            "validation_loss": last["validation"]["loss"],
            "validation_bits_per_byte": last["validation"]["bits_per_byte"],
        }
        disk.write_file(self.folder.metrics, json.dumps(metrics, indent=1).encode() + b"\n")


def _finite(number: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return number if math.isfinite(number) else None


def _loader_threads() -> int:
    """This rank's share of the machine's cores, but for one."""
    return min(_LOADER_THREADS, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
