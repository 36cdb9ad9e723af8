"""Claim-check: a large blob lies in a store beside the broker, and messages name it by its URL.

A store is one base address that this side is configured with: ``file:///srv/pwff``,
``s3://bucket/pwff`` or ``https://host/pwff`` (reached by fsspec). A blob lies there under its
SHA-256 and under no other name, so a URL that somebody sends is compared, never followed: it leads
to the place that this side would have put the blob itself, or nowhere. Sizes in bytes.

Credentials are the store's own affair: the environment for S3 (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL`` for another service that speaks S3), ``~/.netrc`` for HTTP. Nothing of them is
part of an address, which travels in messages. Blobs that are of no use any longer are removed where
the store can do so; one behind HTTP needs a rule of its own.

A store may be silent for as long as it likes: whatever is asked of it is asked on a thread that may
be left where it is, so that a process that is told to leave does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from messaging.errors import AddressError, ProtocolError

log = logging.getLogger(__name__)

CLAIM_ABOVE_BYTES = 8 * 2**20
PIECE_BYTES = 2**20
CONNECT_SECONDS, READ_SECONDS = 10, 30
SLOWEST_BYTES_PER_SECOND = 65_536
PATIENCE_SECONDS = 60.0  # beside the time that the slowest link takes
_LOOK_SECONDS = 0.2  # between two looks at whether this side is leaving

_PACKAGES = {"file": ("fsspec",), "s3": ("s3fs",), "http": ("aiohttp",), "https": ("aiohttp",)}
_PATH = re.compile(r"(/[A-Za-z0-9_.~-]+)+")


class ClaimStore:
    """One place for blobs.

    Args:
        base: Its address.
        attempts: Tries of each transfer.
        pause_seconds: Before the second try at most; twice as long before each further one.

    Raises:
        AddressError: If the address is none, or its package is not installed.
    """

    def __init__(self, base: str, *, attempts: int = 4, pause_seconds: float = 0.5) -> None:
        self.base = base.rstrip("/")
        self.scheme = _check_base(self.base)
        self._attempts, self._pause = attempts, pause_seconds
        self._opened: Any = None
        self._leaving = threading.Event()

    def leave(self) -> None:
        """End every transfer soon, also those that wait for the store, and begin none any more.

        Callable from any thread or signal handler.
        """
        self._leaving.set()

    def __str__(self) -> str:
        """Return the base address, which holds no secret."""
        return self.base

    def url_of(self, sha256: str) -> str:
        """Return where a blob lies, or would."""
        return f"{self.base}/{sha256}"

    def check(self, url: str, sha256: str) -> None:
        """Refuse a URL that is not the one place of this blob in this store.

        Raises:
            ProtocolError: With code ``url``.
        """
        if url != self.url_of(sha256):
            raise ProtocolError(
                "url",
                f"'{url[:120]}' is not where a blob of this hash lies in the store {self.base}; "
                "give both sides the same claim_store",
            )

    def put(self, blob: bytes, sha256: str) -> str:
        """Put a blob in its place, unless it is there already; return its URL.

        Raises:
            ProtocolError: With code ``url``, if the store does not take it, or this side leaves.
        """
        self._tried(lambda: self._put(self.url_of(sha256), blob), f"put {len(blob)} bytes into")
        return self.url_of(sha256)

    def fetch(self, url: str, *, sha256: str, size: int, sink: BinaryIO) -> None:
        """Write a blob to ``sink``, piece by piece, from its beginning.

        Args:
            url: As it was sent.
            sha256: Of the blob.
            size: Of the blob, as it was offered; nothing beyond it is read.
            sink: May be written to, sought and truncated.

        Raises:
            ProtocolError: With code ``url`` if the URL is not in this store or the store does not
                give it or this side leaves, ``size`` or ``hash`` if it gives something else.
        """
        self.check(url, sha256)
        self._tried(lambda: self._fetch(url, sha256, size, sink), f"fetch {size} bytes from")

    def remove(self, sha256: str) -> None:
        """Remove a blob, where the store can; what stays is said in the log and harms nobody."""
        try:
            place = self._path(self.url_of(sha256))
            self._unless_leaving(lambda: self._system().rm_file(place))
        except Exception as err:  # stores raise what they like
            log.debug("%s: %s stays there: %s", self.base, sha256[:12], err)

    # -- one try ---------------------------------------------------------------------------------

    def _put(self, url: str, blob: bytes) -> None:
        system, path = self._system(), self._path(url)
        with contextlib.suppress(Exception):  # whatever it is, what follows says it too
            if system.size(path) == len(blob):
                return
        if self.scheme == "file":  # a reader must not find half of it
            half = f"{path}.{secrets.token_hex(4)}.part"
            system.pipe_file(half, blob)
            system.mv(half, path)
        elif self.scheme == "s3":
            system.pipe_file(path, blob)
        else:
            length = {"Content-Length": str(len(blob))}
            system.put_file(io.BytesIO(blob), path, method="put", headers=length)

    def _fetch(self, url: str, sha256: str, size: int, sink: BinaryIO) -> None:
        until = time.monotonic() + PATIENCE_SECONDS + size / SLOWEST_BYTES_PER_SECOND
        digest, held = hashlib.sha256(), 0
        sink.seek(0)
        sink.truncate()
        with self._open(url, size) as source:
            while held <= size and (piece := source.read(min(PIECE_BYTES, size + 1 - held))):
                held += len(piece)
                digest.update(piece)
                sink.write(piece)
                if self._leaving.is_set():
                    raise ProtocolError("url", f"left {self.base} after {held} of {size} bytes")
                if time.monotonic() > until:
                    raise ProtocolError("url", f"{self.base} gave {held} of {size} bytes in time")
        if held != size:
            more = "more than " if held > size else f"{held} of "
            raise ProtocolError("size", f"{self.base} gave {more}the {size} bytes of the offer")
        if digest.hexdigest() != sha256:
            raise ProtocolError("hash", f"{self.base} gave bytes of another hash")

    def _open(self, url: str, size: int) -> Any:
        system, path = self._system(), self._path(url)
        if self.scheme in ("http", "https"):
            source = system.open(path, "rb", block_size=0, size=size)
            if source.r.status != 200:
                source.close()
                raise ProtocolError(
                    "url", f"{self.base} answered {source.r.status}; redirects are not followed"
                )
            return source
        info = system.info(path)
        if info["type"] != "file" or info.get("islink"):
            raise ProtocolError("url", f"what lies in {self.base} is no plain file")
        if info["size"] != size:
            raise ProtocolError("size", f"{info['size']} bytes lie in {self.base}, {size} offered")
        return system.open(path, "rb", block_size=PIECE_BYTES)

    # -- the store -------------------------------------------------------------------------------

    def _path(self, url: str) -> str:
        return url if self.scheme in ("http", "https") else url.removeprefix(f"{self.scheme}://")

    def _system(self) -> Any:
        if self._opened is None:
            import fsspec

            options = _OPTIONS[self.scheme]()
            self._opened = fsspec.filesystem(self.scheme, skip_instance_cache=True, **options)
        return self._opened

    def _tried(self, once: Callable[[], None], what: str) -> None:
        import tenacity

        tries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts)
            | tenacity.stop_when_event_set(self._leaving),
            sleep=tenacity.sleep_using_event(self._leaving),
            wait=tenacity.wait_random_exponential(multiplier=self._pause, max=20),
            retry=tenacity.retry_if_not_exception_type(ProtocolError),
            reraise=True,
        )
        try:
            self._unless_leaving(lambda: tries(once))
        except ProtocolError:
            raise
        except Exception as err:  # each store has its own
            detail = f"{type(err).__name__}: {err}"[:160]
            raise ProtocolError("url", f"cannot {what} {self.base} ({detail})") from err

    def _unless_leaving(self, work: Callable[[], None]) -> None:
        """Do some work on a thread of its own, and leave it there if this side leaves meanwhile.

        The thread is a daemon: no interpreter waits for it. Whoever waits here only looks at the
        event, since a signal handler that sets it may interrupt just this thread.
        """
        outcome: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except BaseException as err:
                outcome.set_exception(err)
            else:
                outcome.set_result(None)

        why = f"this side is leaving, and waits for {self.base} no more"
        if self._leaving.is_set():
            raise ProtocolError("url", why)
        threading.Thread(target=run, name="pwff-store", daemon=True).start()
        while not wait([outcome], _LOOK_SECONDS).done:
            if self._leaving.is_set():
                raise ProtocolError("url", why)
        outcome.result()


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Where this side puts large blobs, and how many bytes still travel over the broker."""

    store: ClaimStore
    above_bytes: int = CLAIM_ABOVE_BYTES

    def put_if_large(self, blob: bytes, sha256: str) -> str | None:
        """Return the URL of a blob that is large and was put there, or none: it goes in chunks."""
        if len(blob) <= self.above_bytes:
            return None
        try:
            return self.store.put(blob, sha256)
        except ProtocolError as err:
            log.warning("%s; it goes in chunks over the broker instead", err.reason)
            return None


