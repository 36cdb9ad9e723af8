"""Updates and states that lie in a store: fetched beside the protocol, verified, and counted once.

The store is a folder. The network is in memory and every packet on it is seen.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_aggregator.fetches import Fetched, Fetches
from cloud_aggregator.intake import Client, Intake, IntakeRules
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder, read_record
from cloud_aggregator.shelf import Shelf
from device_profiles.modules import initial_adapters
from messaging import topics
from messaging.chunks import MAGIC, parse_chunk
from messaging.claims import Claims, ClaimStore
from messaging.errors import ProtocolError
from messaging.protocol import Done, Grant, Message, Offer, Reject
from messaging.transfer import UploadLimits
from tests.cloud_aggregator.conftest import (
    BASE,
    BINDING,
    CHUNK,
    LAYOUT,
    LIMIT,
    RUN,
    SIZE,
    Events,
    Stage,
    Teacher,
    blob_of,
    constant,
    join,
    offer_of,
    pieces,
    settings_of,
)
from tests.cloud_aggregator.notes import a_spool

BLOB = blob_of("a", 4.0)
NAME = hashlib.sha256(BLOB).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> ClaimStore:
    """Return a store in a folder that fails at once."""
    return ClaimStore(f"file://{tmp_path}/store", attempts=1)


@dataclass
class Counter:
    """An intake of clients a and b whose fetches end when a test takes them."""

    folder: Path
    store: ClaimStore
    sent: list[Message] = field(default_factory=list)
    events: Events = field(default_factory=Events)
    came: queue.Queue[Fetched] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.fetches = Fetches(self.store, self.came.put)
        self.intake = self.open()

    def open(self) -> Intake:
        """Return the intake of round 1, as a process would that has just started."""
        return Intake(
            1,
            {name: Client(examples=1, layout=LAYOUT) for name in "ab"},
            IntakeRules(
                run=RUN,
                binding=BINDING,
                layout=LAYOUT,
                codec="fp32",
                limits=UploadLimits(),
                virtual_time=False,
                round_rules=RoundRules(quorum=1.0, deadline_seconds=50.0),
            ),
            a_spool(self.folder / "1"),
            began=0.0,
            send=lambda _client, message: self.sent.append(message),
            notify=self.events,
            fetches=self.fetches,
        )

    def take(self) -> None:
        """Wait for the fetch that is under way, and take it."""
        self.intake.fetched(self.came.get(timeout=LIMIT), 2.0)

    def close(self) -> None:
        """End the threads, and see that they do."""
        self.fetches._pool.shutdown(wait=True)


@pytest.fixture
def counter(tmp_path: Path, store: ClaimStore) -> Iterator[Counter]:
    """Yield an intake with a store."""
    counter = Counter(tmp_path / "spool", store)
    yield counter
    counter.close()


def claimed(store: ClaimStore, **changes: object) -> Offer:
    """Return client a's offer of an update that lies in the store."""
    return offer_of("a", BLOB, **{"url": store.url_of(NAME), **changes})


def test_an_update_in_the_store_counts_and_is_removed_from_there(
    counter: Counter, store: ClaimStore, tmp_path: Path
) -> None:
    store.put(BLOB, NAME)
    counter.intake.offered(claimed(store), 1.0)
    assert counter.sent == []  # no grant: nothing is to travel over the broker
    counter.take()
    assert counter.sent == [Done(run=RUN, client="a", blob=NAME, status="stored")]
    ((vector, examples),) = counter.intake.accepted_updates()
    assert (vector.tolist(), examples) == (constant(4.0).tolist(), 1)
    counter.close()
    assert list((tmp_path / "store").iterdir()) == []


def test_a_device_that_offers_what_is_anothers_does_not_have_it_removed(
    counter: Counter, store: ClaimStore, tmp_path: Path
) -> None:
    """Global states lie in the same store under their hashes, which every device knows."""
    others = blob_of("b", 4.0)
    name = hashlib.sha256(others).hexdigest()
    store.put(others, name)
    counter.intake.offered(offer_of("a", others, url=store.url_of(name)), 1.0)
    counter.take()
    (reject,) = counter.sent
    assert isinstance(reject, Reject)
    assert reject.code == "identity"
    counter.close()
    assert [path.name for path in (tmp_path / "store").iterdir()] == [name]


