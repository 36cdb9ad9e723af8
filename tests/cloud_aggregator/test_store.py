"""The store: what an aggregator still knows after it was killed, on SQLite and on PostgreSQL.

PostgreSQL is started for these tests where its programs are installed, and is skipped elsewhere.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from cloud_aggregator import store as tables
from cloud_aggregator.database import FILE, StoreError, shown
from cloud_aggregator.store import OpenRound, Store
from device_profiles.errors import InputError
from tests.cloud_aggregator.conftest import RUN, blob_of, device, offer_of

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Yield the address of a PostgreSQL that is gone afterwards."""
    pytest.importorskip("psycopg")
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed")
    root = os.geteuid() == 0
    user = "postgres" if root else getpass.getuser()
    programs = PROGRAMS[-1].parent
    with tempfile.TemporaryDirectory(prefix="pwff-pg-") as name:
        folder = Path(name)
        if root:  # which it refuses to run as
            shutil.chown(folder, user)
        folder.chmod(0o700)
        data = folder / "data"

        def call(program: str, *arguments: str) -> None:
            command = [str(programs / program), "-D", str(data), *arguments]
            subprocess.run(
                command, check=True, capture_output=True, user=user if root else None, cwd=folder
            )

        call("initdb", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses= -c fsync=off -k {folder}"
        call("pg_ctl", "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql+psycopg://{user}@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Return what opens the store of one run, again each time."""
    url = request.getfixturevalue("server") if request.param == "postgresql" else None
    run = RUN if url is None else f"{RUN}-{tmp_path.name}"[-60:].strip("-_").replace("_", "-")
    return lambda: Store(tmp_path, run, url)


def test_each_opening_is_counted_and_so_are_devices_with_their_starts(
    opened: Callable[[], Store],
) -> None:
    with opened() as store:
        assert store.epoch == 1
        assert store.devices() == {}
        store.keep_devices({"a": (3, device("a")), "b": (1, device("b"))})
        store.keep_devices({"a": (4, device("a", examples=9))})
    with opened() as store:
        assert store.epoch == 2
        assert store.devices() == {"a": device("a", examples=9), "b": device("b")}
        assert store.epochs() == {"a": 4, "b": 1}


def test_a_round_is_there_again_as_far_as_it_had_come(opened: Callable[[], Store]) -> None:
    begun = OpenRound(
        stage="instruction", wanted=2, cohort=("a", "b", "c"), accepted=None, closed_seconds=None
    )
    with opened() as store:
        assert store.round(1) is None
        store.open_round(1, "instruction", 2, ["c", "a", "b"])
    with opened() as store:
        assert store.round(1) == begun
        store.ask(1, ["a", "b", "c", "d"])
        store.keep_open(1, 40.5)
        for client in ("b", "a"):
            store.ledger(1).keep(offer_of(client, blob_of(client, 1.0)))
        store.close_round(1, ["b", "a"], 2.5, {"a": "aggregated"}, noise_key=2**128 - 1)
    with opened() as store:
        closed = store.round(1)
        assert closed is not None
        assert (closed.cohort, closed.accepted) == (("a", "b", "c", "d"), ("a", "b"))
        assert (closed.closed_seconds, closed.noise_key) == (2.5, 2**128 - 1)
        assert closed.open_seconds == 40.5
        assert str(2**128 - 1) not in repr(closed)
        assert [offer.client for offer in store.ledger(1).kept()] == ["b", "a"]  # as they came


def test_an_update_that_comes_again_takes_the_place_of_its_clients_first(
    opened: Callable[[], Store],
) -> None:
    first, second = (offer_of("a", blob_of("a", value)) for value in (1.0, 2.0))
    with opened() as store:
        ledger = store.ledger(1)
        ledger.keep(first)
        ledger.keep(offer_of("b", blob_of("b", 1.0)))
        ledger.keep(second)
        assert [(o.client, o.blob) for o in ledger.kept()][:1] == [("a", second.blob)]
        assert len(ledger.kept()) == 2
        ledger.clear()
        assert ledger.kept() == []


def test_a_round_that_is_opened_or_done_again_begins_without_an_update(
    opened: Callable[[], Store],
) -> None:
    with opened() as store:
        store.open_round(1, "alignment", 1, ["a"])
        store.ledger(1).keep(offer_of("a", blob_of("a", 1.0)))
        store.keep_open(1, 3.0)
        store.close_round(1, ["a"], 1.0, {}, noise_key=7)
        store.reopen_round(1)
        again = store.round(1)
        assert again is not None
        assert (again.cohort, again.accepted, again.noise_key) == (("a",), None, None)
        assert again.open_seconds == 0.0
        assert store.ledger(1).kept() == []
        store.ledger(1).keep(offer_of("a", blob_of("a", 1.0)))
        store.open_round(1, "alignment", 1, ["b"])
        assert store.ledger(1).kept() == []


def test_what_stands_in_the_record_is_forgotten_and_the_next_round_is_not(
    opened: Callable[[], Store],
) -> None:
    with opened() as store:
        for number in (1, 2):
            store.open_round(number, "instruction", 1, ["a"])
            store.ledger(number).keep(offer_of("a", blob_of("a", 1.0), round=number))
        store.keep_only(2)
        assert store.round(1) is None
        assert store.ledger(1).kept() == []
        assert store.round(2) is not None
        assert len(store.ledger(2).kept()) == 1


def test_a_new_run_of_the_name_forgets_all_but_the_starts(opened: Callable[[], Store]) -> None:
    with opened() as store:
        store.keep_devices({"a": (3, device("a"))})
        store.open_round(1, "instruction", 1, ["a"])
        store.ledger(1).keep(offer_of("a", blob_of("a", 1.0)))
        store.forget()
        assert (store.round(1), store.devices(), store.ledger(1).kept()) == (None, {}, [])
        assert store.epochs() == {"a": 3}
    with opened() as store:
        assert store.epoch == 2


def test_a_second_aggregator_is_refused_and_comes_in_when_the_first_is_gone(
    opened: Callable[[], Store],
) -> None:
    with opened(), pytest.raises(InputError, match="another aggregator is at work on"):
        opened()
    with opened() as store:
        assert store.epoch == 2


def test_one_server_takes_one_aggregator_a_run_wherever_its_folder_is(
    server: str, tmp_path: Path
) -> None:
    with (
        Store(tmp_path / "one", "run-a", server),
        Store(tmp_path / "two", "run-b", server),
        pytest.raises(InputError, match="'run-a' in postgresql"),
    ):
        Store(tmp_path / "three", "run-a", server)


def test_migrations_make_the_tables_that_the_store_uses(tmp_path: Path) -> None:
    with Store(tmp_path, RUN):
        pass
    made = sa.inspect(sa.create_engine(f"sqlite:///{tmp_path / FILE}"))
    for table in tables._metadata.tables.values():
        columns = {column["name"] for column in made.get_columns(table.name)}
        assert {column.name for column in table.columns} <= columns, table.name


def test_a_store_of_the_first_version_is_gone_on_with(tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", "cloud_aggregator:migrations")
    with sa.create_engine(f"sqlite:///{tmp_path / FILE}").begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.text("INSERT INTO runs (run, epoch) VALUES (:run, 4)"), {"run": RUN})
        row = "INSERT INTO rounds (run, number, stage, wanted, cohort) VALUES (:run, 3, :s, 1, :c)"
        connection.execute(sa.text(row), {"run": RUN, "s": "reward", "c": '["a"]'})
    with Store(tmp_path, RUN) as store:
        assert store.epoch == 5
        assert store.round(3) == OpenRound(
            stage="reward", wanted=1, cohort=("a",), accepted=None, closed_seconds=None
        )


def test_what_a_killed_process_had_not_committed_is_not_there(tmp_path: Path) -> None:
    with Store(tmp_path, RUN) as store:
        store.open_round(1, "instruction", 1, ["a"])
        with contextlib.suppress(KeyboardInterrupt), store._transaction() as connection:
            connection.execute(sa.text("DELETE FROM rounds"))
            raise KeyboardInterrupt
    with Store(tmp_path, RUN) as store:
        assert store.round(1) is not None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "the address cannot be read"),
        ("mysql://host/runs", "needs a lock"),
        ("sqlite://", "needs a lock"),
    ],
)
def test_an_address_that_keeps_nothing_is_refused(url: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        Store(tmp_path, RUN, url)
    with Store(tmp_path, RUN):  # and the lock on the folder was let go
        pass


def test_a_file_that_is_no_database_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="cannot be used: file is not a database"):
        Store(tmp_path, RUN)


def test_an_address_is_shown_without_user_password_and_options() -> None:
    url = "postgresql+psycopg://me:secret@db.example:5432/runs?sslmode=require&passfile=x"
    assert shown(url) == "postgresql+psycopg://db.example/runs"
