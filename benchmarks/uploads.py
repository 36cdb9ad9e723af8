"""Many devices at once: a thousand uploads, five thousand that wait, a state for a hundred.

    python benchmarks/uploads.py                        # all three, at their full size
    python benchmarks/uploads.py many --clients 100 1000 --folder /dev/shm
    python benchmarks/uploads.py idle --clients 5000
    python benchmarks/uploads.py down --clients 100

``many``: devices upload 2.3 MB each to one aggregator over a mosquitto with its own defaults (a
queue of 1,000 messages). The aggregator's intake is the real one: grants, spool, hash, decoding,
every check. Raw MQTT from one publisher to one subscriber, the same chunks at QoS 1 on the same
broker, runs before and after each. Memory is the highest resident size of the aggregator's process.
``idle``: connections that subscribe and are told the manifest, on each embedded broker.
``down``: devices ask for a global state, eight chunks at a time, until all have it.

Devices are doubles without a model: the protocol's own state machines, hundreds on one connection.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import multiprocessing
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transport import connect

from cloud_aggregator.intake import Client, Intake, IntakeRules
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.shelf import Shelf
from cloud_aggregator.spool import Spool
from cloud_aggregator.store import Store
from messaging import topics
from messaging.broker import HOST, embedded_broker, find_mosquitto, free_port, is_installed
from messaging.chunks import CHUNK_BYTES, chunk_count, make_chunk, parse_chunk
from messaging.codecs import BlobHeader, encode_blob
from messaging.errors import ProtocolError
from messaging.layout import Layout, TensorSpec
from messaging.mqtt import MqttNetwork
from messaging.protocol import Costs, Done, Grant, Have, Offer, Want, decode, encode
from messaging.transfer import Download, Upload, UploadLimits

RUN, SESSION, BINDING = "bench", "0" * 16, "b" * 64
LAYOUT = Layout((TensorSpec(name="adapters.all", shape=(580_968,)),))  # GPT-2-small's adapters
WAIT = 120.0
RAW_CHUNKS, RAW_BURST = 2_000, 400  # a burst stays below the default queue of 1,000


def client_name(number: int) -> str:
    return f"c{number:05d}"


@cache
def _template() -> bytes:
    vector = np.random.default_rng(1).standard_normal(LAYOUT.size).astype(np.float32) * 1e-3
    header = BlobHeader(
        run=RUN, round=1, sender=client_name(0), codec="fp32", layout=LAYOUT.sha256, examples=1
    )
    return encode_blob(vector, LAYOUT, header)


def update_of(client: str) -> bytes:
    """Return a client's valid update: the same numbers under its own name."""
    return _template().replace(client_name(0).encode(), client.encode(), 1)


@contextlib.contextmanager
def default_mosquitto() -> Iterator[tuple[str, int]]:
    """Run a mosquitto with its defaults; yield its address and process."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pwff-bench-") as folder:
        config = Path(folder) / "mosquitto.conf"
        config.write_text(f"listener {port} {HOST}\nallow_anonymous true\nlog_type none\n")
        child = subprocess.Popen([find_mosquitto() or "mosquitto", "-c", str(config)])
        try:
            url = f"mqtt://{HOST}:{port}"
            time.sleep(0.5)
            MqttNetwork(url).require(15.0)
            yield url, child.pid
        finally:
            child.terminate()
            child.wait()


def peak_memory() -> float:
    """Return the highest resident size of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- many -----------------------------------------------------------------------------------------


