"""The commands of the device side: ``client``, ``doctor`` and ``pretrain``."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from device_profiles import logs
from edge_client.doctor import doctor
from edge_client.pretrain_command import pretrain

if TYPE_CHECKING:
    from edge_client.host import Host

__all__ = ["client", "doctor", "pretrain"]


class _GaveUpError(Exception):
    """The device was refused, or refused the run."""

    exit_code = 1


@click.command()
@click.option(
    "--config", "path", required=True, type=click.Path(path_type=Path), help="A TOML file."
)
@click.option("-v", "--verbose", is_flag=True, help="The whole log: --log-level debug.")
@click.option("--log-level", type=click.Choice(logs.LEVELS), help="The least logged (info).")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="json: one a line."
)
def client(path: Path, verbose: bool, log_level: str | None, log_format: logs.Format) -> int:
    """Take part in a run with this device's own data, until the run is over.

    The device keeps its LoRA modules, its text and its optimiser in the configured folder; the
    adapters alone are uploaded. Ctrl-C leaves in good order; started again, it goes on.
    """
    from edge_client.service import take_part
    from edge_client.service_config import load_client

    logs.start(log_format, log_level or ("debug" if verbose else "info"))
    stopped = threading.Event()
    configured = load_client(path)
    logs.place(run=configured.run, client=configured.client)

    def on_start(host: Host) -> None:
        """Let Ctrl-C and SIGTERM end the host in good order."""

        def stop(_signal: int, _frame: object) -> None:
            stopped.set()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it
            host.stop()

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)

    failures = take_part(configured, on_start)
    if failures:
        raise _GaveUpError("; ".join(failures))
    if stopped.is_set():
        click.echo("interrupted; started again, the device goes on", err=True)
        return 130
    return 0
