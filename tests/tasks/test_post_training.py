"""What a post-training begins with: found by name, pinned by digest, refused where it does not fit, and told of in the registry."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.checkpoint.store import MODEL, Checkpoint, open_checkpoint
from model.digest import file_sha256
from model.errors import UserError
from model.params import merge, write_yaml
from model.run_config import Base, PostTraining, RunConfig
from model.training.journal import Journal
from tasks import post_training, tracking, use
from tasks.checkpoint_register import checkpoint_register
from tasks.model_card import model_card
from tasks.post_training import answering, base_of, check_is_none, check_is_one, named, pinned, place_of, written
from tasks.project import Project
from tasks.run_page import words_for
from tests.tasks.conftest import NAME, write_checkpoint

TUNED = "tiny-tuned"


def add(project: Project, name: str = TUNED, base: str = f"models:/{NAME}@champion", **changes: Any) -> None:
    """Another experiment, like `tiny` but that it begins with a trained network."""
    path = project.root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    fields = merge(merge(params["experiments"][NAME], {"post_training": {"base": base}}), changes)
    params["experiments"][name] = copy.deepcopy(fields)  # YAML's aliases are refused
    path.write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture
def registered(project: Project) -> tuple[Project, list[Checkpoint]]:
    """Two versions of `tiny`, of which the second is champion."""
    checkpoints = [write_checkpoint(project, step) for step in (10, 20)]
    checkpoint_register(project, NAME)
    tracking.connect(project, project.experiment(NAME)).set_registered_model_alias(NAME, "champion", "2")
    add(project)
    return project, checkpoints


def move(project: Project, version: str) -> None:
    tracking.connect(project, project.experiment(NAME)).set_registered_model_alias(NAME, "champion", version)


def test_a_post_training_is_named_by_itself_or_by_what_it_begins_with(new_project: Project) -> None:
    with pytest.raises(UserError, match=r"^tiny: no post-training begins with it; add an experiment to params.yaml"):
        named(new_project, NAME)
    add(new_project)
    assert named(new_project, NAME) == named(new_project, TUNED) == TUNED
    check_is_one(new_project, TUNED)
    check_is_none(new_project, NAME)
    with pytest.raises(UserError, match=r"gpt2 post-train tiny-tuned$"):
        check_is_none(new_project, TUNED)
    with pytest.raises(UserError, match=r"^tiny begins with random weights: gpt2 train tiny"):
        check_is_one(new_project, NAME)
    add(new_project, "tiny-other", f"models:/{NAME}/3")
    with pytest.raises(UserError, match="several post-trainings begin with it: tiny-tuned, tiny-other; name one"):
        named(new_project, NAME)
    with pytest.raises(UserError, match="no experiment 'tinny'"):
        named(new_project, "tinny")


def test_dvc_knows_which_stage_trains_it(new_project: Project) -> None:
    add(new_project)
    for name in (NAME, TUNED):
        new_project.record_overrides(name, {})
    recorded = yaml.safe_load((new_project.root / "overrides.yaml").read_text())
    assert recorded == {"overrides": {NAME: {}, TUNED: {}}, "pre_training": [NAME], "post_training": [TUNED]}
    assert [new_project.training_stage(name) for name in (NAME, TUNED)] == ["train", "post-train"]


def test_overrides_of_before_there_was_post_training_are_read_and_completed(new_project: Project) -> None:
    (new_project.root / "overrides.yaml").write_text(f"overrides: {{{NAME}: {{seed: 3}}}}\n")
    assert new_project.overrides(NAME) == {"seed": 3}
    new_project.record_overrides(NAME, {"seed": 3})
    assert yaml.safe_load((new_project.root / "overrides.yaml").read_text())["pre_training"] == [NAME]


def test_an_alias_is_pinned_to_its_version_and_followed_when_it_moves(registered: tuple[Project, list[Checkpoint]]) -> None:
    project, _ = registered
    changes = pinned(project, TUNED, {"training": {"max_steps": 3}})
    assert changes == {"training": {"max_steps": 3}, "post_training": {"base": f"models:/{NAME}/2"}}
    project.record_overrides(TUNED, changes)
    move(project, "1")
    assert pinned(project, TUNED, {})["post_training"]["base"] == f"models:/{NAME}/1"
    project.run_folder(TUNED).path.mkdir()
    journal = Journal(project.run_folder(TUNED).journal)
    journal.append("started", step=0)
    assert pinned(project, TUNED, {})["post_training"]["base"] == f"models:/{NAME}/2", "what was begun goes on with what it began with"
    assert pinned(project, TUNED, {"post_training": {"base": f"models:/{NAME}/1"}})["post_training"]["base"] == f"models:/{NAME}/1"
    journal.append("finished", step=3)
    journal.close()
    assert pinned(project, TUNED, {})["post_training"]["base"] == f"models:/{NAME}/1"
    elsewhere = pinned(project, TUNED, {"seed": 3}, begun_with={"seed": 3, "post_training": {"base": f"models:/{NAME}/2"}})
    assert elsewhere == {"seed": 3, "post_training": {"base": f"models:/{NAME}/2"}}, "another machine has begun it"


def test_a_base_is_pinned_with_its_lineage_and_found_wherever_it_lies(registered: tuple[Project, list[Checkpoint]]) -> None:
    project, (first, second) = registered
    base = base_of(project, project.experiment(TUNED))
    assert base == Base(source=f"models:/{NAME}/2", experiment=NAME, checkpoint="step_00000020", digest=second.digest)
    assert place_of(project, base) == second.path
    move(project, "1")
    assert base_of(project, project.experiment(TUNED)).digest == first.digest
    aside = project.run_folder(NAME).aside / "somewhere" / second.name
    aside.parent.mkdir(parents=True)
    shutil.move(second.path, aside)
    assert place_of(project, base) == aside


def test_a_folder_is_a_base_too(registered: tuple[Project, list[Checkpoint]], tmp_path: Path) -> None:
    project, (first, _) = registered
    relative = first.path.relative_to(project.root).as_posix()
    add(project, base=relative)
    assert base_of(project, project.experiment(TUNED)) == Base(
        source=relative, experiment=NAME, checkpoint="step_00000010", digest=first.digest
    )
    elsewhere = shutil.copytree(first.path, tmp_path / "elsewhere" / first.name)
    add(project, base=str(elsewhere))
    base = base_of(project, project.experiment(TUNED))
    assert (base.experiment, base.digest) == (None, first.digest)
    assert words_for(base) == str(elsewhere)

    exported = project.root / "exported"
    use.export(first, exported)
    add(project, base="exported")
    base = base_of(project, project.experiment(TUNED))
    assert base == Base(source="exported", digest=file_sha256(exported / MODEL))
    assert place_of(project, base) == exported


def test_a_folder_is_typed_as_it_is_seen_and_written_as_the_project_sees_it(
    new_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = new_project.root / "runs"
    monkeypatch.chdir(below)
    assert written(new_project, "exported") == "runs/exported"
    assert written(new_project, "../exported") == "exported"
    assert written(new_project, str(tmp_path / "elsewhere")) == str(tmp_path / "elsewhere")
    assert written(new_project, "models:/tiny/3") == "models:/tiny/3"


def test_what_validated_the_base_is_not_learned(registered: tuple[Project, list[Checkpoint]]) -> None:
    project, (first, _) = registered
    add(project, seed=43)
    with pytest.raises(
        UserError, match=r"^seed: 43, and models:/tiny/2 was trained with 42: rows that it was validated on would be learned"
    ):
        base_of(project, project.experiment(TUNED))
    add(project, data={"train_ratio": 0.95})
    with pytest.raises(UserError, match=r"^data\.train_ratio: 0\.95, and models:/tiny/2 was trained with 0\.9"):
        base_of(project, project.experiment(TUNED))
    add(project, data={"article_column": "words"})
    with pytest.raises(UserError, match=r"^data\.article_column: words"):
        base_of(project, project.experiment(TUNED))
    add(project, data={"article_column": "source", "path": "other rows"})
    assert base_of(project, project.experiment(TUNED)).experiment == NAME, "other data may call their columns otherwise"
    use.export(first, project.root / "exported")
    add(project, base="exported", seed=43)
    with pytest.raises(UserError, match=r"^seed: 43, and exported was trained with 42"):
        base_of(project, project.experiment(TUNED))
    config = json.loads((project.root / "exported" / "config.json").read_text())
    del config["gpt2_from_scratch"]
    (project.root / "exported" / "config.json").write_text(json.dumps(config))
    assert base_of(project, project.experiment(TUNED)).source == "exported", "of a network from elsewhere nobody knows"


BAD = {
    "models:/tiny@nobody": "models:/tiny@nobody: ",
    "models:/tiny/9": "models:/tiny/9: ",
    "models:/stranger@champion": "no experiment 'stranger'",
    "nowhere/at/all": "'nowhere/at/all' is neither a registered version",
    "nul\\0": "is neither a registered version",
    "~nobody-of-this-name/x": "is neither a registered version",
    "runs": "'runs' is neither a registered version",
}


@pytest.mark.parametrize("base", BAD)
def test_a_base_that_is_not_there_is_one_line_that_names_the_field(registered: tuple[Project, list[Checkpoint]], base: str) -> None:
    project, _ = registered
    add(project, base=base)
    with pytest.raises(UserError) as refusal:
        base_of(project, project.experiment(TUNED))
    assert BAD[base] in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_where_nothing_is_registered_the_cure_is_to_train(new_project: Project) -> None:
    add(new_project)
    with pytest.raises(
        UserError, match=r"^post_training\.base: models:/tiny@champion: nothing is registered yet; train it first: gpt2 train tiny$"
    ):
        pinned(new_project, TUNED, {})
    assert not (new_project.root / "storage").exists(), "to look is not to make"


def test_another_network_is_refused_by_its_field(registered: tuple[Project, list[Checkpoint]]) -> None:
    project, (first, _) = registered
    add(project, model={"n_layer": 3})
    with pytest.raises(UserError, match=r"^model\.n_layer: 3, the base's network has 2; write what models:/tiny/2 has"):
        base_of(project, project.experiment(TUNED))
    use.export(first, project.root / "exported")
    add(project, base="exported", model={"n_embd": 64})
    with pytest.raises(UserError, match=r"^model\.n_embd: 64, the base's network has 32"):
        base_of(project, project.experiment(TUNED))
    add(project, base="exported", model={"dropout": 0.3})
    base_of(project, project.experiment(TUNED))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"data": {"cache": True}}, "data.cache: post-training keeps no cache"),
        ({"data": {"text_template": "{text}"}}, "data.text_template: post-training needs a question and an answer"),
        (
            {"checkpoint": {"fork_of": {"experiment": "a", "checkpoint": "step_00000001", "digest": "a" * 64}}},
            "checkpoint.fork_of: post-training begins with post_training.base",
        ),
        ({"post_training": {"packing": "yes"}}, "post_training.packing"),
        ({"post_training": {"bass": "x"}}, "post_training.bass: no such field"),
    ],
)
def test_what_does_not_go_with_post_training_is_refused(new_project: Project, fields: dict[str, Any], what: str) -> None:
    add(new_project, **fields)
    with pytest.raises(UserError) as refusal:
        new_project.experiment(TUNED)
    assert what in str(refusal.value)


def test_the_config_of_a_pre_training_is_what_it_was(new_project: Project) -> None:
    config = tracking.read_config(new_project.run_folder(NAME))
    assert "post_training" not in config.model_dump(mode="json")
    assert "post_training" not in config.identity
    base = Base(source="models:/tiny/2", experiment=NAME, checkpoint="step_00000020", digest="a" * 64)
    tuned = config.model_copy(update={"post_training": PostTraining(base=base, packing=True)})
    renamed = tuned.model_copy(update={"post_training": PostTraining(base=base.model_copy(update={"source": "elsewhere"}), packing=True)})
    other = tuned.model_copy(update={"post_training": PostTraining(base=base.model_copy(update={"digest": "b" * 64}), packing=True)})
    assert config.digest != tuned.digest == renamed.digest != other.digest, "the bytes decide, not where they lie"
    assert other.differences(tuned) == [f"post_training.base.digest: {'a' * 64}, now {'b' * 64}"]
    assert config.data_identity == tuned.data_identity, "so both are scored on the same items"


def tuned_run(project: Project, second: Checkpoint) -> Checkpoint:
    """A checkpoint of the post-training."""
    base = base_of(project, project.experiment(TUNED))
    config = tracking.read_config(project.run_folder(NAME)).model_copy(update={"post_training": PostTraining(base=base, packing=True)})
    folder = project.run_folder(TUNED)
    folder.path.mkdir(parents=True)
    write_yaml(folder.config, config.model_dump(mode="json"))
    place = folder.checkpoints / "step_00000000"
    shutil.copytree(second.path, place)
    return open_checkpoint(place)


def test_it_is_a_model_of_its_own_with_lineage_to_its_base(registered: tuple[Project, list[Checkpoint]]) -> None:
    project, (_, second) = registered
    tuned_run(project, second)
    checkpoint_register(project, TUNED)
    client = tracking.connect(project, project.experiment(TUNED))
    (version,) = tracking.versions(client, TUNED)
    assert (version.tags["base"], version.tags["base_digest"]) == (f"models:/{NAME}/2", second.digest)
    assert "begun with step_00000020 of tiny" in client.get_registered_model(TUNED).description
    entry = json.loads(project.run_folder(TUNED).registered.read_text())[0]
    run = client.get_run(entry["run_id"])
    assert run.data.tags["base_digest"] == second.digest
    (parent,) = run.inputs.model_inputs
    assert client.get_logged_model(parent.model_id).tags[tracking.DIGEST_TAG] == second.digest
    assert "[step_00000020 of tiny](#/experiments/" in run.data.tags["mlflow.note.content"]
    assert f"gpt2 post-train {TUNED}" in run.data.tags["mlflow.note.content"]


def test_the_card_says_what_it_was_made_of(registered: tuple[Project, list[Checkpoint]]) -> None:
    project, (_, second) = registered
    base = base_of(project, project.experiment(TUNED))
    state = second.state()
    config = RunConfig.model_validate({**state["config"], "post_training": {"base": base.model_dump(), "packing": True}})
    made = post_training_checkpoint(project, {**state, "config": config.model_dump(mode="json"), "tokens": 5})
    card = model_card(made)
    assert "which began as `step_00000020 of tiny` and was fine-tuned to answer on 5 tokens" in card
    assert f"| begun with | `step_00000020 of tiny, {second.digest}` |" in card
    assert "It answers single questions" in card
    assert "It writes on" in model_card(second)


def post_training_checkpoint(project: Project, state: dict[str, Any]) -> Checkpoint:
    from model.checkpoint.store import OPTIMIZER, STATE, CheckpointStore

    source = project.run_folder(NAME).checkpoints / "step_00000020"
    files = {name: [(source / name).read_bytes()] for name in (MODEL, OPTIMIZER)}
    return CheckpointStore(project.run_folder(TUNED).checkpoints).write(0, {**files, STATE: [json.dumps(state).encode()]})


def test_who_was_taught_to_answer_answers(registered: tuple[Project, list[Checkpoint]], monkeypatch: pytest.MonkeyPatch) -> None:
    project, _ = registered
    monkeypatch.chdir(project.root)
    assert answering(project, NAME) == NAME, "it is not trained yet"
    scores = project.run_folder(TUNED).scores
    scores.parent.mkdir(parents=True, exist_ok=True)
    scores.write_text(json.dumps({"champion": None, "checkpoints": []}))
    assert answering(project, NAME) == NAME
    scores.write_text(json.dumps({"champion": {"digest": "a" * 64}, "checkpoints": []}))
    assert answering(project, NAME) == answering(project, TUNED) == use.who_answers(NAME) == TUNED
    assert use.who_answers("models:/tiny@champion") == "models:/tiny@champion"
    assert use.who_answers("unheard-of") == "unheard-of"
    add(project, "tiny-other")
    other = project.run_folder("tiny-other").scores
    other.parent.mkdir(parents=True)
    shutil.copy(scores, other)
    assert answering(project, NAME) == NAME, "of two none is meant"


def test_a_base_of_which_a_bit_is_flipped_is_not_begun_with(registered: tuple[Project, list[Checkpoint]]) -> None:
    project, (first, _) = registered
    add(project, base=first.path.relative_to(project.root).as_posix())
    data = bytearray((first.path / MODEL).read_bytes())
    data[-1] ^= 1
    (first.path / MODEL).chmod(0o644)
    (first.path / MODEL).write_bytes(data)
    with pytest.raises(UserError, match=r"^post_training\.base: step_00000010/model\.safetensors: "):
        base_of(project, project.experiment(TUNED))
    assert post_training.FIELD == "post_training.base"
