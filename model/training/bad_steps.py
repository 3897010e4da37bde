"""Bad steps: losses and gradients that must not reach the weights. What happens to one is decided by the run's own numbers alone, so an
interrupted run decides it again in the same way.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Literal

from model.config import TrainingConfig
from model.errors import TooManyBadSteps

Verdict = Literal["good", "skip", "rollback"]


class BadSteps:
    """Judges step by step. Its state belongs to a checkpoint."""

    def __init__(self, config: TrainingConfig) -> None:
        self._spike, self._most = config.spike, config.max_bad_steps
        self._norms: deque[float] = deque(maxlen=config.spike.history)
        self._in_a_row = self._rollbacks = 0
        self.skipped = 0
        """Steps that were skipped since the run began."""

    @property
    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"norms": list(self._norms), "in_a_row": self._in_a_row, "rollbacks": self._rollbacks, "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self._norms = deque(state["norms"], maxlen=self._spike.history)
        self._in_a_row, self._rollbacks, self.skipped = state["in_a_row"], state["rollbacks"], state["skipped"]

    def judge(self, step: int, loss: float, gradient_norm: float) -> Verdict:
        """What to do with a step, given its loss and the norm of its gradient before clipping.

        Raises:
            TooManyBadSteps: this is the last of too many.
        """
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        if finite and not self._is_spike(gradient_norm):
            self._in_a_row = 0
            self._norms.append(gradient_norm)
            return "good"
        if finite and self._spike.action == "rollback":
            self._rollbacks += 1
            if self._rollbacks > self._most:
                raise TooManyBadSteps(
                    f"step {step}: rolled back {self._most} times to one checkpoint (training.max_bad_steps), and the gradient norm still "
                    f"jumps to {gradient_norm:.3g}; lower training.learning_rate, or raise training.spike.threshold"
                )
            return "rollback"
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self._most:
            what = f"a gradient norm of {gradient_norm:.3g}" if finite else f"a loss of {loss} and a gradient norm of {gradient_norm}"
            raise TooManyBadSteps(
                f"step {step}: {self._in_a_row} bad steps in a row (training.max_bad_steps), the last with {what}; the weights are those "
                "before them. Lower training.learning_rate, look at the data, or go on from an earlier checkpoint "
                "(checkpoint.checkpoint_to_resume)"
            )
        return "skip"

    def rolled_back(self, state: dict[str, Any] | None) -> None:
        """Take over the state of the checkpoint that was gone back to (None: the beginning), but for the number of rollbacks."""
        rollbacks = self._rollbacks
        self.load(state or {"norms": [], "in_a_row": 0, "rollbacks": 0, "skipped": 0})
        self._rollbacks = rollbacks

    def regular_checkpoint(self) -> None:
        """The next rollback goes back to another one: its count begins anew."""
        self._rollbacks = 0

    def _is_spike(self, gradient_norm: float) -> bool:
        if self._spike.action == "none" or len(self._norms) < self._spike.history:
            return False
        return gradient_norm > self._spike.threshold * statistics.median(self._norms)
