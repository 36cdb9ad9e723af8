"""The aggregator's desk with keys, message by message: what a resumed OFFER is, and a replay."""

from __future__ import annotations

import queue

import pytest

from cloud_aggregator.rounds import RoundRules
from messaging import protocol, topics
from messaging.chunks import Missing
from messaging.key_files import RunKeys
from messaging.protocol import (
    Done,
    Grant,
    Hello,
    Manifest,
    Message,
    Reject,
    Task,
    decode,
    encode,
)
from messaging.security import DeviceSeal
from tests.cloud_aggregator.conftest import (
    BINDING,
    LAYOUT,
    LIMIT,
    RUN,
    SESSION,
    Clock,
    Events,
    M,
    Puppet,
    Stage,
    blob_of,
    device,
    join,
    offer_of,
    settings_of,
)

KEYS = RunKeys.generate(RUN)


class SealedPuppet(Puppet):
    """A device moved by hand that seals what it says, and keeps the packets."""

    def __init__(self, stage: Stage, client: str, keys: RunKeys = KEYS) -> None:
        mine = keys.device(client)
        self.seal = DeviceSeal(
            run=RUN,
            client=client,
            key=mine.key,
            verify_key=mine.verify_key,
            session=SESSION,
            epoch=1,
        )
        self.manifests: queue.Queue[bytes] = queue.Queue()
        self.said: list[bytes] = []
        super().__init__(stage.network, client)
        ear = stage.network.open(
            client_id=f"{client}-ear",
            filters=[topics.manifest(RUN)],
            deliver=lambda _topic, payload: self.manifests.put(payload),
            connected=lambda: None,
        )
        ear.start()

    def say(self, message: Message) -> None:
        """Seal a message and say it."""
        self.said.append(self.seal.seal(encode(message)))
        place = topics.state if isinstance(message, Hello) else topics.control
        self.publish(place(RUN, self.client), self.said[-1])

    def take_manifest(self) -> None:
        """Take the next manifest."""
        manifest = self.seal.open_manifest(self.manifests.get(timeout=LIMIT))
        assert isinstance(decode(manifest), Manifest)

    def greet(self, **changes: object) -> None:
        """Take the newest manifest and say HELLO."""
        self.take_manifest()
        fields = {
            "run": RUN,
            "client": self.client,
            "session": SESSION,
            "epoch": 1,
            "online": True,
            "binding": BINDING,
            "layout": LAYOUT.sha256,
            "device": device(self.client),
        }
        self.say(Hello.model_validate({**fields, **changes}))

    def expect(self, kind: type[M]) -> M:
        """Return the next message of this kind, unsealed."""
        while True:
            packet = self._heard.get(timeout=LIMIT)
            message = decode(self.seal.open(packet)) if packet.startswith(b"S") else None
            if isinstance(message, kind):
                return message


@pytest.fixture
def run(stage: Stage) -> tuple[Stage, Events]:
    """Return the stage of a sealed run of one device and one round, and what it tells."""
    events = Events()
    rules = RoundRules(quorum=1.0, deadline_seconds=1000.0)
    settings = settings_of(virtual_time=False, clients=1, minimum_clients=1, rounds=1, rules=rules)
    server = stage.aggregator(settings, events=events, clock=Clock(), keys=KEYS)
    stage.start(server)
    return stage, events


def in_training(stage: Stage) -> SealedPuppet:
    """Return a device that has been asked to train."""
    puppet = SealedPuppet(stage, "a")
    puppet.greet()
    puppet.report(puppet.expect_task("evaluate", 0))
    puppet.expect_task("train", 1)
    return puppet


def test_a_resumed_offer_is_answered_and_the_same_packet_is_a_replay(
    run: tuple[Stage, Events],
) -> None:
    stage, events = run
    a = in_training(stage)
    blob = blob_of("a", 2.0)
    offer = offer_of("a", blob)
    a.say(offer)
    everything = set(range(offer.chunks))
    assert Missing.from_bitmap(a.expect(Grant).missing, offer.chunks).indices == everything
    a.send(offer, blob, [0])
    a.say(offer)  # said anew, sealed anew: it resumes
    missing = Missing.from_bitmap(a.expect(Grant).missing, offer.chunks).indices
    assert missing == everything - {0}
    a.publish(topics.control(RUN, "a"), a.said[-1])  # the same packet again
    events.wait_for("refused", code="replay", client="a")
    a.send(offer, blob, sorted(missing))
    done = a.expect(Done)
    assert (done.blob, done.status) == (offer.blob, "stored")


