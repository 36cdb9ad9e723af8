"""Blobs beside the broker: in a folder, behind HTTP, in S3; and URLs that lead anywhere else."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from messaging.claims import ClaimStore
from messaging.errors import AddressError, ProtocolError

BLOB = bytes(range(256)) * 12_000  # 3,072,000 bytes: three pieces of 2**20
NAME = hashlib.sha256(BLOB).hexdigest()


class Shop:
    """An HTTP server that keeps what is PUT; ``answer`` bends what it says to a GET."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.failures = 0  # requests that are answered 503 first
        self.redirect = ""
        shop = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self._begins("PUT"):
                    shop.kept[self.path] = body
                    self._say(201, b"")

            def do_GET(self) -> None:
                if self._begins("GET"):
                    body = shop.kept.get(self.path)
                    self._say(404 if body is None else 200, body or b"")

            def do_HEAD(self) -> None:
                self.do_GET()

            def _begins(self, method: str) -> bool:
                shop.asked.append((method, self.path))
                if shop.redirect:
                    self.send_response(302)
                    self.send_header("Location", shop.redirect)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return False
                if shop.failures:
                    shop.failures -= 1
                    self._say(503, b"")
                    return False
                return True

            def _say(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}/claims"


@contextmanager
def open_shop() -> Iterator[Shop]:
    """Serve until the block ends."""
    shop = Shop()
    thread = threading.Thread(target=shop.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield shop
    finally:
        shop.server.shutdown()
        thread.join()
        shop.server.server_close()


@pytest.fixture
def shop() -> Iterator[Shop]:
    """Yield a running HTTP store."""
    with open_shop() as shop:
        yield shop


@contextmanager
def open_s3() -> Iterator[str]:
    """Serve S3 from memory until the block ends; yield a bucket's address."""
    for package in ("moto", "flask", "flask_cors", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; the extra dev brings it")
    import boto3
    from moto.server import ThreadedMotoServer

    bucket = f"pwff-{secrets.token_hex(4)}"  # moto keeps what it has for the whole process
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket=bucket)
        try:
            yield f"s3://{bucket}/claims"
        finally:
            server.stop()


@pytest.fixture(params=["file", "http", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ClaimStore]:
    """Yield a store of each kind."""
    with ExitStack() as stack:
        if request.param == "file":
            base = f"file://{tmp_path}/claims"
        elif request.param == "http":
            base = stack.enter_context(open_shop()).base
        else:
            base = stack.enter_context(open_s3())
        yield ClaimStore(base, pause_seconds=0.0)


def fetched(store: ClaimStore, *, size: int = len(BLOB), sha256: str = NAME) -> bytes:
    """Return what a store gives for a blob."""
    sink = io.BytesIO(b"what an earlier try left" * 200_000)
    store.fetch(store.url_of(sha256), sha256=sha256, size=size, sink=sink)
    return sink.getvalue()


def refusal(store: ClaimStore, *, size: int = len(BLOB), sha256: str = NAME) -> str:
    """Return the code with which a blob is refused."""
    with pytest.raises(ProtocolError) as caught:
        fetched(store, size=size, sha256=sha256)
    return caught.value.code


def test_a_blob_comes_back_as_it_was_put_and_putting_it_twice_changes_nothing(
    store: ClaimStore,
) -> None:
    for _ in range(2):
        assert store.put(BLOB, NAME) == f"{store.base}/{NAME}"
    assert fetched(store) == BLOB


def test_more_or_less_than_was_offered_is_refused(store: ClaimStore) -> None:
    store.put(BLOB, NAME)
    assert refusal(store, size=len(BLOB) - 1) == "size"
    assert refusal(store, size=len(BLOB) + 1) == "size"


def test_bytes_of_another_hash_are_refused(store: ClaimStore) -> None:
    other = "ab" * 32
    store.put(BLOB, other)
    assert refusal(store, sha256=other) == "hash"


def test_what_is_not_there_is_told(store: ClaimStore) -> None:
    assert refusal(store) == "url"
    store.remove(NAME)  # and removing it is no error


def test_no_more_than_one_byte_beyond_the_offer_is_read(shop: Shop) -> None:
    shop.kept[f"/claims/{NAME}"] = BLOB
    sink = io.BytesIO()
    store = ClaimStore(shop.base, pause_seconds=0.0)
    with pytest.raises(ProtocolError, match="more than the 1000 bytes"):
        store.fetch(store.url_of(NAME), sha256=NAME, size=1000, sink=sink)
    assert len(sink.getvalue()) == 1001


def test_a_store_that_fails_twice_is_tried_again(shop: Shop) -> None:
    shop.kept[f"/claims/{NAME}"] = BLOB
    shop.failures = 2
    assert fetched(ClaimStore(shop.base, pause_seconds=0.0)) == BLOB
    assert shop.asked == [("GET", f"/claims/{NAME}")] * 3


def test_a_store_that_goes_on_failing_is_given_up(shop: Shop) -> None:
    shop.failures = 99
    assert refusal(ClaimStore(shop.base, pause_seconds=0.0, attempts=3)) == "url"
    assert len(shop.asked) == 3


def test_once_this_side_leaves_nothing_is_tried_again_and_nothing_begun(shop: Shop) -> None:
    class Left(ClaimStore):
        def _fetch(self, url: str, sha256: str, size: int, sink: BinaryIO) -> None:
            self.leave()
            super()._fetch(url, sha256, size, sink)

    shop.failures = 99
    store = Left(shop.base, pause_seconds=0.0)
    assert refusal(store) == "url"
    assert refusal(store) == "url"
    assert len(shop.asked) <= 1  # nobody waits for the answer


def test_a_transfer_that_is_under_way_ends_with_its_piece_once_this_side_leaves(
    tmp_path: Path,
) -> None:
    ended = threading.Event()

    class Watched(ClaimStore):
        def _fetch(self, url: str, sha256: str, size: int, sink: BinaryIO) -> None:
            try:
                super()._fetch(url, sha256, size, sink)
            finally:
                ended.set()

    class Sink(io.BytesIO):
        def write(self, piece: Any, /) -> int:
            store.leave()
            return super().write(piece)

    store, sink = Watched(f"file://{tmp_path}"), Sink()
    store.put(BLOB, NAME)
    with pytest.raises(ProtocolError):
        store.fetch(store.url_of(NAME), sha256=NAME, size=len(BLOB), sink=sink)
    assert ended.wait(20.0)
    assert len(sink.getvalue()) == 2**20


def test_a_redirect_is_not_followed(shop: Shop) -> None:
    with open_shop() as elsewhere:
        shop.redirect = f"{elsewhere.base}/{NAME}"
        elsewhere.kept[f"/claims/{NAME}"] = BLOB
        store = ClaimStore(shop.base, pause_seconds=0.0)
        assert refusal(store) == "url"
        store.put(BLOB, NAME)
        assert elsewhere.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        f"http://127.0.0.1:1/claims/{NAME}",
        f"https://store.example.org/claims/{NAME}",
        f"http://store.example.org/claims/../{NAME}",
        f"http://store.example.org/claims/{NAME}?x=1",
        f"http://store.example.org/claims/{NAME}#x",
        f"http://store.example.org/claims/{'ab' * 32}",
        f"http://store.example.org@127.0.0.1/claims/{NAME}",
        f"http://store.example.org.evil.org/claims/{NAME}",
        f"http://store.example.org/claims//{NAME}",
        f"s3://claims/{NAME}",
    ],
)
def test_a_url_that_is_not_the_blobs_own_place_is_refused_unread(url: str) -> None:
    store = ClaimStore("http://store.example.org/claims")
    sink = io.BytesIO(b"untouched")
    with pytest.raises(ProtocolError) as caught:
        store.fetch(url, sha256=NAME, size=len(BLOB), sink=sink)
    assert caught.value.code == "url"
    assert sink.getvalue() == b"untouched"


