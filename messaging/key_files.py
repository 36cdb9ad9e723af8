"""Where a run's keys come from: a file of its owner's alone, or the environment.

The cloud's file holds the run's master key and its signing key, a device's file its own key and
the public half of the signing key. Both are TOML with hexadecimal digits, and both name the run, so
that a file of another run is told at once. ``pwff certs`` makes them.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from messaging.errors import SecretError
from messaging.keys import KEY_BYTES, SigningKey, client_key
from messaging.secret_files import read_secret

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has 3.10
    import tomli as tomllib

MASTER_VARIABLE, SIGNING_VARIABLE = "PWFF_MASTER_KEY", "PWFF_SIGNING_KEY"
DEVICE_VARIABLE, VERIFY_VARIABLE = "PWFF_DEVICE_KEY", "PWFF_VERIFY_KEY"


@dataclass(frozen=True, kw_only=True)
class RunKeys:
    """The cloud's keys of one run."""

    run: str
    master: bytes = field(repr=False)
    signing_key: SigningKey

    @classmethod
    def generate(cls, run: str) -> RunKeys:
        """Return fresh keys of the operating system's randomness."""
        master = secrets.token_bytes(KEY_BYTES)
        return cls(run=run, master=master, signing_key=SigningKey.generate())

    def device(self, client: str) -> DeviceKeys:
        """Return what one device is given."""
        return DeviceKeys(
            run=self.run,
            client=client,
            key=client_key(self.master, self.run, client),
            verify_key=self.signing_key.verify_key,
        )

    def file(self) -> bytes:
        """Return the content of the cloud's key file."""
        return (
            f"# The cloud's keys of one run. Whoever has them speaks for every device of it.\n"
            f'run = "{self.run}"\n'
            f'master = "{self.master.hex()}"\n'
            f'signing = "{self.signing_key.seed.hex()}"\n'
        ).encode()


@dataclass(frozen=True, kw_only=True)
class DeviceKeys:
    """A device's keys in one run."""

    run: str
    client: str
    key: bytes = field(repr=False)
    verify_key: bytes

    def file(self) -> bytes:
        """Return the content of the device's key file."""
        return (
            f"# One device's key in one run, and what the run's manifest is verified by.\n"
            f'run = "{self.run}"\n'
            f'client = "{self.client}"\n'
            f'key = "{self.key.hex()}"\n'
            f'verify = "{self.verify_key.hex()}"\n'
        ).encode()


def run_keys(
    path: Path | None, run: str, environment: Mapping[str, str] = os.environ
) -> RunKeys | None:
    """Return the cloud's keys from its file, else from the environment, else none.

    Args:
        path: Of the key file; without it ``PWFF_MASTER_KEY`` and ``PWFF_SIGNING_KEY`` are taken.
        run: That they must be of.
        environment: Variables.

    Raises:
        SecretError: If the file is open to others, damaged or of another run, or a variable is
            missing or no key.
    """
    if path is not None:
        said = _file(path, {"run": run}, ("master", "signing"))
        master, seed = said["master"], said["signing"]
    else:
        given = _variables(environment, MASTER_VARIABLE, SIGNING_VARIABLE)
        if given is None:
            return None
        master, seed = given
    return RunKeys(run=run, master=master, signing_key=SigningKey(seed))


def device_keys(
    path: Path | None, run: str, client: str, environment: Mapping[str, str] = os.environ
) -> DeviceKeys | None:
    """Return a device's keys from its file, else from the environment, else none.

    Args:
        path: Of the key file; without it ``PWFF_DEVICE_KEY`` and ``PWFF_VERIFY_KEY`` are taken.
        run: That they must be of.
        client: That they must be of.
        environment: Variables.

    Raises:
        SecretError: As ``run_keys``.
    """
    if path is not None:
        said = _file(path, {"run": run, "client": client}, ("key", "verify"))
        key, verify = said["key"], said["verify"]
    else:
        given = _variables(environment, DEVICE_VARIABLE, VERIFY_VARIABLE)
        if given is None:
            return None
        key, verify = given
    return DeviceKeys(run=run, client=client, key=key, verify_key=verify)


def _file(path: Path, owner: Mapping[str, str], names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the named keys of a file that says that it belongs to ``owner``."""
    content = read_secret(path, "key file")
    try:
        said = tomllib.loads(content.decode())
    except ValueError:  # its text may quote a key
        raise SecretError(
            f"key file: {path} is no valid TOML; make it anew with `pwff certs`"
        ) from None
    for field_, wanted in owner.items():
        found = said.get(field_)
        if found != wanted:
            shown = f"'{found}'" if isinstance(found, str) else "nobody"
            raise SecretError(
                f"key file: {path} is of {field_} {shown}, and '{wanted}' needs its own; give that"
            )
    for name in (*owner, *names):
        if name not in said:
            raise SecretError(
                f"key file: {path} has no '{name}'; give what `pwff certs` made for this side"
            )
    return {name: _key(said[name], f"key file: '{name}' in {path}") for name in names}


def _variables(environment: Mapping[str, str], *names: str) -> tuple[bytes, ...] | None:
    given = [name for name in names if environment.get(name)]
    if not given:
        return None
    for name in names:
        if name not in given:
            raise SecretError(f"{given[0]} is set and {name} is not; set both, or neither")
    return tuple(_key(environment[name], name) for name in names)


def _key(text: object, where: str) -> bytes:
    try:
        key = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise SecretError(f"{where} is no key of {2 * KEY_BYTES} hexadecimal digits")
    return key
