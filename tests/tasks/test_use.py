"""What people name is found, verified, loaded and exported: all of it or nothing, with a card that says what is known."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model import disk
from model.checkpoint.store import FILES, MODEL, STATE, Checkpoint, CheckpointStore, open_checkpoint
from model.errors import UserError
from model.generation import answer
from model.gpt2 import GPT2
from model.huggingface import load_model
from tasks import checkpoint_register, model_card, tracking, use
from tasks.project import Project, read_json
from tests.tasks.conftest import NAME, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project as the current folder, with the checkpoints of steps 10 and 20; 10 is the champion."""
    monkeypatch.chdir(project.root)
    first, _ = write_checkpoint(project, 10), write_checkpoint(project, 20)
    write_scores(project, champion=first)
    return project


def checkpoint_of(project: Project, step: int) -> Checkpoint:
    return open_checkpoint(project.run_folder(NAME).checkpoints / f"step_{step:08d}")


def resealed(checkpoint: Checkpoint, state: dict[str, Any]) -> Checkpoint:
    """The same weights with another state."""
    contents = {name: (checkpoint.path / name).read_bytes() for name in FILES}
    shutil.rmtree(checkpoint.path)
    pieces = {name: [content] for name, content in contents.items()}
    return CheckpointStore(checkpoint.path.parent).write(checkpoint.step, pieces | {STATE: [json.dumps(state).encode()]})


def write_scores(project: Project, champion: Checkpoint, **row: Any) -> None:
    entry = {"digest": champion.digest, "champion": True, "reason": "the first to be evaluated", **row}
    scores = {"champion": {"digest": champion.digest}, "checkpoints": [entry]}
    project.run_folder(NAME).scores.write_text(json.dumps(scores))


def digest_found(what: str, which: str | None = None) -> str:
    found = use.find(what, which)
    assert isinstance(found, Checkpoint)
    return found.digest


def test_a_name_is_its_champion_its_newest_or_the_one_that_is_asked_for(here: Project) -> None:
    first, second = checkpoint_of(here, 10), checkpoint_of(here, 20)
    assert digest_found(NAME) == first.digest
    assert digest_found(NAME, "step_00000020") == second.digest
    here.run_folder(NAME).scores.unlink()
    assert digest_found(NAME) == second.digest


