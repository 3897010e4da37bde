"""The champion in a real registry: compare-and-set under our lock, whoever else is at it, and champions from elsewhere."""

from __future__ import annotations

import queue
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from model.evaluation.comparison import Evidence
from tasks import champion, tracking
from tasks.champion import NotComparable, crown, mark_best
from tasks.project import Project
from tests.tasks.conftest import NAME, make_project

if TYPE_CHECKING:
    from mlflow import MlflowClient

ITEMS = tuple(f"item {number}" for number in range(12))


def evidence(bits: float) -> Evidence:
    """Of a checkpoint that needs so many bits a byte, and on each item a little more or less of its own."""
    luck = np.random.default_rng(round(bits * 1e6)).normal(0, 1e-4, len(ITEMS))
    return Evidence(ITEMS, ITEMS, 10 * (bits + luck), np.full(len(ITEMS), 10.0), ITEMS, np.ones(len(ITEMS)))


class Registry:
    """A registered model with versions of planted quality."""

    def __init__(self, project: Project, client: MlflowClient, bits: list[float]) -> None:
        self.client = client
        self.lock = tracking.alias_lock(project, project.experiment(NAME), NAME)
        self.evidence = {f"digest {value:.2f}": evidence(value) for value in bits}
        client.create_registered_model(NAME)
        self.entries: list[dict[str, Any]] = []
        for step, digest in enumerate(self.evidence):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
                version = client.create_model_version(NAME, f"/somewhere/{step}", tags={tracking.DIGEST_TAG: digest})
            name = f"step_{step:08d}"
            self.entries.append({"name": name, "step": step, "digest": digest, "version": str(version.version), "model_id": ""})
        self.materialised: list[str] = []

    def crown(self, *chosen: int, known: list[int] | None = None, unknown: Any = None, lock: Any = None) -> dict[str, Any]:
        """Let these compete; `known` are those whose scores there are."""
        entries = [self.entries[index] for index in chosen]
        scores = {self.entries[index]["digest"]: self.evidence[self.entries[index]["digest"]] for index in known or chosen}

        def from_elsewhere(version: tracking.Version) -> Evidence:
            return self.evidence[str(version.digest)]

        _, verdicts = crown(
            self.client,
            lock or self.lock,
            NAME,
            entries,
            scores,
            unknown or from_elsewhere,
            lambda entry: self.materialised.append(entry["name"]),
        )
        return verdicts

    @property
    def champion(self) -> int:
        """The index of the checkpoint that the alias marks."""
        version = self.client.get_model_version_by_alias(NAME, tracking.CHAMPION).version
        return next(index for index, entry in enumerate(self.entries) if entry["version"] == str(version))


@pytest.fixture
def client(project: Project) -> MlflowClient:
    return tracking.connect(project, project.experiment(NAME))


def test_the_champion_is_the_best_whatever_the_order(project: Project, client: MlflowClient) -> None:
    registry = Registry(project, client, [1.0, 0.8, 0.9])
    verdicts = registry.crown(0, 1, 2)
    assert registry.champion == 1
    assert registry.materialised == ["step_00000001"], "only who wins in the end"
    assert verdicts["digest 1.00"].reason == "beaten by step_00000001; before: takes over: the first to be evaluated"
    assert verdicts["digest 0.80"].reason.startswith("takes over: -0.2")
    assert verdicts["digest 0.90"].reason.startswith("stays: not significantly better, +0.1")
    registry.crown(2, 0)
    assert registry.champion == 1, "a champion that is not among those that compete is measured against all the same"


def test_a_second_evaluation_changes_nothing_and_keeps_the_champions_reason(project: Project, client: MlflowClient) -> None:
    registry = Registry(project, client, [1.0, 0.8])
    reason = registry.crown(0, 1)["digest 0.80"].reason
    tracking.tag_version(client, NAME, "2", {champion.REASON_TAG: reason})
    assert registry.crown(0, 1)["digest 0.80"].reason == reason
    assert registry.materialised == ["step_00000001"]


def test_an_older_step_that_arrives_late_cannot_demote(project: Project, client: MlflowClient) -> None:
    """While the older ones were scored, a better one was crowned; their evaluation knows nothing of it."""
    registry = Registry(project, client, [1.0, 0.9, 0.5])
    registry.crown(0)

    def meanwhile(entry: dict[str, Any]) -> None:
        client.set_registered_model_alias(NAME, tracking.CHAMPION, registry.entries[2]["version"])

    entries = registry.entries[:2]
    scores = {entry["digest"]: registry.evidence[entry["digest"]] for entry in entries}
    now, verdicts = crown(client, registry.lock, NAME, entries, scores, lambda version: registry.evidence[str(version.digest)], meanwhile)
    assert registry.champion == 2
    assert now is not None
    assert now.digest == "digest 0.50"
    assert not any(verdict.promoted for verdict in verdicts.values())


