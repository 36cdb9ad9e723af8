"""Who takes part: devices by identity, each in its newest session, checked against the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from messaging.errors import ProtocolError
from messaging.protocol import DeviceRecord, Hello, encoder_of

_LISTENING_SECONDS = 5.0  # between two looks; what is more, nobody listened


class Registry:
    """The devices that said HELLO.

    Args:
        binding: Hash of base, tokenizer and placement that the run is built on.
        layout: Hash of the shared tensors.
        known: The only devices that may take part; by default any that fits.
        scoring: Of the devices that the run has had; by default that of those that are there.
        encoder: Mark of the encoder that the run's reward models read; empty for none.
        devices: That an earlier process of this run knew; none of them is there yet.
        epochs: The most starts that each of them has come with.
        silence_seconds: After as long without a word a device is taken for gone; without it, only
            its last will says so.
        private: Whether devices may take part only if they withhold what they hold.

    Attributes:
        devices: That have been there, by their names.
        changes: How often one of them came or left.
    """

    def __init__(
        self,
        *,
        binding: str,
        layout: str,
        known: frozenset[str] | None = None,
        scoring: str | None = None,
        encoder: str = "",
        devices: Mapping[str, DeviceRecord] | None = None,
        epochs: Mapping[str, int] | None = None,
        silence_seconds: float | None = None,
        private: bool = False,
    ) -> None:
        self._known = known
        self._binding = binding
        self._layout = layout
        self._scoring, self._encoder = scoring, encoder
        self._sessions: dict[str, str] = {}
        self._online: set[str] = set()
        self._left: set[str] = set()
        self.devices: dict[str, DeviceRecord] = {
            name: record
            for name, record in (devices or {}).items()
            if known is None or name in known
        }
        self.changes = 0
        self._epochs = dict(epochs or {})
        self._changed: set[str] = set()
        self._silence = silence_seconds
        self._private = private
        self._listened = 0.0  # seconds in which a device could be heard
        self._looked: float | None = None
        self._heard: dict[str, float] = {}

    def greeted(self, hello: Hello) -> bool:
        """Take a HELLO; return whether the device is newly there (and needs its task again).

        Raises:
            ProtocolError: If the device is built on something else than the run.
        """
        if not hello.online:
            known = hello.client in self.devices  # names of strangers are not kept
            if known and self._sessions.get(hello.client, hello.session) == hello.session:
                self._gone([hello.client])
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
                f"device '{hello.client}' shares other tensors than the run; compare method, "
                "stages, reward_shares, reward_trunk and adapter size",
            )
        if hello.device is None or hello.device.id != hello.client:
            raise ProtocolError("identity", "HELLO without a record of the device that sends it")
        if self._private and not _withholds(hello.device):
            raise ProtocolError(
                "private",
                f"the run is private and device '{hello.client}' says what it holds; set private = "
                "true in its configuration",
            )
        if hello.device.scoring and encoder_of(hello.device.scoring) != self._encoder:
            raise ProtocolError(
                "layout",
                f"the reward models of device '{hello.client}' read another reward_trunk than the "
                "run's; give it the run's encoder, or none where the run has none",
            )
        others = {self.devices[name].scoring for name in self._online if name != hello.client}
        wanted = others if self._scoring is None else {self._scoring}
        if wanted - {hello.device.scoring}:
            raise ProtocolError(
                "layout",
                f"device '{hello.client}' scores responses by '{hello.device.scoring}' and the "
                "others do not: another trunk precision, reward_trunk or reference set; give it "
                "theirs",
            )
        if hello.epoch < (last := self._epochs.get(hello.client, 0)):
            raise ProtocolError(
                "session",
                f"'{hello.client}' says that this is its start {hello.epoch}, and it has been here "
                f"in its start {last}: give each device a name and a folder of its own, or write a "
                "higher number into its file 'epoch'",
            )
        if (hello.epoch, hello.device) != (last, self.devices.get(hello.client)):
            self._changed.add(hello.client)
        self._epochs[hello.client] = hello.epoch
        self._sessions[hello.client] = hello.session
        self.devices[hello.client] = hello.device
        self.heard(hello.client)
        return True

    def take_changed(self) -> dict[str, tuple[int, DeviceRecord]]:
        """Return the devices that are new, or not as they were at the last call, with starts."""
        changed = {i: (self._epochs[i], self.devices[i]) for i in sorted(self._changed)}
        self._changed.clear()
        return changed

    def heard(self, client: str) -> bool:
        """Note that a device said something in its newest session; return whether it was gone."""
        self._heard[client] = self._listened
        if client in self._online:
            return False
        self._online.add(client)
        self._left.discard(client)
        self.changes += 1
        return True

    def look(self, now: float) -> list[str]:
        """Return who has just fallen silent for too long, in client order; called every second.

        Only seconds in which this was called count: while nobody listened, nobody could be heard.
        """
        if self._looked is not None:
            self._listened += min(now - self._looked, _LISTENING_SECONDS)
        self._looked = now
        if self._silence is None:
            return []
        limit = self._listened - self._silence
        silent = sorted(i for i in self._online if self._heard.get(i, 0.0) < limit)
        self._gone(silent)
        return silent

    def _gone(self, clients: Sequence[str]) -> None:
        self._online.difference_update(clients)
        self._left.update(clients)
        self.changes += len(clients)

    def reconnected(self) -> None:
        """Count silence anew: nobody could be heard while this side had no connection."""
        self._heard = dict.fromkeys(self._online, self._listened)

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

    @property
    def all_left(self) -> bool:
        """Whether every device of the run has said that it leaves, or is taken for gone.

        One that an earlier process knew may be there until it has said so to this one.
        """
        return self._left >= set(self.devices)


def _withholds(device: DeviceRecord) -> bool:
    """Return whether a record says nothing of its device's data."""
    told = device.held_out_examples or device.categories or device.preference_pairs > 1
    return device.examples == 1 and not told
