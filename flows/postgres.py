"""PostgreSQL behind both servers: one address, two databases, `prefect` and `mlflow`, made if they are not there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from model.errors import UserError
from model.secrets import redacted

DATABASES = ("prefect", "mlflow")
ANSWERS_WITHIN_S = 10
_PASSWORD = re.compile(r"://[^/?#]*:[^/?#]*@|[?&]password=|\bpassword *=", re.IGNORECASE)


@dataclass(frozen=True)
class Databases:
    """The URLs that the two servers want; with the password, so they are shown nowhere."""

    prefect: str = field(repr=False)
    mlflow: str = field(repr=False)


def make_databases(url: str) -> Databases:
    """Make the two databases if they are missing, and say where they are. `url` is libpq's, `postgresql://user@host:port`; a database in
    it is only the one that is connected to for that (`postgres` if there is none). Without a password the driver looks for PGPASSWORD and
    ~/.pgpass, here and in the servers.

    Raises:
        UserError: this is no such URL, or the driver is not installed.
        ConnectionError: the server does not answer, or does not let us.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        address = make_url(url)
    except (ArgumentError, ValueError):
        raise UserError("--postgres: is no URL; give one such as postgresql://host:5432") from None
    if address.drivername not in ("postgresql", "postgres"):
        raise UserError(f"--postgres: begins with {address.drivername}://; give one such as postgresql://host:5432")
    try:
        import psycopg2
    except ImportError:
        raise UserError("--postgres: needs a driver; install it: pip install 'gpt2-from-scratch[postgres]'") from None
    libpq = address.set(drivername="postgresql", database=address.database or "postgres").render_as_string(hide_password=False)
    try:
        connection = psycopg2.connect(libpq, connect_timeout=ANSWERS_WITHIN_S)
        connection.autocommit = True  # CREATE DATABASE takes no transaction
        with connection.cursor() as cursor:
            for name in DATABASES:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
                if cursor.fetchone() is None:
                    cursor.execute(f'CREATE DATABASE "{name}"')
        connection.close()
    except psycopg2.Error as error:
        raise ConnectionError(redacted(f"--postgres: {' '.join(str(error).split())}")) from None
    asyncpg = {"ssl" if key == "sslmode" else key: value for key, value in address.query.items()}  # its own word for it
    return Databases(
        prefect=address.set(drivername="postgresql+asyncpg", database="prefect", query=asyncpg).render_as_string(hide_password=False),
        mlflow=address.set(drivername="postgresql+psycopg2", database="mlflow").render_as_string(hide_password=False),
    )


def refuse_a_password(url: str) -> None:
    """For a URL that was typed: every user of the machine sees it in the list of processes.

    Raises:
        UserError: it holds a password; the message does not repeat it.
    """
    if _PASSWORD.search(url):
        raise UserError(
            "--postgres: holds a password, which everybody sees in the list of processes; leave it out and set PGPASSWORD or ~/.pgpass, "
            "or give the whole URL as GPT2_POSTGRES"
        )