@pytest.mark.parametrize("replaceable", [True, False])
def test_a_champion_that_cannot_be_compared_goes_only_if_its_data_are_others(
    project: Project, client: MlflowClient, replaceable: bool
) -> None:
    registry = Registry(project, client, [1.0, 0.9, 0.5])
    client.set_registered_model_alias(NAME, tracking.CHAMPION, registry.entries[2]["version"])

    def unknown(version: tracking.Version) -> Evidence:
        raise NotComparable("was seen last on the moon", replaceable)

    verdicts = registry.crown(0, 1, unknown=unknown)
    assert registry.champion == (1 if replaceable else 2)
    assert "version 3" in verdicts["digest 1.00"].reason
    assert "was seen last on the moon" in verdicts["digest 1.00"].reason
    if not replaceable:
        assert verdicts["digest 0.90"].reason.endswith("to choose a champion anew, remove the alias champion in MLflow")


def test_whoever_sets_the_alias_without_our_lock_is_noticed_and_judged(project: Project, client: MlflowClient, monkeypatch: Any) -> None:
    registry = Registry(project, client, [1.0, 0.9, 0.5])
    registry.crown(0)
    setting, interfered = client.set_registered_model_alias, []

    def slow(name: str, alias: str, version: str) -> None:
        setting(name, alias, version)
        if not interfered:
            interfered.append(version)
            setting(name, alias, "3")  # another machine, a moment later

    monkeypatch.setattr(client, "set_registered_model_alias", slow)
    verdicts = registry.crown(0, 1)
    assert interfered == ["2"]
    assert registry.champion == 2
    assert not any(verdict.promoted for verdict in verdicts.values())


@pytest.mark.slow
def test_in_a_thousand_races_the_alias_is_right(project: Project, client: MlflowClient) -> None:
    """Eight at once against a real SQLite registry: 25 rounds, in each of which 40 checkpoints arrive in any order; none takes the alias
    from a better one, and at the end of each the best has it."""
    registry = Registry(project, client, [1.0 + 0.05 * number for number in range(40)])
    rng = random.Random(0)
    setting = client.set_registered_model_alias
    moves: list[int] = []

    def noted(name: str, alias: str, version: str) -> None:
        setting(name, alias, version)
        moves.append(int(version))

    client.set_registered_model_alias = noted  # type: ignore[method-assign]
    failures: list[BaseException] = []
    for _ in range(25):
        arriving: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in rng.sample(range(40), 40):
            arriving.put(index)

        def challenge_in_turn(arriving: queue.SimpleQueue[int] = arriving) -> None:
            lock = tracking.alias_lock(project, project.experiment(NAME), NAME)  # a lock object is its holder's: one each
            try:
                while True:
                    registry.crown(arriving.get_nowait(), lock=lock)
            except queue.Empty:
                pass
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=challenge_in_turn) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert registry.champion == 0, "the first is the best"
        assert moves == sorted(moves, reverse=True), "nobody was demoted"
        client.delete_registered_model_alias(NAME, tracking.CHAMPION)
        moves.clear()


def test_best_is_the_lowest_validation_loss(project: Project, client: MlflowClient) -> None:
    registry = Registry(project, client, [1.0, 0.9, 0.8, 0.7])
    assert mark_best(client, registry.lock, NAME, registry.entries, {}) is None
    best = mark_best(client, registry.lock, NAME, registry.entries, {0: 3.0, 1: 2.5, 2: 2.5, 7: 1.0})
    assert best is not None
    assert best["name"] == "step_00000001", "the earlier of equal ones; a step without a checkpoint does not count"
    marked = tracking.version_with(client, NAME, tracking.BEST)
    assert marked is not None
    assert marked.version == "2"


def test_clones_that_share_a_storage_share_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clones = [make_project(tmp_path / name) for name in ("one", "other")]
    for clone in clones:
        clone.record_overrides(NAME, {"storage": {"base_folder": str(tmp_path / "storage")}})
    places = [Path(tracking.alias_lock(clone, clone.experiment(NAME), NAME).lock_file) for clone in clones]
    assert places[0] == places[1] == tmp_path / "storage" / "mlflow" / f".aliases-{NAME}.lock"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path.as_posix()}/elsewhere/mlflow.db")
    assert Path(tracking.alias_lock(clones[0], clones[0].experiment(NAME), NAME).lock_file).parent == tmp_path / "elsewhere"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert Path(tracking.alias_lock(clones[0], clones[0].experiment(NAME), NAME).lock_file).parent == clones[0].scratch_folder()
