"""The cloud side: rounds, aggregation, methods, the run's records, reports, and the emulator.

Sees named arrays only; nothing but ``emulation`` knows how a device trains. What a program needs
to emulate fleets is here under its own name (``docs/api.md``), and is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloud_aggregator.emulation.emulate import emulate
    from cloud_aggregator.experiment import Experiment, load_experiment
    from cloud_aggregator.records import RunRecord
    from cloud_aggregator.run_folder import read_record

__all__ = ["Experiment", "RunRecord", "emulate", "load_experiment", "read_record"]

_HOMES = {
    "Experiment": "cloud_aggregator.experiment",
    "RunRecord": "cloud_aggregator.records",
    "emulate": "cloud_aggregator.emulation.emulate",
    "load_experiment": "cloud_aggregator.experiment",
    "read_record": "cloud_aggregator.run_folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cloud_aggregator' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
