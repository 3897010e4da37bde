"""What build-config wrote last, for those who only look: it is read without the libraries that read data."""

from __future__ import annotations

import contextlib
import math

from model.config import DataConfig, Experiment, TrainingConfig
from model.errors import UserError
from model.params import read_yaml, validated
from model.run_config import RunConfig
from model.run_folder import RunFolder

_NOT_DECIDING = {"revision", "max_length", "buffer_size", "lanes", "cache"}
"""Fields of the data config that do not decide what a dataset manifest says. (The revision is compared by itself.)"""


def expected_steps(training: TrainingConfig, data: DataConfig, train_samples: int, tokens_per_sample: float) -> int:
    """Steps of all epochs, by the mean length of a sample."""
    windows = training.num_epochs * train_samples * tokens_per_sample / data.max_length
    return math.ceil(windows / (training.batch_size * training.gradient_accumulation))


def built(folder: RunFolder) -> RunConfig | None:
    """The config that build-config wrote last, if there is one and this code can read it."""
    with contextlib.suppress(UserError):
        if folder.config.exists():
            return validated(RunConfig, read_yaml(folder.config), folder.config.name)
    return None


def is_of_same_data(config: RunConfig, experiment: Experiment) -> bool:
    """Whether what a resolved config says of its dataset holds for the experiment, too."""
    same = config.data.model_dump(exclude=_NOT_DECIDING) == experiment.data.model_dump(exclude=_NOT_DECIDING)
    if config.post_training is not None or experiment.post_training is not None:  # there it counts the rows that fit
        same = (
            same and bool(config.post_training) == bool(experiment.post_training) and config.data.max_length == experiment.data.max_length
        )
    return same and config.seed == experiment.seed and experiment.data.revision in (None, config.data.revision)
