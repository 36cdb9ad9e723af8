"""Late updates wait on the disk, are folded in once by a later round, and survive a restart.

Clients a, b and c have one, two and three examples; two of three make a round's quorum. Round r
began at second 100 r.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloud_aggregator.aggregation.asynchronous import with_stale
from cloud_aggregator.intake import Client, Intake, IntakeRules
from cloud_aggregator.records import Observed
from cloud_aggregator.round_record import round_record
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.stale import StaleUpdates
from device_profiles.errors import InputError
from messaging.chunks import parse_chunk
from messaging.errors import ProtocolError
from messaging.protocol import Costs, Done, Grant, Message, Reject
from messaging.transfer import UploadLimits
from tests.cloud_aggregator.conftest import (
    BINDING,
    LAYOUT,
    RUN,
    blob_of,
    device,
    offer_of,
    pieces,
)
from tests.cloud_aggregator.notes import a_spool

WEIGHTS = {"a": 1, "b": 2, "c": 3}


class Buffered:
    """The rounds of a run that keeps late updates; ``begin`` is also what a new process does."""

    def __init__(self, folder: Path, *, virtual_time: bool = False, most: int = 5) -> None:
        self.folder = folder
        self.virtual_time = virtual_time
        self.most = most
        self.sent: dict[str, Message] = {}
        self.told: list[tuple[str, dict[str, Any]]] = []

    def begin(self, number: int, clients: str = "abc", deadline: float = 50.0) -> Intake:
        """Begin a round, or begin it again."""
        self.number = number
        self.intake = Intake(
            number,
            {i: Client(examples=WEIGHTS[i], layout=LAYOUT) for i in clients},
            IntakeRules(
                run=RUN,
                binding=BINDING,
                layout=LAYOUT,
                codec="fp32",
                limits=UploadLimits(),
                virtual_time=self.virtual_time,
                round_rules=RoundRules(quorum=0.6, deadline_seconds=deadline),
            ),
            a_spool(self.folder / str(number)),
            began=100.0 * number,
            send=self.sent.__setitem__,
            notify=lambda event, **fields: self.told.append((event, fields)),
            stale=StaleUpdates(self.folder / "stale", self.most),
        )
        return self.intake

    def update(
        self, client: str, value: float, round_: int, at: float, chunks: int = 99, **offer: Any
    ) -> Message:
        """Bring a client's update for a round ``at`` seconds after this one began."""
        blob = blob_of(client, value, examples=WEIGHTS[client], round=round_)
        asked = offer_of(client, blob, round=round_, **offer)
        now = 100.0 * self.number + at
        self.intake.offered(asked, now)
        if isinstance(self.sent[client], Grant):
            for packet in pieces(asked, blob)[:chunks]:
                self.intake.data(client, parse_chunk(RUN, packet), now)
        return self.sent[client]

    def folded(self) -> list[tuple[str, int, int, float, int]]:
        """Return what the round folds in: client, round, staleness, value, examples."""
        return [
            (u.client, u.round, u.staleness, float(u.vector[0]), u.examples)
            for u in self.intake.stale_updates()
        ]

    def first_round(self) -> None:
        """Do round 1: a and b are accepted, c is late."""
        self.begin(1)
        self.update("a", 1.0, 1, 1.0)
        self.update("b", 2.0, 1, 2.0)
        assert isinstance(self.update("c", 3.0, 1, 3.0), Done)
        assert self.folded() == []
        self.intake.clear()

    def full_round(self, number: int) -> None:
        """Do a round in which a and b are accepted and nothing else happens."""
        self.begin(number, "ab")
        self.update("a", 1.0, number, 1.0)
        self.update("b", 2.0, number, 2.0)


@pytest.fixture
def run(tmp_path: Path) -> Buffered:
    """Return a run in real time."""
    return Buffered(tmp_path / "spool")


def late(message: Message) -> bool:
    assert isinstance(message, Done)
    return message.status == "late"


def test_a_late_update_is_taken_and_the_next_round_folds_it_in_with_its_age(run: Buffered) -> None:
    run.first_round()
    assert late(run.sent["c"])
    assert run.intake.round.status("c") == "late"
    run.full_round(2)
    assert run.folded() == [("c", 1, 1, 3.0, 3)]
    # Aggregated: that of round 1 scaled by 2^-1/2, then the round's own in client order.
    mixed = [
        (float(vector[0]), examples)
        for vector, examples in with_stale(
            run.intake.accepted_updates(), run.intake.stale_updates()
        )
    ]
    assert mixed == [(pytest.approx(3.0 / 2**0.5, rel=1e-7), 3), (1.0, 1), (2.0, 2)]  # float32
    run.full_round(3)
    assert run.folded() == []


def test_an_update_is_told_once_however_late_it_comes(run: Buffered) -> None:
    """Metrics count updates by these: late in its own round it is no stale one besides."""
    run.first_round()
    told = [(event, fields["client"]) for event, fields in run.told if event != "granted"]
    assert told == [("update", "a"), ("update", "b"), ("update", "c")]
    assert run.told[-1][1]["verdict"] == "late"


