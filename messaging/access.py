"""How a broker is reached: certificates, and user and password, each from where secrets belong.

A password is never read from a command line. It comes from a file of its owner's alone, from the
broker's address in a configuration file, or from ``PWFF_MQTT_USERNAME`` and ``PWFF_MQTT_PASSWORD``,
in that order; the file is read anew at each connection, as certificates are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from messaging.errors import SecretError
from messaging.secret_files import read_secret
from messaging.tls import TlsFiles

USERNAME_VARIABLE, PASSWORD_VARIABLE = "PWFF_MQTT_USERNAME", "PWFF_MQTT_PASSWORD"

Login = tuple[str, str | None]


class BrokerAccess(BaseModel):
    """The part of a ``[security]`` section that both sides have.

    Attributes:
        ca: Authorities that may vouch for the broker (PEM); by default the system's.
        certificate: Of this side (PEM), for a broker that asks for one.
        private_key: Of that certificate; by default it stands in the certificate's file.
        username: At the broker, instead of one in its address.
        password_file: Holds the password in its first line, readable by its owner alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    username: str | None = None
    password_file: Path | None = None

    @model_validator(mode="after")
    def _whole(self) -> BrokerAccess:
        if self.private_key is not None and self.certificate is None:
            raise ValueError("private_key is given without certificate; give both, or neither")
        if (self.username is None) != (self.password_file is None):
            given = "username" if self.password_file is None else "password_file"
            raise ValueError(f"{given} is given alone; give username and password_file, or neither")
        return self

    @property
    def tls(self) -> TlsFiles:
        """The certificates."""
        return TlsFiles(ca=self.ca, certificate=self.certificate, private_key=self.private_key)

    @property
    def needs_tls(self) -> bool:
        """Whether a certificate is given, which is of use over TLS alone."""
        return self.ca is not None or self.certificate is not None

    def login(
        self, of_address: Login | None, environment: Mapping[str, str] = os.environ
    ) -> Login | None:
        """Return user and password for a connection that is made now; none where none are given.

        Args:
            of_address: User and password of the broker's address.
            environment: Variables.

        Raises:
            SecretError: If the password's file is not usable, or one variable is set without the
                other.
        """
        if self.username is not None and self.password_file is not None:
            lines = read_secret(self.password_file, "password_file").splitlines()
            try:
                return self.username, lines[0].decode() if lines else ""
            except UnicodeDecodeError:
                raise SecretError(f"password_file: {self.password_file} is no UTF-8 text") from None
        if of_address is not None:
            return of_address
        user, password = environment.get(USERNAME_VARIABLE), environment.get(PASSWORD_VARIABLE)
        if password and not user:
            raise SecretError(
                f"{PASSWORD_VARIABLE} is set and {USERNAME_VARIABLE} is not; set both"
            )
        return (user, password) if user else None
