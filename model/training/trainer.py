"""The training loop: windows in, checkpoints and journal out. It talks to no server.

Exactness: the weights after step n are a pure function of the config. The data order is (model/stream), and so is the randomness of
dropout: before each micro-batch the generators are seeded from (seed, step, micro-batch). So a resume needs no generator's state.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.background import wait_for
from model.checkpoint.store import MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore, name_of
from model.digest import digest_of
from model.errors import Stopped
from model.evaluation.likelihood import validation_loss
from model.generation import answer
from model.gpt2 import GPT2
from model.huggingface import load_weights, save_weights
from model.run_folder import RunFolder
from model.stream.batches import Batch, TrainingWindows
from model.stream.packing import OddRows
from model.stream.validation import cached_validation_windows
from model.tokenizer import decode
from model.training.identity import code_identity, versions
from model.training.journal import Journal, read_current
from model.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate
from model.training.resume import set_aside_other_configurations, starting_checkpoint
from model.training.run import read_run
from model.training.schedule import learning_rate_factor
from model.training.stop import StopRequest

_LOADER_THREADS = min(4, max(1, (os.cpu_count() or 1) - 1))
"""One tokenizes about 3 M tokens/s."""


class Trainer:
    """One training run, from wherever its folder says it stands, to its end or to a stop request."""

    def __init__(self, folder: RunFolder, device: torch.device, compile_model: bool, stop: StopRequest) -> None:
        self.folder, self.device, self.stop = folder, device, stop
        self.config, self.manifest = read_run(folder)
        self.store = CheckpointStore(folder.checkpoints)
        self.store.sweep()
        aside = set_aside_other_configurations(folder, self.config)
        messages: list[str] = [f"another configuration's checkpoints were moved to {aside}"] if aside else []
        start = self.saved = starting_checkpoint(folder, self.config, messages.append)
        self.model = GPT2(self.config.model, seed=self.config.seed).to(device).train()
        self.optimizer = build_optimizer(self.model, self.config.training)
        self.step, self.tokens = 0, 0
        self.stream_state: dict[str, Any] | None = None
        self.odd_rows: OddRows | None = None
        if start is not None:
            self._load(start)
        precision = self.config.training.precision
        self.autocast = precision == "bf16" or (precision == "auto" and device.type == "cuda")
        self.forward: Any = torch.compile(self.model) if compile_model else self.model
        self.journal = Journal(folder.journal)
        self.journal.append(
            "started",
            step=self.step,
            config_digest=self.config.digest,
            resumed_from=start.name if start else None,
            checkpoint_to_resume=self.config.checkpoint.checkpoint_to_resume,
            total_steps=self.config.total_steps,
            device=str(device),
            precision="bf16" if self.autocast else "fp32",
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            versions=versions(),
            code=code_identity(),
            threads=torch.get_num_threads(),
        )
        self.validated_steps = {event["step"] for event in read_current(folder.journal) if event["event"] == "validation"}
        for message in messages:
            self.journal.append("warning", step=self.step, kind="resume", message=message)

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        load_weights(self.model, checkpoint.path / MODEL)
        load_optimizer_state(self.model, self.optimizer, load_file(checkpoint.path / OPTIMIZER))
        self.step, self.tokens, self.stream_state = state["step"], state["tokens"], state["stream"]

    def run(self) -> None:
        """Train to the end.

        Raises:
            Stopped: somebody asked; everything is saved.
        """
        training = self.config.training
        try:
            self.validation = wait_for(self._validation_windows, lambda: Stopped(self.stop.reason) if self.stop else None)
        except Stopped as fault:
            self._leave_for(fault)
        windows = TrainingWindows(
            self.manifest,
            self.config.data,
            self.config.seed,
            self.config.global_batch,
            training.num_epochs,
            self.stream_state,
            threads=_LOADER_THREADS,
            cache=self.folder.token_caches if self.config.data.cache else None,
            stopping=lambda: bool(self.stop),
        )
        if self.step and self._validation_due():
            self._validate()  # the stop that we resume from may have cut it short
        with contextlib.closing(windows) as batches:
            while not self._finished():
                if self.stop:
                    self._leave()
                began = time.perf_counter()
                try:
                    batch = next(batches, None)
                except Stopped as fault:
                    self._leave_for(fault)
                while windows.warnings:
                    self.journal.append("warning", step=self.step, kind="stream", message=windows.warnings.popleft())
                if batch is None:
                    break
                self._train_step(batch, began)
                if self._due(self.config.checkpoint.save_every_n_iterations):
                    self._save()
                if self._validation_due():
                    self._validate()
                    self._retain()
        self._finish()

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _validation_due(self) -> bool:
        due = self._due(self.config.training.eval_freq) or self._due(self.config.checkpoint.save_every_n_iterations)
        return due and self.step not in self.validated_steps

    def _finished(self) -> bool:
        return self.config.training.max_steps is not None and self.step >= self.config.training.max_steps

    def _train_step(self, batch: Batch, began: float) -> None:
        """One optimizer step; `began` is when it began to wait for its batch."""
        waited = time.perf_counter() - began
        training = self.config.training
        factor = learning_rate_factor(self.step, training, self.config.total_steps)
        set_learning_rate(self.optimizer, factor)
        targets = batch.windows.shape[0] * (batch.windows.shape[1] - 1)
        total = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(batch.windows.split(training.batch_size)):
            torch.manual_seed(int(digest_of([self.config.seed, self.step, number])[:15], 16))
            tokens_BT = micro_batch.to(self.device, non_blocking=True).long()
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                loss = self.forward(tokens_BT[:, :-1], tokens_BT[:, 1:]) / targets
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += targets
        self.stream_state, self.odd_rows = batch.state, batch.odd_rows
        loss_value, gradient_norm = _finite(total), _finite(norm)  # waits for the device: what follows measures the whole step
        seconds = time.perf_counter() - began
        self.journal.append(
            "step",
            step=self.step,
            epoch=batch.epoch,
            loss=loss_value,
            learning_rate=training.learning_rate * factor,
            gradient_norm=gradient_norm,
            tokens=self.tokens,
            tokens_per_s=round(targets / seconds),
            step_time_s=round(seconds, 4),
            data_wait_s=round(waited, 4),
        )

    def _validation_windows(self) -> np.ndarray:
        count = self.config.training.eval_iters * self.config.training.batch_size
        return cached_validation_windows(self.folder.validation_windows, self.manifest, self.config.data, self.config.seed, count)

    def _validate(self) -> None:
        result = validation_loss(self.model, self.validation, self.config.training.batch_size, lambda: bool(self.stop), self.autocast)
        if result is None:
            return
        loss, bits_per_byte = result
        self.validated_steps.add(self.step)
        self.journal.append("validation", step=self.step, loss=loss, bits_per_byte=bits_per_byte, windows=len(self.validation))
        prompt = self._sample_prompt()
        self.model.eval()
        try:
            text = answer(self.model, [prompt], max_new_tokens=48)[0]
        finally:
            self.model.train()
        self.journal.append("sample", step=self.step, prompt=prompt, text=text)

    def _sample_prompt(self) -> str:
        """The beginning of the first held-out document, up to where the network has something to say."""
        text = decode(self.validation[0].tolist())
        literal = self.config.data.prompt_template.rpartition("}")[2]
        end = text.find(literal) + len(literal) if literal and literal in text else 40
        return text[: max(1, end)]

    def _save(self) -> Checkpoint | None:
        """Seal a checkpoint, once a step. A disk that says no is reported and costs nothing but this checkpoint."""
        if self.saved is not None and self.saved.step == self.step:
            return self.saved
        began = time.perf_counter()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "stream": self.stream_state,
            "randomness": "seeded from (seed, step, micro-batch) before each micro-batch",
            "config": self.config.model_dump(mode="json"),
            "config_digest": self.config.digest,
            "versions": versions(),
            "code": code_identity(),
        }
        try:
            checkpoint = self.store.write(
                self.step,
                {
                    MODEL: lambda path: save_weights(self.model, path),
                    OPTIMIZER: lambda path: save_file(optimizer_state(self.model, self.optimizer), path),
                    STATE: lambda path: _write_text(path, json.dumps(state, indent=1, sort_keys=True)),
                },
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            self.journal.append("warning", step=self.step, kind="checkpoint", message=f"{name_of(self.step)} was not written: {error}")
            return None
        self.journal.append(
            "checkpoint",
            step=self.step,
            name=checkpoint.name,
            digest=checkpoint.digest,
            model_sha256=checkpoint.model_sha256,
            seconds=round(time.perf_counter() - began, 3),
            odd_rows=self.odd_rows._asdict() if self.odd_rows else None,
        )
        self.journal.sync()
        self.saved = checkpoint
        return checkpoint

    def _retain(self) -> None:
        """Keep the last k regular checkpoints, the best by validation loss, what the registry names, and the newest of all.

        So a save made by a stop request goes once a regular one has overtaken it, whether or not there ever was an interruption.
        """
        every, keep_last = self.config.checkpoint.save_every_n_iterations, self.config.checkpoint.keep_last
        checkpoints = self.store.checkpoints()
        regular = [c for c in checkpoints if c.step % every == 0]
        losses = {e["step"]: e["loss"] for e in read_current(self.folder.journal) if e["event"] == "validation"}
        best = min((c for c in regular if c.step in losses), key=lambda c: losses[c.step], default=None)
        protected = self._protected()
        self.store.retain(
            c.name
            for c in checkpoints
            if c in (regular[-keep_last:] if keep_last else regular) or c in (best, checkpoints[-1]) or c.digest in protected
        )

    def _protected(self) -> set[str]:
        """Digests of checkpoints that the registry's alias names, as evaluation last wrote it down: the trainer asks no server."""
        path = self.folder.scores
        champion = json.loads(path.read_text(encoding="utf-8"))["champion"] if path.exists() else None
        return {champion["digest"]} if champion else set()

    def _leave_for(self, fault: Stopped) -> NoReturn:
        """Leave because of a source that does not answer, unless somebody had asked for a stop."""
        if not self.stop:
            self.journal.append("warning", step=self.step, kind="stream", message=str(fault))
            self.stop.ask(str(fault))
        self._leave()

    def _leave(self) -> NoReturn:
        checkpoint = None
        if self.step:
            checkpoint = self._save()
        self.journal.append("stopped", step=self.step, reason=self.stop.reason, checkpoint=checkpoint.name if checkpoint else None)
        self.journal.close()
        raise Stopped(f"stopped at step {self.step} ({self.stop.reason}); the same command goes on from there")

    def _finish(self) -> None:
        checkpoint = self._save()
        if checkpoint is None:
            raise RuntimeError(f"the last checkpoint, {name_of(self.step)}, could not be written; see {self.folder.journal}")
        if self.step not in self.validated_steps:
            self._validate()
        if self.step not in self.validated_steps:
            self._leave()
        self._retain()
        last = {event["event"]: event for event in read_current(self.folder.journal)}
        metrics = {
            "step": self.step,
            "tokens": self.tokens,
            "train_loss": last["step"]["loss"] if "step" in last else None,
            "validation_loss": last["validation"]["loss"],
            "validation_bits_per_byte": last["validation"]["bits_per_byte"],
        }
        _write_text(self.folder.metrics, json.dumps(metrics, indent=1) + "\n")
        self.journal.append(
            "finished",
            step=self.step,
            tokens=self.tokens,
            checkpoint=checkpoint.name,
            digest=checkpoint.digest,
            model_sha256=checkpoint.model_sha256,
        )
        self.journal.close()


def _finite(value: torch.Tensor) -> float | None:
    """JSON has no NaN and no infinity."""
    number = float(value)
    return number if math.isfinite(number) else None


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
