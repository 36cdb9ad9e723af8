"""What can go wrong between two machines, and the exit code that each means to a person."""

from __future__ import annotations

REASON_CHARACTERS = 400  # as much as a REJECT carries; whoever sent nonsense chose its length


class ProtocolError(Exception):
    """A message, chunk or update that does not hold what the protocol asks of it.

    Attributes:
        code: A short stable word that travels in a REJECT and is counted (``layout``, ``hash``).
        reason: One sentence, cut at ``REASON_CHARACTERS``.
    """

    exit_code = 1

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason[:REASON_CHARACTERS]
        super().__init__(self.code, self.reason)  # what a pickle between processes carries

    def __str__(self) -> str:
        return self.reason


class OtherVersionError(ProtocolError):
    """A message of a protocol that this side does not understand, from whom it says it is."""

    def __init__(self, reason: str) -> None:
        super().__init__("version", reason)
        self.args = (self.reason,)


class PrivateTensorError(ProtocolError):
    """A tensor that is not on the allow-list of shared names was about to leave the device."""

    def __init__(self, reason: str) -> None:
        super().__init__("private", reason)
        self.args = (self.reason,)


class BrokerUnavailableError(Exception):
    """No broker answered within the stated wait, or none could be started."""

    exit_code = 1


class AddressError(ValueError):
    """An address of a broker or a store that a person must correct."""

    exit_code = 2


class SecretError(ValueError):
    """A key, certificate or password that a person must correct; the sentence shows none of it."""

    exit_code = 2
