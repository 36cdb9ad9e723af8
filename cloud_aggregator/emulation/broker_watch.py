"""Notices that the broker of an emulation is gone, long before its devices are missed."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from cloud_aggregator.errors import RunFailedError
from messaging.mqtt import parse_address

_EVERY_SECONDS = 2.0


@contextlib.contextmanager
def watch_broker(
    url: str, failed: Callable[[Exception], None], *, every_seconds: float = _EVERY_SECONDS
) -> Iterator[None]:
    """Ask again and again, for as long as the block lasts, whether the broker still listens.

    Twice refused in a row, it is gone: the port of an embedded broker is this machine's own, where
    a listener that is only busy refuses nobody.

    Args:
        url: Of a broker on this machine.
        failed: Told once, from a thread of its own.
        every_seconds: Between two questions, > 0.
    """
    address, left = parse_address(url), threading.Event()

    def watch() -> None:
        misses = 0
        while misses < 2:
            if left.wait(every_seconds):
                return
            misses = misses + 1 if _refused(address.host, address.port) else 0
        failed(
            RunFailedError(
                f"the embedded broker at {url} ended in the middle of the run; what the rounds so "
                "far gave is kept, go on with --resume (a port of its own: --broker-port)"
            )
        )

    thread = threading.Thread(target=watch, name="pwff-broker-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _refused(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # busy, not gone
        return False
    return False
