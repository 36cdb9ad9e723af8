"""Everything that reads bytes from the network, given bytes that nobody meant to send.

    python benchmarks/fuzz.py --seconds 3600
    python benchmarks/fuzz.py --targets seal chunk --engine hypothesis --seconds 60
    python benchmarks/fuzz.py --write-corpus

A target may refuse with ProtocolError and with nothing else, within five seconds an input, and the
process may not grow by more than 64 MB. Each target runs in a process of its own, on atheris
(coverage-guided) where it is installed, else on Hypothesis; the seconds are divided among them. The
corpus of ``tests/messaging/corpus`` is where both begin; what breaks a target is written to
``--crashes``, to be mended and added to the corpus, which a test replays.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

HANG_SECONDS = 5
GROWTH_BYTES = 64 * 2**20
WARM_UP = 2_000  # executions until the process has allocated what it always does
LARGEST_INPUT = 4096
CORPUS = Path(__file__).parents[1] / "tests/messaging/corpus"

_ATHERIS = importlib.util.find_spec("atheris") is not None


@contextlib.contextmanager
def _instrumented(wanted: bool) -> Iterator[None]:
    """Let atheris see the branches of what is imported in this block."""
    if not wanted:
        yield
        return
    import atheris

    with atheris.instrument_imports(include=["messaging"]):
        yield


# Instrumented comparisons of numpy arrays leak some hundred bytes each (atheris 3.0; the same
# calls leak nothing without it): the target that does little else is fuzzed blindly.
with _instrumented({"--child", "atheris"} <= set(sys.argv) and "tensors" not in sys.argv):
    import numpy as np

    from messaging.chunks import Missing, make_chunk, parse_chunk
    from messaging.codecs import CODECS, BlobHeader, decode_blob, encode_blob, read_header
    from messaging.errors import ProtocolError
    from messaging.keys import client_key
    from messaging.layout import Layout, TensorSpec
    from messaging.protocol import decode, encode
    from messaging.security import CloudSeal, DeviceSeal, SigningKey

RUN, CLIENT = "fuzz", "pi-1"
MASTER, SEED = bytes(range(32)), bytes(range(32, 64))
DEVICE_SESSION, CLOUD_SESSION = "0123456789abcdef", "fedcba9876543210"
LAYOUT = Layout(
    (TensorSpec(name="down", shape=(3, 5), scale_axis=0), TensorSpec(name="bias", shape=(4,)))
)


def envelope(data: bytes) -> None:
    """Read a control message; what is read and said again is the same message."""
    message = decode(data)
    assert decode(encode(message)) == message


def chunk(data: bytes) -> None:
    """Read a piece of a blob, and the bitmap that its last bytes spell."""
    with contextlib.suppress(ProtocolError):
        Missing.from_bitmap(data[-64:].hex(), 300)
        Missing.from_bitmap(data.decode("latin-1"), 300)
    parse_chunk(RUN, data)


def mended_chunk(data: bytes) -> None:
    """Read a piece whose magic, run and checksum are right, so that the rest of it is reached."""
    data = data.ljust(64, b"\0")
    whole = make_chunk(RUN, "00" * 32, data[64:] or b"x", 0, 2**20)
    head = whole[:16] + data[16:56]  # blob, index and count are the fuzzer's
    parse_chunk(RUN, head + whole[56:])


def seal(data: bytes) -> None:
    """Open a sealed packet as a device and as the aggregator; without a key, nothing opens."""
    device, cloud = _device_seal(), _cloud_seal()
    opened = 0
    for read in (device.open, device.open_manifest, lambda packet: cloud.open(CLIENT, packet)):
        with contextlib.suppress(ProtocolError):
            read(data)
            opened += 1
    assert opened == 0 or data in _sealed_seeds()


def blob(data: bytes) -> None:
    """Read an update's header, and decode it in the codec that it names."""
    with contextlib.suppress(ProtocolError):
        read_header(data)
    _, vector = decode_blob(data, LAYOUT)
    assert vector.shape == (LAYOUT.size,)
    assert np.isfinite(vector).all()


