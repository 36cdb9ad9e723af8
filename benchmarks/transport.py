"""The protocol against raw MQTT: one 2.3 MB update, granted and verified, and the same bytes bare.

    python benchmarks/transport.py --repeats 40

The device is a process of its own, as it is. Both ways go through the same embedded broker at the
same chunk size and QoS 1, in turn: raw publishes every chunk and is over when all have come; the
protocol is over when the aggregator's desk has verified the hash and said DONE. Absolute figures
drift on shared machines: the ratio counts.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import queue
import statistics
import time
from typing import Any

from messaging import topics
from messaging.broker import embedded_broker, embedded_kind
from messaging.chunks import CHUNK_BYTES, chunk_count, make_chunk, parse_chunk
from messaging.mqtt import MqttNetwork
from messaging.protocol import Costs, Done, Grant, Have, Offer, decode, encode
from messaging.transfer import Upload, UploadDesk, UploadLimits

RUN, CLIENT = "bench", "laptop-1"
BYTES = 4 * 580_968
COUNT = chunk_count(BYTES, CHUNK_BYTES)
WAIT = 60.0

Inbox = queue.SimpleQueue[tuple[str, bytes]]


class Memory:
    """Where the pieces of the benchmark's update go."""

    def __init__(self, size: int) -> None:
        self.blob = bytearray(size)

    def write(self, offset: int, payload: bytes) -> None:
        self.blob[offset : offset + len(payload)] = payload

    def rest(self) -> None:
        pass

    def finish(self) -> bytearray:
        return self.blob

    def discard(self) -> None:
        self.blob = bytearray()


def connect(url: str, client_id: str, filters: list[str]) -> tuple[Any, Inbox]:
    """Return a connection whose subscriptions hold, and what arrives on it."""
    inbox: Inbox = queue.SimpleQueue()
    ready: queue.SimpleQueue[None] = queue.SimpleQueue()
    transport = MqttNetwork(url).open(
        client_id=client_id,
        filters=filters,
        deliver=lambda topic, payload: inbox.put((topic, payload)),
        connected=lambda: ready.put(None),
    )
    transport.start()
    ready.get(timeout=WAIT)
    return transport, inbox


# -- the device ------------------------------------------------------------------------------------


def device(url: str, talk: Any) -> None:
    """Send a fresh blob the way that is asked for, until asked for nothing."""
    transport, inbox = connect(url, "device", [topics.down(RUN, CLIENT)])
    talk.send("ready")
    while way := talk.recv():
        blob = os.urandom(BYTES)
        talk.send("ready")
        talk.recv()
        name = hashlib.sha256(blob).hexdigest()
        topic = topics.data(RUN, CLIENT, name)
        if way == "raw":
            for index in range(COUNT):
                transport.publish(topic, make_chunk(RUN, name, blob, index, CHUNK_BYTES))
            continue
        offer = Offer(
            run=RUN, client=CLIENT, session="0" * 16, round=1, blob=name, bytes=BYTES,
            chunk_bytes=CHUNK_BYTES, chunks=COUNT, binding=name, layout=name, codec="fp32",
            costs=Costs(),
        )  # fmt: skip
        upload = Upload(blob, offer, time.monotonic())
        transport.publish(topics.control(RUN, CLIENT), encode(offer))
        while True:
            message = decode(inbox.get(timeout=WAIT)[1])
            if isinstance(message, Grant):
                indices = upload.granted(message, time.monotonic())
            elif isinstance(message, Have):
                indices = upload.acknowledged(message, time.monotonic())
            else:
                break  # DONE
            for index in indices:
                transport.publish(topic, make_chunk(RUN, name, blob, index, CHUNK_BYTES))
    transport.close()


# -- the aggregator --------------------------------------------------------------------------------


def take_raw(_transport: Any, inbox: Inbox) -> None:
    """Wait until every chunk has come."""
    for _ in range(COUNT):
        inbox.get(timeout=WAIT)


def take_granted(transport: Any, inbox: Inbox) -> None:
    """Grant, verify, and say DONE."""
    done: list[Done] = []

    def complete(offer: Offer, _blob: bytes) -> Done:
        done.append(Done(run=RUN, client=offer.client, blob=offer.blob, status="stored"))
        return done[0]

    desk = UploadDesk(
        run=RUN,
        limits=UploadLimits(),
        open_partial=lambda o: Memory(o.bytes),
        send=lambda client, message: transport.publish(topics.down(RUN, client), encode(message)),
        complete=complete,
    )
    while not done:
        _topic, payload = inbox.get(timeout=WAIT)
        now = time.monotonic()
        if payload[:1] == b"{":
            desk.offered(decode(payload), now)
        else:
            desk.data(CLIENT, parse_chunk(RUN, payload), now)


WAYS = {"raw": take_raw, "granted": take_granted}


def measure(url: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way, in turn."""
    talk, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=device, args=(url, theirs), daemon=True)
    process.start()
    transport, inbox = connect(url, "server", topics.everything_up(RUN))
    talk.recv()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, take in WAYS.items():
            talk.send(way)
            talk.recv()
            began = time.perf_counter()
            talk.send("go")
            take(transport, inbox)
            seconds[way].append(time.perf_counter() - began)
    talk.send("")
    process.join(WAIT)
    transport.close()
    return seconds


def main() -> None:
    """Time both in turn and print the medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    with embedded_broker() as url:
        seconds = measure(url, arguments.repeats)
    print(
        f"broker: {embedded_kind()}; {BYTES / 1e6:.1f} MB in chunks of {CHUNK_BYTES} bytes, QoS 1"
    )
    for name, values in seconds.items():
        rates = [BYTES / 1e6 / v for v in values]
        low, high = min(rates), max(rates)
        print(f"{name:8} {statistics.median(rates):7.1f} MB/s (min {low:.1f}, max {high:.1f})")
    pairs = zip(seconds["raw"], seconds["granted"], strict=True)
    ratio = statistics.median(r / g for r, g in pairs)
    best = min(seconds["raw"]) / min(seconds["granted"])
    print(
        f"the protocol reaches {ratio:.2f} of raw MQTT (median of {arguments.repeats} pairs; "
        f"{best:.2f} between the best of each)"
    )


if __name__ == "__main__":
    main()