def _http_options() -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    return {
        "allow_redirects": False,
        "encoded": True,
        "client_kwargs": {"timeout": timeout, "trust_env": True},
    }


def _s3_options() -> dict[str, Any]:
    timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    return {
        "config_kwargs": timeouts | {"retries": {"max_attempts": 1}},
        "use_listings_cache": False,
    }


_OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "file": lambda: {"auto_mkdir": True},
    "s3": _s3_options,
    "http": _http_options,
    "https": _http_options,
}


def _check_base(base: str) -> str:
    """Return the scheme of a store's address.

    Raises:
        AddressError: Naming what is wrong and an address that would do.
    """
    remedy = "write it as file:///FOLDER, s3://BUCKET/PREFIX or https://HOST/PATH"
    try:
        parts = urlsplit(base)
        secret = parts.username is not None or parts.password is not None
        _ = parts.port
    except ValueError:
        raise AddressError(f"claim_store has a bad host or port; {remedy}") from None
    if secret:
        raise AddressError(
            "claim_store holds a user or password, and would be sent in messages; leave them to "
            "the environment (S3) or ~/.netrc (HTTP)"
        )
    if parts.scheme not in _PACKAGES:
        raise AddressError(f"claim_store '{base}' is of no known kind; {remedy}")
    if parts.query or parts.fragment or (parts.scheme == "file") == bool(parts.netloc):
        raise AddressError(f"claim_store '{base}' is no address of a store; {remedy}")
    plain = not parts.path if parts.scheme != "file" else False
    if not plain and (not _PATH.fullmatch(parts.path) or "/." in parts.path):
        raise AddressError(
            f"claim_store '{base}' has a path of other than letters, digits, and '_', '-', '.', "
            f"'~' within names; {remedy}"
        )
    missing = [p for p in (*_PACKAGES[parts.scheme], "fsspec", "tenacity") if not _installed(p)]
    if missing:
        extra = "claims-s3" if parts.scheme == "s3" else "claims"
        raise AddressError(
            f"claim_store '{base}' needs the package {missing[0]}; `pip install 'pwff[{extra}]'`"
        )
    return parts.scheme


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
