"""What a post-training begins with: which network its base is, where it lies on this machine, and whether the two belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.checkpoint.store import MANIFEST, MODEL, Checkpoint, NotWhole, open_checkpoint
from model.config import DataConfig, Experiment, ModelConfig
from model.digest import file_sha256
from model.errors import UserError
from model.params import merge
from model.run_config import Base, RunConfig
from model.training.journal import read_current
from tasks import tracking
from tasks.model_card import run_of
from tasks.project import Project, read_json
from tasks.starting_point import REGISTRY, find_whole
from tasks.use import EXPORT

FIELD = "post_training.base"
_MAY_DIFFER = {"preset", "dropout", "initializer_range"}
"""Fields of `model` that say nothing about the weights' shapes."""
_SPLIT = ("split_by", "train_ratio")
_COLUMNS = ("article_column", "id_column")
"""Fields of `data` that, with the seed, say which rows are held out."""


def named(project: Project, name: str) -> str:
    """The post-training that `gpt2 post-train NAME` means: the experiment of this name, or the only one that begins with its model.

    Raises:
        UserError: there is none, or there are several.
    """
    project.experiment(name)
    if project.is_post_training(name):
        return name
    tuned = tuned_from(project, name)
    if len(tuned) == 1:
        return tuned[0]
    if tuned:
        raise UserError(f"{name}: several post-trainings begin with it: {', '.join(tuned)}; name one of them")
    raise UserError(
        f"{name}: no post-training begins with it; add an experiment to params.yaml with post_training: {{base: {REGISTRY}{name}@champion}}"
    )


def tuned_from(project: Project, name: str) -> list[str]:
    """The post-trainings of params.yaml that begin with the model `name`."""
    return [each for each in project.experiment_names() if base_model(project, each) == name]


def base_model(project: Project, name: str) -> str | None:
    """The registered model that an experiment begins with; None if it does not, or with a folder."""
    if not project.is_post_training(name):
        return None
    post_training = project.experiment(name).post_training
    assert post_training is not None
    return _registered_model(post_training.base) if post_training.base.startswith(REGISTRY) else None


def answering(project: Project, name: str) -> str:
    """Who answers for an experiment: the only post-training that begins with its model and has a champion; else itself."""
    if name not in project.experiment_names() or project.is_post_training(name):
        return name
    answers = [each for each in tuned_from(project, name) if (read_json(project.run_folder(each).scores) or {}).get("champion")]
    return answers[0] if len(answers) == 1 else name


def check_is_one(project: Project, name: str) -> None:
    """Refuse an experiment that begins with random weights."""
    project.experiment(name)
    if not project.is_post_training(name):
        raise UserError(
            f"{name} begins with random weights: gpt2 train {name}; post-training needs post_training.base in its entry of params.yaml"
        )


def check_is_none(project: Project, name: str) -> None:
    """Refuse a post-training."""
    if project.is_post_training(name):
        raise UserError(f"{name} begins with a trained network: gpt2 post-train {name}")


def pinned(project: Project, name: str, changes: dict[str, Any], begun_with: dict[str, Any] | None = None) -> dict[str, Any]:
    """The changes with a version for the base in the place of an alias: what is recorded of a run says what it began with.

    One that was begun and is not finished goes on with the base that it has, wherever the alias has moved.

    Args:
        project: where it is.
        name: the post-training's.
        changes: the fields to change for this run.
        begun_with: the changes, pinned, of one that is going on now, perhaps on another machine; None if there is none.

    Raises:
        UserError: the registry has no such version.
    """
    post_training = project.with_overrides(name, changes).post_training
    assert post_training is not None, "see check_is_one"
    base = post_training.base
    if begun_with is None and _is_under_way(project, name):
        begun_with = project.overrides(name)
    begun = ((begun_with or {}).get("post_training") or {}).get("base")
    if begun and "base" not in changes.get("post_training", {}):
        base = begun
    elif base.startswith(REGISTRY) and "@" in base:
        base = f"{REGISTRY}{_registered_model(base)}/{_version(project, base).version}"
    return merge(changes, {"post_training": {"base": base}})


def written(project: Project, base: str) -> str:
    """A base as it was typed, as it stands in a config: a folder as the project sees it, not the current folder."""
    if base.startswith(REGISTRY):
        return base
    try:
        folder = Path(base).expanduser().resolve()
    except (OSError, ValueError, RuntimeError):
        return base
    return folder.relative_to(project.root).as_posix() if folder.is_relative_to(project.root) else str(folder)


def _is_under_way(project: Project, name: str) -> bool:
    events = [event["event"] for event in read_current(project.run_folder(name).journal)]
    return "started" in events and "finished" not in events


def _registered_model(uri: str) -> str:
    return uri.removeprefix(REGISTRY).replace("@", "/").partition("/")[0]


def _version(project: Project, uri: str) -> tracking.Version:
    """The version behind `models:/NAME@alias` or `models:/NAME/3`, in the registry that the experiment NAME uses."""
    from mlflow import MlflowException

    what, name = uri.removeprefix(REGISTRY), _registered_model(uri)
    experiment = project.experiment(name)
    if not tracking.is_there(project, experiment):
        raise UserError(f"{FIELD}: {uri}: nothing is registered yet; train it first: gpt2 train {name}")
    client = tracking.connect(project, experiment)
    try:
        if "@" in what:
            found = client.get_model_version_by_alias(*what.split("@", 1))
        else:
            found = client.get_model_version(name, what.partition("/")[2])
    except MlflowException as error:
        cure = f"train it first: gpt2 train {name}" if what.endswith(f"@{tracking.CHAMPION}") else "name one that is there"
        raise UserError(f"{FIELD}: {uri}: {error.message.splitlines()[0].rstrip('.')}; {cure}") from None
    if tracking.DIGEST_TAG not in found.tags:
        raise UserError(f"{FIELD}: {uri} is not a checkpoint of this project")
    return tracking.as_version(found)


