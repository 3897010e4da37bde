"""What an experiment will take before anything of it is run: parameters, tokens, operations, memory, hours, cost, storage."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model.config import Experiment
from model.errors import UserError
from model.flops import flops_per_token, parameters_by_kind, peak_flops
from model.memory import Memory, checkpoint_size, training_memory
from model.params import merge
from model.run_config import RunConfig
from tasks.built_config import built, expected_steps, is_of_same_data
from tasks.gpu_offers import PRICES_AS_OF, Offer, chosen_offers
from tasks.project import Project

TOKENS_PER_SAMPLE = 850
"""PleIAs/SYNTH's English samples have about so many; used until build-config has counted."""
_USABLE = 0.92
"""Share of a GPU's memory that tensors can have; the rest is CUDA's own and what fragmentation costs."""
_TOKENS_PER_STEP = 500_000
"""GPT-3's batch at 125M to 760M parameters (Brown et al. 2020, table 2.1)."""


@dataclass(frozen=True)
class Tokens:
    """How much is trained on."""

    estimated: bool
    """build-config has not run for these data: samples and their length are guessed."""
    train_samples: int | None
    """An epoch's; None: not known, and the run's length comes from `training.max_steps` alone."""
    per_sample: float | None
    epoch: int | None
    """Tokens of one epoch."""
    epochs: float | None
    """Epochs that the steps take."""
    total: int
    per_step: int
    """The global batch."""
    per_parameter: float
    """Hoffmann et al. 2022 found about 20 the best use of a given number of operations."""


@dataclass(frozen=True)
class Rent:
    """The run on one type of GPU."""

    gpu: str
    precision: str
    """bf16, or fp32 where the config says so or the GPU has no bf16."""
    peak_tflops: float
    """Of one GPU, dense."""
    memory_gb: int
    micro_batch: int
    """Windows that fit its memory at once, by the estimate; 0: not even one does."""
    tokens_per_s: float
    """Of all ranks."""
    hours: float
    usd_per_hour: float
    """Of one GPU: an assumption."""
    usd: float


@dataclass(frozen=True)
class Checkpoints:
    """What training writes, in bytes and numbers."""

    weights: int
    optimizer: int
    total: int
    """One checkpoint."""
    made: int
    """In the whole run."""
    kept: int
    """Afterwards, at most: the last ones, the best, the champion."""


@dataclass(frozen=True)
class Storage:
    """Bytes on disks, at most."""

    run_folder: int
    """`runs/NAME` while training: the kept checkpoints and the one in the making. DVC's cache links to the same bytes."""
    external: int
    """`storage.base_folder` afterwards: DVC's remote, and the champion's weights in the registry."""
    external_peak: int
    """The same while DVC pushes and the copies made during training are still there."""
    token_cache: int
    """`runs/.tokens`, with `data.cache`."""


