"""``pwff certs``: certificates, keys and the broker's configuration of a deployment."""

from __future__ import annotations

import re
from pathlib import Path

import click

from cloud_aggregator.credentials import BROKER, Credentials
from device_profiles.errors import InputError
from messaging.broker_rules import AGGREGATOR
from messaging.topics import IDENTIFIER

_IDENTIFIER = re.compile(IDENTIFIER)
_RESERVED = (AGGREGATOR, BROKER)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--run", metavar="NAME", help="Makes the keys of this run too.")
@click.option("--client", "clients", multiple=True, metavar="ID", help="A device; repeat it.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME|IP",
    help="That devices reach the broker by; repeat it (localhost, 127.0.0.1).",
)
@click.option("--port", default=8883, show_default=True, help="That the broker listens on.")
@click.option(
    "--installed",
    default="/etc/mosquitto/pwff",
    show_default=True,
    metavar="PATH",
    help="Where the broker's machine has the files of FOLDER/broker.",
)
@click.option(
    "--data",
    default="/var/lib/mosquitto",
    show_default=True,
    metavar="PATH",
    help="Where the broker keeps its state.",
)
@click.option(
    "--log-denials",
    is_flag=True,
    help="Has the broker log every message, so that broker_log counts those that may not be "
    "published where they were.",
)
@click.option(
    "--days", default=397, show_default=True, type=click.IntRange(1, 3650), help="Validity."
)
@click.option(
    "--renew",
    multiple=True,
    metavar="NAME",
    help=f"Makes certificate and key of '{BROKER}', '{AGGREGATOR}' or a device anew.",
)
def certs(
    folder: Path,
    *,
    run: str | None,
    clients: tuple[str, ...],
    hosts: tuple[str, ...],
    port: int,
    installed: str,
    data: str,
    log_denials: bool,
    days: int,
    renew: tuple[str, ...],
) -> int:
    """Make what a deployment needs so that nobody else takes part.

    In FOLDER: an authority for development, the broker's certificate with a mosquitto.conf and
    access rules, the aggregator's certificate and the run's keys, and for each device its
    certificate and its key. Called again, it makes what is missing and keeps what is there;
    nothing is written over but by --renew.

    \b
    pwff certs secrets --run first-run --host broker.lan --client jetson-1 --client laptop-1

    Then give each machine its own folder (FOLDER/broker, FOLDER/aggregator, FOLDER/clients/ID),
    and nobody FOLDER/ca. Where a real authority makes the certificates, the key files alone are
    of use. docs/deployment.md goes on from there.
    """  # noqa: D301 - click takes the escape for a paragraph that it must not wrap
    for kind, names in (("run", [run] if run else []), ("client", clients)):
        for name in names:
            if not _IDENTIFIER.fullmatch(name):
                raise InputError(
                    f"--{kind} '{name}' is no name: give 1 to 64 of a-z, 0-9, '.', '_' and '-', "
                    "with a letter or digit first and last"
                )
            if kind == "client" and name in _RESERVED:
                raise InputError(
                    f"--client '{name}' would have the rights of the {name}; give another name"
                )
    for name in renew:
        if name not in (*_RESERVED, *clients):
            raise InputError(f"--renew '{name}' is not made here; add --client {name}")
    made = Credentials(folder, days=days, renew=renew)
    made.broker(hosts, port, installed, data, denials=log_denials)
    keys = made.aggregator(run)
    for name in clients:
        made.client(name, keys)
    for line in made.lines:
        until = f"  until {line.until:%Y-%m-%d}" if line.until else ""
        click.echo(f"{line.what:8} {line.path}{until}")
    return 0