def aggregate(url: str, folder: str, clients: int, talk: Any) -> None:
    """Take every client's update, and say how long it took and what it held."""
    transport, inbox = connect(url, "aggregator", topics.everything_up(RUN))
    told: list[str] = []
    store = Store(Path(folder), RUN)
    intake = Intake(
        1,
        {client_name(i): Client(examples=1, layout=LAYOUT) for i in range(clients)},
        IntakeRules(
            run=RUN, binding=BINDING, layout=LAYOUT, codec="fp32", limits=UploadLimits(),
            virtual_time=False,
            round_rules=RoundRules(quorum=1.0, deadline_seconds=1e6),
        ),
        Spool(Path(folder) / "1", store.ledger(1)),
        began=time.monotonic(),
        send=lambda client, m: transport.publish(topics.down(RUN, client), encode(m)),
        notify=lambda event, **_: told.append(event) if event == "refused" else None,
    )  # fmt: skip
    talk.send("ready")
    began, tick = 0.0, 0.0
    while not intake.answered:
        topic, payload = inbox.get(timeout=WAIT)
        now = time.monotonic()
        began = began or now
        with contextlib.suppress(ProtocolError):
            if payload[:1] == b"{":
                intake.offered(decode(payload), now)
            else:
                intake.data(topics.client_of(topic), parse_chunk(RUN, payload), now)
        if now - tick > 0.5:
            tick = now
            intake.expire(now)
    talk.send(
        {
            "seconds": time.monotonic() - began,
            "accepted": len(intake.round.accepted),
            "refused": len(told),
            "again": intake.retransmitted_bytes,
            "peak": peak_memory(),
        }
    )
    transport.close()


def upload_all(url: str, clients: int, talk: Any) -> None:
    """Be that many devices until each has heard DONE."""
    names = [client_name(i) for i in range(clients)]
    hashes = {name: hashlib.sha256(update_of(name)).hexdigest() for name in names}
    size = len(_template())
    transport, inbox = connect(url, "devices", [f"{topics.ROOT}/{RUN}/c/+/down"])
    talk.send("ready")
    talk.recv()
    uploads: dict[str, Upload] = {}
    for name in names:
        offer = Offer(
            run=RUN, client=name, session=SESSION, round=1, blob=hashes[name], bytes=size,
            chunk_bytes=CHUNK_BYTES, chunks=chunk_count(size, CHUNK_BYTES), binding=BINDING,
            layout=LAYOUT.sha256, codec="fp32", costs=Costs(),
        )  # fmt: skip
        uploads[name] = Upload(b"", offer, time.monotonic())
        transport.publish(topics.control(RUN, name), encode(offer))
    tick = time.monotonic()
    while uploads:
        with contextlib.suppress(queue.Empty):
            topic, payload = inbox.get(timeout=1.0)
            name, message = topics.client_of(topic), decode(payload)
            upload = uploads.get(name)
            indices: list[int] = []
            if upload is None:
                continue
            if isinstance(message, Grant):
                upload.blob = upload.blob or update_of(name)
                indices = upload.granted(message, time.monotonic())
            elif isinstance(message, Have):
                indices = upload.acknowledged(message, time.monotonic())
            elif isinstance(message, Done):
                del uploads[name]
            else:
                raise SystemExit(f"{name}: {message}")
            for index in indices:
                packet = make_chunk(RUN, hashes[name], upload.blob, index, CHUNK_BYTES)
                transport.publish(topics.data(RUN, name, hashes[name]), packet)
        if time.monotonic() - tick > 1.0:
            tick = time.monotonic()
            for name, upload in uploads.items():
                if upload.must_offer_again(tick):
                    transport.publish(topics.control(RUN, name), encode(upload.offer))
    transport.close()


def raw_subscribe(url: str, talk: Any) -> None:
    transport, inbox = connect(url, "raw-in", ["raw/+"])
    talk.send("ready")
    for at in range(RAW_CHUNKS):
        inbox.get(timeout=WAIT)
        if (at + 1) % RAW_BURST == 0:
            talk.send("burst")
    transport.close()