@dataclass(frozen=True)
class Plan:
    """Everything `gpt2 plan` says; `--json` prints these fields by their names."""

    experiment: str
    parameters: int
    parameters_by_kind: dict[str, int]
    global_batch: int
    """Windows a step."""
    max_length: int
    """Tokens a window."""
    steps: int
    steps_of_all_epochs: int | None
    tokens: Tokens
    flops_per_token: float
    """6·N + 12·L·H·Q·T, forward and backward."""
    flops: float
    """Of the whole run, without validation."""
    validation_share: float
    """What the validations add to `flops`, as a share of it: a forward pass is a third of forward and backward."""
    ranks: int
    micro_batch: int
    """Windows that a rank runs at once, as configured; with `hardware.micro_batch=auto` as with null."""
    memory: dict[str, dict[str, int]]
    """Bytes by part, of one rank: `bf16` and `fp32`, each with its `total`."""
    mfu: float
    """Assumed share of the peak."""
    prices_as_of: str
    gpus: list[Rent]
    checkpoints: Checkpoints
    storage: Storage
    hints: list[str]
    """What looks unsuitable, each with a cure."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def plan(
    project: Project,
    name: str,
    changes: Mapping[str, Any],
    mfu: float = 0.4,
    gpus: Iterable[str] = (),
    prices: Iterable[str] = (),
) -> Plan:
    """Plan an experiment: params.yaml, its recorded overrides, and `changes` over them. Reads what build-config wrote, if it is for the
    same data; reads no data, asks nobody, writes nothing.

    Args:
        project: where the experiment is.
        name: its name.
        changes: fields to change, as `parse_overrides` gives them.
        mfu: the share of the peak that is assumed, 0 to 1.
        gpus: names of OFFERS to show; none: all.
        prices: such as `H100=2.50`, USD an hour.

    Raises:
        UserError: an unknown experiment, field or GPU, a wrong value, or a run without a length.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: should be more than 0 and at most 1, such as 0.4, not {mfu:g}")
    offers = chosen_offers(list(gpus), list(prices))
    experiment = project.with_overrides(name, merge(project.overrides(name), dict(changes)))
    model, training, window = experiment.model, experiment.training, experiment.data.max_length
    config = built(project.run_folder(name))
    if config is not None and not is_of_same_data(config, experiment):
        config = None
    global_batch = training.batch_size * training.gradient_accumulation
    samples, length, estimated = _data(experiment, config)
    all_epochs = expected_steps(training, experiment.data, samples, length) if samples and length else None
    steps = min(each for each in (training.max_steps, all_epochs) if each is not None)
    parameters, per_step = parameters_by_kind(model), global_batch * window
    tokens = Tokens(
        estimated=estimated,
        train_samples=samples,
        per_sample=length,
        epoch=round(samples * length) if samples and length else None,
        epochs=round(steps / all_epochs * training.num_epochs, 4) if all_epochs else None,
        total=steps * per_step,
        per_step=per_step,
        per_parameter=round(steps * per_step / parameters.total, 2),
    )
    each = flops_per_token(model, window)
    ranks = experiment.hardware.devices if isinstance(experiment.hardware.devices, int) else 1
    micro_batch = experiment.hardware.micro_batch
    windows = min(max(1, global_batch // ranks), micro_batch if isinstance(micro_batch, int) else training.batch_size)
    cpu = experiment.hardware.device == "cpu"
    checkpoints = _checkpoints(experiment, steps)
    made = Plan(
        experiment=name,
        parameters=parameters.total,
        parameters_by_kind=parameters._asdict(),
        global_batch=global_batch,
        max_length=window,
        steps=steps,
        steps_of_all_epochs=all_epochs,
        tokens=tokens,
        flops_per_token=each,
        flops=each * tokens.total,
        validation_share=round(_validations(experiment, steps) * training.eval_iters * training.batch_size / (3 * steps * global_batch), 4),
        ranks=ranks,
        micro_batch=windows,
        memory={precision: _by_part(_memory(experiment, windows, ranks, precision == "bf16", cpu)) for precision in ("bf16", "fp32")},
        mfu=mfu,
        prices_as_of=PRICES_AS_OF,
        gpus=[_rent(experiment, offer, each * tokens.total, tokens.total, mfu, ranks) for offer in offers],
        checkpoints=checkpoints,
        storage=Storage(
            run_folder=(min(checkpoints.kept + 1, checkpoints.made)) * checkpoints.total,
            external=checkpoints.kept * checkpoints.total + checkpoints.weights,
            external_peak=2 * checkpoints.kept * checkpoints.total + checkpoints.weights,
            token_cache=2 * (tokens.epoch or tokens.total) if experiment.data.cache else 0,
        ),
        hints=[],
    )
    made.hints.extend(_hints(experiment, made))
    return made


def _data(experiment: Experiment, config: RunConfig | None) -> tuple[int | None, float | None, bool]:
    """Samples trained on in an epoch, tokens of each, and whether both are guessed."""
    if config is not None:
        return config.dataset.train_samples, config.dataset.tokens_per_sample, False
    data = experiment.data
    if data.num_samples is not None:
        return round(data.num_samples * data.train_ratio), TOKENS_PER_SAMPLE, True
    if experiment.training.max_steps is not None:
        return None, None, True
    raise UserError(
        "data.num_samples: how many samples there are is not known before build-config has run; give --set data.num_samples=N "
        "or --set training.max_steps=N"
    )


def _memory(experiment: Experiment, windows: int, ranks: int, half: bool, cpu: bool) -> Memory:
    training = experiment.training
    return training_memory(
        experiment.model,
        training.optimizer,
        windows,
        experiment.data.max_length,
        half,
        accumulate=training.batch_size * training.gradient_accumulation > windows * ranks,
        cpu=cpu,
        shards=ranks if experiment.hardware.strategy == "fsdp" else 1,
    )


def _by_part(memory: Memory) -> dict[str, int]:
    return {**memory._asdict(), "total": memory.total}


def _rent(experiment: Experiment, offer: Offer, flops: float, tokens: int, mfu: float, ranks: int) -> Rent:
    bf16 = None if experiment.training.precision == "fp32" else peak_flops(offer.device, "bf16")
    peak = bf16 or peak_flops(offer.device, "fp32")
    assert peak is not None, f"{offer.device} has no peak in model/flops.py"
    hours = flops / (peak * mfu * ranks) / 3600
    room = offer.memory_gb * 1e9 * _USABLE
    fits = bisect_right(range(1, 2**20), room, key=lambda windows: _memory(experiment, windows, ranks, bf16 is not None, False).total)
    return Rent(
        gpu=offer.name,
        precision="fp32" if bf16 is None else "bf16",
        peak_tflops=round(peak / 1e12, 2),
        memory_gb=offer.memory_gb,
        micro_batch=fits,
        tokens_per_s=round(tokens / (hours * 3600)),
        hours=hours,
        usd_per_hour=offer.usd_per_hour,
        usd=hours * offer.usd_per_hour * ranks,
    )


def _validations(experiment: Experiment, steps: int) -> int:
    """As the trainer: every `eval_freq` steps, with every regular checkpoint, and at the end."""
    often, saved = experiment.training.eval_freq, experiment.checkpoint.save_every_n_iterations
    return steps // often + steps // saved - steps // math.lcm(often, saved) + bool(steps % often and steps % saved)


def _checkpoints(experiment: Experiment, steps: int) -> Checkpoints:
    """As model/checkpoint/retention.py: one every so many steps and one at the end; the last k, the best, the champion, the newest stay."""
    size, config = checkpoint_size(experiment.model, experiment.training.optimizer), experiment.checkpoint
    regular, at_the_end = divmod(steps, config.save_every_n_iterations)
    made = regular + bool(at_the_end)
    kept = made if config.keep_last is None else min(made, config.keep_last + 2 + bool(at_the_end))
    return Checkpoints(size.weights, size.optimizer, size.total, made, kept)


def _hints(experiment: Experiment, plan: Plan) -> Iterable[str]:
    model, training, checkpoint = experiment.model, experiment.training, experiment.checkpoint
    per_step = plan.tokens.per_step
    if plan.parameters > 100e6 and per_step < _TOKENS_PER_STEP / 5:
        times = round(_TOKENS_PER_STEP / per_step)
        yield (
            f"a step sees {per_step:,} tokens, so there are {plan.steps:,} steps, each too short to keep a large GPU busy; GPT-3 saw about "
            f"{_TOKENS_PER_STEP:,} at this size. --set training.gradient_accumulation={training.gradient_accumulation * times} makes "
            f"{per_step * times:,} and {-(-plan.steps // times):,} steps (then set learning rate, warm-up, eval_freq and "
            f"save_every_n_iterations anew), --set hardware.micro_batch=auto fills the GPU"
        )
    if plan.max_length < model.context_length:
        yield (
            f"data.max_length ({plan.max_length:,}) is shorter than model.context_length ({model.context_length:,}): the later positions "
            f"are never trained. Make them equal, unless that is meant"
        )
    if training.warmup_steps * 5 > plan.steps and training.warmup_steps > 0:
        yield (
            f"the warm-up takes {training.warmup_steps:,} of {plan.steps:,} steps: --set training.warmup_steps={max(1, plan.steps // 20)}"
        )
    if checkpoint.save_every_n_iterations > plan.steps:
        yield (
            "the only checkpoint is the one at the end: "
            f"--set checkpoint.save_every_n_iterations={max(1, plan.steps // 5)} saves on the way"
        )
    if checkpoint.keep_last is None and plan.storage.run_folder > 50e9:
        yield f"all {plan.checkpoints.made:,} checkpoints are kept: --set checkpoint.keep_last=3 keeps the last, the best and the champion"
    if plan.validation_share > 0.1:
        yield f"validation adds {plan.validation_share:.0%} to the work: raise training.eval_freq or lower training.eval_iters"
    if experiment.hardware.devices == "auto":
        yield "hardware.devices is auto: planned for one GPU; --set hardware.devices=N plans for N"
