"""The form of a run's changes: all of an experiment's fields, with their docs and bounds, and none of them required."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from model.changes import Changes, changes_of
from model.config import Experiment
from model.params import parse_overrides
from tasks.project import Project


def fields(kind: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in kind.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        sections = [each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)]
        if sections:
            found |= fields(sections[0], f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def of(schema: dict[str, Any], section: str, field: str) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][section]["properties"][field]
    return found


def test_it_has_every_field_of_an_experiment_and_requires_none() -> None:
    assert fields(Changes) == fields(Experiment)
    assert changes_of(Changes.model_validate({})) == {}
    assert changes_of(None) == {}


def test_the_schema_says_docs_bounds_and_choices_and_no_defaults() -> None:
    schema = Changes.model_json_schema()
    rate = of(schema, "TrainingChanges", "learning_rate")
    assert rate["exclusiveMinimum"] == 0
    assert rate["description"]
    assert of(schema, "HardwareChanges", "device")["enum"] == ["auto", "cpu", "cuda", "mps"]
    assert of(schema, "OrchestrationChanges", "auto_resume")["maximum"] == 100
    assert not [field for section in schema["$defs"].values() for field in section["properties"].values() if "default" in field]
    assert not any("required" in section for name, section in schema["$defs"].items() if name.endswith("Changes"))


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"training": {"learning_rate": -1}}, "training.learning_rate"),
        ({"training": {"learning_rte": 1}}, "training.learning_rte"),
        ({"hardware": {"device": "tpu"}}, "hardware.device"),
        ({"seed": "many"}, "seed"),
    ],
)
def test_a_bad_value_is_refused_by_name(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Changes.model_validate(bad)
    assert [".".join(map(str, error["loc"])) for error in refused.value.errors()] == [field]


@pytest.mark.parametrize(
    "set_", ["training.max_steps=100", "checkpoint.keep_last=null", "data.path=somewhere", "seed=7", "training.spike.action=skip"]
)
def test_what_the_form_gives_is_what_set_gives(set_: str) -> None:
    overrides = parse_overrides([set_])
    assert changes_of(Changes.model_validate(overrides)) == overrides


def test_a_section_that_was_opened_and_left_empty_changes_nothing() -> None:
    assert changes_of(Changes.model_validate({"training": {}, "seed": 1})) == {"seed": 1}


def test_every_experiment_can_be_given_whole() -> None:
    project = Project(Path(__file__).parents[2])
    for name in project.experiment_names():
        whole = project.experiment(name).model_dump(mode="json")
        assert Experiment.model_validate(changes_of(Changes.model_validate(whole))) == project.experiment(name)


def test_a_form_sends_no_value_for_a_field_that_was_left_alone_and_says_the_bounds() -> None:
    schema = Changes.model_json_schema()
    compiled = of(schema, "HardwareChanges", "compile")
    assert "type" not in compiled, "Prefect's form shows a boolean as a switch, which is always on or off"
    assert compiled["enum"] == [True, False]
    assert of(schema, "HardwareChanges", "devices")["anyOf"][1]["enum"] == ["auto"], "a constant cannot be filled in"
    assert of(schema, "TrainingChanges", "embedding_learning_rate")["anyOf"][0]["exclusiveMinimum"] == 0
    assert of(schema, "DataChanges", "train_ratio")["description"].endswith(". More than 0 and less than 1.")
