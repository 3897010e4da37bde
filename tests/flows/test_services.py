"""`gpt2 services` as a team has it: a real PostgreSQL behind both servers, a password before them; and what it refuses."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import yaml

from flows.access import chosen_access
from flows.postgres import make_databases, refuse_a_password
from flows.services import gpus
from model.errors import UserError
from tests.end_to_end.conftest import GPT2, PREFECT, Clone, until
from tests.flows import postgres_server
from tests.tasks.conftest import free_port

ROOT = Path(__file__).parents[2]
PASSWORD = "correct:horse battery"
SLOW = """
import time
from pathlib import Path
from prefect import flow

@flow
def slow() -> None:
    Path("begun").touch()
    time.sleep(600)
"""


@dataclass
class Team:
    clone: Clone
    desk: subprocess.Popen[str]
    prefect: str
    mlflow: str
    postgres_port: int

    def ask(self, url: str, user: str | None = None, body: str | None = None, method: str | None = None, **headers: str) -> tuple[int, str]:
        """The status and body of an answer; POST if there is a body of JSON."""
        if user is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        headers["Content-Type"] = "application/json"
        request = urllib.request.Request(url, body.encode() if body else None, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def select(self, database: str, query: str) -> list[tuple[Any, ...]]:
        user, password = postgres_server.USER, postgres_server.PASSWORD
        address = {"host": "127.0.0.1", "port": self.postgres_port, "user": user, "password": password, "dbname": database}
        with closing(psycopg2.connect(**address)) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    home = tmp_path_factory.mktemp("team")
    root = home / "a clone"
    root.mkdir()
    for name in ("params.yaml", "dvc.yaml", "overrides.yaml"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "slow.py").write_text(SLOW)
    deployment = {"name": "here", "entrypoint": "slow.py:slow", "work_pool": {"name": "cpu"}}
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(root)}}]
    (root / "prefect.yaml").write_text(yaml.safe_dump({"pull": pull, "deployments": [deployment]}))
    unset = ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI", "PGPASSWORD")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
        "GPT2_PASSWORD": PASSWORD,
    }
    prefect, mlflow = free_port(), free_port()
    with postgres_server.postgres_server() as port:
        login = f"{postgres_server.USER}:{urllib.parse.quote(postgres_server.PASSWORD, safe='')}"
        environment["GPT2_POSTGRES"] = f"postgresql://{login}@127.0.0.1:{port}"
        clone = Clone(root, environment)
        desk = clone.start(*GPT2, "services", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow))
        try:
            until(lambda: "Ctrl-C ends all" in clone.said_by(desk) or desk.poll() is not None, 240, "all services answer")
            assert desk.poll() is None, clone.said_by(desk)
            environment |= {"PREFECT_API_URL": f"http://127.0.0.1:{prefect}/api", "PREFECT_API_AUTH_STRING": f"admin:{PASSWORD}"}
            yield Team(clone, desk, f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}", port)
        finally:
            if desk.poll() is None:
                desk.send_signal(signal.SIGINT)
                desk.wait(90)
            assert clone.end() == [], "these were left behind"


@pytest.mark.slow
def test_both_servers_keep_their_data_in_postgresql(team: Team) -> None:
    assert team.select("prefect", "SELECT name FROM deployment") == [("here",)]
    assert team.ask(f"{team.mlflow}/api/2.0/mlflow/experiments/create", f"admin:{PASSWORD}", body='{"name": "of a team"}')[0] == 200
    assert ("of a team",) in team.select("mlflow", "SELECT name FROM experiments")


@pytest.mark.slow
def test_a_worker_of_each_pool_is_there_under_this_machines_name(team: Team) -> None:
    workers = dict(team.select("prefect", "SELECT worker.name, work_pool.name FROM worker JOIN work_pool ON work_pool_id = work_pool.id"))
    assert sorted(workers.values()) == ["cpu", "gpu"]
    assert all(name.partition("@")[0] == pool for name, pool in workers.items())


@pytest.mark.slow
def test_nobody_gets_in_without_the_password(team: Team) -> None:
    for place in (f"{team.prefect}/api/work_pools/gpu", f"{team.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"):
        assert team.ask(place)[0] == 401
        assert team.ask(place, "admin:password1234")[0] == 401
        assert team.ask(place, f"admin:{PASSWORD}")[0] == 200


@pytest.mark.slow
def test_a_changing_request_without_a_csrf_token_is_refused(team: Team) -> None:
    status, said = team.ask(f"{team.prefect}/api/work_pools/", f"admin:{PASSWORD}", body='{"name": "mine"}')
    assert (status, "CSRF" in said) == (403, True)


@pytest.mark.slow
def test_pages_of_elsewhere_may_not_ask_and_other_names_are_not_answered(team: Team) -> None:
    me, elsewhere = f"admin:{PASSWORD}", "http://elsewhere.example"
    asks = {"Access-Control-Request-Method": "GET"}
    assert team.ask(f"{team.prefect}/api/work_pools/gpu", None, method="OPTIONS", Origin=team.prefect, **asks)[0] == 200
    assert team.ask(f"{team.prefect}/api/work_pools/gpu", None, method="OPTIONS", Origin=elsewhere, **asks)[0] == 400
    made = f"{team.mlflow}/api/2.0/mlflow/experiments/create"
    assert team.ask(made, me, body='{"name": "theirs"}', Origin=elsewhere) == (403, "Cross-origin request blocked")
    assert team.ask(f"{team.mlflow}/", me, Host="elsewhere.example")[0] == 403
    assert team.ask(f"{team.mlflow}/", me)[0] == 200


@pytest.mark.slow
def test_no_password_is_in_a_command_line_or_a_log(team: Team) -> None:
    secrets = (PASSWORD, postgres_server.PASSWORD, urllib.parse.quote(postgres_server.PASSWORD, safe=""))
    shown = [team.clone.said_by(team.desk), *(path.read_text(errors="replace") for path in team.clone.root.rglob(".dvc/tmp/gpt2/*.log"))]
    shown += [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [text for text in shown if any(secret in text for secret in secrets)]
    workers = [process for process in psutil.Process(team.desk.pid).children() if "worker" in process.cmdline()]
    assert len(workers) == 2
    for worker in workers:
        assert worker.environ()["GPT2_PROJECT"] == str(team.clone.root)
        assert not {"GPT2_POSTGRES", "PGPASSWORD"} & set(worker.environ())


@pytest.mark.slow
def test_prefects_server_takes_the_template_for_kubernetes(team: Team) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    template = json.loads((ROOT / "deploy" / "kubernetes.json").read_text())
    settings = {PREFECT_API_URL: f"{team.prefect}/api", PREFECT_API_AUTH_STRING: f"admin:{PASSWORD}"}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="on-a-cluster", type="kubernetes", base_job_template=template))
        del template["variables"]["properties"]["gpus"]
        with pytest.raises((PrefectHTTPStatusError, ValueError), match="gpus"):
            client.create_work_pool(WorkPoolCreate(name="on-another", type="kubernetes", base_job_template=template))


@pytest.mark.slow
def test_a_worker_of_another_clone_joins_and_leaves(team: Team, tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    worker = subprocess.Popen([*GPT2, "worker", "gpu", "--limit", "3"], cwd=tmp_path, env=team.clone.environment)
    try:
        log = tmp_path / ".dvc" / "tmp" / "gpt2" / "gpu-worker.log"
        until(lambda: log.exists() and "started!" in log.read_text(), 60, "it began")
        commands = [" ".join(process.cmdline()) for process in psutil.Process(worker.pid).children()]
        assert any("--pool gpu" in command and command.endswith("--limit 3") for command in commands)
        worker.terminate()
        assert worker.wait(30) == 0
        assert "stopped!" in log.read_text()
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.slow
def test_ctrl_c_lets_a_flow_say_how_it_ended_and_leaves_nothing_behind(team: Team) -> None:
    team.clone.run(*PREFECT, "deployment", "run", "slow/here")
    until((team.clone.root / "begun").exists, 60, "the flow begins")
    team.desk.send_signal(signal.SIGINT)
    assert team.desk.wait(60) == 0
    assert team.select("prefect", "SELECT state_name FROM flow_run") == [("Crashed",)], "without this it would say Running for ever"
    assert team.clone.said_by(team.desk).splitlines()[-2:] == ["gpu worker and cpu worker end", "Prefect and MLflow end"]
    assert team.clone.end() == []


@pytest.mark.parametrize(
    ("options", "password", "says"),
    [
        (["--host", "0.0.0.0"], "", "--host: others would reach 0.0.0.0"),
        (["--host", "127.0.0.1"], "short", "GPT2_PASSWORD: has fewer than 8 characters"),
        (["--host", "192.0.2.1"], PASSWORD, "--host: 192.0.2.1 is no address of this machine"),
        (["--prefect-port", "5000"], "", "--mlflow-port: 5000 is Prefect's"),
        (["--postgres", "postgresql://me:sesame12@db"], "", "--postgres: holds a password"),
        (["--postgres", "mysql://db"], "", "--postgres: begins with mysql://"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: list[str], password: str, says: str) -> None:
    environment = {**os.environ, "GPT2_PASSWORD": password}
    free = [] if "--prefect-port" in options else ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    refused = subprocess.run([*GPT2, "services", *free, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {says}")
    assert refused.stderr.count("\n") == 1
    assert "sesame12" not in refused.stderr


def test_a_url_without_a_password_may_be_typed() -> None:
    for url in ("postgresql://db", "postgresql://me@db:5432/postgres?sslmode=require"):
        refuse_a_password(url)
    for url in ("postgresql://me:x@db", "postgresql://db/?user=me&password=x"):
        with pytest.raises(UserError, match="holds a password"):
            refuse_a_password(url)


def test_a_postgresql_that_does_not_answer_is_one_line_without_the_password() -> None:
    with pytest.raises(ConnectionError, match=r"--postgres: .*refused") as raised:
        make_databases(f"postgresql://me:sesame12@127.0.0.1:{free_port()}")
    assert "sesame12" not in str(raised.value)


def test_a_password_is_shown_by_nothing_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_PASSWORD", PASSWORD)
    assert PASSWORD not in repr(chosen_access("127.0.0.1", free_port(), free_port()))


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no CUDA")
@pytest.mark.parametrize(("visible", "count"), [("0,2", 2), ("GPU-1a2b", 1), ("", 1), ("-1", 1)])
def test_a_training_for_each_gpu_that_is_visible(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == count