def test_an_update_for_an_earlier_round_is_taken_while_a_later_one_is_open(run: Buffered) -> None:
    run.begin(1)
    run.update("a", 1.0, 1, 1.0)
    run.update("b", 2.0, 1, 2.0)
    assert run.folded() == []
    run.intake.clear()
    run.begin(2, "ab")
    assert late(run.update("c", 3.0, 1, 1.0))
    assert run.intake.round.accepted == []  # it is none of this round's
    assert late(run.update("c", 3.0, 1, 2.0))  # offered again
    run.update("a", 1.0, 2, 3.0)
    run.update("b", 2.0, 2, 4.0)
    assert run.folded() == [("c", 1, 1, 3.0, 3)]


def test_a_round_is_decided_once_however_often_it_is_done(run: Buffered) -> None:
    run.first_round()
    run.full_round(2)
    first = run.folded()
    assert first == [("c", 1, 1, 3.0, 3)]
    # Killed before the record was written: the round is done again, after c said it once more.
    run.begin(2, "ab")
    assert late(run.update("c", 3.0, 1, 0.5))
    run.intake.restore()
    assert run.folded() == first
    # Killed after the record was written and before the update was removed.
    run.full_round(3)
    assert run.folded() == []
    assert not list((run.folder / "stale").glob("*.safetensors"))


def test_what_was_counted_is_not_taken_again_in_its_round_or_later(run: Buffered) -> None:
    run.first_round()
    run.full_round(2)
    assert run.folded() == [("c", 1, 1, 3.0, 3)]
    run.begin(3, "ab")
    for client, value in (("c", 3.0), ("a", 1.0), ("a", 7.0)):  # DONE was lost, or trained anew
        with pytest.raises(ProtocolError) as refusal:
            run.update(client, value, 1, 1.0)
        assert refusal.value.code == "late"
        assert late(run.sent[client])
    run.update("a", 1.0, 3, 2.0)
    run.update("b", 2.0, 3, 3.0)
    assert run.folded() == []


def test_a_late_update_survives_a_restart_in_its_own_round(run: Buffered) -> None:
    run.begin(1)
    run.update("a", 1.0, 1, 1.0)
    run.update("b", 2.0, 1, 2.0)
    run.update("c", 3.0, 1, 3.0)
    again = run.begin(1)
    again.round.recorded(["a", "b"], 2.0)
    again.restore()
    assert [again.round.status(i) for i in "abc"] == ["aggregated", "aggregated", "late"]
    assert run.folded() == []
    run.full_round(2)
    assert run.folded() == [("c", 1, 1, 3.0, 3)]


def test_an_update_that_was_kept_and_then_accepted_in_its_round_counts_there_alone(
    run: Buffered,
) -> None:
    """The process ended before it noted that the round was over, and the round was done anew."""
    run.begin(1)
    run.update("a", 1.0, 1, 1.0)
    run.update("b", 2.0, 1, 2.0)
    run.update("c", 3.0, 1, 3.0)
    run.begin(1)
    assert isinstance(run.update("c", 3.0, 1, 1.0), Done)
    run.update("a", 1.0, 1, 2.0)
    assert run.intake.round.accepted == ["a", "c"]
    assert run.folded() == []
    run.full_round(2)
    assert run.folded() == []


def test_what_is_too_stale_is_dropped_and_counted(tmp_path: Path) -> None:
    run = Buffered(tmp_path / "spool", most=2)
    run.first_round()
    for number in (2, 3, 4):  # nothing was decided for 2 and 3: both were broken off
        run.begin(number, "ab")
        if number == 4:
            run.update("a", 1.0, 4, 1.0)
            run.update("b", 2.0, 4, 2.0)
    assert run.folded() == []
    closed = run.intake.folded()
    assert closed is not None
    assert closed.dropped == 1
    with pytest.raises(ProtocolError) as refusal:
        run.update("c", 3.0, 1, 3.0)
    assert refusal.value.code == "late"


def test_an_update_of_two_rounds_ago_is_still_folded_in_where_two_are_allowed(
    tmp_path: Path,
) -> None:
    run = Buffered(tmp_path / "spool", most=2)
    run.first_round()
    run.full_round(3)
    assert run.folded() == [("c", 1, 2, 3.0, 3)]


def test_who_was_not_asked_has_no_late_update(run: Buffered) -> None:
    run.full_round(1)
    assert run.folded() == []
    run.begin(2)
    with pytest.raises(ProtocolError) as refusal:
        run.update("c", 3.0, 1, 1.0)
    assert refusal.value.code == "late"
    assert not list((run.folder / "stale").glob("*.late"))