@pytest.mark.parametrize("trap", ["symlink", "folder", "fifo"])
def test_what_is_no_plain_file_in_a_folder_is_not_opened(trap: str, tmp_path: Path) -> None:
    place = tmp_path / NAME
    if trap == "symlink":
        secret = tmp_path / "secret"
        secret.write_bytes(BLOB)
        place.symlink_to(secret)
    elif trap == "folder":
        place.mkdir()
    else:
        os.mkfifo(place)  # to open it would wait for ever
    assert refusal(ClaimStore(f"file://{tmp_path}")) == "url"


def test_a_removed_blob_is_gone(tmp_path: Path) -> None:
    store = ClaimStore(f"file://{tmp_path}", attempts=1)
    store.put(BLOB, NAME)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]  # and no half of it beside
    store.remove(NAME)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("ftp://host/x", "no known kind"),
        ("/srv/claims", "no known kind"),
        ("file://host/srv", "no address"),
        ("file:///", "path"),
        ("file:///srv/../etc", "path"),
        ("http://host/a%2e%2e/b", "path"),
        ("http://host/a?b=c", "no address"),
        ("http://user:hunter2@host/a", "environment"),
        ("http://[host/a", "bad host"),
        ("https:///a", "no address"),
    ],
)
def test_an_address_that_is_no_store_is_refused_without_its_secrets(base: str, named: str) -> None:
    with pytest.raises(AddressError, match=named) as caught:
        ClaimStore(base)
    assert "hunter2" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_store_whose_package_is_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("messaging.claims._installed", lambda _package: False)
    with pytest.raises(AddressError, match=r"pip install 'pwff\[claims-s3\]'"):
        ClaimStore("s3://bucket/claims")
