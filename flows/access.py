"""Who may reach the two servers: their address, the password, and which names and pages a browser may come from."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from dataclasses import dataclass, field

from model.errors import UserError
from model.secrets import SHORTEST
from tasks.project import Project

LOOPBACK = "127.0.0.1"
USER = "admin"
PASSWORD = "GPT2_PASSWORD"  # noqa: S105 (the name of the variable)
_ANY = ("0.0.0.0", "::")  # noqa: S104


@dataclass(frozen=True)
class Access:
    """Where the servers listen, and for whom. `password` comes from the environment and goes nowhere else."""

    host: str
    prefect_port: int
    mlflow_port: int
    password: str | None = field(repr=False)

    @property
    def prefect(self) -> str:
        """Prefect's address, as this machine and others reach it."""
        return f"http://{_in_url(self._name())}:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        """MLflow's address."""
        return f"http://{_in_url(self._name())}:{self.mlflow_port}"

    def for_prefect(self) -> dict[str, str]:
        """The environment of Prefect's server."""
        return {
            "PREFECT_SERVER_UI_API_URL": f"{self.prefect}/api",
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(self._origins(self.prefect_port)),
        } | (
            {"PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{self.password}", "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true"}
            if self.password
            else {}
        )

    def for_mlflow(self, project: Project) -> dict[str, str]:
        """The environment of MLflow's server. Its accounts are made anew with each start: the password is the one of today."""
        environment = {
            "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{_in_url(name)}:{self.mlflow_port}" for name in self._names()),
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(self._origins(self.mlflow_port)),
            "MLFLOW_SERVER_X_FRAME_OPTIONS": "DENY",
        }
        if self.password:
            accounts, settings = project.scratch_folder() / "mlflow-accounts.db", project.scratch_folder() / "mlflow-accounts.ini"
            accounts.unlink(missing_ok=True)
            database = accounts.relative_to(project.root).as_posix()  # the server runs in the project's folder
            settings.write_text(f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{database}\n", encoding="utf-8")
            environment |= {
                "MLFLOW_AUTH_CONFIG_PATH": str(settings),
                "MLFLOW_AUTH_ADMIN_USERNAME": USER,
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            }
        return environment

    def for_clients(self) -> dict[str, str]:
        """The environment of the workers and of who deploys."""
        return {"PREFECT_API_URL": f"{self.prefect}/api"} | (
            {"PREFECT_API_AUTH_STRING": f"{USER}:{self.password}"} if self.password else {}
        )

    def for_mlflow_clients(self) -> dict[str, str]:
        """The environment of who reaches MLflow through its server."""
        return {"MLFLOW_TRACKING_URI": self.mlflow} | (
            {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": self.password} if self.password else {}
        )

    def _name(self) -> str:
        return (socket.getfqdn() if self.password else LOOPBACK) if self.host in _ANY else self.host

    def _names(self) -> list[str]:
        """What a browser may call this machine."""
        names = [self.host] if self.host not in _ANY else [socket.getfqdn(), socket.gethostname(), *_own_addresses()]
        return list(dict.fromkeys([*names, "localhost", LOOPBACK]))

    def _origins(self, port: int) -> list[str]:
        return [f"http://{_in_url(name)}:{port}" for name in self._names()]


def chosen_access(host: str, prefect_port: int, mlflow_port: int) -> Access:
    """The access that the options and GPT2_PASSWORD ask for.

    Raises:
        UserError: a host that others reach without a password, a password that is too short, a host or port that cannot be had.
    """
    password = os.environ.get(PASSWORD) or None
    if password is not None and len(password) < SHORTEST:
        raise UserError(f"{PASSWORD}: has fewer than {SHORTEST} characters; take a longer one")
    if password is not None and not (password.isascii() and password.isprintable()):
        raise UserError(f"{PASSWORD}: holds a character that a browser's login would spell otherwise; take printable ASCII characters")
    if not _is_loopback(host) and password is None:
        raise UserError(f"--host: others would reach {host}, and start programs here; set a password first: export {PASSWORD}=…")
    if prefect_port == mlflow_port:
        raise UserError(f"--mlflow-port: {mlflow_port} is Prefect's; choose another")
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        _check_free(host, port, option)
    return Access(host, prefect_port, mlflow_port, password)


def _check_free(host: str, port: int, option: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise UserError(f"--host: {host} is unknown; give an address of this machine") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address[0], 0))
        except OSError:
            raise UserError(f"--host: {host} is no address of this machine") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            raise UserError(f"{option}: port {port} is taken; choose another") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _own_addresses() -> list[str]:
    import psutil

    internet = (socket.AF_INET, socket.AF_INET6)
    return [each.address.partition("%")[0] for card in psutil.net_if_addrs().values() for each in card if each.family in internet]


def _in_url(name: str) -> str:
    return f"[{name}]" if ":" in name else name