def tensors(data: bytes) -> None:
    """Decode an update whose header is right and whose tensors are the fuzzer's, in each codec."""
    for codec in CODECS:
        whole = encode_blob(np.zeros(LAYOUT.size, np.float32), LAYOUT, _header(codec))
        (length,) = struct.unpack_from("<Q", whole)
        room = len(whole) - 8 - length
        with contextlib.suppress(ProtocolError):
            _, vector = decode_blob(whole[: 8 + length] + data[:room].ljust(room, b"\0"), LAYOUT)
            assert np.isfinite(vector).all()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "envelope": envelope,
    "chunk": chunk,
    "mended_chunk": mended_chunk,
    "seal": seal,
    "blob": blob,
    "tensors": tensors,
}


def run_one(name: str, data: bytes) -> None:
    """Give one input to a target; refusing it is right, and whatever else it raises is not."""
    with contextlib.suppress(ProtocolError):
        TARGETS[name](data)


# -- where the fuzzers begin ----------------------------------------------------------------------


def _header(codec: str) -> BlobHeader:
    return BlobHeader.model_validate(
        {
            "run": RUN, "round": 1, "sender": CLIENT, "codec": codec, "layout": LAYOUT.sha256,
            "examples": 3,
        }
    )  # fmt: skip


def _device_seal() -> DeviceSeal:
    return DeviceSeal(
        run=RUN, client=CLIENT, key=client_key(MASTER, RUN, CLIENT),
        verify_key=SigningKey(SEED).verify_key, session=DEVICE_SESSION, epoch=1,
    )  # fmt: skip


def _cloud_seal() -> CloudSeal:
    return CloudSeal(RUN, MASTER, SigningKey(SEED), CLOUD_SESSION, 1)


def _sealed_seeds() -> list[bytes]:
    """Return what the right keys make: a manifest, and a will and a message of the device."""
    device, cloud = _device_seal(), _cloud_seal()
    manifest = cloud.sign_manifest(b"{}")
    device.open_manifest(manifest)
    return [manifest, device.seal(b"{}"), device.seal(b"{}", will=True)]


_COSTS = (
    b'"costs":{"uplink_bits":1.5,"uplink_seconds":2,"uplink_joules":0.5,"download_bytes":7,'
    b'"lost":true}'
)
_STATE = (
    b'{"round":1,"blob":"' + b"a" * 64 + b'","bytes":1000,"chunk_bytes":1024,"chunks":2,'
    b'"url":"s3://bucket/x"}'
)
_FROM = b'"schema":1,"run":"fuzz","client":"pi-1"'
_SESSION = b'"session":"0123456789abcdef"'
_HASH = b'"' + b"a" * 64 + b'"'
_MESSAGES = [
    b'{"kind":"HELLO",' + _FROM + b"," + _SESSION + b',"epoch":2,"online":true,"binding":' + _HASH
    + b',"layout":' + _HASH + b',"device":null}',
    b'{"kind":"ALIVE",' + _FROM + b"," + _SESSION + b"}",
    b'{"kind":"OFFER",' + _FROM + b"," + _SESSION + b',"round":1,"blob":' + _HASH
    + b',"bytes":1000,"chunk_bytes":1024,"chunks":2,"binding":' + _HASH + b',"layout":' + _HASH
    + b',"codec":"int8",' + _COSTS + b',"url":"file:///srv/x"}',
    b'{"kind":"WANT",' + _FROM + b"," + _SESSION + b',"blob":' + _HASH + b',"missing":"ff03"}',
    b'{"kind":"REPORT",' + _FROM + b"," + _SESSION + b',"round":1,"phase":"train","examples":3,'
    b'"pairs":{"helpfulness":{"pairs":1,"loss":0.5,"accuracy":1,"longer_wins":0.5,'
    b'"calibration_error":0}},' + _COSTS + b"}",
    b'{"kind":"TASK",' + _FROM + b',"work":"train","stage":"instruction","round":1,"state":'
    + _STATE + b',"seed":1,"local_steps":2,"alignment":{"algorithm":"rloo"}}',
    b'{"kind":"GRANT",' + _FROM + b',"blob":' + _HASH
    + b',"missing":"ff","window":8,"expiry_seconds":30}',
    b'{"kind":"HAVE",' + _FROM + b',"blob":' + _HASH + b',"missing":""}',
    b'{"kind":"DONE",' + _FROM + b',"blob":' + _HASH + b',"status":"late"}',
    b'{"kind":"REJECT",' + _FROM + b',"blob":null,"code":"hash","reason":"no"}',
    b'{"kind":"MANIFEST","schema":1,"run":"fuzz",' + _SESSION + b',"method":"pwff","stage":"reward"'
    b',"state":' + _STATE + b',"binding":' + _HASH + b',"layout":' + _HASH + b',"taken_back":[1]}',
    b"[" * 3000,
    b'{"kind":"DONE","kind":{}}',
    b'{"kind":"HAVE","round":1e999,"run":"\\ud800"}',
]  # fmt: skip


