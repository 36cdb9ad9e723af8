"""What this machine reaches: a matrix product, a copy, and training steps of the packed model.

SI units: FLOP/s, bytes/s, seconds, watts. The best of several repeats counts: what disturbs a
measurement only ever makes it slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_profiles.errors import InputError
from device_profiles.modules import BaseShape
from device_profiles.step_model import NUMBER_BYTES, Pass, StepShape
from device_profiles.step_time import Machine, step_seconds

if TYPE_CHECKING:
    from quantization.frozen_gpt2 import FrozenBase

Clock = Callable[[], float]

GEMM = (2048, 768, 2304)  # 2,048 rows through GPT-2 small's query, key and value
COPY_BYTES = 2**28
STEP_PASS = Pass(examples=4, tokens=128, response=64)
#: Blocks of GPT-2 small's width, few of them and with few words, so that a step is soon done.
STEP_SHAPE = StepShape(
    base=BaseShape(layers=2, width=768, inner=3072),
    heads=12,
    vocabulary=8192,
    positions=256,
    adapter_size=10,
    placement="qkv",
    lora_rank=96,
)
STEP_LORA = 6
_LEAST_REPEATS = 3
_RUNS = {"gemm": 0.2, "copy": 0.1, "step": 0.5, "mini": 0.2}  # shares of the time


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """A base, and the modules that are put on it."""

    base: FrozenBase
    shape: StepShape
    lora_count: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step that was timed.

    Attributes:
        seconds: Of the best step.
        predicted_seconds: By ``device_profiles.step_time`` from what else was measured.
    """

    seconds: float
    predicted_seconds: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured.

    Attributes:
        gemm_flops: Of a large product, FLOP/s.
        bandwidth: Of a copy, bytes read and written, bytes/s.
        flops: Of the products inside of a training step of GPT-2's width, FLOP/s.
        step: That step.
        mini: One of the bundled base.
    """

    gemm_flops: float
    bandwidth: float
    flops: float
    step: Step
    mini: Step


def least_seconds(work: Callable[[], object], budget_seconds: float, clock: Clock) -> float:
    """Return the time of the fastest repeat: at least three, and more while the budget lasts.

    One call before warms up and is not timed.
    """
    work()
    best, began, repeats = float("inf"), clock(), 0
    while repeats < _LEAST_REPEATS or clock() - began < budget_seconds:
        started = clock()
        work()
        best = min(best, clock() - started)
        repeats += 1
    return best


def gemm_flops(device: str, budget_seconds: float, clock: Clock = time.perf_counter) -> float:
    """Return the rate of an fp32 product of ``GEMM``'s size, FLOP/s."""
    import torch

    rows, inner, columns = GEMM
    a = torch.ones(rows, inner, device=device)
    b = torch.ones(inner, columns, device=device)
    out = torch.empty(rows, columns, device=device)

    def work() -> None:
        torch.mm(a, b, out=out)
        _wait(device)

    return 2 * rows * inner * columns / least_seconds(work, budget_seconds, clock)


def copy_bandwidth(device: str, budget_seconds: float, clock: Clock = time.perf_counter) -> float:
    """Return the bandwidth of a copy, reading and writing counted each, bytes/s."""
    import torch

    source = torch.ones(COPY_BYTES // NUMBER_BYTES, device=device)
    target = torch.empty_like(source)

    def work() -> None:
        target.copy_(source)
        _wait(device)

    return 2 * COPY_BYTES / least_seconds(work, budget_seconds, clock)


def sustained_flops(
    shape: StepShape, lora_count: int, pass_: Pass, seconds: float, bandwidth: float
) -> float:
    """Return the rate of products at which a step takes so long, FLOP/s.

    Raises:
        InputError: If everything but the products is slower by itself.
    """

    def predicted(flops: float) -> float:
        machine = Machine(flops=flops, bandwidth=bandwidth)
        return step_seconds(shape, lora_count, pass_, machine).total

    low, high = 1e6, 1e18
    if predicted(high) >= seconds:
        raise InputError(
            f"a training step took {seconds:.3g} s, and moving its numbers at {bandwidth:.3g} B/s "
            "alone would take longer; the machine is busy, measure again"
        )
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if predicted(middle) > seconds else (low, middle)
    return low


def measure_speed(
    budget_seconds: float,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
    pass_: Pass = STEP_PASS,
    training: AbstractContextManager[object] | None = None,
) -> Speed:
    """Return what this machine reaches, in about ``budget_seconds``.

    Args:
        budget_seconds: Some repeats take longer where a machine is slow.
        device: ``cpu`` or ``cuda``.
        clock: Seconds.
        pass_: What goes through the timed steps at once.
        training: Entered while it trains at GPT-2's width, to meter its power.

    Raises:
        InputError: If it is too busy for figures that agree.
    """
    import torch

    from edge_client.random_base import random_base
    from quantization.frozen_gpt2 import load_frozen
    from quantization.identity import MINI, identify

    shares = {name: share * budget_seconds for name, share in _RUNS.items()}
    gemm = gemm_flops(device, shares["gemm"], clock)
    bandwidth = copy_bandwidth(device, shares["copy"], clock)
    large = TimedModel(
        base=random_base(STEP_SHAPE, torch.device(device)), shape=STEP_SHAPE, lora_count=STEP_LORA
    )
    with training or nullcontext():
        taken = time_step(large, pass_, shares["step"], clock)
    flops = sustained_flops(STEP_SHAPE, STEP_LORA, pass_, taken, bandwidth)
    mini = load_frozen(identify(MINI), device=device)
    shape = StepShape(
        base=mini.identity.shape,
        heads=mini.weights.heads,
        vocabulary=mini.identity.vocabulary,
        positions=mini.identity.positions,
        adapter_size=10,
        placement="qkv",
        lora_rank=16,
    )
    small = TimedModel(base=mini, shape=shape, lora_count=36)

    def step(of: TimedModel, seconds: float, rate: float) -> Step:
        machine = Machine(flops=rate, bandwidth=bandwidth)
        predicted = step_seconds(of.shape, of.lora_count, pass_, machine).total
        return Step(seconds=seconds, predicted_seconds=predicted)

    return Speed(
        gemm_flops=gemm,
        bandwidth=bandwidth,
        flops=flops,
        step=step(large, taken, gemm),
        mini=step(small, time_step(small, pass_, shares["mini"], clock), flops),
    )


def time_step(
    timed: TimedModel, pass_: Pass, budget_seconds: float, clock: Clock = time.perf_counter
) -> float:
    """Return the seconds of the fastest training step on random tokens, with its optimiser."""
    from edge_client.peft.packed_model import PackedModel
    from edge_client.random_base import random_examples
    from edge_client.state import ClientState
    from edge_client.trainer import train

    shape = timed.shape
    model = PackedModel(
        timed.base,
        adapter_size=shape.adapter_size,
        placement=shape.placement,
        lora_count=timed.lora_count,
        lora_rank=shape.lora_rank,
    )
    examples = random_examples(pass_, shape.vocabulary)
    state = ClientState(round=0, personal={})

    def work() -> None:
        train(
            model,
            state,
            examples,
            steps=1,
            batch_size=pass_.examples,
            learning_rate=1e-6,
            seed=0,
            words=("measure",),
        )
        _wait(model.device.type)

    return least_seconds(work, budget_seconds, clock)


def _wait(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
