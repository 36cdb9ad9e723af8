"""Sealed messages: what is true passes once, and nothing else does."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messaging.errors import ProtocolError
from messaging.keys import SigningKey, client_key
from messaging.security import SEAL_BYTES, CloudSeal, DeviceSeal, is_will

RUN, A, B = "trial", "pi5-01", "pi5-02"
MASTER = bytes(range(32))
SIGNING = SigningKey(bytes(range(32, 64)))
CLOUD, DEVICE, LATER = "c" * 16, "d" * 16, "e" * 16


def a_cloud(session: str = CLOUD, epoch: int = 1, run: str = RUN) -> CloudSeal:
    return CloudSeal(run, MASTER, SIGNING, session, epoch)


def a_device(
    client: str = A,
    *,
    session: str = DEVICE,
    epoch: int = 1,
    run: str = RUN,
    key: bytes | None = None,
    highest: tuple[int, int] = (0, 0),
) -> DeviceSeal:
    return DeviceSeal(
        run=run,
        client=client,
        key=key or client_key(MASTER, run, client),
        verify_key=SIGNING.verify_key,
        session=session,
        epoch=epoch,
        highest=highest,
    )


def met() -> tuple[CloudSeal, DeviceSeal]:
    """Return both sides after manifest and HELLO."""
    cloud, device = a_cloud(), a_device()
    device.open_manifest(cloud.sign_manifest(b"manifest"))
    assert cloud.open(A, device.seal(b"hello")) == b"hello"
    cloud.greeted(A, DEVICE, 1)
    return cloud, device


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(ProtocolError) as caught:
        act()
    return caught.value.code


def test_both_sides_hear_each_other_after_a_greeting() -> None:
    cloud, device = met()
    for word in (b"one", b"two", b"two"):
        assert cloud.open(A, device.seal(word)) == word
        assert device.open(cloud.seal(A, word)) == word


def test_a_packet_is_what_its_description_says() -> None:
    """The proof is RFC 2104's, computed here by hand: key xor pads, hashed twice."""
    _, device = met()
    packet = device.seal(b"message")
    head = struct.pack(
        ">sBs8s8sQQ", b"S", 1, b"U", bytes.fromhex(DEVICE), bytes.fromhex(CLOUD), 1, 2
    )
    assert packet[: len(head)] == head
    bound = b"pwff seal 1" + b"\x00\x05trial" + b"\x00\x06pi5-01" + head + b"message"
    key = client_key(MASTER, RUN, A).ljust(64, b"\0")
    inner = hashlib.sha256(bytes(k ^ 0x36 for k in key) + bound).digest()
    outer = hashlib.sha256(bytes(k ^ 0x5C for k in key) + inner).digest()
    assert packet[len(head) :] == outer + b"message"
    assert len(head) + 32 == SEAL_BYTES


def test_a_clients_key_is_that_of_hkdf() -> None:
    """RFC 5869 by hand: no salt is 32 zeros; one block is enough for 32 bytes."""
    info = b"pwff client key 1" + b"\x00\x05trial" + b"\x00\x06pi5-01"
    extracted = hmac.digest(bytes(32), MASTER, "sha256")
    assert client_key(MASTER, RUN, A) == hmac.digest(extracted, info + b"\x01", "sha256")


def test_the_same_packet_twice_is_a_replay_and_the_same_message_anew_is_not() -> None:
    cloud, device = met()
    offer = device.seal(b"offer")
    cloud.open(A, offer)
    assert code_of(lambda: cloud.open(A, offer)) == "replay"
    assert cloud.open(A, device.seal(b"offer")) == b"offer"  # a resumed OFFER
    grant = cloud.seal(A, b"grant")
    device.open(grant)
    assert code_of(lambda: device.open(grant)) == "replay"


def test_what_was_overtaken_is_a_replay() -> None:
    cloud, device = met()
    first, second = device.seal(b"1"), device.seal(b"2")
    cloud.open(A, second)
    assert code_of(lambda: cloud.open(A, first)) == "replay"


def test_one_clients_packet_is_not_anothers_nor_another_runs() -> None:
    cloud, device = met()
    packet = device.seal(b"offer")
    assert code_of(lambda: cloud.open(B, packet)) == "mac"
    assert code_of(lambda: a_cloud(run="other").open(A, packet)) == "mac"
    cloud.open(B, _greeting(cloud, B))
    cloud.greeted(B, DEVICE, 1)
    assert code_of(lambda: device.open(cloud.seal(B, b"done"))) == "mac"


def _greeting(cloud: CloudSeal, client: str) -> bytes:
    device = a_device(client)
    device.open_manifest(cloud.sign_manifest(b"manifest"))
    return device.seal(b"hello")


def test_neither_side_takes_its_own_words_back() -> None:
    cloud, device = met()
    assert code_of(lambda: cloud.open(A, cloud.seal(A, b"done"))) == "mac"
    assert code_of(lambda: device.open(device.seal(b"offer"))) == "mac"
    assert code_of(lambda: device.open(cloud.sign_manifest(b"manifest"))) == "mac"
    assert code_of(lambda: device.open_manifest(cloud.seal(A, b"done"))) == "mac"