def test_a_folder_is_what_it_holds(here: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = checkpoint_of(here, 20)
    assert digest_found(f"runs/{NAME}/checkpoints/step_00000020") == digest_found(str(second.path)) == second.digest
    shutil.copytree(second.path, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)  # no project is needed for a folder
    assert digest_found("elsewhere") == digest_found("elsewhere/") == second.digest
    use.export(second, Path("exported"))
    assert use.find("exported") == Path("exported")


def test_an_experiment_comes_before_a_folder_of_its_name(here: Project) -> None:
    shutil.copytree(checkpoint_of(here, 20).path, NAME)
    assert digest_found(NAME) == checkpoint_of(here, 10).digest
    assert digest_found(f"./{NAME}") == checkpoint_of(here, 20).digest


def test_versions_and_aliases_of_the_registry(here: Project) -> None:
    checkpoint_register.checkpoint_register(here, NAME)
    digests = [entry["digest"] for entry in read_json(here.run_folder(NAME).registered)]
    client = tracking.connect(here, here.experiment(NAME))
    client.set_registered_model_alias(NAME, "champion", "1")
    client.set_registered_model_alias(NAME, "best", "2")
    assert [digest_found(f"models:/{NAME}{which}") for which in ("/1", "/2", "@champion", "@best")] == [*digests, *digests]
    for unknown in (f"models:/{NAME}@nobody", f"models:/{NAME}/99", "models:/nothing/1", "models:/", f"models:/{NAME}"):
        with pytest.raises(UserError, match=r"^experiment: models:/"):
            use.find(unknown)
    shutil.rmtree(checkpoint_of(here, 20).path)
    with pytest.raises(UserError, match=f"gpt2 restore {NAME}@best"):
        use.find(f"models:/{NAME}@best")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "nothing"),
        ("../nothing", "neither an experiment's name nor a folder"),
        ("/etc", "holds neither a checkpoint"),
        ("runs", "runs"),
        ("", "not a name"),
        ("a\x00b", "not a name"),
        ("a/\x00b", "neither"),
        ("x" * 5000, "not a name"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(here: Project, what: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        use.find(what)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_checkpoint_of_a_folder_cannot_be_asked_for(here: Project) -> None:
    for what in (f"runs/{NAME}/checkpoints/step_00000020", f"models:/{NAME}/1"):
        with pytest.raises(UserError, match="--checkpoint"):
            use.find(what, "step_00000010")


def test_damaged_weights_are_refused_wherever_they_lie(here: Project) -> None:
    path = checkpoint_of(here, 10).path
    content = bytearray((path / MODEL).read_bytes())
    content[-1] ^= 1
    (path / MODEL).write_bytes(content)
    for what in (NAME, str(path)):
        with pytest.raises(UserError, match="SHA-256 differs"):
            use.find(what)


@pytest.mark.parametrize("damage", ["{", "[]", '{"model_type": "gpt2"}', '{"model_type": "llama"}', "[" * 100_000])
def test_an_export_that_is_none_is_said_in_one_line(tmp_path: Path, damage: str) -> None:
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(UserError, match="not a GPT-2 that can be loaded") as caught:
        use.open_writer(str(tmp_path))
    assert str(caught.value).isprintable()


def test_checkpoint_and_export_write_the_same(here: Project) -> None:
    use.export(checkpoint_of(here, 10), Path("exported"))
    expected = answer(load_model(checkpoint_of(here, 10).path), ["Q: one"], 9)[0]
    texts = {what: "".join(use.open_writer(what).write("Q: one", 9)) for what in (NAME, "exported", "exported/")}
    assert set(texts.values()) == {expected}
    assert use.open_writer(NAME).frame == use.open_writer("exported").frame
    assert use.open_writer("exported").network.window == 16, "data.max_length: positions beyond were not trained"
    assert use.open_writer(NAME).name == f"step_00000010 of {NAME}"


def test_a_prompt_that_is_not_unicode_is_answered(here: Project) -> None:
    """How Python hands over bytes of a command line that are no text."""
    writer = use.open_writer(NAME)
    assert "".join(writer.write("caf\udce9", 4)) == "".join(writer.write("caf\ufffd", 4))


# Exports are whole or not there


def test_a_folder_that_holds_something_is_left_alone(here: Project) -> None:
    Path("full").mkdir()
    (Path("full") / "mine").write_text("mine")
    for taken in (Path("full"), Path("params.yaml")):
        with pytest.raises(UserError, match=r"FOLDER: .* is not empty"):
            use.export(checkpoint_of(here, 10), taken)
    assert [path.name for path in Path("full").iterdir()] == ["mine"]
    Path("empty").mkdir()
    use.export(checkpoint_of(here, 10), Path("empty"))
    assert (Path("empty") / "README.md").exists()


def test_a_disk_that_refuses_leaves_nothing(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for operation in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(disk, operation, refuse)
            with pytest.raises(UserError, match=r"FOLDER: .*No space left"):
                use.export(checkpoint_of(here, 10), Path("deep/out"))
        assert list(Path("deep").iterdir()) == []
    with pytest.raises(UserError, match=r"FOLDER: .*cannot be written"):
        use.export(checkpoint_of(here, 10), Path("params.yaml/out"))


@pytest.mark.slow
def test_a_kill_leaves_no_folder_and_the_next_export_sweeps_up(here: Project) -> None:
    use.export(checkpoint_of(here, 10), Path("whole"))
    whole = {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    rename = len(whole) + 2  # each file and their folder go to the disk before
    command = [sys.executable, "-m", "flows.cli", "export", NAME, "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CRASH_AT": str(rename)}
    killed = subprocess.run(command, env=environment, timeout=120, check=False)
    assert killed.returncode == -9
    assert not Path("out").exists()
    (leftover,) = Path().glob(".out.*")
    assert {path.name for path in leftover.iterdir()} == set(whole)
    use.export(checkpoint_of(here, 10), Path("out"))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == whole
    assert not list(Path().glob(".out.*"))


# The model card


def card_of(project: Project, **row: Any) -> str:
    write_scores(project, checkpoint_of(project, 10), **row)
    return model_card.model_card(checkpoint_of(project, 10))


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_has_figures_with_intervals_and_lineage(here: Project) -> None:
    checkpoint = checkpoint_of(here, 10)
    config = tracking.read_config(here.run_folder(NAME))
    card = card_of(
        here,
        answer_bits_per_byte=0.51234,
        distractor_accuracy=0.375,
        exact_match=None,
        items=256,
        intervals={"answer_bits_per_byte": [0.49, 0.53], "distractor_accuracy": [0.3, 0.45]},
        best=True,
        reason="lower by 0.1 | certain",
    )
    assert "| 0.5123 | 0.4900 to 0.5300 |" in card
    assert "| 37.5% | 30.0% to 45.0% |" in card
    assert "exact answers" not in card, "a score that is not there is not shown"
    assert "256 samples" in card
    assert "`champion` and `best`. Champion rule: lower by 0.1 | certain." in card
    for fact in (NAME, checkpoint.digest, checkpoint.model_sha256, config.digest, "d" * 64, "somewhere", "language == 'en'", "10 of 100"):
        assert f"`{fact}`" in card
    parameters = sum(parameter.numel() for parameter in GPT2(config.model).parameters())
    assert f"{parameters:,} parameters" in card
    assert "| `learning_rate` | `0.0003` |" in card


def test_a_card_says_when_there_are_no_scores(here: Project, tmp_path: Path) -> None:
    card_of(here, text_bits_per_byte=0.29361)
    here.run_folder(NAME).scores.unlink()
    assert "Not evaluated" in model_card.model_card(checkpoint_of(here, 10))
    shutil.copytree(checkpoint_of(here, 10).path, tmp_path / "step_00000010")
    assert "Not evaluated" in model_card.model_card(open_checkpoint(tmp_path / "step_00000010"))


def test_the_front_matter_is_the_hubs(here: Project) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = card_of(here)
    data = huggingface_hub.ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "other")
    assert data.tags == ["gpt2", "gpt2-from-scratch"]
    assert data.datasets is None, "a folder is no dataset of the Hub"


def test_a_dataset_of_the_hub_is_linked_with_its_license(here: Project) -> None:
    checkpoint = checkpoint_of(here, 10)
    state = checkpoint.state()
    state["config"]["data"]["path"], state["config"]["dataset"]["revision"] = "PleIAs/SYNTH", "abc123"
    fields = front_matter(model_card.model_card(resealed(checkpoint, state)))
    assert fields["datasets"] == ["PleIAs/SYNTH"]
    assert fields["license_link"] == "https://huggingface.co/datasets/PleIAs/SYNTH"


@pytest.mark.parametrize("hostile", ["``` | a\n# b", "`", "|", "a\n---\nlicense: mit\n---\n"])
def test_what_a_config_says_stays_in_its_cell(here: Project, hostile: str) -> None:
    checkpoint = checkpoint_of(here, 10)
    state = checkpoint.state()
    state["config"]["data"]["filter"] = hostile
    card = model_card.model_card(resealed(checkpoint, state))
    (line,) = [line for line in card.splitlines() if line.startswith("| filter")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert " ".join(hostile.split()).replace("|", "\\|") in line
    assert front_matter(card)["license"] == "other"


def test_the_cards_example_runs(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    use.export(checkpoint_of(here, 10), Path("FOLDER"))
    card = (Path("FOLDER") / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("max_new_tokens=128", "max_new_tokens=4")
    printed: list[str] = []
    with torch.no_grad():
        exec(code, {"print": printed.append})
    assert printed[0].startswith("Q: What causes the tides?")
