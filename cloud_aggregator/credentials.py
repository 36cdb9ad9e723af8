"""The folder of a deployment's certificates and keys: made once, gone on with, never written over.

    DIR/ca/          ca.pem, ca.key: the development authority; whoever has its key lets anybody in
    DIR/broker/      ca.pem, broker.pem, broker.key, acl, mosquitto.conf
    DIR/aggregator/  ca.pem, aggregator.pem, aggregator.key, RUN.keys.toml
    DIR/clients/ID/  ca.pem, ID.pem, ID.key, RUN.key.toml

Each folder but the first is what one machine is given. Private keys and key files are their owner's
alone (mode 600).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from messaging.broker_rules import AGGREGATOR, LOGS_ALL, access_rules, mosquitto_config
from messaging.certificates import (
    Pair,
    is_vouched_for,
    make_authority,
    make_client,
    make_server,
    server_names,
    valid_until,
)
from messaging.errors import SecretError
from messaging.key_files import RunKeys, device_keys, run_keys
from messaging.secret_files import read_secret, write_new, write_over

BROKER = "broker"


@dataclass(frozen=True)
class Line:
    """One file, and what came of it: ``made``, ``kept`` or ``renewed``; ``until`` it ends."""

    path: Path
    what: str
    until: datetime | None = None


class Credentials:
    """One deployment's folder.

    Args:
        folder: Made if it is not there.
        days: That new certificates hold.
        renew: ``broker``, ``aggregator`` or devices whose certificate and key are made anew.
    """

    def __init__(self, folder: Path, *, days: int, renew: Iterable[str] = ()) -> None:
        self._folder = folder
        self._days = days
        self._renew = set(renew)
        self.lines: list[Line] = []
        self._authority = self._ca()

    def broker(
        self, hosts: Sequence[str], port: int, installed: str, data: str, *, denials: bool = False
    ) -> None:
        """Make what the broker's machine is given.

        Args:
            hosts: Names and addresses that devices reach the broker by; without any, what an
                earlier certificate says, or this machine alone.
            port: That it listens on.
            installed: Folder of these files on the broker's machine.
            data: Folder on that machine that the broker keeps its state in.
            denials: Whether its log has the messages that access rules deny.

        Raises:
            SecretError: If a file is not usable.
        """
        place = self._folder / BROKER
        if denials:
            _check_denials(place / "mosquitto.conf")
        path = place / f"{BROKER}.pem"
        before = server_names(path.read_bytes()) if path.exists() else ["localhost", "127.0.0.1"]
        names = list(hosts) or before
        if path.exists() and names != before and BROKER not in self._renew:
            raise SecretError(
                f"{path} is for {', '.join(before)}, and {', '.join(names)} is asked for; "
                f"give --renew {BROKER} to make it anew, or leave --host out"
            )
        make = partial(make_server, self._authority, BROKER, names, self._days)
        self._certify(place, BROKER, make)
        self._write(place / "acl", access_rules().encode())
        config = mosquitto_config(port, installed, data, denials=denials)
        self._write(place / "mosquitto.conf", config.encode())

    def aggregator(self, run: str | None) -> RunKeys | None:
        """Make what the aggregator's machine is given; return the keys of the run, if one is named.

        Raises:
            SecretError: If a file is not usable.
        """
        place = self._folder / AGGREGATOR
        make = partial(make_client, self._authority, AGGREGATOR, self._days)
        self._certify(place, AGGREGATOR, make)
        if run is None:
            return None
        path = place / f"{run}.keys.toml"
        self._write(path, RunKeys.generate(run).file(), secret=True)
        return run_keys(path, run)

    def client(self, name: str, keys: RunKeys | None) -> None:
        """Make what a device is given: its certificate, and its key in the run if one is named.

        Raises:
            SecretError: If a file is not usable, or the device's key is not of these run keys.
        """
        place = self._folder / "clients" / name
        self._certify(place, name, partial(make_client, self._authority, name, self._days))
        if keys is None:
            return
        path, mine = place / f"{keys.run}.key.toml", keys.device(name)
        self._write(path, mine.file(), secret=True)
        if device_keys(path, keys.run, name) != mine:
            raise SecretError(
                f"{path} is not of the run's keys in {self._folder / AGGREGATOR}; they were made "
                "anew: move it away and make it again"
            )

    def _ca(self) -> Pair:
        place = self._folder / "ca"
        certificate, key = place / "ca.pem", place / "ca.key"
        if certificate.exists() != key.exists():
            found, gone = (certificate, key) if certificate.exists() else (key, certificate)
            raise SecretError(f"{found} is there and {gone} is not; bring it back, or begin anew")
        if not key.exists():
            made = make_authority(f"pwff development authority {datetime.now(timezone.utc):%F}")
            write_new(key, made.key, secret=True)
            write_new(certificate, made.certificate, secret=False)
            self.lines += [Line(key, "made"), Line(certificate, "made")]
        else:
            self.lines += [Line(key, "kept"), Line(certificate, "kept")]
        held = certificate.read_bytes()
        return Pair(held, read_secret(key, "the authority's private key"))

    def _certify(self, place: Path, name: str, make: Callable[[], Pair]) -> None:
        self._write(place / "ca.pem", self._authority.certificate)
        certificate, key = place / f"{name}.pem", place / f"{name}.key"
        there = certificate.exists() and key.exists()
        if there and name not in self._renew:
            held = certificate.read_bytes()
            if not is_vouched_for(held, self._authority.certificate):
                raise SecretError(
                    f"{certificate} is not of the authority in {self._folder / 'ca'}; "
                    f"give --renew {name} to make it anew"
                )
            until = valid_until(held)
            self.lines += [Line(key, "kept"), Line(certificate, "kept", until)]
            return
        if name not in self._renew and (certificate.exists() or key.exists()):
            raise SecretError(
                f"{place} has half of a pair of certificate and key; give --renew {name} to make "
                "both anew"
            )
        made = make()
        # For a moment the two do not fit: a connection that is made just then is tried again.
        write_over(key, made.key, secret=True)
        write_over(certificate, made.certificate, secret=False)
        what = "renewed" if there else "made"
        until = valid_until(made.certificate)
        self.lines += [Line(key, what), Line(certificate, what, until)]

    def _write(self, path: Path, content: bytes, *, secret: bool = False) -> None:
        made = write_new(path, content, secret=secret)
        self.lines.append(Line(path, "made" if made else "kept"))


def _check_denials(config: Path) -> None:
    """Refuse a configuration that is there, will be kept, and logs no denials.

    Raises:
        SecretError: If it cannot be read either.
    """
    try:
        lines = config.read_text(errors="replace").splitlines() if config.exists() else [LOGS_ALL]
    except OSError as err:
        raise SecretError(f"{config} cannot be read ({err.strerror})") from err
    if not {("log_type", "debug"), ("log_type", "all")} & {tuple(line.split()) for line in lines}:
        raise SecretError(
            f"{config} was there before and is kept, and it logs no denials; put '{LOGS_ALL}' into "
            "it, or remove it to have it made anew"
        )