def base_of(project: Project, experiment: Experiment) -> Base:
    """The experiment's base, pinned by its digest; its network and its held-out rows fit the experiment's.

    Raises:
        UserError: it is not there, not whole, of another network, or other rows were held out when it was trained.
    """
    assert experiment.post_training is not None
    given = experiment.post_training.base
    if given.startswith(REGISTRY):
        version, name = _version(project, given), _registered_model(given)
        source = f"{REGISTRY}{name}/{version.version}"
        checkpoint = _brought(project, source)
        base = Base(source=source, experiment=name, checkpoint=version.tags.get("checkpoint", checkpoint.name), digest=checkpoint.digest)
        _check_config(experiment, base, _config_of(checkpoint))
        return base
    folder = _folder(project, given)
    if (folder / MANIFEST).exists():
        checkpoint = _verified(folder)
        run = run_of(checkpoint)
        base = Base(source=given, experiment=run.experiment if run else None, checkpoint=checkpoint.name, digest=checkpoint.digest)
        _check_config(experiment, base, _config_of(checkpoint))
        return base
    return _export(experiment, given, folder)


def _brought(project: Project, uri: str) -> Checkpoint:
    """A registered version's checkpoint, from the storage if it is not here."""
    from tasks.restore import restore

    try:
        return restore(project, uri.removeprefix(REGISTRY)).checkpoint
    except UserError as error:
        raise UserError(f"{FIELD}: {error}") from None


def _folder(project: Project, given: str) -> Path:
    try:
        folder = (project.root / Path(given).expanduser()).resolve()
        there = any((folder / name).is_file() for name in (MANIFEST, EXPORT))
    except (OSError, ValueError, RuntimeError):  # NUL, too long, nobody's home, …
        there = False
    if not there:
        raise UserError(
            f"{FIELD}: {given[:200]!r} is neither a registered version ({REGISTRY}NAME@champion) nor a checkpoint's or an export's folder"
        )
    return folder


def _verified(folder: Path) -> Checkpoint:
    try:
        checkpoint = open_checkpoint(folder)
        checkpoint.verify()
    except NotWhole as error:
        raise UserError(f"{FIELD}: {error}; bring it back (dvc checkout, dvc pull), or name another") from None
    return checkpoint


def _config_of(checkpoint: Checkpoint) -> RunConfig:
    from model.training.resume import config_of

    try:
        return config_of(checkpoint)
    except NotWhole as error:
        raise UserError(f"{FIELD}: {error}; name another") from None


def _check_config(experiment: Experiment, base: Base, theirs: RunConfig) -> None:
    _check_shape(experiment.model, base, theirs.model)
    columns = {name: getattr(theirs.data, name) for name in _COLUMNS} if theirs.data.path == experiment.data.path else {}
    _check_split(experiment, base, {"seed": theirs.seed, **{name: getattr(theirs.data, name) for name in _SPLIT}, **columns})


def _check_shape(ours: ModelConfig, base: Base, theirs: ModelConfig) -> None:
    mine, its = (each.model_dump(exclude=_MAY_DIFFER) for each in (ours, theirs))
    if wrong := [f"model.{name}: {value}, the base's network has {its[name]}" for name, value in mine.items() if value != its[name]]:
        raise UserError(f"{'; '.join(wrong)}; write what {base.source} has, or name another base")


def _check_split(experiment: Experiment, base: Base, theirs: dict[str, Any]) -> None:
    """What the base was validated and scored on is not to be learned."""
    data: DataConfig = experiment.data
    ours = {"seed": experiment.seed, **{name: getattr(data, name) for name in (*_SPLIT, *_COLUMNS)}}
    wrong = [
        f"{name if name == 'seed' else f'data.{name}'}: {ours[name]}, and {base.source} was trained with {value}"
        for name, value in theirs.items()
        if ours[name] != value
    ]
    if wrong:
        raise UserError(f"{'; '.join(wrong)}: rows that it was validated on would be learned; write the same")


def _export(experiment: Experiment, given: str, folder: Path) -> Base:
    from model.huggingface import model_config, read_split

    try:
        shape = model_config(json.loads((folder / EXPORT).read_text(encoding="utf-8")))
        base = Base(source=given, digest=file_sha256(folder / MODEL))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{FIELD}: {given}: not a GPT-2 in Hugging Face's format ({' '.join(str(error).split())[:200]})") from None
    _check_shape(experiment.model, base, shape)
    _check_split(experiment, base, read_split(folder))
    return base


def place_of(project: Project, base: Base) -> Path:
    """Where the base lies on this machine; brought from the storage if it is a registered version that is not here.

    Raises:
        UserError: it is nowhere to be had.
    """
    if found := find_whole(project, base.digest):
        return found.path
    if base.source.startswith(REGISTRY):
        return _brought(project, base.source).path
    return _folder(project, base.source)
