"""The learning rate at each step."""

from __future__ import annotations

import math

from model.config import TrainingConfig


def learning_rate_factor(step: int, config: TrainingConfig, total_steps: int) -> float:
    """Share of the peak rate for the optimizer step number `step` (0, 1, 2, …).

    Rises linearly over `warmup_steps`, stays at the peak, and falls over the last `decay_share` of what follows the warm-up to
    `min_learning_rate_ratio` at `total_steps`: along a cosine (Loshchilov & Hutter 2017) or a line, or not at all. A line over the last
    fifth is warm-up, stable, decay (Hu et al. 2024, MiniCPM; Hägele et al. 2024). Beyond `total_steps` it stays where it ended.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    after_warmup = max(1, total_steps - config.warmup_steps)
    decay_start = config.warmup_steps + (1 - config.decay_share) * after_warmup
    progress = min(1.0, max(0.0, (step - decay_start) / (config.decay_share * after_warmup)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_learning_rate_ratio + (1 - config.min_learning_rate_ratio) * remaining