def raw_publish(url: str, talk: Any) -> None:
    transport, _ = connect(url, "raw-out", ["nothing"])
    talk.send("ready")
    packet = bytes(CHUNK_BYTES)
    for _ in range(RAW_CHUNKS // RAW_BURST):
        talk.recv()
        for _ in range(RAW_BURST):
            transport.publish("raw/x", packet)
    transport.close()


class Process:
    """A function in a process of its own, and a pipe to it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.talk, theirs = context.Pipe()
        self._process = context.Process(target=function, args=(*arguments, theirs), daemon=True)
        self._process.start()
        self.hear()

    def hear(self) -> Any:
        while not self.talk.poll(1.0):
            if not self._process.is_alive():
                raise SystemExit(f"a process of the benchmark ended with {self._process.exitcode}")
        return self.talk.recv()

    def join(self) -> None:
        self._process.join(WAIT)


def raw_rate(url: str) -> float:
    """Return bytes per second of chunks from one publisher to one subscriber."""
    into, out = Process(raw_subscribe, url), Process(raw_publish, url)
    began = time.monotonic()
    for _ in range(RAW_CHUNKS // RAW_BURST):
        out.talk.send("go")
        into.hear()
    seconds = time.monotonic() - began
    into.join()
    out.join()
    return RAW_CHUNKS * CHUNK_BYTES / seconds


def many(clients: list[int], folder: Path | None) -> None:
    """Let more and more devices upload at once; print rate, memory and what was lost."""
    peaks = []
    for count in clients:
        place = Path(tempfile.mkdtemp(prefix="pwff-spool-", dir=folder))
        try:
            with default_mosquitto() as (url, broker):
                before = raw_rate(url)
                server = Process(aggregate, url, str(place), count)
                devices = Process(upload_all, url, count)
                devices.talk.send("go")
                result = server.hear()
                held = psutil.Process(broker).memory_info().rss / 1e6
                server.join()
                devices.join()
                after = raw_rate(url)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        raw = (before + after) / 2
        rate = count * len(_template()) / result["seconds"]
        peaks.append(result["peak"])
        print(
            f"{count} clients x {len(_template()) / 1e6:.2f} MB: {result['accepted']} accepted, "
            f"{result['refused']} refused, {result['again'] / 1e6:.1f} MB sent twice, "
            f"{result['seconds']:.1f} s, {rate / 1e6:.0f} MB/s = {rate / raw:.2f} of raw "
            f"({before / 1e6:.0f} and {after / 1e6:.0f} MB/s); aggregator {result['peak']:.1f} MB, "
            f"broker {held:.0f} MB",
            flush=True,
        )
        assert result["accepted"] == count
    growth = peaks[-1] - peaks[0]
    print(f"the aggregator grew by {growth:.1f} MB between {clients[0]} and {clients[-1]} clients")


# -- idle -----------------------------------------------------------------------------------------


def _packet(kind: int, body: bytes) -> bytes:
    assert len(body) < 128
    return bytes([kind, len(body)]) + body


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


async def _sit(port: int, number: int, told: asyncio.Semaphore) -> asyncio.StreamWriter:
    """Connect by MQTT 5, subscribe, and wait for the retained manifest; then stay."""
    name = client_name(number)
    for attempt in range(20):
        try:
            reader, writer = await asyncio.open_connection(HOST, port)
            break
        except OSError:
            await asyncio.sleep(0.05 * 2 ** min(attempt, 5))
    else:
        raise SystemExit(f"{name} could not connect")
    writer.write(_packet(0x10, _text("MQTT") + b"\5\2\2\0\0" + _text(name)))
    subscriptions = b"".join(_text(t) + b"\1" for t in (topics.manifest(RUN), f"down/{name}"))
    writer.write(_packet(0x82, b"\0\1\0" + subscriptions))
    heard = b""
    while b"MANIFEST" not in heard:
        piece = await reader.read(4096)
        if not piece:
            raise SystemExit(f"the broker closed the connection of {name}")
        heard += piece
    told.release()
    return writer


async def _sit_all(port: int, clients: int) -> tuple[float, list[asyncio.StreamWriter]]:
    began, told, gate = time.monotonic(), asyncio.Semaphore(0), asyncio.Semaphore(100)

    async def one(number: int) -> asyncio.StreamWriter:
        async with gate:
            return await _sit(port, number, told)

    writers = await asyncio.gather(*(one(number) for number in range(clients)))
    return time.monotonic() - began, list(writers)


def idle(clients: int) -> None:
    """Let devices connect to each embedded broker and wait there."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for kind in ("mosquitto", "iotcore"):
        if not is_installed(kind):
            print(f"{kind}: not installed here")
            continue
        with embedded_broker(kind=kind) as url:
            port = int(url.rpartition(":")[2])
            speaker, _ = connect(url, "speaker", ["nothing"])
            speaker.publish(topics.manifest(RUN), b'{"kind":"MANIFEST"}', retain=True)
            children = psutil.Process().children(recursive=True)
            before = sum(child.memory_info().rss for child in children)
            seconds, writers = asyncio.run(_sit_all(port, clients))
            after = sum(child.memory_info().rss for child in children)
            speaker.close()
            print(
                f"{kind}: {len(writers)} clients connected, subscribed and told the manifest in "
                f"{seconds:.1f} s; the broker grew by {(after - before) / 1e6:.0f} MB",
                flush=True,
            )


# -- down -----------------------------------------------------------------------------------------


def download_all(url: str, first: int, clients: int, ref: Any, talk: Any) -> None:
    """Be that many devices until each has the state; verify afterwards, each on its own machine."""
    names = [client_name(first + i) for i in range(clients)]
    downloads = {name: Download(ref, -1e9) for name in names}
    transport, inbox = connect(url, f"devices-{first}", [topics.down(RUN, n) for n in names])

    def ask(name: str) -> None:
        if indices := downloads[name].wanted(8, time.monotonic()):
            bits = sum(1 << i for i in indices).to_bytes((ref.chunks + 7) // 8, "little")
            want = Want(run=RUN, client=name, session=SESSION, blob=ref.blob, missing=bits.hex())
            transport.publish(topics.control(RUN, name), encode(want))

    talk.send("ready")
    talk.recv()
    for name in names:
        ask(name)
    left = set(names)
    while left:
        topic, payload = inbox.get(timeout=WAIT)
        name = topics.client_of(topic)
        downloads[name].arrived(parse_chunk(RUN, payload), time.monotonic())
        if downloads[name].missing:
            ask(name)
        else:
            left.discard(name)
    talk.send("done")
    for name in names:
        downloads[name].finish()
    talk.send("verified")
    transport.close()


def down(clients: int, repeats: int = 5) -> None:
    """Give a global state to devices that ask for it at once."""
    vector = np.random.default_rng(1).standard_normal(LAYOUT.size).astype(np.float32)
    with default_mosquitto() as (url, _), tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(RUN, LAYOUT, RunFolder(Path(folder)), CHUNK_BYTES)
        transport, inbox = connect(url, "aggregator", topics.everything_up(RUN))
        taken = []
        for repeat in range(repeats):
            ref = shelf.put(vector, repeat)  # each repeat a state of its own, as each round has
            half = clients // 2
            sides = [
                Process(download_all, url, 0, half, ref),
                Process(download_all, url, half, clients - half, ref),
            ]
            began = time.monotonic()
            for side in sides:
                side.talk.send("go")
            waiting = set(sides)
            while waiting:
                with contextlib.suppress(queue.Empty):
                    topic, payload = inbox.get(timeout=0.05)
                    to = topics.down(RUN, topics.client_of(topic))
                    want = decode(payload)
                    assert isinstance(want, Want)
                    shelf.answer(
                        want, lambda packet, to=to: transport.publish(to, packet), time.monotonic()
                    )
                for side in [s for s in waiting if inbox.empty() and s.talk.poll()]:
                    assert side.talk.recv() == "done"
                    waiting.discard(side)
            taken.append(time.monotonic() - began)
            for side in sides:
                assert side.hear() == "verified"
                side.join()
        transport.close()
    rates = ", ".join(f"{seconds:.2f}" for seconds in taken)
    print(
        f"{ref.bytes / 1e6:.2f} MB down to {clients} clients in {rates} s (best {min(taken):.2f})"
    )


def main() -> int:
    """Run what is asked for, or all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("many", "idle", "down"))
    parser.add_argument("--clients", type=int, nargs="+")
    parser.add_argument("--folder", type=Path, help="of the spool; by default the system's own")
    arguments = parser.parse_args()
    if find_mosquitto() is None:
        print("mosquitto is not installed here")
        return 0
    if arguments.what in (None, "down"):
        down((arguments.clients or [100])[0])
    if arguments.what in (None, "idle"):
        idle((arguments.clients or [5000])[0])
    if arguments.what in (None, "many"):
        many(arguments.clients or [100, 1000], arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
