"""A million uploads over fading links on one core: how long, and how true the fast law is.

    python benchmarks/channel.py

Each upload is of 18.591 Mbit (the adapters of a GPT-2 small) over the paper's link, 5 dB, 1 MHz and
a new fading state every 10 ms: about 1,083 states an upload, each drawn by method `exact`, none by
method `normal`. The two laws are compared by Kolmogorov and Smirnov's distance between two samples,
each on streams of its own. Everything runs in this one thread; `core s` is the processor's time,
which others on the machine lengthen less than they do `seconds`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import stats

from device_profiles.airtime import expected_upload
from device_profiles.channel import PAPER_LINK, Link
from device_profiles.many_uploads import Method, upload_seconds_many
from device_profiles.philox import KeyedGenerator, first_words, named_keys, numbered_keys

BITS = 580_968 * 32
BLOCKS = 1_083
DRAWS = 2_000_000


def fastest(function: Callable[[], object], repeats: int = 3) -> float:
    """Return the least seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def draws() -> dict[str, float]:
    """Return nanoseconds a fading state of several ways to draw it, alone."""
    row, small = np.empty(1024), np.empty(1024, dtype=np.float32)
    philox, sfc = (np.random.Generator(bits(1)) for bits in (np.random.Philox, np.random.SFC64))
    words = np.random.Philox(1)
    table = np.linspace(0, 1, 2**16, dtype=np.float32)

    def again(function: Callable[[], object]) -> float:
        def many() -> None:
            for _ in range(DRAWS // row.size):
                function()

        return fastest(many) / DRAWS * 1e9

    return {
        "Philox, exponential, float64 (what `exact` does)": again(
            lambda: philox.standard_exponential(out=row)
        ),
        "Philox, exponential, float32": again(
            lambda: philox.standard_exponential(dtype=np.float32, out=small)
        ),
        "SFC64, exponential, float64": again(lambda: sfc.standard_exponential(out=row)),
        "Philox, one of 65,536 rates from a table": again(
            lambda: np.take(
                table, words.random_raw(row.size // 4).view(np.uint16), out=small, mode="clip"
            )
        ),
        "logarithm of it, float64": again(lambda: np.log1p(row, out=row)),
    }


def timed(link: Link, count: int, method: Method, seed: int) -> tuple[np.ndarray, float, float]:
    """Return the seconds that uploads take, those that computing them took, and of a core."""
    keys = numbered_keys(seed, "benchmark", repr(link), method, count=count)
    began, core = time.perf_counter(), time.process_time()
    samples = upload_seconds_many(BITS, link, keys, method)
    return samples, time.perf_counter() - began, time.process_time() - core


def main() -> None:
    """Print what was measured, as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uploads", type=int, default=1_000_000)
    parser.add_argument("--others", type=int, default=100_000, help="uploads over other links")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    print(f"numpy {np.__version__}; nanoseconds a fading state, the least of three runs:")
    for name, nanoseconds in draws().items():
        print(f"  {name:50} {nanoseconds:5.2f}")

    count = arguments.uploads
    numbers = fastest(lambda: numbered_keys(0, "benchmark", count=count), repeats=1)
    names = [f"client-{i}" for i in range(count)]
    named = fastest(lambda: named_keys(0, "benchmark", names=names), repeats=1)
    keys = numbered_keys(0, "benchmark", count=count)
    words = fastest(lambda: first_words(keys), repeats=1)
    streams = KeyedGenerator()
    turn = fastest(lambda: [streams.at(key) for key in keys[:100_000]]) / 100_000
    print(f"\nstreams of {count:,} uploads, seconds:")
    print(f"  keys by number {numbers:.2f}, by name {named:.2f}; first words of all {words:.2f};")
    print(f"  going to the beginning of one {turn * 1e6:.2f} microseconds")

    links = {
        "Rayleigh, 5 dB": (PAPER_LINK, count),
        "Rician, K = 3": (replace(PAPER_LINK, fading="rician", rician_k=3.0), arguments.others),
        "shadowing of 8 dB": (replace(PAPER_LINK, shadowing_db=8.0), arguments.others),
        "ten in turn": (replace(PAPER_LINK, sharing="tdma", sharers=10), arguments.others // 10),
    }
    print("\nlink              method    uploads  seconds  core s  uploads/s   mean s  spread s")
    for name, (link, uploads) in links.items():
        samples = {}
        for seed, method in enumerate(("exact", "normal"), start=arguments.seed):
            samples[method], seconds, core = timed(link, uploads, method, seed)  # type: ignore[arg-type]
            print(
                f"{name:17} {method:7} {uploads:9,} {seconds:8.2f} {core:7.2f} "
                f"{uploads / seconds:10,.0f} {samples[method].mean():8.4f} "
                f"{samples[method].std():9.4f}",
                flush=True,
            )
        expected = expected_upload(BITS, link)
        told = stats.ks_2samp(samples["exact"], samples["normal"])
        least = 1.36 * math.sqrt(2 / uploads)
        print(
            f"{'':17} theory {'':37} {expected.seconds:8.4f} {expected.spread_seconds:9.4f}\n"
            f"{'':17} distance of the two laws {told.statistic:.5f}, p = {told.pvalue:.3f} "
            f"(told apart from {least:.5f} on, at p = 0.05)",
            flush=True,
        )


if __name__ == "__main__":
    main()
