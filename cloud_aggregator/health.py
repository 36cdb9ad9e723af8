"""What a machine asks of a running aggregator, over HTTP: /metrics, /healthz and /readyz.

It listens on 127.0.0.1 unless the configuration names another address, answers GET and HEAD alone,
and tells nothing but states, reasons of its own and the metrics. Seconds throughout.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from device_profiles.errors import InputError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
SILENCE_SECONDS = 30.0  # the protocol thread ticks twice a second, but for long aggregations
_REQUEST_SECONDS = 5.0
_REQUESTS_AT_ONCE = 16
_LEAVE_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """What a run is asked for its health; each is called from a thread of the server.

    Attributes:
        ticked_at: When the protocol thread last went round, on ``clock``; none before it began.
        connected: Whether the broker is there.
        store_open: Whether the run's state can be written.
        finished: Whether the run is over.
        silence_seconds: Without a tick for so long, the protocol thread is taken for stuck, > 0.
        clock: Monotonic seconds.
    """

    ticked_at: Callable[[], float | None]
    connected: Callable[[], bool]
    store_open: Callable[[], bool]
    finished: Callable[[], bool]
    silence_seconds: float = SILENCE_SECONDS
    clock: Callable[[], float] = time.monotonic

    def health(self) -> dict[str, Any]:
        """Return whether the protocol thread goes round, and since when it has not."""
        at = self.ticked_at()
        if at is None:
            return {"ok": False, "reason": "the protocol thread has not begun"}
        silent = max(0.0, self.clock() - at)
        if silent > self.silence_seconds:
            reason = f"no tick of the protocol thread for {silent:.0f} s"
            return {"ok": False, "reason": reason, "seconds_since_tick": round(silent, 1)}
        return {"ok": True, "seconds_since_tick": round(silent, 1)}

    def readiness(self) -> dict[str, Any]:
        """Return whether devices can take part now, and each thing that this needs."""
        checks = {
            "broker_connected": self.connected(),
            "store_open": self.store_open(),
            "run_not_finished": not self.finished(),
        }
        return {"ok": all(checks.values()), **checks}


def parse_address(text: str, key: str = "monitor") -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``, ``[IPv6]:PORT`` or ``PORT`` (on 127.0.0.1).

    Raises:
        InputError: Naming the key and an address that would do.
    """
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    name = host[1:-1] if bracketed else host
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    forbidden = set("[]/@ ") | (set() if bracketed else {":"})
    if not 0 <= number <= 65_535 or not name.isprintable() or forbidden & set(name):
        raise InputError(
            f"{key} = '{text}' is no address; write it as HOST:PORT, such as 127.0.0.1:9464"
        )
    return name or HOST, number


class _Server(ThreadingHTTPServer):
    """The server; beyond ``_REQUESTS_AT_ONCE`` a connection is closed again."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], vitals: Vitals, page: Callable[[], bytes]) -> None:
        self.vitals = vitals
        self.page = page
        self._room = threading.BoundedSemaphore(_REQUESTS_AT_ONCE)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request
        log.debug("a request from %s broke off", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "pwff"
    sys_version = ""
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(HTTPStatus.OK, self.server.page(), CONTENT_TYPE_LATEST)
        elif path == "/healthz":
            self._answer_state(self.server.vitals.health())
        elif path == "/readyz":
            self._answer_state(self.server.vitals.readiness())
        else:
            self._answer_json(HTTPStatus.NOT_FOUND, {"ok": False, "reason": "no such page"})

    do_HEAD = do_GET

    def _refuse(self) -> None:
        body = {"ok": False, "reason": "only GET and HEAD are answered"}
        self._answer_json(HTTPStatus.METHOD_NOT_ALLOWED, body, Allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = _refuse

    def _answer_state(self, body: dict[str, Any]) -> None:
        good = HTTPStatus.OK if body["ok"] else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer_json(good, body)

    def _answer_json(self, status: HTTPStatus, body: dict[str, Any], **headers: str) -> None:
        self._answer(status, json.dumps(body).encode() + b"\n", "application/json", **headers)

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Cache-Control": "no-store", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


@contextlib.contextmanager
def monitor(address: str, vitals: Vitals, page: Callable[[], bytes]) -> Iterator[int]:
    """Answer at ``address`` while the context is open; yields the port, which 0 leaves open.

    Args:
        address: ``HOST:PORT`` or ``PORT``.
        vitals: What /healthz and /readyz ask.
        page: Returns what /metrics answers.

    Raises:
        InputError: If the address is none, or nothing can listen there.
    """
    where = parse_address(address)
    try:
        server = _Server(where, vitals, page)
    except OSError as err:
        raise InputError(
            f"monitor = '{address}': cannot listen there ({err.strerror or err}); "
            "give a free port and an address of this machine"
        ) from err
    thread = threading.Thread(
        target=server.serve_forever, args=(_LEAVE_SECONDS,), name="pwff-monitor", daemon=True
    )
    thread.start()
    port = int(server.server_address[1])
    log.info("metrics and health at http://%s:%d", where[0], port)
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
