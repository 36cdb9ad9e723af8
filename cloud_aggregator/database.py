"""The database under an aggregator's store: its address, its locks, its migrations.

A commit is on the disk when it returns: SQLite in WAL mode with ``synchronous=FULL``; a server does
as its administrator says. One aggregator a run: locks that end with the process, however it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from cloud_aggregator.locks import FileLock, taken
from device_profiles.errors import InputError

FILE = "state.sqlite"

_MIGRATING = 0x70776666  # of PostgreSQL's advisory locks: "pwff"


class StoreError(Exception):
    """The store cannot be read or written; what was committed is safe."""

    exit_code = 1


class Database:
    """A database that one run's aggregator has to itself, its tables made.

    Args:
        folder: Of the run.
        run: Its name.
        url: SQLAlchemy's, of SQLite or PostgreSQL; by default a file in the folder.

    Attributes:
        name: Where it is, without secrets.

    Raises:
        InputError: If the address is not usable, or another aggregator is at work on the run.
        StoreError: If the database does not answer.
    """

    def __init__(self, folder: Path, run: str, url: str | None = None) -> None:
        self._open = contextlib.ExitStack()
        self._lock(folder / "aggregator.lock", f"the run in {folder}")
        try:
            address = _address(url) if url else sa.URL.create("sqlite", database=str(folder / FILE))
            self.name = _shown(address)
            if address.get_backend_name() == "sqlite" and url:
                database = Path(address.database or "")
                self._lock(
                    database.with_name(f"{database.name}.{run}.lock"), f"'{run}' in {self.name}"
                )
            self._engine = _engine(address)
            self._open.callback(self._engine.dispose)
            with self._told():
                if address.get_backend_name() == "postgresql":
                    self._lock_server(run)
                self._migrate()
        except BaseException:
            self._open.close()
            raise

    def close(self) -> None:
        """Let go of the connections and the locks."""
        self._open.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Give a connection; what was done on it is committed at the end, or nothing of it.

        Raises:
            StoreError: If the database does not do it.
        """
        with self._told(), self._engine.begin() as connection:
            yield connection

    def _lock(self, path: Path, what: str) -> None:
        self._open.callback(FileLock(path, what).release)

    def _lock_server(self, run: str) -> None:
        """Take PostgreSQL's lock on the run; it is free when this connection ends."""
        held = self._open.enter_context(self._engine.connect())
        held = held.execution_options(isolation_level="AUTOCOMMIT")
        key = sa.func.hashtextextended(f"pwff {run}", 0)
        if not held.scalar(sa.select(sa.func.pg_try_advisory_lock(key))):
            raise taken(f"'{run}' in {self.name}")

    def _migrate(self) -> None:
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", "cloud_aggregator:migrations")
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what the database says into a sentence without its address's secrets."""
        try:
            yield
        except DBAPIError as err:
            said = str(err.orig).strip().split("\n", 1)[0]
            raise StoreError(
                f"the store {self.name} cannot be used: {said}; make it answer, then start again"
            ) from None


def _address(url: str) -> sa.URL:
    try:
        address = sa.make_url(url)
        backend = address.get_backend_name()
    except (ArgumentError, ValueError):
        raise InputError(
            "store: the address cannot be read; give sqlite:///FILE or "
            "postgresql+psycopg://USER@HOST/DATABASE"
        ) from None
    if backend not in ("sqlite", "postgresql") or (backend == "sqlite" and not address.database):
        raise InputError(
            f"store = {address.drivername}: a run is kept by one aggregator alone, which needs a "
            "lock that this one has not; give sqlite:///FILE or postgresql+psycopg://..."
        )
    return address


def _shown(address: sa.URL) -> str:
    where = f"{address.host}/" if address.host else ""
    return f"{address.drivername}://{where}{address.database or ''}"


def shown(url: str) -> str:
    """Return an address without user, password and options, for records and messages.

    Raises:
        InputError: If it cannot be read.
    """
    return _shown(_address(url))


def _engine(address: sa.URL) -> sa.Engine:
    try:
        engine = sa.create_engine(address)
    except (SQLAlchemyError, ModuleNotFoundError) as err:
        raise InputError(
            f"store = {address.drivername}: its driver is not there ({type(err).__name__}); "
            "install it (for PostgreSQL: `pip install 'pwff[postgresql]'`) or leave 'store' out"
        ) from None
    if address.get_backend_name() == "sqlite":
        sa.event.listen(engine, "connect", _make_durable)
    return engine


def _make_durable(connection: Any, _record: object) -> None:
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "busy_timeout=10000",
        "secure_delete=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")