def seeds() -> dict[str, list[bytes]]:
    """Return, for each target, what a peer would say, and what breaks careless readers."""
    piece = make_chunk(RUN, "ab" * 32, bytes(range(200)), 0, 164)
    bent = bytearray(piece)
    bent[48:52] = struct.pack(">I", 2**32 - 1)  # index
    long = piece[:56] + struct.pack(">II", 2**32 - 1, zlib.crc32(b"")) + piece[64:]
    vector = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
    blobs = [encode_blob(vector, LAYOUT, _header(codec)) for codec in CODECS]
    bomb = b'{"__metadata__":{"pwff":"{}"},"packed":{"dtype":"F32","shape":[1000000000000],'
    bomb += b'"data_offsets":[0,4000000000000]}}'
    deep = b"[" * 8000
    return {
        "envelope": _MESSAGES,
        "chunk": [piece, bytes(bent), long, piece[:63], b"", b"PWFF"],
        "mended_chunk": [piece, bytes(bent), bytes(64)],
        "seal": [*_sealed_seeds(), b"S", b"S\1U" + bytes(100), b"S\1M" + bytes(200)],
        "blob": [
            *blobs,
            blobs[0][:-1],
            struct.pack("<Q", len(bomb)) + bomb,
            struct.pack("<Q", len(deep)) + deep,
            struct.pack("<Q", 2**64 - 1) + b"{}",
            b"",
        ],
        "tensors": [bytes(80), b"\x80" * 80, b"\xff" * 80, b"\x7f\x80\0\0" * 20],
    }


