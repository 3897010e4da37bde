"""Looking at a network while it is trained: its loss on windows that are always the same, and a text that it writes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from model.evaluation.likelihood import validation_loss
from model.generation import answer
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.stream.manifest import DatasetManifest
from model.stream.validation import cached_validation_windows
from model.tokenizer import END_OF_TEXT, decode
from model.training.engine import Engine
from model.training.journal import Journal, Silence

_SAMPLE_TOKENS = 48


class Validator:
    """Validates an engine's network. All ranks call it alike.

    Args:
        folder: the run's.
        config: the run's.
        manifest: the dataset's files.
        engine: holds the network.
        journal: is told.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, manifest: DatasetManifest, engine: Engine, journal: Journal | Silence) -> None:
        self._folder, self._config, self._manifest, self._engine, self._journal = folder, config, manifest, engine, journal
        self.windows: np.ndarray | None = None
        """What `read_windows` returns, here or on the first rank."""

    def read_windows(self) -> np.ndarray:
        """The windows to validate on, uint16 [windows, max_length + 1], or of rows [windows, 2, max_length]."""
        count = self._config.training.eval_iters * self._config.training.batch_size
        path, data, seed = self._folder.validation_windows, self._config.data, self._config.seed
        return cached_validation_windows(path, self._manifest, data, seed, count, self._warn, self._config.windows)

    def _warn(self, message: str) -> None:
        self._journal.warn(0, "stream", message)

    def validate(self, step: int, should_stop: Callable[[], bool]) -> float | None:
        """Tell the journal the loss (nats a token) after `step` steps, and a text; returns the loss, None if `should_stop` said so."""
        assert self.windows is not None
        engine = self._engine
        with engine.evaluating() as model:
            result = validation_loss(model, self.windows, self._config.training.batch_size, should_stop, engine.autocast)
            if result is None:
                return None
            prompt = self._prompt(self.windows[0])
            text = answer(model, [prompt], max_new_tokens=_SAMPLE_TOKENS)[0]
        loss, bits_per_byte = result
        self._journal.append("validation", step=step, loss=loss, bits_per_byte=bits_per_byte, windows=len(self.windows))
        self._journal.append("sample", step=step, prompt=prompt, text=text)
        return loss

    def _prompt(self, window: np.ndarray) -> str:
        """The beginning of the first held-out document, up to where the network has something to say."""
        tokens = window[0][window[0] != END_OF_TEXT] if window.ndim == 2 else window
        text = decode(tokens.tolist())
        literal = self._config.data.prompt_template.rpartition("}")[2]
        end = text.find(literal) + len(literal) if literal and literal in text else 40
        return text[: max(1, end)]
