"""Experiments: what is accepted, and the one line a mistake gets."""

import time

import pytest

from model.config import Experiment
from model.errors import UserError
from model.params import load_experiment, merge, parse_overrides, parse_yaml, read_long_yaml, read_yaml

PARAMS = {
    "defaults": {"data": {"path": "PleIAs/SYNTH"}, "training": {"batch_size": 4}},
    "experiments": {"one": {"training": {"learning_rate": "3e-4"}}, "bare": None},
}


def mistake(fields):
    with pytest.raises(UserError) as caught:
        load_experiment(PARAMS, "one", fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_then_experiment_then_overrides():
    experiment = load_experiment(PARAMS, "one", {"training": {"batch_size": 2}})
    assert experiment.training.batch_size == 2
    assert experiment.training.learning_rate == 3e-4
    assert experiment.data.path == "PleIAs/SYNTH"
    assert load_experiment(PARAMS, "bare").training.batch_size == 4


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"training": {"learning_rat": 1}}, "experiments.one.training.learning_rat: no such field"),
        ({"trainin": {}}, "experiments.one.trainin: no such field"),
        ({"training": {"batch_size": "8"}}, "experiments.one.training.batch_size: input should be a valid integer, not '8'"),
        ({"training": {"batch_size": True}}, "experiments.one.training.batch_size"),
        ({"training": {"batch_size": 2.0}}, "experiments.one.training.batch_size"),
        ({"training": {"batch_size": 0}}, "experiments.one.training.batch_size: input should be greater than or equal to 1, not 0"),
        ({"training": {"learning_rate": True}}, "experiments.one.training.learning_rate: should be a number"),
        ({"training": {"learning_rate": "fast"}}, "experiments.one.training.learning_rate: should be a number, not 'fast'"),
        ({"training": {"learning_rate": float("nan")}}, "experiments.one.training.learning_rate"),
        ({"training": {"optimizer": "sgd"}}, "experiments.one.training.optimizer"),
        ({"model": {"preset": "huge"}}, "experiments.one.model.preset"),
        ({"model": {"n_embd": 100, "n_head": 12}}, "experiments.one.model: n_embd (100) must be a multiple of n_head (12)"),
        ({"data": {"max_length": 2000}}, "data.max_length (2000) is longer than model.context_length (1024)"),
        ({"data": {"train_ratio": 1}}, "experiments.one.data.train_ratio"),
        ({"data": {"text_template": "no columns"}}, "text_template names no column"),
        ({"checkpoint": {"checkpoint_to_resume": "x" * 5000}}, "experiments.one.checkpoint.checkpoint_to_resume"),
        ({"storage": {"base_folder": r"E:\GPT_SANDBOX_STORAGE"}}, "is a Windows path"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(fields, expected):
    assert expected in mistake(fields)


@pytest.mark.parametrize(
    "name", ["../one", "/etc", "a/b", "", ".", "..", "a\x00b", "a" * 65, "-rf", "a..b", "one\n", "CON", "nul", "Aux", "lpt1"]
)
def test_a_name_that_is_a_path_or_a_device_is_refused(name):
    with pytest.raises(UserError, match=r"experiment: .* is not a name"):
        load_experiment(PARAMS, name)


def test_an_unknown_experiment_lists_the_known_ones():
    with pytest.raises(UserError, match="no experiment 'two'; there are bare, one"):
        load_experiment(PARAMS, "two")


@pytest.mark.parametrize("params", [None, [], {"defaults": {}}, {"defaults": {}, "experiments": []}, {"defaults": 1, "experiments": {}}])
def test_params_of_another_shape_are_refused(params):
    with pytest.raises(UserError, match=r"params\.yaml"):
        load_experiment(params, "one")


def test_a_preset_gives_way_to_fields_beside_it_and_replaces_the_shape_below_it():
    base = {"model": {"preset": "small", "n_layer": 12, "dropout": 0.1}}
    experiment = Experiment.model_validate(
        merge({"data": {"path": "x"}, **base}, {"model": {"preset": "nano", "n_head": 4}}) | {"data": {"path": "x", "max_length": 64}}
    )
    assert (experiment.model.n_layer, experiment.model.n_embd, experiment.model.n_head) == (2, 32, 4)
    assert experiment.model.dropout == 0.1


def test_overrides_are_yaml_values_by_dotted_field():
    assert parse_overrides(["training.max_steps=100", "data.filter=null", "data.path=a=b", "seed=1"]) == {
        "training": {"max_steps": 100},
        "data": {"filter": None, "path": "a=b"},
        "seed": 1,
    }


@pytest.mark.parametrize(
    "assignment",
    ["training.max_steps", "=1", "a..b=1", "training={batch_size: 1}", "a=[*x]", "a=*x", "a.../x=1", "a b=1", "a." * 30 + "b=1"],
)
def test_a_bad_override_is_refused(assignment):
    with pytest.raises(UserError, match="--set"):
        parse_overrides([assignment])


def test_contradicting_overrides_are_refused():
    with pytest.raises(UserError, match="contradicts"):
        parse_overrides(["training=1", "training.max_steps=1"])
    with pytest.raises(UserError, match="group"):
        parse_overrides(["training.max_steps=1", "training=1"])


def test_yaml_that_could_hurt_is_refused_quickly(tmp_path):
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    began = time.process_time()
    for text, reason in [
        (bomb, "aliases"),
        ("*x", "aliases"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!binary aGk=", "could not determine a constructor"),
        ("a: 1\na: 2", "given twice"),
        ("a: [1", "line 1"),
        ("1: a", "not a word"),
        ("x" * 2_000_000, "larger than"),
        ("[" * 90_000, "more than 20 groups"),
        ("{a: " * 20_000, "more than 20 groups"),
        ("- " * 40_000, "more than 20 groups"),
        ("9" * 90_000, "digits"),
        ("1" + ":59" * 30_000, "digits"),
        ('"\\0"', "no place in a value"),
        ('"\\ud800"', "no place in a value"),
        ('"\\e[31m": 1', "no place in a value"),
        ("a: \x00", "#x0000"),
    ]:
        with pytest.raises(UserError, match=reason) as refused:
            parse_yaml(text, "params.yaml")
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 400
    assert time.process_time() - began < 5
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"params\.yaml: is not UTF-8"):
        read_yaml(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="not found"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        read_yaml(tmp_path)


def test_a_file_is_not_read_further_than_it_may_be_long(tmp_path):
    with (tmp_path / "params.yaml").open("wb") as file:
        file.truncate(1 << 40)  # a TB of nothing: reading it would take all memory
    with pytest.raises(UserError, match="larger than"):
        read_yaml(tmp_path / "params.yaml")


def test_what_a_program_wrote_may_be_long_and_have_aliases_but_nothing_else(tmp_path):
    path = tmp_path / "dvc.lock"
    path.write_text("stages:\n" + "".join(f"  train@{n}: &n{n} {{cmd: x}}\n  same@{n}: *n{n}\n" for n in range(3000)))
    assert path.stat().st_size > 100_000
    assert len(read_long_yaml(path)["stages"]) == 6000
    for text in ("[" * 200_000, "!!python/name:os.system", "a: 1\na: 2", "a: \x00"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"dvc\.lock"):
            read_long_yaml(path)


def test_plain_values_are_what_they_look_like():
    text = 'a: 1\nb: 1.5\nc: true\nd: null\ne: 2026-11-23\nf: "x\\n\\ty é ✓"\ng: [1, x]\nh: 0x10\ni: 3e-4'
    assert parse_yaml(text, "params.yaml") == {
        "a": 1, "b": 1.5, "c": True, "d": None, "e": "2026-11-23", "f": "x\n\ty é ✓", "g": [1, "x"], "h": 16, "i": "3e-4",
    }  # fmt: skip
    assert parse_yaml("", "params.yaml") is None
