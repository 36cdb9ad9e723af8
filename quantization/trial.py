"""Whether a way of holding a weight runs on this machine, found out by running it.

A kernel that was built for another processor may raise, give wrong numbers or end the process; so
one that comes from a package other than torch is tried in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from device_profiles.seeds import stream
from quantization.matrix import FrozenMatrix

_OUTPUTS, _INPUTS = 48, 80  # not a whole number of blocks: padding is tried as well
_ROWS = (33, 1)
_WAIT_SECONDS = 120.0


def fault_of(
    hold: Callable[[Tensor, str], FrozenMatrix],
    device: str,
    *,
    weight_error: float,
    product_error: float,
) -> str:
    """Hold a small matrix and multiply by it both ways; return what is wrong, or "".

    Args:
        hold: From a weight, shape (outputs, inputs), and a device.
        device: ``cpu`` or ``cuda``.
        weight_error: ||held - weight|| / ||weight|| at most.
        product_error: Of both products against float64, likewise.
    """
    try:
        return _fault(hold, device, weight_error, product_error)
    except Exception as err:  # a foreign kernel may raise whatever it likes
        line = (str(err).strip().splitlines() or [""])[0][:200]
        return f"{type(err).__name__}: {line}"


def _fault(
    hold: Callable[[Tensor, str], FrozenMatrix],
    device: str,
    weight_error: float,
    product_error: float,
) -> str:
    draw = stream(0, "precision trial").standard_normal
    weight = draw((_OUTPUTS, _INPUTS)) / math.sqrt(_INPUTS)
    weight[0] = 1.0  # with a row of ones in the batch the largest sum: int8 kernels overflow there
    bias = draw(_OUTPUTS)

    def here(array: Any) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=device)

    held = hold(torch.tensor(weight, dtype=torch.float32), device)
    dense = _float64(held.dense())
    found = [("weight", dense, weight, weight_error)]
    index = np.array([_OUTPUTS - 1, 0, 7])
    found.append(("row", _float64(held.rows(here(index).long())), dense[index], 0.0))
    for rows in _ROWS:
        x, g = draw((rows, _INPUTS)), draw((rows, _OUTPUTS))
        x[0] = 1.0
        product = held.times(here(x), here(bias))
        found.append(("product", _float64(product), x @ dense.T + bias, product_error))
        gradient = held.times_transposed(here(g))
        found.append(("gradient", _float64(gradient), g @ dense, product_error))
    for name, value, expected, bound in found:
        error = float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
        if not error <= bound:
            return f"wrong numbers: relative error of a {name} {error:.1e}, at most {bound:g}"
    return ""


def _float64(value: Tensor) -> Any:
    return value.cpu().numpy().astype(np.float64)


def fault_elsewhere(precision: str, backend: str, device: str) -> str:
    """Try a backend in another process; return what is wrong, or ""."""
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "quantization.trial", precision, backend, device],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_WAIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_WAIT_SECONDS:g} s"
    try:
        return str(json.loads(done.stdout.splitlines()[-1])["fault"])
    except (IndexError, ValueError, TypeError, KeyError):
        code = done.returncode
        words = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process ended ({words})"


def _main() -> None:
    from quantization.precision import PRECISIONS, fault_here

    precision, name, device = sys.argv[1:]
    backend = next(b for b in PRECISIONS[precision].backends if b.name == name)
    sys.stdout.write("\n" + json.dumps({"fault": fault_here(precision, backend, device)}) + "\n")


if __name__ == "__main__":
    _main()
