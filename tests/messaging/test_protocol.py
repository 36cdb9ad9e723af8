"""What is decoded is in bounds, and what is not in bounds is a ProtocolError and nothing else."""

from __future__ import annotations

import json
import pickle
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from messaging import protocol, topics
from messaging.chunks import MAX_CHUNKS
from messaging.errors import PrivateTensorError, ProtocolError
from messaging.protocol import (
    MAX_MESSAGE_BYTES,
    Channel,
    Costs,
    DeviceRecord,
    Done,
    Grant,
    Have,
    Hello,
    Manifest,
    Message,
    Offer,
    Preference,
    Reject,
    Report,
    StateRef,
    Task,
    Want,
    decode,
    encode,
)

HASH = "0123456789abcdef" * 4
SESSION = "00000000000000ff"
STATE = StateRef(round=3, blob=HASH, bytes=2_323_872, chunk_bytes=122_880, chunks=19)
DEVICE = DeviceRecord(
    id="pi5-07",
    profile="raspberry-pi-5-8gb",
    lora_count=12,
    lora_rank=96,
    lora_rank_rule="proportional",
    adapter_count=36,
    adapter_size=10,
    placement="qkv",
    precision="fp32",
    threads=1,
    base_bytes=498_000_000,
    examples=100,
    held_out_examples=20,
    categories={"open_qa": 70, "summarisation": 30},
    trainable_parameters=1,
    shared_parameters=580_968,
    preference=Preference(helpfulness=0.25, harmlessness=0.75),
    channel=Channel(
        snr_db=5.0,
        bandwidth_hz=1e6,
        transmit_watts=1.0,
        fading="rayleigh",
        coherence_seconds=0.01,
    ),
    costs="modelled",
)
UP: dict[str, Any] = {"run": "night-1", "client": "pi5-07", "session": SESSION}
DOWN: dict[str, Any] = {"run": "night-1", "client": "pi5-07"}
MESSAGES: list[Message] = [
    Hello(**UP, online=True, binding=HASH, layout=HASH, device=DEVICE),
    Hello(**UP, online=False, binding=HASH, layout=HASH),
    Offer(
        **UP,
        round=3,
        blob=HASH,
        bytes=2_323_872,
        chunk_bytes=122_880,
        chunks=19,
        binding=HASH,
        layout=HASH,
        codec="int8",
        costs=Costs(compute_joules=1.5),
    ),
    Want(**UP, blob=HASH, missing="ff01"),
    Report(**UP, round=3, phase="evaluate", examples=20, eval_accuracy=0.5, costs=Costs()),
    Task(**DOWN, work="train", stage="instruction", round=3, state=STATE, seed=7, local_steps=10),
    Grant(**DOWN, blob=HASH, missing="ff01", window=8, expiry_seconds=30.0),
    Have(**DOWN, blob=HASH, missing=""),
    Done(**DOWN, blob=HASH, status="stored"),
    Reject(**DOWN, blob=None, code="hash", reason="the pieces do not make the blob"),
    Manifest(
        run="night-1",
        session="0" * 16,
        method="pwff",
        stage="reward",
        state=STATE,
        binding=HASH,
        layout=HASH,
    ),
]
VALID = [json.loads(encode(message)) for message in MESSAGES]
HELLO, OFFER, WANT = VALID[0], VALID[2], VALID[3]


def changed(record: dict[str, Any], path: str, value: Any) -> bytes:
    """Return a copy of ``record`` as JSON with ``value`` at the dotted ``path``."""
    copy = json.loads(json.dumps(record))
    place = copy
    *above, last = path.split(".")
    for part in above:
        place = place[part]
    place[last] = value
    return json.dumps(copy).encode()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.kind)