def test_a_guessed_key_opens_nothing() -> None:
    cloud, _ = met()
    thief = a_device(key=bytes(32), epoch=9)
    thief.open_manifest(cloud.sign_manifest(b"manifest"))
    assert code_of(lambda: cloud.open(A, thief.seal(b"hello"))) == "mac"
    other = CloudSeal(RUN, MASTER, SigningKey(bytes(32)), CLOUD, 9)
    assert code_of(lambda: a_device().open_manifest(other.sign_manifest(b"manifest"))) == "mac"


@given(st.data())
def test_one_changed_bit_anywhere_is_refused(data: st.DataObject) -> None:
    cloud, device = met()
    packet = bytearray(data.draw(st.sampled_from([device.seal(b"offer"), cloud.seal(A, b"done")])))
    bit = data.draw(st.integers(0, 8 * len(packet) - 1))
    packet[bit // 8] ^= 1 << bit % 8
    for act in (lambda: cloud.open(A, bytes(packet)), lambda: device.open(bytes(packet))):
        assert code_of(act) in ("mac", "version")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(packet: bytes) -> None:
    cloud, device = met()
    for open_ in (lambda p: cloud.open(A, p), device.open, device.open_manifest):
        for whole in (packet, b"S\x01U" + packet, b"S\x01D" + packet, b"S\x01M" + packet):
            assert code_of(lambda: open_(whole)) in ("mac", "version", "size")  # noqa: B023


def test_a_restarted_device_is_heard_and_its_earlier_session_is_over() -> None:
    cloud, device = met()
    old = device.seal(b"offer")
    again = a_device(session=LATER, epoch=2, highest=device.highest)
    again.open_manifest(cloud.sign_manifest(b"manifest"))
    assert cloud.open(A, again.seal(b"hello")) == b"hello"
    cloud.greeted(A, LATER, 2)
    assert code_of(lambda: cloud.open(A, old)) == "replay"
    assert again.open(cloud.seal(A, b"task")) == b"task"
    assert code_of(lambda: device.open(cloud.seal(A, b"task"))) == "replay"


def test_two_devices_of_one_identity_are_told_apart() -> None:
    cloud, device = met()
    twin = a_device(session=LATER, epoch=1)
    twin.open_manifest(cloud.sign_manifest(b"manifest"))
    with pytest.raises(ProtocolError, match="two devices claim start 1 of 'pi5-01'"):
        cloud.open(A, twin.seal(b"hello"))
    assert cloud.open(A, device.seal(b"offer")) == b"offer"


def test_a_restarted_aggregator_hears_nothing_of_before_and_says_nothing_before_a_hello() -> None:
    cloud, device = met()
    old = device.seal(b"offer")
    done = cloud.seal(A, b"done")
    after = a_cloud(session=LATER, epoch=2)
    assert code_of(lambda: after.open(A, old)) == "stale"
    assert code_of(lambda: after.seal(A, b"task")) == "stale"
    device.open_manifest(after.sign_manifest(b"manifest"))
    assert code_of(lambda: device.open(done)) == "replay"
    after.open(A, device.seal(b"hello"))
    after.greeted(A, DEVICE, 1)
    assert device.open(after.seal(A, b"task")) == b"task"


def test_the_newest_manifest_passes_again_and_an_older_one_does_not() -> None:
    cloud, device = a_cloud(), a_device()
    first, second = cloud.sign_manifest(b"1"), cloud.sign_manifest(b"2")
    assert [device.open_manifest(p) for p in (first, second, second)] == [b"1", b"2", b"2"]
    assert code_of(lambda: device.open_manifest(first)) == "replay"
    after = a_device(session=LATER, epoch=2, highest=device.highest)  # as its disk has it
    assert code_of(lambda: after.open_manifest(first)) == "replay"
    assert after.open_manifest(second) == b"2"


def test_a_last_will_holds_for_its_session_alone() -> None:
    cloud, device = a_cloud(), a_device()
    will = device.seal(b"gone", will=True)
    assert is_will(will)
    assert code_of(lambda: cloud.open(A, will)) == "replay"  # nobody of that session was there
    device.open_manifest(cloud.sign_manifest(b"manifest"))
    hello = device.seal(b"hello")
    assert not is_will(hello)
    cloud.open(A, hello)
    cloud.greeted(A, DEVICE, 1)
    assert cloud.open(A, will) == b"gone"
    again = a_device(session=LATER, epoch=2)
    again.open_manifest(cloud.sign_manifest(b"manifest"))
    cloud.open(A, again.seal(b"hello"))
    cloud.greeted(A, LATER, 2)
    assert code_of(lambda: cloud.open(A, will)) == "replay"


def test_a_hello_that_names_another_session_than_it_is_sealed_in_is_refused() -> None:
    cloud, device = a_cloud(), a_device()
    device.open_manifest(cloud.sign_manifest(b"manifest"))
    cloud.open(A, device.seal(b"hello"))
    assert code_of(lambda: cloud.greeted(A, LATER, 1)) == "replay"
    assert code_of(lambda: cloud.greeted(A, DEVICE, 2)) == "replay"
    assert code_of(lambda: cloud.greeted(B, DEVICE, 1)) == "replay"


def test_no_key_is_shown() -> None:
    key = client_key(MASTER, RUN, A)
    shown = f"{a_device()!r} {SIGNING!r} {a_cloud()!r}"
    for secret in (key, MASTER, SIGNING.seed):
        assert repr(secret) not in shown
        assert secret.hex() not in shown
