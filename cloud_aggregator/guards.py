"""The sections of the aggregator's configuration that say who may come in, and with how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from cloud_aggregator.door import DoorLimits
from device_profiles.config_files import Config
from messaging.access import BrokerAccess


class SecuritySection(BrokerAccess):
    """Who may take part, and how the broker is reached: also see ``messaging.access``.

    Attributes:
        keys: The run's key file, of its owner alone (``pwff certs`` makes one). With it, or with
            the keys in the environment, every message is sealed and nobody without a key takes
            part.
    """

    keys: Path | None = None


class LimitsSection(Config):
    """What may come in of one client and of all: see ``cloud_aggregator.door``.

    Attributes:
        messages_per_second: Of one client, chunks included; four seconds' worth may come at once.
        bytes_per_second: Of one client; a second's worth may come at once.
        waiting_bytes: That lie here unread at once, of all clients.
    """

    messages_per_second: Annotated[float, Field(ge=1, le=1e6)] = 5000.0
    bytes_per_second: Annotated[float, Field(ge=2**18, le=1e12)] = 2.0**29
    waiting_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 2**28

    @property
    def door(self) -> DoorLimits:
        """The same for the door."""
        return DoorLimits(
            messages_per_second=self.messages_per_second,
            burst_messages=4 * self.messages_per_second,
            bytes_per_second=self.bytes_per_second,
            burst_bytes=self.bytes_per_second,
            waiting_bytes=self.waiting_bytes,
        )
