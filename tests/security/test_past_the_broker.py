"""Ways in past the broker: what refuses them is the run itself, and its metrics count them.

An ``insider`` is one to whom the broker denies nothing, and a ``Crook`` is a device with a key.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from cloud_aggregator.door import DoorLimits
from cloud_aggregator.run_folder import RunFolder
from device_profiles.modules import initial_adapters
from edge_client.local_client import Result
from edge_client.stage_work import GlobalStates
from messaging import topics
from messaging.chunks import make_chunk
from messaging.layout import Layout, TensorSpec
from messaging.protocol import Done, Grant, Hello, Manifest, Task, encode
from messaging.security import MAGIC, SEAL_BYTES, CloudSeal, DeviceSeal, SigningKey
from tests.cloud_aggregator.conftest import (
    BASE,
    BINDING,
    LAYOUT,
    RUN,
    SESSION,
    SIZE,
    Teacher,
    blob_of,
    constant,
    device,
    header,
    join,
    offer_of,
)
from tests.security.conftest import INSIDER, Site

pytestmark = pytest.mark.broker


def finished_well(site: Site) -> None:
    """See that the run came to the end that it has without an attack: both updates of 2.0."""
    assert [r.accepted for r in site.record.rounds] == [["a", "b"]] * len(site.record.rounds)
    first = LAYOUT.pack(initial_adapters(BASE, SIZE, 7))
    after = LAYOUT.pack(load_file(RunFolder(site.folder).global_path(1)))
    assert after.tobytes() == (first + np.float32(2.0)).tobytes()


class Attacked:
    """A run whose device b waits, so that an insider has time, and then goes on to its end."""

    def __init__(self, site: Site, **changes: Any) -> None:
        self.site = site
        self.insider = site.peer(INSIDER, "pwff/#")
        _, self.thread = site.aggregator(rounds=1, **changes)
        self.a = site.device("a")
        site.device("b", Teacher("b", 2.0, before_work=self._wait))
        site.events.wait_for("hello", client="a", online=True)

    def _wait(self, task: Task) -> None:
        if task.work == "train":
            self.site.events.wait_for("attack-over")

    def end(self) -> None:
        """Let the run end, and see that the attack came to nothing."""
        self.site.tell("attack-over")
        join(self.thread)
        finished_well(self.site)


def forged(client: str = "a") -> DeviceSeal:
    """Return the seal of somebody who guesses at a key."""
    return DeviceSeal(
        run=RUN,
        client=client,
        key=bytes(32),
        verify_key=SigningKey.generate().verify_key,
        session=SESSION,
        epoch=99,
    )


def test_a_forged_offer_is_refused(site: Site) -> None:
    run = Attacked(site)
    offer = encode(offer_of("a", blob_of("a", 99.0)))
    run.insider.say(topics.control(RUN, "a"), offer)  # plain
    run.insider.say(topics.control(RUN, "a"), forged().seal(offer))  # by another key
    run.insider.say(topics.control(RUN, "a"), MAGIC + b"\x01U" + bytes(200))
    site.events.wait_for("refused", code="mac", client="a", times=3)
    assert site.rejects("mac") == 3
    run.end()


def test_a_forged_hello_neither_takes_a_device_off_nor_brings_one_on(site: Site) -> None:
    run = Attacked(site)
    for client, online in (("a", False), ("c", True)):
        hello = Hello(
            run=RUN,
            client=client,
            session=SESSION,
            online=online,
            binding=BINDING,
            layout=LAYOUT.sha256,
            device=device(client) if online else None,
        )
        run.insider.say(topics.state(RUN, client), forged(client).seal(encode(hello)))
        run.insider.say(topics.state(RUN, client), encode(hello))
        site.events.wait_for("refused", code="mac", client=client, times=2)
    assert site.rejects("mac") == 4
    run.end()
    assert [c.id for c in site.record.clients] == ["a", "b"]


def test_a_forged_done_grant_or_manifest_moves_no_device(site: Site) -> None:
    """Plain, by a guessed key, and sealed by a whole aggregator that the insider makes up."""
    run = Attacked(site)
    false = CloudSeal(RUN, bytes(32), SigningKey.generate(), SESSION, 99)
    blob = "0" * 64
    down = topics.down(RUN, "a")
    done = encode(Done(run=RUN, client="a", blob=blob, status="stored"))
    grant = Grant(run=RUN, client="a", blob=blob, missing="01", window=8, expiry_seconds=9.0)
    stop = Task(run=RUN, client="a", work="stop", stage="instruction", round=1, state=None, seed=0)
    for message in (done, encode(grant), encode(stop)):
        run.insider.say(down, message)
    _, sealed = run.insider.wait_for(down, lambda payload: payload.startswith(MAGIC))
    run.insider.say(down, sealed[:SEAL_BYTES] + encode(stop))  # a true seal on another message
    manifest = Manifest(
        run=RUN,
        session=SESSION,
        method="pwff",
        stage="instruction",
        state=None,
        binding=BINDING,
        layout=LAYOUT.sha256,
        finished=True,
    )
    run.insider.say(topics.manifest(RUN), false.sign_manifest(encode(manifest)), retain=True)
    run.insider.say(topics.manifest(RUN), encode(manifest), retain=True)
    # b sees the same two manifests; the run ends, so both devices refused them
    run.end()
    assert not run.a.failures
    assert run.a.refused["mac"] == 6


def test_a_replay_is_refused_in_its_session_and_in_the_next(site: Site) -> None:
    run = Attacked(site)
    mine = (topics.state(RUN, "a"), topics.control(RUN, "a"))
    _, hello = run.insider.wait_for(mine[0])
    _, report = run.insider.wait_for(mine[1])
    for topic, packet in zip(mine, (hello, report), strict=True):
        run.insider.say(topic, packet)
    site.events.wait_for("refused", code="replay", client="a", times=2)
    assert site.rejects("replay") == 2
    run.end()
    # the next aggregator of this run: what was true once is of a session that is over
    while not run.insider.heard.empty():
        run.insider.heard.get()
    _, thread = site.aggregator(rounds=2)
    run.insider.wait_for(topics.manifest(RUN))
    for topic, packet in zip(mine, (hello, report), strict=True):
        run.insider.say(topic, packet)
    site.events.wait_for("refused", code="stale", client="a", times=2)
    site.device("a")
    site.device("b")
    join(thread)
    assert [r.accepted for r in site.record.rounds] == [["a", "b"]] * 2


def test_a_replayed_word_of_the_aggregator_moves_no_device(site: Site) -> None:
    run = Attacked(site)
    down = topics.down(RUN, "a")
    _, task = run.insider.wait_for(down, lambda payload: payload.startswith(MAGIC))
    run.insider.say(down, task)
    run.end()
    assert run.a.refused["replay"] == 1


def test_chunks_that_nobody_was_granted_are_refused(site: Site) -> None:
    run = Attacked(site)
    blob = blob_of("a", 99.0)
    name = offer_of("a", blob).blob
    packet = make_chunk(RUN, name, blob, 0, 1024)
    run.insider.say(topics.data(RUN, "a", name), packet)
    site.refused("grant", client="a")
    run.end()


@pytest.mark.parametrize("name", ["..", "A", "x" * 65])
def test_a_name_that_could_be_a_path_is_refused_wherever_it_stands(site: Site, name: str) -> None:
    run = Attacked(site)
    before = sorted(site.folder.parent.rglob("*"))
    run.insider.say(topics.state(RUN, name), b"{}")
    run.insider.say(topics.data(RUN, name, name), b"{}")
    site.refused("identity")
    true = encode(offer_of("a", blob_of("a", 1.0))).decode()
    for place in ('"client":"a"', f'"run":"{RUN}"'):
        field = place.split(":")[0]
        run.insider.say(topics.control(RUN, "a"), true.replace(place, f'{field}:"{name}"').encode())
    site.events.wait_for("refused", code="mac", client="a", times=2)
    assert [p for p in sorted(site.folder.parent.rglob("*")) if name in p.name] == [
        p for p in before if name in p.name
    ]
    run.end()


class Crook(Teacher):
    """A device with a key of the run, whose update is whatever a test makes it."""

    def __init__(self, blob: bytes) -> None:
        super().__init__("a", 1.0)
        self._blob = blob

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        """Do as told, but for the update."""
        done = super().perform(task, states, download_bytes)
        return done if done.blob is None else replace(done, blob=self._blob)


def lora_update() -> bytes:
    """Return an update of a layout that has a LoRA tensor too, and says so."""
    more = Layout((*LAYOUT.specs, TensorSpec(name="transformer.h.0.lora_A.weight", shape=(2, 8))))
    said = header("a", layout=more.sha256)
    return save({"packed": constant(1.0, more)}, metadata={"pwff": said.model_dump_json()})


def update_with(**arrays: Any) -> bytes:
    """Return an update that says that it is of the run, and holds other arrays."""
    return save(arrays, metadata={"pwff": header("a").model_dump_json()})


def bomb(shape: list[int]) -> bytes:
    """Return a safetensors file whose header claims a shape that its few bytes do not have."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
    meta = {"pwff": header("a").model_dump_json()}
    head = json.dumps({"__metadata__": meta, "packed": entry}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(4)


@pytest.mark.parametrize(
    ("code", "blob"),
    [
        ("layout", lora_update()),
        ("name", update_with(packed=constant(1.0), lora_A=np.ones((2, 8), np.float32))),
        ("name", update_with(**{"transformer.h.0.lora_A.weight": np.ones((2, 8), np.float32)})),
        ("shape", update_with(packed=np.ones((1, LAYOUT.size), np.float32))),
        ("dtype", update_with(packed=np.ones(LAYOUT.size, np.float64))),
        ("finite", update_with(packed=np.full(LAYOUT.size, np.nan, np.float32))),
        ("shape", bomb([2**40])),
        ("shape", bomb([2**32, 2**32, 2**32])),
        ("format", bomb([LAYOUT.size])),
        ("format", struct.pack("<Q", 2**63) + b"{}"),
        ("identity", blob_of("b", 1.0)),
        ("size", update_with(packed=np.zeros(2**20, np.float32))),
    ],
    ids=[
        "lora-layout", "lora-beside", "lora-instead", "shape", "dtype", "nan", "shape-bomb",
        "shape-overflow", "too-few-bytes", "header-bomb", "another-sender", "too-large",
    ],
)  # fmt: skip
def test_what_is_no_update_of_this_run_is_refused_and_left_out(
    site: Site, code: str, blob: bytes
) -> None:
    _, thread = site.aggregator(rounds=1)
    site.device("a", Crook(blob))
    site.device("b")
    join(thread)
    assert site.rejects(code) >= 1
    (done,) = site.record.rounds
    assert done.accepted == ["b"]
    assert {c.id: c.status for c in done.clients} == {"a": "rejected", "b": "aggregated"}
    assert {s.name for s in LAYOUT.specs} == set(load_file(RunFolder(site.folder).global_path(1)))


def test_a_device_that_floods_is_cut_off_and_nobody_else_waits(site: Site) -> None:
    """Of 200 messages at once, 50 are taken, and one more a second; a and b say fewer in a run."""
    run = Attacked(site, door=DoorLimits(messages_per_second=1.0, burst_messages=50.0))
    for _ in range(200):
        run.insider.say(topics.control(RUN, "c"), b"{")
    site.refused("rate", client="c")
    run.end()
    assert 50 <= site.rejects("mac") < 100


def test_what_is_refused_is_told_with_no_secret_in_it(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    run = Attacked(site)
    run.insider.say(topics.control(RUN, "a"), b"{}")
    site.refused("mac")
    run.end()
    keys = site.keys
    told = caplog.text + json.dumps(site.events.all("refused")) + site.metrics.page().decode()
    written = [p for p in site.folder.rglob("*") if p.is_file()]
    for secret in (keys.master, keys.signing_key.seed, keys.device("a").key):
        assert secret.hex() not in told
        assert not any(secret.hex().encode() in p.read_bytes() for p in written)
        assert not any(secret in p.read_bytes() for p in written)
    assert repr(keys).count(keys.master.hex()) == 0


def test_a_retained_manifest_of_an_earlier_start_is_not_taken(site: Site) -> None:
    """An insider keeps the first start's manifest, and puts it back after the second."""
    insider = site.peer(INSIDER, "pwff/#")
    server, thread = site.aggregator()
    a = site.device("a")
    _, first = insider.wait_for(topics.manifest(RUN))
    site.events.wait_for("hello", client="a", online=True)
    server.stop()
    join(thread)
    _, thread = site.aggregator()
    site.events.wait_for("hello", client="a", online=True, times=2)
    insider.say(topics.manifest(RUN), first, retain=True)
    site.device("b")
    join(thread)
    assert site.record.status == "done"
    assert not a.failures
    assert a.refused["replay"] >= 1
