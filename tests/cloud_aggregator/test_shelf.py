"""Global states by content: on disk, the newest two in memory, a window of chunks a request."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.shelf import Shelf
from device_profiles.errors import InputError
from messaging.chunks import Chunk, Missing, parse_chunk
from messaging.codecs import decode_blob
from messaging.errors import ProtocolError
from messaging.layout import Layout, TensorSpec
from messaging.protocol import StateRef, Want
from messaging.transfer import SILENCE_SECONDS
from tests.cloud_aggregator.conftest import CHUNK, LAYOUT, RUN, SESSION, constant


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(RUN, LAYOUT, RunFolder(tmp_path), CHUNK)


def ask(
    shelf: Shelf,
    ref: StateRef,
    missing: Missing | None = None,
    *,
    client: str = "a",
    now: float = 0.0,
) -> list[Chunk]:
    """Return the chunks that a request is answered with."""
    wanted = Missing(ref.chunks) if missing is None else missing
    sent: list[bytes] = []
    want = Want(run=RUN, client=client, session=SESSION, blob=ref.blob, missing=wanted.bitmap())
    shelf.answer(want, sent.append, now)
    return [parse_chunk(RUN, packet) for packet in sent]


def long_layout(numbers: int) -> Layout:
    """Return the layout of a state of four bytes a number."""
    return Layout((TensorSpec(name="long", shape=(numbers,)),))


def refused(shelf: Shelf, ref: StateRef, **changes: Any) -> bool:
    """Return whether a request is refused for its rate."""
    try:
        ask(shelf, ref, **changes)
    except ProtocolError as err:
        return err.code == "rate"
    return False


def test_a_state_goes_down_whole_and_says_its_round(shelf: Shelf) -> None:
    ref = shelf.put(constant(1.5), 3)
    chunks = ask(shelf, ref)
    blob = b"".join(chunk.payload for chunk in chunks)
    assert (len(blob), hashlib.sha256(blob).hexdigest()) == (ref.bytes, ref.blob)
    head, vector = decode_blob(blob, LAYOUT)
    assert (head.round, head.sender, head.codec) == (3, "aggregator", "fp32")
    assert vector.tolist() == constant(1.5).tolist()
    assert shelf.newest == ref
    assert shelf.vector is not None
    assert shelf.vector.tolist() == vector.tolist()


def test_a_state_is_in_the_run_folder_under_its_names(shelf: Shelf, tmp_path: Path) -> None:
    vector = np.arange(LAYOUT.size, dtype=np.float32)
    shelf.put(vector, 2)
    tensors = load_file(tmp_path / "global" / "2" / "shared.safetensors")
    assert set(tensors) == LAYOUT.names
    assert (
        tensors["adapters.0.attention.down.weight"].tolist() == vector[:32].reshape(4, 8).tolist()
    )
    assert shelf.load(2).tolist() == vector.tolist()


def test_the_same_state_put_again_is_the_same_blob(shelf: Shelf) -> None:
    """A device that has it need not fetch it again from an aggregator that was started again."""
    assert shelf.put(constant(1.0), 1) == shelf.put(constant(1.0), 1)
    assert shelf.put(constant(1.0), 1) != shelf.put(constant(1.0), 2)


def test_only_what_a_device_lacks_is_sent(shelf: Shelf) -> None:
    ref = shelf.put(constant(1.0), 1)
    assert ref.chunks == 3
    assert [chunk.index for chunk in ask(shelf, ref, Missing(3, {2, 0}))] == [0, 2]
    assert ask(shelf, ref, Missing(3, set())) == []


def test_one_request_brings_a_window_of_eight_chunks(tmp_path: Path) -> None:
    layout = long_layout(4096)
    long = Shelf(RUN, layout, RunFolder(tmp_path), CHUNK)
    ref = long.put(constant(1.0, layout), 1)
    assert ref.chunks == 18  # 16,384 bytes and a header, in pieces of 960
    assert [chunk.index for chunk in ask(long, ref)] == list(range(8))


def test_the_newest_two_states_are_kept(shelf: Shelf) -> None:
    refs = [shelf.put(constant(float(r)), r) for r in range(3)]
    assert ask(shelf, refs[2])
    assert ask(shelf, refs[1])
    with pytest.raises(ProtocolError, match="not on the shelf") as refusal:
        ask(shelf, refs[0])
    assert refusal.value.code == "state"
    assert shelf.load(0).tolist() == constant(0.0).tolist()  # the disk keeps every round


def test_a_request_for_a_chunk_that_there_is_not_is_refused(shelf: Shelf) -> None:
    ref = shelf.put(constant(1.0), 1)
    with pytest.raises(ProtocolError) as refusal:
        ask(shelf, ref, Missing(9, {8}))
    assert refusal.value.code == "bitmap"


def test_who_asks_without_end_is_refused_and_nobody_else_waits(tmp_path: Path) -> None:
    """Of a small state there are 4 MiB at once, and 2 MiB a second from then on.

    A request of 8 chunks of 1024 bytes takes 8192: 512 of them are 4 MiB, and 256 are 2 MiB.
    """
    layout = long_layout(4096)
    shelf = Shelf(RUN, layout, RunFolder(tmp_path), 1024)
    ref = shelf.put(constant(1.0, layout), 1)
    assert sum(not refused(shelf, ref) for _ in range(1000)) == 512
    assert sum(not refused(shelf, ref, now=1.0) for _ in range(1000)) == 256
    assert len(ask(shelf, ref, client="b", now=1.0)) == 8
    newer = shelf.put(constant(2.0, layout), 2)
    assert len(ask(shelf, newer, now=1.0)) == 8
    shelf.put(constant(3.0, layout), 3)
    assert ref.blob not in shelf._given  # what is gone from the shelf is not counted any longer


@pytest.mark.parametrize("chunk_bytes", [1024, 122_880])
def test_an_honest_device_takes_a_large_state_as_fast_as_its_link_is_and_again(
    tmp_path: Path, chunk_bytes: int
) -> None:
    """2.3 MB as in the benchmark, three times in no time at all: it was started again twice."""
    layout = long_layout(580_968)
    shelf = Shelf(RUN, layout, RunFolder(tmp_path), chunk_bytes)
    ref = shelf.put(constant(1.0, layout), 1)
    for _ in range(3):
        missing = Missing(ref.chunks)
        while missing:
            for chunk in ask(shelf, ref, missing):
                missing.arrived(chunk.index)


def test_a_device_whose_answers_are_lost_is_never_refused(tmp_path: Path) -> None:
    """It asks again after its silence, with the largest chunks that a broker takes."""
    layout = long_layout(2**19)
    shelf = Shelf(RUN, layout, RunFolder(tmp_path), 262_144)
    ref = shelf.put(constant(1.0, layout), 1)
    assert not any(refused(shelf, ref, now=SILENCE_SECONDS * i) for i in range(50))


@pytest.mark.parametrize("damage", ["missing", "cut", "shape", "stranger"])
def test_a_state_that_is_damaged_is_told_by_its_path(
    damage: str, shelf: Shelf, tmp_path: Path
) -> None:
    shelf.put(constant(1.0), 4)
    path = tmp_path / "global" / "4" / "shared.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "shape":
        name = "adapters.0.mlp.up.bias"
        save_file({**tensors, name: tensors[name][:-1]}, path)
    else:
        save_file({**tensors, "lora_A.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(InputError, match="cannot go on") as told:
        shelf.load(4)
    assert str(path) in str(told.value)


def test_for_a_broker_of_small_packets_states_come_in_small_pieces(tmp_path: Path) -> None:
    shelf = Shelf(RUN, LAYOUT, RunFolder(tmp_path), 4096)
    ref = shelf.put(constant(1.0), 1)
    assert not shelf.fit(None)
    assert not shelf.fit(65_536)
    assert ref.chunks == 1
    assert shelf.fit(2048)  # 512 of them for the topic: pieces of 1536 - 64
    smaller = shelf.newest
    assert smaller is not None
    assert (smaller.chunk_bytes, smaller.chunks) == (1536, 2)
    assert shelf.current(ref) == smaller
    assert b"".join(c.payload for c in ask(shelf, smaller)) == ask_whole(shelf, smaller)
    assert shelf.put(constant(2.0), 2).chunk_bytes == 1536
    assert not shelf.fit(None)  # a device may hold the reference


def ask_whole(shelf: Shelf, ref: StateRef) -> bytes:
    """Return a state as it was put."""
    blob = shelf._blobs[ref.blob][1]
    assert hashlib.sha256(blob).hexdigest() == ref.blob
    return blob
