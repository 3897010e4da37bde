"""One Prefect server for all tests of this folder that need one; it wants a password."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import temporary_settings

from tests.flows.prefect_server import PrefectServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"), auth="admin:a long password")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: PrefectServer) -> Iterator[SyncPrefectClient]:
    """A client of the server, which has no automations yet, and keeps none: an impatient rule would find other tests' runs dead."""
    with temporary_settings({"api.url": server.api, "api.auth_string": server.auth}), get_client(sync_client=True) as client:
        _forget_automations(client)
        yield client
        _forget_automations(client)


def _forget_automations(client: SyncPrefectClient) -> None:
    for automation in client.read_automations():
        client.delete_automation(automation.id)
