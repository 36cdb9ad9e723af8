"""One round's updates: what is right is taken once, what is wrong is refused with a code.

The round has number 1 and began at second 100. Its clients a, b and c said that they have one, two
and three examples.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_aggregator.intake import Client, Intake, IntakeRules
from cloud_aggregator.methods import METHODS, ModuleShape, own_layout, stage_layout
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.spool import SpoolFullError
from device_profiles.modules import BaseShape
from messaging.chunks import Missing, parse_chunk
from messaging.codecs import encode_blob
from messaging.errors import ProtocolError
from messaging.layout import Layout
from messaging.protocol import Costs, Done, Grant, Message, Offer, Reject, Report
from messaging.transfer import UploadLimits
from tests.cloud_aggregator.conftest import (
    BINDING,
    LAYOUT,
    NOTHING,
    RUN,
    SESSION,
    blob_of,
    constant,
    header,
    offer_of,
    pieces,
)
from tests.cloud_aggregator.notes import a_spool

BEGAN = 100.0
WEIGHTS = {"a": 1, "b": 2, "c": 3}
LORA = "transformer.h.0.attn.c_attn.query.lora_A.weight"
Usage = namedtuple("Usage", "total used free")


class Desk:
    """An intake with all that it said and told."""

    def __init__(
        self,
        folder: Path,
        *,
        virtual_time: bool = False,
        quorum: float = 1.0,
        deadline: float = 50.0,
        layout: Layout = LAYOUT,
        codec: Any = "fp32",
        limits: UploadLimits | None = None,
        weights: dict[str, int] = WEIGHTS,
        own: dict[str, Layout] | None = None,
    ) -> None:
        clients = {
            client: Client(examples=examples, layout=(own or {}).get(client, layout))
            for client, examples in weights.items()
        }
        self.sent: list[tuple[str, Message]] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.spool = a_spool(folder)
        self.intake = Intake(
            1,
            clients,
            IntakeRules(
                run=RUN,
                binding=BINDING,
                layout=layout,
                codec=codec,
                limits=limits or UploadLimits(),
                virtual_time=virtual_time,
                round_rules=RoundRules(quorum=quorum, deadline_seconds=deadline),
            ),
            self.spool,
            began=BEGAN,
            send=lambda client, message: self.sent.append((client, message)),
            notify=lambda event, **fields: self.told.append((event, fields)),
        )
        self.round = self.intake.round

    def last(self, client: str) -> Message:
        """Return what was said to a client last."""
        return [message for to, message in self.sent if to == client][-1]

    def bring(self, offer: Offer, blob: bytes, at: float = BEGAN + 1) -> Message:
        """Offer an update, send all its chunks if it is granted, and return the answer."""
        self.intake.offered(offer, at)
        if isinstance(self.last(offer.client), Grant):
            for packet in pieces(offer, blob):
                self.intake.data(offer.client, parse_chunk(RUN, packet), at)
        return self.last(offer.client)

    def update(self, client: str, value: float = 1.0, at: float = BEGAN + 1, **offer: Any) -> str:
        """Bring a client's right update; return what the answer says."""
        blob = blob_of(client, value, examples=WEIGHTS[client])
        answer = self.bring(offer_of(client, blob, **offer), blob, at)
        assert isinstance(answer, Done | Reject)
        return answer.status if isinstance(answer, Done) else answer.code

    def accepted(self) -> list[tuple[float, int]]:
        """Return value and weight of every accepted update."""
        taken = []
        for vector, examples in self.intake.accepted_updates():
            assert set(vector.tolist()) == {float(vector[0])}
            taken.append((float(vector[0]), examples))
        return taken


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Yield a desk in real time; what is under way at the end is dropped."""
    desk = Desk(tmp_path / "1")
    yield desk
    desk.intake.close()


@pytest.fixture
def virtual(tmp_path: Path) -> Desk:
    """Return a desk in virtual time."""
    return Desk(tmp_path / "1", virtual_time=True)


# -- what is right --------------------------------------------------------------------------------


def test_an_update_that_is_right_is_stored_and_counts_with_its_examples(desk: Desk) -> None:
    blob = blob_of("b", 4.0, examples=2, train_loss=1.5)
    offer = offer_of("b", blob, costs=Costs(uplink_seconds=3.0))
    answer = desk.bring(offer, blob, at=BEGAN + 7)
    assert answer == Done(run=RUN, client="b", blob=offer.blob, status="stored")
    assert desk.round.accepted == ["b"]
    assert desk.accepted() == [(4.0, 2)]
    given = desk.intake.contributions["b"]
    assert (given.train_loss, given.costs.uplink_seconds, given.offer) == (1.5, 3.0, offer)
    assert given.parameters == 456
    assert desk.told == [
        ("granted", {"client": "b", "round": 1}),
        (
            "update",
            {
                "client": "b",
                "round": 1,
                "verdict": "accepted",
                "train_loss": 1.5,
                "bytes": len(blob),
            },
        ),
    ]


def test_accepted_updates_come_in_client_order_whatever_came_first(desk: Desk) -> None:
    for client, value in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        assert desk.update(client, value) == "stored"
    assert desk.accepted() == [(1.0, 1), (2.0, 2), (3.0, 3)]
    assert desk.intake.answered


def test_chunks_in_any_order_and_twice_make_the_same_update(desk: Desk) -> None:
    blob = blob_of("a", 1.0)
    offer = offer_of("a", blob)
    desk.intake.offered(offer, BEGAN)
    packets = pieces(offer, blob)
    assert len(packets) == 3
    for packet in (packets[2], packets[0], packets[2], packets[0], packets[1]):
        desk.intake.data("a", parse_chunk(RUN, packet), BEGAN)
    assert isinstance(desk.last("a"), Done)
    # the first has 960 bytes, the last what is left of the blob; each came once too often
    assert desk.intake.retransmitted_bytes == 960 + len(blob) - 2 * 960
    assert desk.accepted() == [(1.0, 1)]


def test_an_interrupted_upload_goes_on_with_what_is_missing(desk: Desk) -> None:
    blob = blob_of("a", 1.0)
    offer = offer_of("a", blob)
    desk.intake.offered(offer, BEGAN)
    desk.intake.data("a", parse_chunk(RUN, pieces(offer, blob)[1]), BEGAN)
    desk.intake.offered(offer, BEGAN + 30)
    grant = desk.last("a")
    assert isinstance(grant, Grant)
    assert Missing.from_bitmap(grant.missing, 3).indices == {0, 2}


# -- what is wrong --------------------------------------------------------------------------------


def by_hand(offer_client: str, tensors: dict[str, tuple[tuple[int, ...], bytes]]) -> bytes:
    """Return a safetensors file of float32 tensors, written without the codec."""
    places: dict[str, Any] = {"__metadata__": {"pwff": header(offer_client).model_dump_json()}}
    body = b""
    for name, (shape, content) in tensors.items():
        end = len(body) + len(content)
        places[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), end]}
        body += content
    head = json.dumps(places).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + body


PACKED = ((LAYOUT.size,), constant(1.0).tobytes())


def test_an_update_written_by_hand_is_as_good_as_the_codecs(desk: Desk) -> None:
    blob = by_hand("a", {"packed": PACKED})
    assert isinstance(desk.bring(offer_of("a", blob), blob), Done)
    assert desk.accepted() == [(1.0, 1)]


@pytest.mark.parametrize("beside", [True, False], ids=["beside the update", "instead of it"])
def test_a_personal_tensor_of_a_lying_client_is_refused_by_name_and_counted(
    beside: bool, desk: Desk
) -> None:
    secret = np.full((2, 8), 7.0, np.float32)
    blob = by_hand(
        "a", {**({"packed": PACKED} if beside else {}), LORA: (secret.shape, secret.tobytes())}
    )
    answer = desk.bring(offer_of("a", blob), blob)
    assert isinstance(answer, Reject)
    assert answer.code == "name"
    assert (LORA if beside else "tensor '") in answer.reason
    assert desk.intake.refused == {"name": 1}
    assert [fields["code"] for event, fields in desk.told if event == "refused"] == ["name"]
    assert desk.round.status("a") == "rejected"
    assert desk.intake.reasons["a"].startswith("name: ")
    desk.intake.passed(BEGAN + 1000)
    assert desk.accepted() == []
    assert list(desk.spool.path("a").parent.iterdir()) == []  # nothing of it stays on the disk


def with_value(value: float) -> bytes:
    vector = constant(1.0)
    vector[17] = value
    return encode_blob(vector, LAYOUT, header("a"))


@pytest.mark.parametrize(
    ("blob", "code"),
    [
        (with_value(np.nan), "finite"),
        (with_value(np.inf), "finite"),
        (with_value(2e6), "range"),
        (with_value(-3e38), "range"),
        (blob_of("a", 1.0, examples=1000), "examples"),
        (blob_of("b", 1.0), "identity"),
        (blob_of("a", 1.0, run="another"), "identity"),
        (blob_of("a", 1.0, round=2), "identity"),
        (blob_of("a", 1.0, layout="0" * 64), "layout"),
        (encode_blob(constant(1.0), LAYOUT, header("a", codec="int8")), "identity"),
        (by_hand("a", {"packed": ((LAYOUT.size - 1,), PACKED[1][4:])}), "shape"),
        (by_hand("a", {"packed": ((2, LAYOUT.size // 2), PACKED[1])}), "shape"),
        (b"\x80\x04\x95 a pickle, perhaps", "format"),
        (b"x", "format"),
        (struct.pack("<Q", 2**60) + b"{}", "format"),
    ],
    ids=[
        "not a number", "infinite", "large", "overflow", "weight", "another client's",
        "another run's", "another round's", "layout", "codec", "short", "shape", "no safetensors",
        "tiny", "header beyond the end",
    ],
)  # fmt: skip
def test_what_is_no_update_of_this_client_and_round_is_refused_when_it_is_whole(
    blob: bytes, code: str, desk: Desk
) -> None:
    answer = desk.bring(offer_of("a", blob), blob)
    assert isinstance(answer, Reject)
    assert answer.code == code
    assert desk.intake.refused == {code: 1}
    assert desk.round.status("a") == "rejected"
    assert "a" not in desk.intake.contributions


def test_a_client_without_examples_has_no_weight(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "1", weights={"a": 0})
    blob = blob_of("a", 1.0, examples=0)
    answer = desk.bring(offer_of("a", blob), blob)
    assert isinstance(answer, Reject)
    assert answer.code == "examples"


def test_pieces_that_thrice_do_not_make_the_blob_are_refused(desk: Desk) -> None:
    blob, other = blob_of("a", 1.0), blob_of("a", 2.0)
    offer = offer_of("a", blob)
    desk.intake.offered(offer, BEGAN)
    for _ in range(3):
        assert isinstance(desk.last("a"), Grant)
        assert desk.round.status("a") == "lost"  # it is waited for: who sent them is not known
        for packet in pieces(offer, other):
            desk.intake.data("a", parse_chunk(RUN, packet), BEGAN)
    answer = desk.last("a")
    assert isinstance(answer, Reject)
    assert answer.code == "hash"
    assert desk.intake.refused == {"hash": 1}
    assert desk.round.status("a") == "rejected"
    assert desk.update("a") == "stored"  # and it may send them again, right


OFFERED = blob_of("a", 1.0)


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"binding": "0" * 64}, "base", "base"),
        ({"layout": "0" * 64}, "layout", "tensors"),
        ({"codec": "int8"}, "codec", "int8"),
        ({"round": 2}, "round", "asked"),
        ({"bytes": 2**33, "chunk_bytes": 268_435_455, "chunks": 33}, "size", "8589934592"),
        ({"bytes": 18_209, "chunks": 19}, "size", "18209"),  # 16,384 + 4*456 and one
        ({"chunks": 4}, "chunk", "4 chunks"),
    ],
    ids=["base", "layout", "codec", "round", "huge", "a little too large", "chunks"],
)
def test_an_offer_that_does_not_fit_is_refused_before_a_byte_is_taken(
    changes: dict[str, Any], code: str, word: str, desk: Desk
) -> None:
    offer = offer_of("a", OFFERED, **changes)
    with pytest.raises(ProtocolError, match=word) as refusal:
        desk.intake.offered(offer, BEGAN)
    assert refusal.value.code == code
    answer = desk.last("a")
    assert isinstance(answer, Reject)
    assert (answer.code, answer.blob) == (code, offer.blob)
    with pytest.raises(ProtocolError) as chunk:
        desk.intake.data("a", parse_chunk(RUN, pieces(offer_of("a", OFFERED), OFFERED)[0]), BEGAN)
    assert chunk.value.code == "grant"
    assert list(desk.spool.path("a").parent.iterdir()) == []
    assert desk.round.status("a") == ("lost" if code == "round" else "rejected")


def test_the_largest_update_that_fits_is_not_too_large(desk: Desk) -> None:
    # 456 float32 and a header that says as much as it may
    blob = blob_of("a", 1.0)
    assert len(blob) < 16_384 + 4 * 456
    desk.intake.offered(offer_of("a", blob, bytes=16_384 + 4 * 456, chunks=19), BEGAN)
    assert isinstance(desk.last("a"), Grant)


def test_a_client_that_is_not_asked_is_refused(desk: Desk) -> None:
    blob = blob_of("x", 1.0)
    with pytest.raises(ProtocolError, match="'x'") as refusal:
        desk.intake.offered(offer_of("x", blob), BEGAN)
    assert refusal.value.code == "round"
    assert "x" not in desk.intake.reasons


def test_a_chunk_counts_for_the_client_that_was_granted_it(desk: Desk) -> None:
    blob = blob_of("a", 1.0)
    offer = offer_of("a", blob)
    desk.intake.offered(offer, BEGAN)
    for packet in pieces(offer, blob):
        with pytest.raises(ProtocolError) as refusal:
            desk.intake.data("b", parse_chunk(RUN, packet), BEGAN)
        assert refusal.value.code == "grant"
    assert desk.round.status("a") == "lost"


def test_an_update_of_an_earlier_round_is_late_and_counted_as_that(desk: Desk) -> None:
    blob = blob_of("a", 1.0, round=0)
    with pytest.raises(ProtocolError) as refusal:
        desk.intake.offered(offer_of("a", blob, round=0), BEGAN)
    assert refusal.value.code == "late"
    answer = desk.last("a")
    assert isinstance(answer, Done)
    assert answer.status == "late"
    assert desk.round.status("a") == "lost"  # its update of this round may still come
    assert desk.update("a") == "stored"


def test_a_disk_that_is_full_ends_the_round_and_not_in_silence(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(100, 97, 3))
    with pytest.raises(SpoolFullError, match="3 bytes free"):
        desk.bring(offer_of("a", OFFERED), OFFERED)


# -- devices that hold only the first LoRA modules ------------------------------------------------

#: 36 LoRA modules of 2*(8 + 8) = 32 parameters.
ALL = stage_layout(
    "instruction",
    METHODS["fedlora-own"],
    ModuleShape(
        base=BaseShape(layers=12, width=8, inner=32),
        adapter_size=4,
        placement="qkv",
        lora_rank=2,
    ),
)
TWELVE = own_layout(ALL, 12)


@pytest.fixture
def mixed(tmp_path: Path) -> Iterator[Desk]:
    """Yield a desk whose client a said that it has 12 modules, and b and c 36."""
    desk = Desk(tmp_path / "1", layout=ALL, own={"a": TWELVE})
    yield desk
    desk.intake.close()


def lora_update(
    client: str, held: Layout, *, blob_says: Layout, offer_says: Layout
) -> tuple[Offer, bytes]:
    """Return an update of the tensors in ``held``, and what blob and offer call it."""
    said = header(client, examples=WEIGHTS[client], layout=blob_says.sha256)
    blob = encode_blob(constant(1.0, held), held, said)
    return offer_of(client, blob, layout=offer_says.sha256), blob


def test_each_device_sends_what_it_holds_and_is_counted_with_that(mixed: Desk) -> None:
    for client, own in (("a", TWELVE), ("b", ALL)):
        answer = mixed.bring(*lora_update(client, own, blob_says=own, offer_says=own))
        assert isinstance(answer, Done)
    assert [vector.size for vector, _ in mixed.intake.accepted_updates()] == [12 * 32, 36 * 32]
    given = mixed.intake.contributions
    assert (given["a"].parameters, given["b"].parameters) == (12 * 32, 36 * 32)


@pytest.mark.parametrize(
    ("client", "sent"),
    [("a", ALL), ("b", TWELVE), ("a", own_layout(ALL, 11)), ("a", own_layout(ALL, 13))],
    ids=["12 said and 36 sent", "36 said and 12 sent", "11 sent", "13 sent"],
)
def test_an_update_of_other_modules_than_the_device_said_is_refused_before_a_byte_is_taken(
    client: str, sent: Layout, mixed: Desk
) -> None:
    offer, _ = lora_update(client, sent, blob_says=sent, offer_says=sent)
    with pytest.raises(ProtocolError) as refusal:
        mixed.intake.offered(offer, BEGAN)
    assert refusal.value.code == "layout"
    answer = mixed.last(client)
    assert isinstance(answer, Reject)
    assert answer.code == "layout"
    assert mixed.round.status(client) == "rejected"


@pytest.mark.parametrize(
    ("client", "said", "sent"),
    [("a", TWELVE, ALL), ("b", ALL, TWELVE)],
    ids=["12 said and 36 sent", "36 said and 12 sent"],
)
@pytest.mark.parametrize("code", ["layout", "shape"], ids=["offer lies", "offer and blob lie"])
def test_an_update_that_lies_about_its_modules_is_refused_when_it_is_whole(
    client: str, said: Layout, sent: Layout, code: str, mixed: Desk
) -> None:
    blob_says = said if code == "shape" else sent
    answer = mixed.bring(*lora_update(client, sent, blob_says=blob_says, offer_says=said))
    assert isinstance(answer, Reject)
    assert answer.code == code
    assert mixed.intake.refused == {code: 1}
    assert list(mixed.intake.accepted_updates()) == []


def test_a_device_that_holds_less_may_offer_less(mixed: Desk) -> None:
    # 16,384 for the header and four bytes an entry, of its own entries
    offer, _ = lora_update("a", TWELVE, blob_says=TWELVE, offer_says=TWELVE)
    most = 16_384 + 4 * 12 * 32
    with pytest.raises(ProtocolError, match=f"at most {most}") as refusal:
        mixed.intake.offered(offer.model_copy(update={"bytes": most + 1, "chunks": 19}), BEGAN)
    assert refusal.value.code == "size"


def test_after_a_restart_each_kept_update_is_read_in_its_devices_layout(
    mixed: Desk, tmp_path: Path
) -> None:
    mixed.bring(*lora_update("a", TWELVE, blob_says=TWELVE, offer_says=TWELVE))
    mixed.intake.close()
    again = Desk(tmp_path / "1", layout=ALL, own={"a": TWELVE})
    again.intake.restore()
    assert [vector.size for vector, _ in again.intake.accepted_updates()] == [12 * 32]
    grown = Desk(tmp_path / "1", layout=ALL)  # it says 36 now: what it sent then is another's
    grown.intake.restore()
    assert grown.intake.contributions == {}


# -- what comes twice -----------------------------------------------------------------------------


def test_an_update_offered_again_is_done_at_once_and_changes_nothing(desk: Desk) -> None:
    desk.update("a", 1.0)
    before = desk.intake.contributions["a"]
    assert desk.update("a", 1.0, costs=Costs(uplink_seconds=99.0)) == "stored"
    assert desk.intake.contributions["a"] is before
    assert [m for to, m in desk.sent if to == "a" and isinstance(m, Grant)] == [desk.sent[0][1]]
    assert desk.accepted() == [(1.0, 1)]
    assert desk.intake.retransmitted_bytes == 0


def test_while_the_round_is_open_a_client_may_give_another_update_in_its_place(
    desk: Desk,
) -> None:
    """A device that was started again may have trained anew; DONE is about what will count."""
    desk.update("a", 1.0)
    assert desk.update("a", 2.0) == "stored"
    assert desk.round.closed_at is None  # it is one client still
    desk.update("b", 5.0)
    desk.update("c", 6.0)
    assert desk.accepted() == [(2.0, 1), (5.0, 2), (6.0, 3)]


def test_once_the_round_is_closed_another_update_changes_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "1", quorum=0.5)
    desk.update("a", 1.0)
    under_way = blob_of("a", 2.0)
    offer = offer_of("a", under_way)
    desk.intake.offered(offer, BEGAN + 2)
    desk.update("b", 5.0)
    assert desk.round.closed_at == 1.0
    before = desk.intake.contributions["a"]
    for packet in pieces(offer, under_way):
        desk.intake.data("a", parse_chunk(RUN, packet), BEGAN + 3)
    answer = desk.last("a")
    assert isinstance(answer, Done)
    assert answer.status == "late"
    assert desk.update("a", 3.0, at=BEGAN + 4) == "late"
    assert desk.accepted() == [(1.0, 1), (5.0, 2)]
    assert desk.intake.contributions["a"] is before
    assert desk.round.status("a") == "aggregated"


@pytest.mark.parametrize("virtual_time", [False, True])
def test_nonsense_after_an_update_takes_nothing_back(virtual_time: bool, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "1", virtual_time=virtual_time)
    desk.update("a", 1.0)
    with pytest.raises(ProtocolError):
        desk.intake.offered(offer_of("a", with_value(3.0), binding="0" * 64), BEGAN)
    bad = with_value(np.nan)
    assert isinstance(desk.bring(offer_of("a", bad), bad), Reject)
    assert desk.intake.reasons == {}
    desk.update("b", 2.0)
    assert not desk.intake.answered  # c has said nothing, whatever a said besides
    assert desk.intake.silent() == ["c"]
    desk.update("c", 3.0)
    assert desk.intake.answered
    desk.intake.settle()
    assert desk.accepted() == [(1.0, 1), (2.0, 2), (3.0, 3)]


# -- time -----------------------------------------------------------------------------------------


def test_in_real_time_an_update_after_the_deadline_is_late_and_left_out(desk: Desk) -> None:
    desk.update("a", 1.0, at=BEGAN + 50)
    under_way = blob_of("b", 2.0, examples=2)
    offer = offer_of("b", under_way)
    desk.intake.offered(offer, BEGAN + 50)
    desk.intake.passed(BEGAN + 50.5)
    assert desk.round.closed_at == 50.0
    for packet in pieces(offer, under_way):
        desk.intake.data("b", parse_chunk(RUN, packet), BEGAN + 51)
    answer = desk.last("b")
    assert isinstance(answer, Done)
    assert answer.status == "late"
    assert desk.update("c", 3.0, at=BEGAN + 52) == "late"
    assert [desk.round.status(c) for c in "abc"] == ["aggregated", "late", "late"]
    assert desk.accepted() == [(1.0, 1)]
    assert desk.update("b", 2.0, at=BEGAN + 53) == "late"  # offered again: the same answer
    assert "c" not in desk.intake.contributions  # not a byte of it was taken


def test_a_wrong_offer_after_the_deadline_is_refused_and_not_late(desk: Desk) -> None:
    desk.intake.passed(BEGAN + 51)
    with pytest.raises(ProtocolError):
        desk.intake.offered(offer_of("a", OFFERED, binding="0" * 64), BEGAN + 52)
    assert isinstance(desk.last("a"), Reject)
    assert desk.round.status("a") == "rejected"


def modelled(compute: float, uplink: float) -> dict[str, Any]:
    return {"costs": Costs(compute_seconds=compute, uplink_seconds=uplink)}


def test_in_virtual_time_updates_arrive_in_the_order_of_their_devices(tmp_path: Path) -> None:
    """Taken c, b, a; modelled b at 3 s, c at 5 s, a at 9 s. Two of three are asked for."""
    desk = Desk(tmp_path / "1", virtual_time=True, quorum=0.6)
    assert desk.update("c", 3.0, at=BEGAN + 1, **modelled(4.0, 1.0)) == "stored"
    assert desk.update("b", 2.0, at=BEGAN + 2, **modelled(1.0, 2.0)) == "stored"
    assert desk.round.closed_at is None
    assert desk.update("a", 1.0, at=BEGAN + 900, **modelled(0.0, 9.0)) == "stored"
    assert desk.intake.answered
    desk.intake.settle()
    assert desk.accepted() == [(2.0, 2), (3.0, 3)]
    assert desk.round.closed_at == 5.0
    assert desk.round.status("a") == "late"


@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
def test_in_virtual_time_a_tie_goes_to_the_first_in_client_order(
    order: str, tmp_path: Path
) -> None:
    desk = Desk(tmp_path / "1", virtual_time=True, quorum=0.6)
    for client in order:
        desk.update(client, 1.0, **modelled(2.0, 2.0))
    desk.intake.settle()
    assert desk.round.accepted == ["a", "b"]


def test_in_virtual_time_the_deadline_is_the_devices_own(virtual: Desk) -> None:
    virtual.update("a", 1.0, at=BEGAN + 10_000, **modelled(49.0, 1.0))  # at 50, to the second
    virtual.update("b", 1.0, at=BEGAN + 1, **modelled(50.0, 0.5))
    virtual.update("c", 1.0, at=BEGAN + 2, **modelled(1.0, 1.0))
    virtual.intake.settle()
    assert virtual.round.accepted == ["a", "c"]
    assert virtual.round.status("b") == "late"
    assert virtual.round.closed_at == 50.0


def test_in_virtual_time_a_refused_client_has_answered_and_is_not_waited_for(
    virtual: Desk,
) -> None:
    bad = with_value(np.nan)
    virtual.bring(offer_of("a", bad), bad)
    virtual.update("b", 2.0, **modelled(1.0, 1.0))
    assert virtual.intake.silent() == ["c"]
    virtual.update("c", 3.0, **modelled(5.0, 1.0))
    assert virtual.intake.answered
    virtual.intake.settle()
    assert virtual.round.closed_at == 6.0
    assert [virtual.round.status(c) for c in "abc"] == ["rejected", "aggregated", "aggregated"]


def test_in_virtual_time_a_settled_round_is_over_whoever_is_missing(virtual: Desk) -> None:
    virtual.update("a", 1.0, **modelled(1.0, 1.0))
    virtual.intake.settle()
    assert virtual.round.closed_at == 50.0
    assert [virtual.round.status(c) for c in "abc"] == ["aggregated", "lost", "lost"]


def test_in_virtual_time_nothing_counts_once_the_round_is_settled(virtual: Desk) -> None:
    for client in "bc":
        virtual.update(client, 1.0, **modelled(1.0, 1.0))
    bad = with_value(np.nan)
    virtual.bring(offer_of("a", bad), bad)
    virtual.intake.settle()
    assert virtual.update("a", 9.0) == "late"
    assert virtual.round.status("a") == "rejected"
    assert virtual.accepted() == [(1.0, 2), (1.0, 3)]


# -- grants ---------------------------------------------------------------------------------------


def test_the_grant_of_a_silent_client_goes_to_the_next(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "1", limits=UploadLimits(grants=1, window=8, expiry_seconds=30.0))
    blobs = {client: blob_of(client, 1.0, examples=WEIGHTS[client]) for client in "ab"}
    for client, blob in blobs.items():
        desk.intake.offered(offer_of(client, blob), BEGAN)
    assert [to for to, m in desk.sent if isinstance(m, Grant)] == ["a"]
    desk.intake.expire(BEGAN + 29)
    assert [to for to, m in desk.sent if isinstance(m, Grant)] == ["a"]
    desk.intake.expire(BEGAN + 30)
    assert [to for to, m in desk.sent if isinstance(m, Grant)] == ["a", "b"]
    assert desk.update("b") == "stored"
    assert desk.update("a") == "stored"


# -- a run that was broken off --------------------------------------------------------------------


def test_what_was_acknowledged_counts_after_a_restart(tmp_path: Path) -> None:
    first = Desk(tmp_path / "1")
    first.update("b", 2.0, costs=Costs(uplink_seconds=4.0))
    half = blob_of("a", 1.0)
    offer = offer_of("a", half)
    first.intake.offered(offer, BEGAN)
    first.intake.data("a", parse_chunk(RUN, pieces(offer, half)[0]), BEGAN)
    first.intake.close()

    again = Desk(tmp_path / "1")
    again.intake.restore()
    assert again.round.accepted == ["b"]
    assert again.intake.contributions["b"].costs.uplink_seconds == 4.0
    assert again.update("b", 2.0) == "stored"  # said again, as often as it is asked
    again.update("a", 1.0)
    again.update("c", 3.0)
    assert again.accepted() == [(1.0, 1), (2.0, 2), (3.0, 3)]


def test_an_upload_that_a_restart_broke_off_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    blob = blob_of("a", 1.0)
    offer = offer_of("a", blob)
    first = Desk(tmp_path / "1")
    first.intake.offered(offer, BEGAN)
    first.intake.data("a", parse_chunk(RUN, pieces(offer, blob)[1]), BEGAN)
    again = Desk(tmp_path / "1")  # nobody closed the first
    again.intake.offered(offer, BEGAN)
    grant = again.last("a")
    assert isinstance(grant, Grant)
    assert Missing.from_bitmap(grant.missing, 3).indices == {0, 2}
    for index in (0, 2):
        again.intake.data("a", parse_chunk(RUN, pieces(offer, blob)[index]), BEGAN)
    assert isinstance(again.last("a"), Done)
    assert again.accepted() == [(1.0, 1)]
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["a.json", "a.safetensors"]


def test_pieces_of_another_update_are_of_no_use_to_one(tmp_path: Path) -> None:
    first, second = blob_of("a", 1.0), blob_of("a", 2.0)
    before = Desk(tmp_path / "1")
    before.intake.offered(offer_of("a", first), BEGAN)
    before.intake.data("a", parse_chunk(RUN, pieces(offer_of("a", first), first)[1]), BEGAN)
    again = Desk(tmp_path / "1")
    again.intake.offered(offer_of("a", second), BEGAN)
    grant = again.last("a")
    assert isinstance(grant, Grant)
    assert Missing.from_bitmap(grant.missing, 3).indices == {0, 1, 2}
    assert again.update("a", 2.0) == "stored"
    assert again.accepted() == [(2.0, 1)]


def test_the_accepted_set_that_was_recorded_wins_over_the_order_after_a_restart(
    tmp_path: Path,
) -> None:
    first = Desk(tmp_path / "1", quorum=0.6)
    for client, at in (("c", 1), ("b", 2), ("a", 3)):
        blob = blob_of(client, 1.0, examples=WEIGHTS[client])
        first.intake.offered(offer_of(client, blob), BEGAN)
        for packet in pieces(offer_of(client, blob), blob):
            first.intake.data(client, parse_chunk(RUN, packet), BEGAN + at)
        if client == "b":
            # a was granted before the round closed, so that it lies in the spool as well
            assert first.round.closed_at == 2.0
            assert first.update("a", 1.0, at=BEGAN + 3) == "late"
            first.spool.partial_path("a").unlink(missing_ok=True)
            break
    assert first.round.accepted == ["b", "c"]
    again = Desk(tmp_path / "1", quorum=0.6)
    again.round.recorded(first.round.accepted, 2.0)
    again.intake.restore()
    assert again.accepted() == [(1.0, 2), (1.0, 3)]
    assert again.update("a", 1.0) == "late"
    assert again.round.closed_at == 2.0


# -- devices that vanish --------------------------------------------------------------------------


def test_a_device_that_vanished_is_replaced_and_the_other_ones_update_counts(desk: Desk) -> None:
    desk.intake.lost("c", BEGAN + 5)
    assert desk.intake.vacancies(BEGAN + 5) == ["c"]
    one = Client(examples=7, layout=LAYOUT)
    assert desk.intake.invited("d", one, BEGAN + 6) == "c"
    assert desk.intake.vacancies(BEGAN + 6) == []
    desk.update("a")
    desk.update("b")
    blob = blob_of("d", 4.0, examples=7)
    assert isinstance(desk.bring(offer_of("d", blob), blob, at=BEGAN + 9), Done)
    assert desk.round.closed_at == 9.0
    assert desk.accepted() == [(1.0, 1), (1.0, 2), (4.0, 7)]
    assert desk.round.status("c") == "lost"
    assert desk.intake.reasons["c"].endswith("'d' was asked in its place")
    with pytest.raises(ValueError, match="no place is free for 'e'"):
        desk.intake.invited("e", one, BEGAN + 9)


def test_a_device_that_speaks_again_needs_no_replacement(desk: Desk) -> None:
    desk.intake.lost("a", BEGAN + 5)
    desk.intake.offered(offer_of("a", OFFERED), BEGAN + 6)
    assert desk.intake.vacancies(BEGAN + 6) == []


def test_in_virtual_time_nobody_vanishes(virtual: Desk) -> None:
    virtual.intake.lost("a", BEGAN + 5)
    assert virtual.intake.vacancies(BEGAN + 5) == []


def test_in_virtual_time_a_restored_update_arrives_at_its_devices_time(tmp_path: Path) -> None:
    first = Desk(tmp_path / "1", virtual_time=True)
    first.update("a", 1.0, **modelled(50.0, 9.0))
    again = Desk(tmp_path / "1", virtual_time=True)
    again.intake.restore()
    again.update("b", 1.0)
    again.update("c", 1.0)
    again.intake.settle()
    assert again.round.accepted == ["b", "c"]
    assert again.round.status("a") == "late"


def test_an_update_that_no_longer_fits_the_run_is_not_restored(tmp_path: Path) -> None:
    Desk(tmp_path / "1").update("a", 1.0)
    again = Desk(tmp_path / "1", codec="int8")
    again.intake.restore()
    assert again.intake.contributions == {}
    assert again.round.status("a") == "lost"  # it is asked for again


def test_closed_the_intake_keeps_what_was_acknowledged_and_what_was_under_way(
    desk: Desk,
) -> None:
    desk.update("a", 1.0)
    blob = blob_of("b", 2.0, examples=2)
    offer = offer_of("b", blob)
    desk.intake.offered(offer, BEGAN)
    desk.intake.data("b", parse_chunk(RUN, pieces(offer, blob)[0]), BEGAN)
    folder = desk.spool.path("a").parent
    assert (folder / "b.part").exists()
    desk.intake.close()
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.json",
        "a.safetensors",
        "b.part",
    ]
    desk.intake.clear()
    assert not folder.exists()


# -- methods that share nothing -------------------------------------------------------------------


def report(client: str, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "run": RUN,
        "client": client,
        "session": SESSION,
        "round": 1,
        "phase": "train",
        "examples": 1,
        "train_loss": 2.5,
        "costs": Costs(compute_seconds=3.0),
    }
    return Report(**{**fields, **changes})


def test_where_nothing_is_shared_a_report_is_the_contribution(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "1", virtual_time=True, layout=NOTHING)
    desk.intake.reported(report("a"), BEGAN)
    desk.intake.reported(report("a", train_loss=9.0), BEGAN)  # said twice, it counts once
    assert desk.intake.contributions["a"].train_loss == 2.5
    assert desk.intake.contributions["a"].offer is None
    assert desk.intake.contributions["a"].parameters == 0
    assert not desk.intake.answered
    for client in "bc":
        desk.intake.reported(report(client), BEGAN)
    desk.intake.settle()
    assert desk.round.accepted == ["a", "b", "c"]
    assert desk.round.closed_at == 3.0


def test_a_report_is_no_update_where_one_is_asked_for(desk: Desk) -> None:
    with pytest.raises(ProtocolError, match="where an update is asked for"):
        desk.intake.reported(report("a"), BEGAN)
    assert desk.intake.contributions == {}


def test_a_report_of_a_client_that_is_not_asked_is_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "1", layout=NOTHING)
    with pytest.raises(ProtocolError):
        desk.intake.reported(report("x"), BEGAN)


def test_a_blob_is_named_by_its_content(desk: Desk) -> None:
    """The hash in DONE is of the bytes on disk, so a device can forget exactly those."""
    blob = blob_of("a", 1.0)
    answer = desk.bring(offer_of("a", blob), blob)
    assert isinstance(answer, Done)
    assert hashlib.sha256(desk.spool.path("a").read_bytes()).hexdigest() == answer.blob


# -- on the air -----------------------------------------------------------------------------------


def test_an_update_that_is_lost_on_the_air_does_not_count(virtual: Desk) -> None:
    virtual.update("a", costs=Costs(uplink_seconds=1.0))
    virtual.update("b", costs=Costs(uplink_seconds=2.0, lost=True))
    virtual.intake.settle()
    assert virtual.round.accepted == ["a"]
    assert virtual.round.status("b") == "lost"
    assert virtual.intake.reasons["b"] == "outage: lost on the air"
    assert virtual.intake.contributions["b"].costs.uplink_seconds == 2.0  # spent all the same


def test_a_client_waits_from_its_own_arrival_to_the_end_of_the_round(virtual: Desk) -> None:
    virtual.update("a", costs=Costs(compute_seconds=1.0, uplink_seconds=2.0))
    virtual.update("b", costs=Costs(compute_seconds=4.0, uplink_seconds=6.0))
    virtual.update("c", costs=Costs(compute_seconds=70.0))  # after the deadline of 50 s
    virtual.intake.settle()
    waited = {client: virtual.intake.waited(client) for client in "abc"}
    assert waited == {"a": 47.0, "b": 40.0, "c": 0.0}