def test_an_offer_that_is_said_again_meanwhile_is_fetched_once(
    counter: Counter, store: ClaimStore
) -> None:
    store.put(BLOB, NAME)
    for _ in range(5):
        counter.intake.offered(claimed(store), 1.0)
    counter.take()
    counter.intake.offered(claimed(store), 3.0)
    assert [type(message) for message in counter.sent] == [Done, Done]
    counter.close()
    assert counter.came.empty()


@pytest.mark.parametrize("fault", ["absent", "short", "forged"])
def test_what_the_store_does_not_give_is_asked_for_in_chunks(
    fault: str, counter: Counter, store: ClaimStore
) -> None:
    if fault != "absent":
        store.put(BLOB[:-1] if fault == "short" else bytes(len(BLOB)), NAME)
    offer = claimed(store)
    counter.intake.offered(offer, 1.0)
    counter.take()
    (grant,) = counter.sent
    assert isinstance(grant, Grant)
    assert counter.intake.refused == {
        {"absent": "url", "short": "size", "forged": "hash"}[fault]: 1
    }
    (told,) = counter.events.all("refused")  # what the metrics count
    assert counter.intake.refused == {told["code"]: 1}
    counter.intake.offered(offer, 2.0)  # said again, it does not begin anew
    for packet in pieces(offer, BLOB):
        counter.intake.data("a", parse_chunk(RUN, packet), 2.0)
    assert isinstance(counter.sent[-1], Done)
    assert counter.came.empty()


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest", "file:///etc/passwd", "file:///x/{}/../{}", "s3://b/{}"],
)
def test_an_offer_of_any_other_place_is_refused_unread(
    url: str, counter: Counter, store: ClaimStore
) -> None:
    with pytest.raises(ProtocolError) as caught:
        counter.intake.offered(claimed(store, url=url.format(NAME, NAME)), 1.0)
    assert caught.value.code == "url"
    (reject,) = counter.sent
    assert isinstance(reject, Reject)
    assert reject.code == "url"
    counter.close()
    assert counter.came.empty()


def test_without_a_store_an_offer_with_a_url_is_asked_for_in_chunks(
    counter: Counter, store: ClaimStore
) -> None:
    counter.intake._fetches = None
    counter.intake.offered(claimed(store), 1.0)
    assert isinstance(counter.sent[0], Grant)


def test_a_fetch_that_ends_after_its_round_leaves_nothing(
    counter: Counter, store: ClaimStore
) -> None:
    store.put(BLOB, NAME)
    counter.intake.offered(claimed(store), 1.0)
    fetched = counter.came.get(timeout=LIMIT)
    counter.intake = counter.open()
    counter.intake.fetched(fetched, 2.0)
    assert counter.sent == []
    assert not fetched.path.exists()


