"""What an aggregator must still know after it was killed: SQLite in the run's folder, or a server.

Its starts, the devices with theirs, the cohort of the round that is open, each update in the order
of arrival before it is acknowledged, and the accepted set before it is aggregated. ``run.json``
stays the record: what stands there leaves the store. Tensors stay in the spool, late updates that
wait for a later round in a folder of their own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from cloud_aggregator.database import Database
from messaging.errors import ProtocolError
from messaging.protocol import DeviceRecord, Offer, Stage, decode, encode

_metadata = sa.MetaData()
_runs = sa.Table("runs", _metadata, sa.Column("run", sa.String), sa.Column("epoch", sa.BigInteger))
_devices = sa.Table(
    "devices",
    _metadata,
    sa.Column("run", sa.String),
    sa.Column("client", sa.String),
    sa.Column("epoch", sa.BigInteger),
    sa.Column("record", sa.Text),
)
_rounds = sa.Table(
    "rounds",
    _metadata,
    sa.Column("run", sa.String),
    sa.Column("number", sa.Integer),
    sa.Column("stage", sa.String),
    sa.Column("wanted", sa.Integer),
    sa.Column("cohort", sa.Text),
    sa.Column("accepted", sa.Text),
    sa.Column("closed_seconds", sa.Float),
    sa.Column("noise_key", sa.String),
    sa.Column("open_seconds", sa.Float),
)
_updates = sa.Table(
    "updates",
    _metadata,
    sa.Column("arrival", sa.Integer, primary_key=True),
    sa.Column("run", sa.String),
    sa.Column("number", sa.Integer),
    sa.Column("client", sa.String),
    sa.Column("blob", sa.String),
    sa.Column("offer", sa.Text),
    sa.Column("verdict", sa.String),
)


#: Both databases know it; the arrival stays that of the first.
_KEEP = sa.text(
    "INSERT INTO updates (run, number, client, blob, offer) "
    "VALUES (:run, :number, :client, :blob, :offer) "
    "ON CONFLICT (run, number, client) DO UPDATE SET blob = excluded.blob, offer = excluded.offer"
)


@dataclass(frozen=True, kw_only=True)
class OpenRound:
    """A round that is not in ``run.json`` yet.

    Attributes:
        stage: That it is of.
        wanted: How many clients its quorum is a share of.
        cohort: Who was asked, in client order.
        accepted: Whose updates count, once the round is closed; in client order.
        closed_seconds: After how many seconds it closed.
        open_seconds: For how long aggregators have had it open.
        noise_key: Of the noise that hides each client's part, where the run is private: a secret.
    """

    stage: Stage
    wanted: int
    cohort: tuple[str, ...]
    accepted: tuple[str, ...] | None
    closed_seconds: float | None
    open_seconds: float = 0.0
    noise_key: int | None = field(default=None, repr=False)


class Store:
    """The state of one run. Opening it counts one more start of its aggregator.

    Args:
        folder: Of the run.
        run: Its name.
        url: SQLAlchemy's, of SQLite or PostgreSQL; by default a file in the folder.

    Attributes:
        name: Where it is, without secrets.
        epoch: How often an aggregator of this run has started, this time included.

    Raises:
        InputError: If the address is not usable, or another aggregator is at work on the run.
        StoreError: If the database does not answer.
    """

    def __init__(self, folder: Path, run: str, url: str | None = None) -> None:
        self._run = run
        self._database = Database(folder, run, url)
        self.name = self._database.name
        try:
            self.epoch = self._begin()
        except BaseException:
            self._database.close()
            raise

    def _begin(self) -> int:
        with self._transaction() as connection:
            mine = _runs.c.run == self._run
            epoch = (connection.scalar(sa.select(_runs.c.epoch).where(mine)) or 0) + 1
            if epoch == 1:
                connection.execute(_runs.insert().values(run=self._run, epoch=epoch))
            else:
                connection.execute(_runs.update().where(mine).values(epoch=epoch))
            return epoch

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database and the locks."""
        self._database.close()

    def _transaction(self) -> contextlib.AbstractContextManager[sa.Connection]:
        return self._database.transaction()

    # -- devices ---------------------------------------------------------------------------------

    def devices(self) -> dict[str, DeviceRecord]:
        """Return the devices that have been there; a record of another version is passed."""
        found = {}
        with self._transaction() as connection:
            rows = connection.execute(
                sa.select(_devices.c.client, _devices.c.record).where(_devices.c.run == self._run)
            )
            for client, record in rows:
                with contextlib.suppress(ValidationError):
                    if record is not None:
                        found[client] = DeviceRecord.model_validate_json(record)
        return found

    def epochs(self) -> dict[str, int]:
        """Return the highest start that each device has come with."""
        columns = sa.select(_devices.c.client, _devices.c.epoch).where(_devices.c.run == self._run)
        with self._transaction() as connection:
            return {row.client: row.epoch for row in connection.execute(columns)}

    def keep_devices(self, devices: Mapping[str, tuple[int, DeviceRecord]]) -> None:
        """Put devices down, each with its starts."""
        if not devices:
            return
        rows = [
            {"run": self._run, "client": name, "epoch": epoch, "record": record.model_dump_json()}
            for name, (epoch, record) in devices.items()
        ]
        with self._transaction() as connection:
            connection.execute(
                _devices.delete().where(
                    _devices.c.run == self._run, _devices.c.client == sa.bindparam("name")
                ),
                [{"name": row["client"]} for row in rows],
            )
            connection.execute(_devices.insert(), rows)

    # -- rounds ----------------------------------------------------------------------------------

    def forget(self) -> None:
        """Forget what an earlier run of this name did; starts stay counted, on both sides."""
        with self._transaction() as connection:
            for table in (_rounds, _updates):
                connection.execute(table.delete().where(table.c.run == self._run))
            connection.execute(
                _devices.update().where(_devices.c.run == self._run).values(record=None)
            )

    def keep_only(self, number: int) -> None:
        """Forget every round but one: the others stand in ``run.json``."""
        with self._transaction() as connection:
            for table in (_rounds, _updates):
                gone = sa.and_(table.c.run == self._run, table.c.number != number)
                connection.execute(table.delete().where(gone))

    def open_round(self, number: int, stage: Stage, wanted: int, cohort: Iterable[str]) -> None:
        """Put down who is asked in a round, before anyone is; it begins without an update."""
        with self._transaction() as connection:
            connection.execute(_updates.delete().where(self._is_update(number)))
            connection.execute(_rounds.delete().where(self._is_round(number)))
            connection.execute(
                _rounds.insert().values(
                    run=self._run,
                    number=number,
                    stage=stage,
                    wanted=wanted,
                    cohort=json.dumps(sorted(cohort)),
                )
            )

    def ask(self, number: int, cohort: Iterable[str]) -> None:
        """Put down who is asked now that others take the place of some."""
        self._set(number, cohort=json.dumps(sorted(cohort)))

    def keep_open(self, number: int, seconds: float) -> None:
        """Put down for how long a round has been open."""
        self._set(number, open_seconds=seconds)

    def close_round(
        self,
        number: int,
        accepted: Iterable[str],
        seconds: float,
        verdicts: Mapping[str, str],
        *,
        noise_key: int | None = None,
    ) -> None:
        """Put down whose updates count, and under what noise, before they are aggregated."""
        with self._transaction() as connection:
            connection.execute(
                _rounds.update()
                .where(self._is_round(number))
                .values(
                    accepted=json.dumps(sorted(accepted)),
                    closed_seconds=seconds,
                    noise_key=None if noise_key is None else f"{noise_key:032x}",
                )
            )
            updates = self._is_update(number)
            clients = connection.scalars(sa.select(_updates.c.client).where(updates)).all()
            for client in clients:
                row = sa.and_(updates, _updates.c.client == client)
                said = verdicts.get(client)
                connection.execute(_updates.update().where(row).values(verdict=said))

    def reopen_round(self, number: int) -> None:
        """Forget a round's updates and whose counted: it is done again from its beginning."""
        with self._transaction() as connection:
            connection.execute(_updates.delete().where(self._is_update(number)))
            connection.execute(
                _rounds.update()
                .where(self._is_round(number))
                .values(accepted=None, closed_seconds=None, noise_key=None, open_seconds=None)
            )

    def round(self, number: int) -> OpenRound | None:
        """Return what was put down of a round; none if it has not begun."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(_rounds).where(self._is_round(number))).first()
        if row is None:
            return None
        return OpenRound(
            stage=row.stage,
            wanted=row.wanted,
            cohort=tuple(json.loads(row.cohort)),
            accepted=None if row.accepted is None else tuple(json.loads(row.accepted)),
            closed_seconds=row.closed_seconds,
            open_seconds=row.open_seconds or 0.0,
            noise_key=None if row.noise_key is None else int(row.noise_key, 16),
        )

    def ledger(self, number: int) -> RoundLedger:
        """Return the list of a round's updates."""
        return RoundLedger(self, number)

    def _set(self, number: int, **values: Any) -> None:
        with self._transaction() as connection:
            connection.execute(_rounds.update().where(self._is_round(number)).values(**values))

    def _is_round(self, number: int) -> sa.ColumnElement[bool]:
        return sa.and_(_rounds.c.run == self._run, _rounds.c.number == number)

    def _is_update(self, number: int) -> sa.ColumnElement[bool]:
        return sa.and_(_updates.c.run == self._run, _updates.c.number == number)


class RoundLedger:
    """The updates of one round, in the order of their arrival, each client once."""

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self._number = number

    def keep(self, offer: Offer) -> None:
        """Put an update down; another one of the same client takes the place of its first."""
        values = {
            "run": self._store._run,
            "number": self._number,
            "client": offer.client,
            "blob": offer.blob,
            "offer": encode(offer).decode(),
        }
        with self._store._transaction() as connection:
            connection.execute(_KEEP, values)

    def kept(self) -> list[Offer]:
        """Return the offers that updates came with; those of another version are passed."""
        store = self._store
        rows = sa.select(_updates.c.offer).where(store._is_update(self._number))
        offers = []
        with store._transaction() as connection:
            for text in connection.scalars(rows.order_by(_updates.c.arrival)):
                with contextlib.suppress(ProtocolError):
                    message = decode(text.encode())
                    if isinstance(message, Offer):
                        offers.append(message)
        return offers

    def clear(self) -> None:
        """Forget the round's updates."""
        store = self._store
        with store._transaction() as connection:
            connection.execute(_updates.delete().where(store._is_update(self._number)))