def test_an_offer_without_a_greeting_is_not_taken(run: tuple[Stage, Events]) -> None:
    """Its key is right, and its session is not known: nothing but HELLO begins one."""
    stage, events = run
    in_training(stage)
    b = SealedPuppet(stage, "b")
    b.take_manifest()
    b.say(offer_of("b", blob_of("b", 9.0)))
    events.wait_for("refused", code="session", client="b")


def test_a_device_that_is_refused_is_told_why_under_its_seal(run: tuple[Stage, Events]) -> None:
    stage, _events = run
    in_training(stage)
    b = SealedPuppet(stage, "b")
    b.greet(binding="0" * 64)
    assert b.expect(Reject).code == "base"


def test_a_last_will_says_nothing_but_that_its_device_is_gone(run: tuple[Stage, Events]) -> None:
    stage, events = run
    a = in_training(stage)
    offer = encode(offer_of("a", blob_of("a", 9.0)))
    a.publish(topics.control(RUN, "a"), a.seal.seal(offer, will=True))
    events.wait_for("refused", code="mac", client="a")
    gone = Hello(
        run=RUN, client="a", session=SESSION, epoch=1, online=False, binding=BINDING,
        layout=LAYOUT.sha256,
    )  # fmt: skip
    a.publish(topics.state(RUN, "a"), a.seal.seal(encode(gone), will=True))
    events.wait_for("hello", client="a", online=False)


def test_a_run_with_keys_hears_no_plain_message_and_one_without_no_sealed_one(
    stage: Stage,
) -> None:
    for keys in (KEYS, None):
        events = Events()
        server = stage.aggregator(
            settings_of(virtual_time=False, clients=1), events=events, keys=keys
        )
        thread = stage.start(server)
        puppet = SealedPuppet(stage, "a")
        if keys is None:
            puppet.say(offer_of("a", blob_of("a", 1.0)))
        else:
            puppet.hello()
        events.wait_for("refused", code="mac", client="a")
        server.stop()
        join(thread)


def test_a_stranger_beyond_the_devices_that_there_is_room_for_is_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events()
    server = stage.aggregator(settings_of(virtual_time=False, clients=3), events=events)
    monkeypatch.setattr(server._desk, "_most_devices", 2)
    stage.start(server)
    puppets = [Puppet(stage.network, name) for name in "abc"]
    for puppet in puppets:
        puppet.hello()
    assert puppets[2].expect(Reject).code == "room"
    puppets[0].hello()  # who is known may come again
    events.wait_for("hello", client="a", times=2)


def test_refusals_beyond_what_can_be_told_are_counted_together(stage: Stage) -> None:
    """200 are told one by one; the clock stands, so the other 50 wait for the next tick."""
    events, clock = Events(), Clock()
    server = stage.aggregator(settings_of(virtual_time=False), events=events, clock=clock)
    stage.start(server)
    attacker = Puppet(stage.network, "x")
    for _ in range(250):
        attacker.publish(topics.control(RUN, "x"), b"{")
    attacker.hello()
    events.wait_for("hello", client="x")
    clock.now = 1.0
    attacker.hello()
    events.wait_for("refused", count=50)
    assert len(events.all("refused")) == 201


def test_a_device_of_a_protocol_that_is_too_old_is_told_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "SCHEMA", 2)
    monkeypatch.setattr(protocol, "OLDEST", 2)
    events = Events()
    stage.start(stage.aggregator(settings_of(virtual_time=False), events=events))
    puppet = Puppet(stage.network, "a")
    puppet.hello()  # says 1, the default of this code
    events.wait_for("refused", code="version", client="a")
    monkeypatch.undo()
    answer = puppet.expect(Reject)
    assert answer.code == "version"
    assert "protocol 1, and this side understands 2 to 2; update pwff" in answer.reason


def test_a_newer_device_is_served(stage: Stage) -> None:
    """It says more than this side knows, and is asked to work like any other."""
    events = Events()
    settings = settings_of(virtual_time=False, clients=1, minimum_clients=1)
    stage.start(stage.aggregator(settings, events=events))
    puppet = Puppet(stage.network, "a")
    hello = Hello(
        run=RUN, client="a", session=SESSION, online=True, binding=BINDING, layout=LAYOUT.sha256,
        device=device("a"),
    )  # fmt: skip
    newer = encode(hello).replace(b'"schema":1', b'"schema":2,"colour":"red"')
    puppet.publish(topics.state(RUN, "a"), newer)
    assert puppet.expect(Task).work == "evaluate"