def test_an_update_that_is_here_whole_needs_its_store_no_more(
    counter: Counter, store: ClaimStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between the disk and the answer; the next one has the bytes already."""
    store.put(BLOB, NAME)
    counter.intake.offered(claimed(store), 1.0)
    fetched = counter.came.get(timeout=LIMIT)
    with monkeypatch.context() as patch:
        patch.setattr(counter.intake, "offered", lambda *_: None)
        counter.intake.fetched(fetched, 2.0)
    counter.intake = counter.open()
    counter.fetches.store.remove(NAME)
    counter.intake.offered(claimed(store), 3.0)
    counter.take()
    assert counter.sent == [Done(run=RUN, client="a", blob=NAME, status="stored")]


def test_a_large_state_lies_in_the_store_for_as_long_as_it_is_on_the_shelf(
    store: ClaimStore, tmp_path: Path
) -> None:
    claims = Claims(store=store, above_bytes=1000)
    shelf = Shelf(RUN, LAYOUT, RunFolder(tmp_path), CHUNK, claims)
    refs = [shelf.put(constant(float(r)), r) for r in range(3)]
    assert [ref.url for ref in refs] == [store.url_of(ref.blob) for ref in refs]
    lying = {path.name for path in (tmp_path / "store").iterdir()}
    assert lying == {refs[1].blob, refs[2].blob}


def test_a_small_state_and_one_that_the_store_does_not_take_travel_in_chunks(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    full = ClaimStore(f"file://{tmp_path}/file", attempts=1)  # no folder can be made there
    for claims in (Claims(store=full, above_bytes=10**6), Claims(store=full, above_bytes=0)):
        assert (
            Shelf(RUN, LAYOUT, RunFolder(tmp_path), CHUNK, claims).put(constant(1.0), 1).url is None
        )


def test_a_run_with_a_store_ends_with_the_same_state_and_sends_no_chunk(
    stage: Stage, store: ClaimStore
) -> None:
    claims = Claims(store=store, above_bytes=1000)
    seen: queue.Queue[bytes] = queue.Queue()
    watcher = stage.network.open(
        client_id="watcher",
        filters=[f"{topics.ROOT}/#"],
        deliver=lambda _topic, payload: seen.put(payload),
        connected=lambda: None,
    )
    watcher.start()
    stage.host(Teacher("a", 1.0), Teacher("b", 2.0, examples=2), Teacher("c", 6.0), claims=claims)
    record = stage.aggregator(settings_of(claims=claims)).run()
    assert [r.accepted for r in record.rounds] == [["a", "b", "c"]] * 2
    # (1*1 + 2*2 + 1*6) / 4 = 2.75 a round, in single precision
    once = LAYOUT.pack(initial_adapters(BASE, SIZE, 7)) + np.float32(2.75)
    assert record.summary.eval_loss_after == pytest.approx(10.0 - 5.5, abs=1e-5)
    newest = Shelf(RUN, LAYOUT, RunFolder(stage.path), CHUNK).load(2)
    assert newest.tobytes() == (once + np.float32(2.75)).tobytes()
    payloads = [seen.get_nowait() for _ in range(seen.qsize())]
    assert payloads
    assert not any(payload.startswith(MAGIC) for payload in payloads)


class Unreachable(ClaimStore):
    """A store that a device cannot reach."""

    def put(self, blob: bytes, sha256: str) -> str:
        """Fail."""
        del blob, sha256
        raise ProtocolError("url", "no route")

    def fetch(self, url: str, *, sha256: str, size: int, sink: object) -> None:
        """Fail."""
        del url, sha256, size, sink
        raise ProtocolError("url", "no route")


@pytest.mark.parametrize("has_store", [True, False], ids=["out of reach", "not configured"])
def test_a_run_whose_devices_have_no_store_ends_with_the_same_state(
    has_store: bool, stage: Stage, store: ClaimStore
) -> None:
    theirs = Claims(store=Unreachable(store.base), above_bytes=1000) if has_store else None
    stage.host(Teacher("a", 1.0), Teacher("b", 2.0, examples=2), Teacher("c", 6.0), claims=theirs)
    claims = Claims(store=store, above_bytes=1000)
    record = stage.aggregator(settings_of(claims=claims)).run()
    assert [r.accepted for r in record.rounds] == [["a", "b", "c"]] * 2
    once = LAYOUT.pack(initial_adapters(BASE, SIZE, 7)) + np.float32(2.75)
    newest = Shelf(RUN, LAYOUT, RunFolder(stage.path), CHUNK).load(2)
    assert newest.tobytes() == (once + np.float32(2.75)).tobytes()


class Silent(ClaimStore):
    """A store that is asked and does not answer before the test ends."""

    def __init__(self, base: str) -> None:
        super().__init__(base)
        self.asked, self.over = threading.Event(), threading.Event()

    def _system(self) -> Any:
        self.asked.set()
        assert self.over.wait(LIMIT)
        raise OSError("it is gone")


@pytest.fixture
def silent(store: ClaimStore) -> Iterator[Silent]:
    """Yield a store that does not answer."""
    silent = Silent(store.base)
    yield silent
    silent.over.set()


def test_leaving_waits_for_no_store_that_does_not_answer(
    tmp_path: Path, store: ClaimStore, silent: Silent
) -> None:
    came: queue.Queue[Fetched] = queue.Queue()
    fetches = Fetches(silent, came.put)
    fetches.begin(claimed(store), store.url_of(NAME), tmp_path / "x")
    assert silent.asked.wait(LIMIT)
    fetches.close()
    assert came.get(timeout=LIMIT / 2).fault == "url"
    assert not silent.over.is_set()


def test_an_aggregator_that_is_told_to_stop_waits_for_no_store(
    stage: Stage, silent: Silent
) -> None:
    """It puts a state there on the thread that takes what arrives."""
    stage.host(Teacher("a", 1.0), Teacher("b", 2.0), Teacher("c", 6.0))
    server = stage.aggregator(settings_of(claims=Claims(store=silent, above_bytes=1000)))
    thread = stage.start(server)
    assert silent.asked.wait(LIMIT)
    server.stop()
    join(thread)
    assert read_record(stage.path).status == "stopped"
    assert not silent.over.is_set()
