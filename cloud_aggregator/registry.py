"""Who takes part: devices by identity, each in its newest session, checked against the run."""

from __future__ import annotations

from messaging.errors import ProtocolError
from messaging.protocol import DeviceRecord, Hello


class Registry:
    """The devices that said HELLO.

    Args:
        binding: Hash of base, tokenizer and placement that the run is built on.
        layout: Hash of the shared tensors.
        known: The only devices that may take part; by default any that fits.
        scoring: Of the devices that the run has had; by default that of those that are there.
    """

    def __init__(
        self,
        *,
        binding: str,
        layout: str,
        known: frozenset[str] | None = None,
        scoring: str | None = None,
    ) -> None:
        self._known = known
        self._binding = binding
        self._layout = layout
        self._scoring = scoring
        self._sessions: dict[str, str] = {}
        self._online: set[str] = set()
        self.devices: dict[str, DeviceRecord] = {}

    def greeted(self, hello: Hello) -> bool:
        """Take a HELLO; return whether the device is newly there (and needs its task again).

        Raises:
            ProtocolError: If the device is built on something else than the run.
        """
        if not hello.online:
            if self._sessions.get(hello.client) == hello.session:
                self._online.discard(hello.client)
            return False
        if self._known is not None and hello.client not in self._known:
            raise ProtocolError("identity", f"'{hello.client}' is no client of this run")
        if hello.binding != self._binding:
            raise ProtocolError(
                "base",
                f"device '{hello.client}' is on another base, tokenizer or LoRA placement than the "
                "run; give it the run's model and placement",
            )
        if hello.layout != self._layout:
            raise ProtocolError(
                "layout",
                f"device '{hello.client}' shares other tensors than the run; compare method and "
                "adapter size",
            )
        if hello.device is None or hello.device.id != hello.client:
            raise ProtocolError("identity", "HELLO without a record of the device that sends it")
        others = {self.devices[name].scoring for name in self._online if name != hello.client}
        wanted = others if self._scoring is None else {self._scoring}
        if wanted - {hello.device.scoring}:
            raise ProtocolError(
                "layout",
                f"device '{hello.client}' scores responses by '{hello.device.scoring}' and the "
                "others do not: another trunk precision, or another reference set; give it theirs",
            )
        self._sessions[hello.client] = hello.session
        self._online.add(hello.client)
        self.devices[hello.client] = hello.device
        return True

    def check_session(self, client: str, session: str) -> None:
        """Refuse a message of a device that never said HELLO, or of an older session.

        Raises:
            ProtocolError: With code ``session``.
        """
        if self._sessions.get(client) != session:
            raise ProtocolError(
                "session", f"'{client}' speaks from a session that is not its newest"
            )

    def is_online(self, client: str) -> bool:
        """Return whether a device is there."""
        return client in self._online

    @property
    def online(self) -> list[str]:
        """Devices that are there, in client order."""
        return sorted(self._online)