def test_a_message_survives_the_way_through_json(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("record", VALID, ids=lambda r: r["kind"])
def test_json_names_schema_and_kind(record: dict[str, Any]) -> None:
    assert record["schema"] == 1
    assert record["kind"].isupper()
    assert "schema_" not in record


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"{",
        b'"HELLO"',
        b"\xff\xfe",
        b"\x00" * 100,
        b'{"kind": "HELLO"}',
        b'{"kind": {"HELLO": 1}}',
        b"[" * 60_000,
        b'{"kind":' * 8_000,
        b'{"kind": "HELLO", "run": "\\ud800"}',
        json.dumps(HELLO).encode("utf-16"),
        json.dumps(HELLO).encode() + b"{}",
        changed(HELLO, "kind", "GOODBYE"),
        changed(HELLO, "kind", "hello"),
        changed(HELLO, "kind", "TASK"),
        changed(HELLO, "schema", 0),
        changed(HELLO, "schema", 1001),
        changed(HELLO, "schema", "2"),
        changed(HELLO, "schema_", 1),
        changed(HELLO, "extra", 1),
        changed(HELLO, "device.extra", 1),
        changed(HELLO, "online", 1),
        changed(HELLO, "online", "true"),
        changed(HELLO, "session", "0" * 15),
        changed(HELLO, "device.threads", 0),
        changed(HELLO, "device.threads", True),
        changed(HELLO, "device.threads", "1"),
        changed(HELLO, "device.threads", 1.0),
        changed(HELLO, "device.examples", -1),
        changed(HELLO, "device.examples", 10**400),
        changed(HELLO, "device.categories", {str(i): 1 for i in range(65)}),
        changed(HELLO, "device.categories", {"x" * 201: 1}),
        changed(HELLO, "device.preference.helpfulness", 0.5),
        changed(HELLO, "device.channel", None),
        changed(OFFER, "blob", HASH.upper()),
        changed(OFFER, "blob", HASH + "\n"),
        changed(OFFER, "blob", HASH[:-1]),
        changed(OFFER, "bytes", 0),
        changed(OFFER, "chunk_bytes", 64),
        changed(OFFER, "chunks", MAX_CHUNKS + 1),
        changed(OFFER, "codec", "pickle"),
        changed(OFFER, "costs.uplink_joules", -0.1),
        changed(WANT, "missing", "f"),
        changed(WANT, "missing", "FF"),
        changed(WANT, "missing", "00" * (MAX_CHUNKS // 8 + 1)),
        changed(VALID[5], "state.chunks", 18),
        changed(VALID[6], "window", 0),
        changed(VALID[9], "reason", "x" * 401),
    ],
    ids=lambda _payload: "payload",
)
def test_what_does_not_follow_the_schema_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(payload)
    assert caught.value.code == "schema"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("record", "path"),
    [
        (HELLO, "device.channel.snr_db"),
        (HELLO, "device.channel.bandwidth_hz"),
        (HELLO, "device.preference.helpfulness"),
        (OFFER, "costs.compute_seconds"),
        (VALID[4], "train_loss"),
        (VALID[5], "learning_rate"),
        (VALID[6], "expiry_seconds"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(
    record: dict[str, Any], path: str, constant: str
) -> None:
    payload = changed(record, path, "@").replace(b'"@"', constant.encode())
    with pytest.raises(ProtocolError):
        decode(payload)


@pytest.mark.parametrize(
    "identifier",
    [
        "",
        ".",
        "..",
        "../x",
        "..\\x",
        "a/b",
        "/a",
        "a/",
        "~",
        "-a",
        "a-",
        ".a",
        "a.",
        "Upper",
        "a b",
        "a\n",
        "a\x00b",
        "+",
        "#",
        "a+b",
        "$SYS",
        "é",
        "ａ",  # noqa: RUF001 (full-width letter, on purpose)
        "x" * 65,
    ],
)
@pytest.mark.parametrize("field", ["run", "client", "device.id"])
def test_an_identifier_that_could_leave_its_folder_or_topic_is_refused(
    field: str, identifier: str
) -> None:
    with pytest.raises(ProtocolError):
        decode(changed(HELLO, field, identifier))


@given(st.text(alphabet="a0.-_/\\+#$ ~AZ:é\n\x00", min_size=1, max_size=66))
def test_every_accepted_identifier_is_one_file_name_and_one_topic_level(identifier: str) -> None:
    try:
        client = decode(changed(WANT, "client", identifier)).client  # type: ignore[union-attr]
    except ProtocolError:
        return
    assert PurePosixPath("root", client).parent == PurePosixPath("root")
    assert PureWindowsPath("root", client).parent == PureWindowsPath("root")
    assert client not in (".", "..")
    assert not set(client) & set("+#$/\\\0\n ")
    assert len(client.encode()) <= 64


def of_protocol_2(record: dict[str, Any], **new: Any) -> dict[str, Any]:
    """Return a message as a newer side would say it."""
    return {**record, **new, "schema": 2}


def test_a_message_of_a_newer_protocol_is_read_without_what_is_not_known_here() -> None:
    hello = of_protocol_2(HELLO, colour="red", device={**HELLO["device"], "cores": [1, {"a": 2}]})
    read = decode(json.dumps(hello).encode())
    assert isinstance(read, Hello)
    assert read.schema_ == 2
    assert read.model_copy(update={"schema_": 1}) == MESSAGES[0]


@pytest.mark.parametrize(
    "payload",
    [
        changed(of_protocol_2(HELLO, colour="red"), "epoch", -1),  # what is known has its bounds
        changed(of_protocol_2(HELLO, colour="red"), "online", 1),
        changed(of_protocol_2(HELLO, colour="red"), "kind", "GREETING"),
        changed({**HELLO, "colour": "red"}, "schema", 1),  # nobody of this protocol says that
        json.dumps(of_protocol_2(HELLO, colour="@")).encode().replace(b'"@"', b"9" * 5000),
    ],
    ids=["bound", "type", "kind", "same", "digits"],
)
def test_what_is_wrong_in_a_message_of_a_newer_protocol_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(payload)
    assert caught.value.code == "schema"


def test_a_message_of_a_protocol_that_is_too_old_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "SCHEMA", 3)
    monkeypatch.setattr(protocol, "OLDEST", 2)
    decode(changed(HELLO, "schema", 2))
    with pytest.raises(ProtocolError, match=r"protocol 1, .* understands 2 to 3; update") as caught:
        decode(changed(HELLO, "schema", 1))
    assert caught.value.code == "version"


def test_a_message_of_64_kib_is_read_and_one_byte_more_is_not() -> None:
    message = encode(MESSAGES[0])
    largest = message + b" " * (65_536 - len(message))
    assert decode(largest) == MESSAGES[0]
    with pytest.raises(ProtocolError) as caught:
        decode(largest + b" ")
    assert caught.value.code == "size"
    assert MAX_MESSAGE_BYTES == 65_536


def test_the_largest_upload_fits_in_a_message() -> None:
    bitmap = "ff" * (MAX_CHUNKS // 8)
    assert len(encode(Want(**UP, blob=HASH, missing=bitmap))) < MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    "payload",
    [changed(HELLO, "x" * 60_000, 1), changed(HELLO, "kind", "x" * 60_000)],
    ids=["field", "kind"],
)
def test_a_refusal_is_short_enough_to_be_sent_back(payload: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(payload)
    err = caught.value
    answer = Reject(**DOWN, blob=None, code=err.code, reason=err.reason)
    assert decode(encode(answer)) == answer


def test_a_refusal_names_the_field() -> None:
    with pytest.raises(ProtocolError, match=r"device\.channel\.bandwidth_hz.*greater than 0"):
        decode(changed(HELLO, "device.channel.bandwidth_hz", 0))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_a_message_or_a_protocol_error(payload: bytes) -> None:
    try:
        decode(payload)
        code = "read"
    except ProtocolError as err:
        code = err.code
    assert code in ("read", "schema", "size")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.data(), st.sampled_from(VALID), JSON)
def test_a_message_with_one_field_replaced_is_a_message_or_a_protocol_error(
    data: st.DataObject, record: dict[str, Any], value: Any
) -> None:
    field = data.draw(st.sampled_from(sorted(record)))
    try:
        again = decode(changed(record, field, value))
    except ProtocolError:
        return
    assert decode(encode(again)) == again


@given(st.data(), st.sampled_from(MESSAGES))
def test_a_message_with_one_byte_replaced_is_a_message_or_a_protocol_error(
    data: st.DataObject, message: Message
) -> None:
    payload = bytearray(encode(message))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = decode(bytes(payload))
    except ProtocolError:
        return
    assert decode(encode(again)) == again


def test_a_state_must_have_as_many_chunks_as_its_bytes_make() -> None:
    # pieces of 1024 - 64 = 960 bytes: 1,921 bytes are two full ones and one byte
    assert StateRef(round=0, blob=HASH, bytes=1_921, chunk_bytes=1_024, chunks=3).chunks == 3
    with pytest.raises(ValidationError, match="make 3"):
        StateRef(round=0, blob=HASH, bytes=1_921, chunk_bytes=1_024, chunks=2)


def test_preferences_sum_to_one() -> None:
    assert Preference(helpfulness=0.1 + 0.2, harmlessness=0.7).harmlessness == 0.7
    with pytest.raises(ValidationError, match="must sum to 1"):
        Preference(helpfulness=0.5, harmlessness=0.6)


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        MESSAGES[0].run = "other"  # type: ignore[misc]


@pytest.mark.parametrize("error", [ProtocolError("hash", "why"), PrivateTensorError("why")])
def test_an_error_reaches_another_process_whole(error: ProtocolError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (made in this line)
    assert type(again) is type(error)
    assert (again.code, again.reason, str(again)) == (error.code, "why", "why")


def test_topics_have_at_most_eight_levels_and_name_their_client() -> None:
    up = [
        topics.state("night-1", "pi5-07"),
        topics.control("night-1", "pi5-07"),
        topics.data("night-1", "pi5-07", HASH),
        topics.down("night-1", "pi5-07"),
    ]
    assert all(len(topic.split("/")) <= 8 for topic in up)
    assert [topics.client_of(topic) for topic in up] == ["pi5-07"] * 4
    assert topics.client_of(topics.manifest("night-1")) == ""


@pytest.mark.parametrize("topic", ["", "a", "pwff/v1/r/c", "pwff/v1/r/c/x", "a/b/c/d/e/f"])
def test_no_client_is_read_from_another_topic(topic: str) -> None:
    assert topics.client_of(topic) == ""
