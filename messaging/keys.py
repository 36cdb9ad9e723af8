"""The keys of a run: one master key and one signing key in the cloud, one small file a device.

A device's key follows from the master key, so that the aggregator keeps no list of devices. A file
holds keys as hexadecimal digits and is readable by its owner alone.

Source: RFC 5869 (HKDF), RFC 8032 (Ed25519).
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass, field

KEY_BYTES = 32


def client_key(master: bytes, run: str, client: str) -> bytes:
    """Return the 32-byte key of one client in one run (HKDF-SHA256 of the run's master key).

    Raises:
        ValueError: If ``master`` has not 32 bytes.
    """
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    check_key("master key", master)
    info = b"pwff client key 1" + sized(run) + sized(client)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(master)


@dataclass(frozen=True)
class SigningKey:
    """What the manifest is signed with; devices hold ``verify_key``. ``seed`` has 32 bytes."""

    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_key("signing key", self.seed)

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a fresh key of the operating system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @property
    def verify_key(self) -> bytes:
        """The public half, 32 bytes."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()

    def sign(self, content: bytes) -> bytes:
        """Return the signature of ``content``, 64 bytes."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(content)


def check_key(name: str, key: bytes) -> None:
    """Raise ``ValueError`` if ``key`` has not 32 bytes; the sentence does not show it."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"{name} has {len(key)} bytes; it needs {KEY_BYTES}")


def sized(text: str) -> bytes:
    """Return the UTF-8 bytes of ``text`` after their number, so that none runs into the next."""
    raw = text.encode()
    return struct.pack(">H", len(raw)) + raw
