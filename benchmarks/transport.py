"""The protocol against raw MQTT: one 2.3 MB update, granted and verified, and the same bytes bare.

    python benchmarks/transport.py

Both go through the same embedded broker at the same chunk size and QoS 1, in turn, from one
connection to another in this process. Absolute figures drift on shared machines: the ratio counts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import queue
import statistics
import time
from collections.abc import Callable

from messaging import topics
from messaging.broker import embedded_broker, embedded_kind
from messaging.chunks import CHUNK_BYTES, chunk_count, make_chunk, parse_chunk
from messaging.mqtt import MqttNetwork
from messaging.protocol import Costs, Done, Grant, Have, Offer, decode, encode
from messaging.transfer import Upload, UploadDesk, UploadLimits

RUN, CLIENT = "bench", "laptop-1"
BYTES = 4 * 580_968
WAIT = 60.0

Inbox = queue.Queue[tuple[str, bytes]]
Send = Callable[[str, bytes], None]


class Memory:
    """Where the pieces of the benchmark's update go."""

    def __init__(self, size: int) -> None:
        self.blob = bytearray(size)

    def write(self, offset: int, payload: bytes) -> None:
        self.blob[offset : offset + len(payload)] = payload

    def finish(self) -> bytes:
        return bytes(self.blob)

    def discard(self) -> None:
        self.blob = bytearray()


def raw(blob: bytes, send: Send, inbox: Inbox) -> None:
    """Publish every chunk and wait until all have arrived."""
    name = hashlib.sha256(blob).hexdigest()
    count = chunk_count(len(blob), CHUNK_BYTES)
    for index in range(count):
        send(topics.data(RUN, CLIENT, name), make_chunk(RUN, name, blob, index, CHUNK_BYTES))
    for _ in range(count):
        inbox.get(timeout=WAIT)


def granted(blob: bytes, send: Send, inbox: Inbox) -> None:
    """Offer, grant, send within the window, verify, done: both ends in this thread."""
    name = hashlib.sha256(blob).hexdigest()
    offer = Offer(
        run=RUN, client=CLIENT, session="0" * 16, round=1, blob=name, bytes=len(blob),
        chunk_bytes=CHUNK_BYTES, chunks=chunk_count(len(blob), CHUNK_BYTES), binding=name,
        layout=name, codec="fp32", costs=Costs(),
    )  # fmt: skip
    desk = UploadDesk(
        run=RUN,
        limits=UploadLimits(),
        open_partial=lambda o: Memory(o.bytes),
        send=lambda client, message: send(topics.down(RUN, client), encode(message)),
        complete=lambda o, _blob: Done(run=RUN, client=o.client, blob=o.blob, status="stored"),
    )
    upload = Upload(blob, offer, time.monotonic())
    send(topics.control(RUN, CLIENT), encode(offer))
    while True:
        _topic, payload = inbox.get(timeout=WAIT)
        now = time.monotonic()
        if payload[:1] != b"{":
            desk.data(CLIENT, parse_chunk(RUN, payload), now)
            continue
        message = decode(payload)
        indices: list[int] = []
        if isinstance(message, Offer):
            desk.offered(message, now)
        elif isinstance(message, Grant):
            indices = upload.granted(message, now)
        elif isinstance(message, Have):
            indices = upload.acknowledged(message, now)
        else:
            return  # DONE
        for index in indices:
            chunk = make_chunk(RUN, name, blob, index, CHUNK_BYTES)
            send(topics.data(RUN, CLIENT, name), chunk)


def main() -> None:
    """Time both in turn and print the medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    inbox: Inbox = queue.Queue()
    with embedded_broker() as url:
        network = MqttNetwork(url)
        ready: queue.Queue[None] = queue.Queue()
        server = network.open(
            client_id="server", filters=topics.everything_up(RUN),
            deliver=lambda t, p: inbox.put((t, p)), connected=lambda: ready.put(None),
        )  # fmt: skip
        device = network.open(
            client_id="device", filters=[topics.down(RUN, CLIENT)],
            deliver=lambda t, p: inbox.put((t, p)), connected=lambda: ready.put(None),
        )  # fmt: skip
        for transport in (server, device):
            transport.start()
            ready.get(timeout=WAIT)

        def send(topic: str, payload: bytes) -> None:
            (server if topic.endswith("/down") else device).publish(topic, payload)

        seconds: dict[str, list[float]] = {"raw": [], "granted": []}
        for _ in range(arguments.repeats):
            blob = os.urandom(BYTES)
            for name, function in (("raw", raw), ("granted", granted)):
                began = time.perf_counter()
                function(blob, send, inbox)
                seconds[name].append(time.perf_counter() - began)
        device.close()
        server.close()
    print(
        f"broker: {embedded_kind()}; {BYTES / 1e6:.1f} MB in chunks of {CHUNK_BYTES} bytes, QoS 1"
    )
    for name, values in seconds.items():
        rates = [BYTES / 1e6 / v for v in values]
        low, high = min(rates), max(rates)
        print(f"{name:8} {statistics.median(rates):7.1f} MB/s (min {low:.1f}, max {high:.1f})")
    ratio = statistics.median(
        r / g for r, g in zip(seconds["raw"], seconds["granted"], strict=True)
    )
    print(f"the protocol reaches {ratio:.2f} of raw MQTT (median of {arguments.repeats} pairs)")


if __name__ == "__main__":
    main()
