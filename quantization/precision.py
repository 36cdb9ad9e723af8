"""What the base can be held in, whose kernels do it, and what runs on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from device_profiles.errors import InputError
from quantization.backends.bf16 import hold_bf16
from quantization.backends.dense import hold_fp32
from quantization.backends.int8 import hold_int8, hold_int8_dynamic, hold_int8_dynamic_head
from quantization.backends.nf4 import hold_nf4
from quantization.backends.nf4_bitsandbytes import hold_nf4_bitsandbytes
from quantization.matrix import FrozenMatrix
from quantization.trial import fault_elsewhere, fault_of

DEVICES = ("cpu", "cuda")
_FAST_INT8 = ("AVX512",)  # elsewhere torch multiplies int8 one number at a time

Hold = Callable[[Tensor, str], FrozenMatrix]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Whose kernels hold and multiply.

    Attributes:
        hold: From a weight, shape (outputs, inputs) of any float type on the CPU, and a device.
        hold_head: The same for the embedding, which is the head too; None for ``hold``.
        devices: Where it may run.
        package: Needed beside torch; it is tried in a process of its own.
        processors: Instruction sets of the CPU that it is fast on; empty for any.
    """

    name: str
    hold: Hold
    hold_head: Hold | None = None
    devices: tuple[str, ...] = DEVICES
    package: str | None = None
    processors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A way of holding a weight.

    Attributes:
        backends: The first that runs is taken. All give the same dequantised weights.
        weight_error: ||held - weight|| / ||weight|| of normally distributed weights at most.
        product_error: Relative error of a product with the held weight at most; a GPU may
            multiply fp32 as TF32.
    """

    backends: tuple[Backend, ...]
    weight_error: float
    product_error: float = 2e-3


#: ``int8-dynamic`` rounds what a weight is multiplied by to int8 as well.
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(backends=(Backend(name="torch", hold=hold_fp32),), weight_error=1e-6),
    "bf16": Precision(backends=(Backend(name="torch", hold=hold_bf16),), weight_error=2**-8),
    "int8": Precision(backends=(Backend(name="torch", hold=hold_int8),), weight_error=0.02),
    "int8-dynamic": Precision(
        backends=(
            Backend(
                name="torch",
                hold=hold_int8_dynamic,
                hold_head=hold_int8_dynamic_head,
                devices=("cpu",),
                processors=_FAST_INT8,
            ),
        ),
        weight_error=0.02,
        product_error=0.02,
    ),
    "nf4": Precision(
        backends=(
            Backend(name="bitsandbytes", hold=hold_nf4_bitsandbytes, package="bitsandbytes"),
            Backend(name="torch", hold=hold_nf4),
        ),
        weight_error=0.15,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Whether a precision runs here.

    Attributes:
        backend: The one that is taken; None if none runs.
        words: Why each backend before it, or every one, is not.
    """

    backend: str | None
    words: str


def available(device: str = "cpu") -> dict[str, Availability]:
    """Try every precision on a device, once a process; say which backend each would take.

    Raises:
        InputError: If there is no such kind of device.
    """
    kind_of(device)
    found = {name: _first(name, row.backends, device) for name, row in PRECISIONS.items()}
    return {
        name: Availability(backend=row.name if row else None, words=words)
        for name, (row, words) in found.items()
    }


def choose(precision: str, device: str = "cpu", backend: str | None = None) -> Backend:
    """Return the backend that holds a precision on a device.

    Args:
        precision: Row of ``PRECISIONS``.
        device: ``cpu`` or ``cuda``, perhaps with a number as in ``cuda:1``.
        backend: By name; None for the first that runs.

    Raises:
        InputError: If precision, device or backend are unknown, or do not run here.
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision '{precision}'; choose one of {', '.join(PRECISIONS)}")
    kind_of(device)
    rows = {row.name: row for row in PRECISIONS[precision].backends}
    if backend is not None and backend not in rows:
        raise InputError(
            f"unknown backend '{backend}' of precision '{precision}'; "
            f"choose one of {', '.join(rows)}"
        )
    tried = tuple(rows.values()) if backend is None else (rows[backend],)
    row, faults = _first(precision, tried, device)
    if row is None:
        run = [
            f"{name} ({found.backend})"
            for name, found in available(device).items()
            if found.backend
        ]
        raise InputError(
            f"precision '{precision}' does not run on '{device}' here ({faults}); "
            f"{'what does: ' + ', '.join(run) if run else 'nor does any other: take cpu'}"
        )
    return row


def _first(
    precision: str, backends: tuple[Backend, ...], device: str
) -> tuple[Backend | None, str]:
    """Return the first backend that runs, and why those before it do not."""
    faults: list[str] = []
    for backend in backends:
        fault = _fault(precision, backend, device)
        if not fault:
            return backend, "; ".join(faults)
        faults.append(f"{backend.name}: {fault}")
    return None, "; ".join(faults)


def kind_of(device: str) -> str:
    """Return ``cpu`` or ``cuda``, for ``cuda:1`` too.

    Raises:
        InputError: If it is another.
    """
    kind, _, number = device.partition(":")
    if kind not in DEVICES or (number and not number.isdecimal()):
        raise InputError(f"unknown device '{device}'; choose one of {', '.join(DEVICES)}")
    return kind


@lru_cache
def _fault(precision: str, backend: Backend, device: str) -> str:
    """Return why a backend does not run on a device, or ""."""
    kind = kind_of(device)
    if kind not in backend.devices:
        return f"not on {kind}"
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    processor = torch.backends.cpu.get_cpu_capability()
    if backend.processors and processor not in backend.processors:
        return f"slow on this processor ({processor}, not {' or '.join(backend.processors)})"
    if backend.package is None:
        return fault_here(precision, backend, device)
    if importlib.util.find_spec(backend.package) is None:
        return f"{backend.package} is not installed (pip install 'pwff[quantized]')"
    return fault_elsewhere(precision, backend.name, device)


def fault_here(precision: str, backend: Backend, device: str) -> str:
    """Try a backend in this process; return what is wrong, or ""."""
    row = PRECISIONS[precision]
    return fault_of(
        backend.hold, device, weight_error=row.weight_error, product_error=row.product_error
    )
