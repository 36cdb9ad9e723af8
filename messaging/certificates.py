"""A development authority and the certificates that it vouches for.

Small on purpose: one authority that signs leaves and nothing else, ECDSA on P-256, server
certificates for brokers and client certificates whose common name is who one is. A real authority's
certificates serve as well; nothing else here asks where they come from.

Valid from a day before they are made, since clocks of devices are off. Keys are PKCS #8 without a
passphrase, for services that nobody can be asked by.

Source: RFC 5280 (profile), RFC 6125 (names of servers).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from messaging.errors import SecretError

AUTHORITY_DAYS = 3650
_CLOCKS = timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def make_authority(name: str, now: datetime | None = None) -> Pair:
    """Return a fresh authority, valid for ten years, that may sign leaves alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    builder = (
        _begun(subject, subject, key, AUTHORITY_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return Pair(_pem(builder.sign(key, hashes.SHA256())), _key_pem(key))


def make_server(
    authority: Pair, name: str, hosts: Sequence[str], days: int, now: datetime | None = None
) -> Pair:
    """Return the certificate of a server that is reached by these names or addresses.

    Raises:
        SecretError: If the authority is damaged, or a host is no name and no address.
    """
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    return _leaf(authority, name, ExtendedKeyUsageOID.SERVER_AUTH, days=days, now=now, hosts=names)


def make_client(authority: Pair, name: str, days: int, now: datetime | None = None) -> Pair:
    """Return the certificate of a client, whose common name is ``name``.

    Raises:
        SecretError: If the authority is damaged.
    """
    return _leaf(authority, name, ExtendedKeyUsageOID.CLIENT_AUTH, days=days, now=now)


def valid_until(certificate: bytes) -> datetime:
    """Return when a certificate ends, UTC.

    Raises:
        SecretError: If it is none.
    """
    return _load(certificate).not_valid_after_utc


def server_names(certificate: bytes) -> list[str]:
    """Return the names and addresses that a server's certificate is for.

    Raises:
        SecretError: If it is none.
    """
    try:
        found = _load(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in found.value]


def is_vouched_for(certificate: bytes, authority: bytes) -> bool:
    """Return whether an authority signed a certificate.

    Raises:
        SecretError: If one of them is none.
    """
    try:
        _load(certificate).verify_directly_issued_by(_load(authority))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _leaf(
    authority: Pair,
    name: str,
    purpose: x509.ObjectIdentifier,
    *,
    days: int,
    now: datetime | None,
    hosts: x509.SubjectAlternativeName | None = None,
) -> Pair:
    issuer = _load(authority.certificate)
    try:
        signer = load_pem_private_key(authority.key, password=None)
    except (ValueError, TypeError):
        raise SecretError("the authority's private key is damaged; make another folder") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise SecretError("the authority's private key is not one that this command made")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _begun(_name(name), issuer.subject, key, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if hosts is not None:
        builder = builder.add_extension(hosts, critical=False)
    return Pair(_pem(builder.sign(signer, hashes.SHA256())), _key_pem(key))


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    now: datetime | None,
) -> x509.CertificateBuilder:
    at = now or datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - _CLOCKS)
        .not_valid_after(at + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        name = host.encode("idna").decode()
    except UnicodeError:
        name = ""
    if not name or any(character in name for character in "/: *@"):
        raise SecretError(f"host '{host}' is no name and no address; give a DNS name or an IP")
    return x509.DNSName(name)


def _load(certificate: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate)
    except ValueError:
        raise SecretError("a certificate is damaged; make it anew") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
