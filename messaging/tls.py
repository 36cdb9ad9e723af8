"""TLS towards the broker: whom to trust, and who one is oneself, by files.

Every connection is made with the files as they are at that moment, so certificates are exchanged
without a restart: put the new file in the place of the old, and the next connection has it. A
connection that stands is left alone; brokers do not look at a certificate again either. A pair that
does not fit, because only one of its files has been exchanged yet, fails that attempt and is tried
again.

Source: RFC 8446 and RFC 5246 (TLS 1.3 and 1.2), RFC 6125 (the server's name).
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from messaging.errors import SecretError
from messaging.secret_files import check_secret


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Where the certificates are.

    Attributes:
        ca: Authorities that may vouch for the broker (PEM); without it, the system's.
        certificate: Of this side, with what leads to its authority (PEM).
        private_key: Of that certificate; by default it stands in the certificate's file.
    """

    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def check(self) -> None:
        """Refuse files that no connection could be made with.

        Raises:
            SecretError: Naming the file and what is wrong with it.
        """
        if self.private_key is not None and self.certificate is None:
            raise SecretError(
                f"private_key = '{self.private_key}' without a certificate; give both, or neither"
            )
        if self.certificate is not None:
            check_secret(self.private_key or self.certificate, "private key")
        self.context()

    def context(self) -> ssl.SSLContext:
        """Return what a connection is made with, from the files as they are now.

        The broker's name is checked, and nothing older than TLS 1.2 is spoken.

        Raises:
            SecretError: If a file is missing or is not what it should be.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            with _told(f"ca = '{self.ca}'", "a PEM file with the broker's authority"):
                context.load_verify_locations(self.ca)
        if self.certificate is not None:
            key = self.private_key or self.certificate
            with _told(
                f"certificate = '{self.certificate}' with private key '{key}'",
                "PEM files that belong together, the key without a passphrase",
            ):
                context.load_cert_chain(self.certificate, key, password=_no_passphrase)
        return context


def _no_passphrase() -> str:
    return ""  # a service is not asked at a terminal


@contextlib.contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    """Turn what goes wrong with a file into a sentence."""
    try:
        yield
    except (OSError, ValueError) as err:  # an SSLError is an OSError
        reason = getattr(err, "reason", None) or getattr(err, "strerror", None) or err
        raise SecretError(f"{what}: {reason}; give {remedy}") from err


class FreshContext(ssl.SSLContext):
    """A context that makes each connection by another one, of the files as they are then.

    The handshake is done here, so that what is wrong with it can be told; whoever asks for it
    again finds it done.
    """

    _files: TlsFiles
    _trouble: Callable[[str], None]

    def __new__(cls, files: TlsFiles, trouble: Callable[[str], None]) -> FreshContext:
        """Return a context that checks the server's name."""
        del files, trouble
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, files: TlsFiles, trouble: Callable[[str], None]) -> None:
        self._files, self._trouble = files, trouble

    def wrap_socket(self, sock: socket.socket, **options: Any) -> ssl.SSLSocket:  # type: ignore[override]
        """Return the socket, its peer verified; where that fails, it is closed.

        Raises:
            OSError: If a file is not usable, or the peer is not whom it should be.
        """
        open_socket = sock
        try:
            open_socket = wrapped = self._files.context().wrap_socket(sock, **options)
            wrapped.do_handshake()
        except (SecretError, OSError) as err:
            open_socket.close()
            reason = _reason(err)
            self._trouble(reason)
            raise OSError(reason) from err
        return wrapped


def _reason(err: Exception) -> str:
    if isinstance(err, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {err.verify_message}"
    if isinstance(err, ssl.SSLError):
        return f"no TLS connection: {err.reason or err}"
    return str(err)
