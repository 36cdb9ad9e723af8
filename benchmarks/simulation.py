"""How long rounds of a large fleet take in virtual time: seconds of this machine, peak memory.

One process, one core (set OMP_NUM_THREADS=1). Run: python benchmarks/simulation.py
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from typing import Any

import numpy as np

from cloud_aggregator.simulation.engine import simulate
from cloud_aggregator.simulation.settings import load_simulation

CASES: dict[str, dict[str, Any]] = {
    "synchronous, always, uniform": {},
    "synchronous, diurnal, uniform": {"availability": "diurnal"},
    "synchronous, churn, best-channel": {"availability": "churn", "selection": "best-channel"},
    "synchronous, churn, utility": {"availability": "churn", "selection": "utility"},
    "synchronous, battery, proportional-fair": {
        "availability": "battery",
        "selection": "proportional-fair",
    },
    "fedbuff, churn, uniform": {"mode": "fedbuff", "availability": "churn"},
    "fedasync, churn, uniform": {"mode": "fedasync", "availability": "churn"},
}


def main() -> None:
    """Print what was measured, as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=100_000)
    parser.add_argument("--cohort", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=100)
    given = vars(parser.parse_args())
    load = ", ".join(f"{one:.2f}" for one in os.getloadavg())
    print(f"numpy {np.__version__}, load average {load}, {given}")
    print(f"{'':42} seconds  core s  peak MB so far  updates accepted")
    for name, case in CASES.items():
        began, core = time.perf_counter(), time.process_time()
        totals = simulate(load_simulation(None, {**given, **case})).totals()
        seconds, core = time.perf_counter() - began, time.process_time() - core
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{name:42} {seconds:7.2f} {core:7.2f} {peak:15.0f} {totals['accepted']:17,}")


if __name__ == "__main__":
    main()