def write_corpus(folder: Path) -> int:
    """Put the seeds into a folder for each target, named by their hash; return how many."""
    count = 0
    for name, inputs in seeds().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for data in inputs:
            (folder / name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            count += 1
    return count


# -- the engines ----------------------------------------------------------------------------------


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Counts executions, and raises where the process has grown too much."""

    def __init__(self) -> None:
        self.executions = 0
        self.before = 0

    def passed(self) -> None:
        self.executions += 1
        if self.executions == WARM_UP:
            self.before = _rss()
        elif self.executions > WARM_UP and self.executions % 1000 == 0:
            assert self.growth < GROWTH_BYTES, f"grew by {self.growth} bytes"

    @property
    def growth(self) -> int:
        return max(0, _rss() - self.before) if self.before else 0


def fuzz_with_atheris(name: str, seconds: int, corpus: Path, crashes: Path) -> None:
    """Run libFuzzer in this process; it does not return."""
    import atheris

    watch = Watch()

    def one(data: bytes) -> None:
        run_one(name, data)
        watch.passed()
        if watch.executions % 20_000 == 0:
            print(f"growth {watch.growth}", flush=True)

    flags = [
        f"-max_total_time={seconds}", f"-timeout={HANG_SECONDS}", "-print_final_stats=1",
        f"-max_len={LARGEST_INPUT}", "-rss_limit_mb=1024", f"-artifact_prefix={crashes}/{name}-",
        "-verbosity=0",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


def fuzz_with_hypothesis(name: str, seconds: int, corpus: Path, crashes: Path) -> None:
    """Run batches of drawn inputs until the time is over."""
    from hypothesis import HealthCheck, given, settings

    watch, until = Watch(), time.monotonic() + seconds

    def hang(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"{name}: no end after {HANG_SECONDS} s")

    signal.signal(signal.SIGALRM, hang)

    @settings(
        max_examples=2_000, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(inputs([path.read_bytes() for path in sorted(corpus.iterdir())]))
    def batch(data: bytes) -> None:
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            run_one(name, data)
        except BaseException:
            (crashes / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        watch.passed()

    while time.monotonic() < until:
        batch()
    print(f"growth {watch.growth}\nstat::number_of_executed_units: {watch.executions}")


def inputs(known: list[bytes]) -> object:
    """Return a Hypothesis strategy: anything, and known inputs cut, spliced and bent."""
    from hypothesis import strategies as st

    @st.composite
    def bent(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(known)))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(data)))
            length = draw(st.integers(0, 8))
            data[at : at + length] = draw(st.binary(max_size=8))
        if draw(st.booleans()):
            other = draw(st.sampled_from(known))
            data = data[: draw(st.integers(0, len(data)))] + other[len(data) // 2 :]
        return bytes(data)

    return st.one_of(st.binary(max_size=300), bent())


ENGINES = {"atheris": fuzz_with_atheris, "hypothesis": fuzz_with_hypothesis}


def fuzz(name: str, seconds: int, engine: str, crashes: Path) -> bool:
    """Fuzz one target in a process of its own; print what came of it, return whether it held."""
    with tempfile.TemporaryDirectory(prefix="pwff-fuzz-") as folder:
        corpus = Path(folder) / name
        shutil.copytree(CORPUS / name, corpus)
        child = [sys.executable, __file__, "--child", name, "--engine", engine]
        began = time.monotonic()
        done = subprocess.run(
            [*child, "--seconds", str(seconds), "--corpus", str(corpus), "--crashes", str(crashes)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        took = time.monotonic() - began
    said = done.stdout + done.stderr
    counts = re.findall(r"stat::number_of_executed_units:\s+(\d+)", said)
    growth = max((int(n) for n in re.findall(r"^growth (\d+)", said, re.MULTILINE)), default=0)
    executions = int(counts[-1]) if counts else 0
    held = done.returncode == 0
    print(
        f"{name:13} {engine:10} {executions:12,} executions {took:7.0f} s  "
        f"growth {growth / 2**20:5.1f} MB  {'held' if held else 'BROKE'}",
        flush=True,
    )
    if not held:
        print(said[-3000:])
    return held


def main() -> int:
    """Fuzz the targets in turn; return 1 if one of them broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=120, help="in all")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--engine", choices=ENGINES, default="atheris" if _ATHERIS else "hypothesis"
    )
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"))
    parser.add_argument("--write-corpus", action="store_true")
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_corpus:
        print(f"{write_corpus(CORPUS)} inputs in {CORPUS}")
        return 0
    arguments.crashes.mkdir(exist_ok=True)
    if arguments.child:
        engine = ENGINES[arguments.engine]
        engine(arguments.child, arguments.seconds, arguments.corpus, arguments.crashes)
        return 0
    each = max(1, arguments.seconds // len(arguments.targets))
    results = [fuzz(t, each, arguments.engine, arguments.crashes) for t in arguments.targets]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