def test_a_late_update_that_is_wrong_is_refused_and_its_client_still_asked(run: Buffered) -> None:
    run.begin(1)
    run.update("a", 1.0, 1, 1.0)
    run.update("b", 2.0, 1, 2.0)
    assert run.folded() == []
    run.begin(2)
    assert isinstance(run.update("c", 2e6, 1, 1.0), Reject)
    assert run.intake.refused == {"range": 1}
    assert run.intake.reasons == {}
    with pytest.raises(ProtocolError) as refusal:
        run.update("c", 3.0, 1, 1.0, binding="0" * 64)
    assert refusal.value.code == "base"
    assert run.intake.reasons == {}
    assert not late(run.update("c", 3.0, 2, 1.0))
    assert run.intake.round.accepted == ["c"]


def test_a_late_upload_that_was_broken_off_goes_on_after_a_restart(run: Buffered) -> None:
    run.begin(1)
    run.update("a", 1.0, 1, 1.0)
    run.update("b", 2.0, 1, 2.0)
    assert run.folded() == []
    run.update("c", 3.0, 1, 3.0, chunks=1)
    run.begin(2, "ab")
    run.update("c", 3.0, 1, 1.0, chunks=0)
    grant = run.sent["c"]
    assert isinstance(grant, Grant)
    assert grant.missing == "06"  # of three, the first is here
    assert late(run.update("c", 3.0, 1, 2.0))
    assert not list((run.folder / "stale").glob("*.part*"))


def test_a_decision_that_cannot_be_read_is_no_decision_to_go_on_without(run: Buffered) -> None:
    run.first_round()
    (run.folder / "stale" / "round-1.json").write_text("{")
    with pytest.raises(InputError, match=r"round-1\.json is damaged"):
        run.begin(2)


def test_a_bound_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_staleness = 0"):
        StaleUpdates(tmp_path, 0)


def test_what_a_round_folds_in_is_not_decided_while_it_is_open(run: Buffered) -> None:
    run.begin(1)
    with pytest.raises(ValueError, match="round 1 is open"):
        list(run.intake.stale_updates())


def test_the_record_of_a_round_says_what_it_folded_in(run: Buffered) -> None:
    run.first_round()
    run.full_round(2)
    record = round_record(
        [device("a"), device("b"), device("c")],
        run.intake,
        {},
        stage="instruction",
        before=None,
        observed=Observed(),
    )
    (entry,) = record.stale
    assert (entry.id, entry.round, entry.staleness, entry.examples) == ("c", 1, 1, 3)
    assert entry.share == pytest.approx(0.5**0.5, rel=1e-15)
    assert record.stale_dropped == 0
    assert record.moved
    assert record.accepted == ["a", "b"]


# -- on the devices' modelled clock ---------------------------------------------------------------


def seconds(value: float) -> dict[str, Any]:
    return {"costs": Costs(compute_seconds=value)}


@pytest.mark.parametrize(
    ("arrives", "staleness"),
    [(14.0, 1), (14.5, 2), (24.0, 2), (24.5, None)],
    ids=["on the second", "just after it", "with the next", "after both"],
)
def test_in_virtual_time_a_late_update_counts_in_the_round_in_which_it_comes(
    tmp_path: Path, arrives: float, staleness: int | None
) -> None:
    """Rounds of 4, 10 and 10 s: what comes at 14 s is there when the second closes."""
    run = Buffered(tmp_path / "spool", virtual_time=True)
    run.begin(1)
    run.update("c", 3.0, 1, 0.0, **seconds(arrives))
    run.update("b", 2.0, 1, 0.0, **seconds(4.0))
    run.update("a", 1.0, 1, 0.0, **seconds(3.0))
    run.intake.settle()
    assert run.intake.round.closed_at == 4.0
    assert run.folded() == []
    run.intake.clear()
    found: dict[int, list[Any]] = {}
    for number in (2, 3):
        run.begin(number, "ab")
        for client in "ab":
            run.update(client, 1.0, number, 0.0, **seconds(10.0))
        run.intake.settle()
        found[number] = run.folded()
        run.intake.clear()
    expected: dict[int, list[Any]] = {2: [], 3: []}
    if staleness is not None:
        expected[1 + staleness] = [("c", 1, staleness, 3.0, 3)]
    assert found == expected


def test_in_virtual_time_what_was_lost_on_the_air_is_not_late_but_lost(tmp_path: Path) -> None:
    run = Buffered(tmp_path / "spool", virtual_time=True)
    run.begin(1)
    run.update("c", 3.0, 1, 0.0, costs=Costs(compute_seconds=9.0, lost=True))
    run.update("a", 1.0, 1, 0.0, **seconds(1.0))
    run.update("b", 2.0, 1, 0.0, **seconds(1.0))
    run.intake.settle()
    assert run.folded() == []
    assert not list((run.folder / "stale").glob("*.late"))


def test_without_a_folder_for_them_nothing_is_folded_in() -> None:
    intake: Any = SimpleNamespace(_stale=None)
    assert Intake.folded(intake) is None
