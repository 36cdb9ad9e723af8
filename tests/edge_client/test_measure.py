"""Timings of the best repeat, a rate that gives the step its time, and a profile that says so."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from device_profiles.errors import InputError
from device_profiles.profile import catalog, find_profile, write_profile
from device_profiles.step_model import Pass, base_parameters
from device_profiles.step_time import Machine, step_seconds
from edge_client import measure_command as command_module
from edge_client.machine_profile import (
    THIS_MACHINE,
    PowerFigures,
    known_power,
    machine_profile,
    profile_name,
)
from edge_client.measure import (
    COPY_BYTES,
    GEMM,
    STEP_LORA,
    STEP_PASS,
    STEP_SHAPE,
    Speed,
    Step,
    copy_bandwidth,
    gemm_flops,
    least_seconds,
    measure_speed,
    sustained_flops,
)
from edge_client.measure_command import measure_command, this_machine
from edge_client.preflight import FreeMemory
from edge_client.random_base import random_base, random_examples

SHORT = Pass(examples=1, tokens=16, response=4)


class Clock:
    """A clock that the work itself moves on."""

    def __init__(self, durations: list[float]) -> None:
        self.now, self._durations = 0.0, itertools.chain(durations, itertools.repeat(durations[-1]))

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def work(self) -> None:
        """Take as long as the next duration says."""
        self.now += next(self._durations)


def test_the_best_repeat_counts_and_the_first_call_does_not() -> None:
    clock = Clock([0.01, 5.0, 3.0, 4.0])
    assert least_seconds(clock.work, 0.0, clock) == pytest.approx(3.0)


def test_repeats_go_on_while_there_is_time() -> None:
    # three repeats are at 9 s, and so are within ten; the fourth is the best
    clock = Clock([1.0, 3.0, 3.0, 3.0, 2.0, 9.0])
    assert least_seconds(clock.work, 10.0, clock) == pytest.approx(2.0)


def ticking() -> Callable[[], float]:
    """Return a clock that is a second later at each look."""
    seconds = itertools.count()
    return lambda: float(next(seconds))


def test_rates_are_work_over_time() -> None:
    rows, inner, columns = GEMM
    assert gemm_flops("cpu", 0.0, ticking()) == 2 * rows * inner * columns
    assert copy_bandwidth("cpu", 0.0, ticking()) == 2 * COPY_BYTES


def test_the_sustained_rate_is_the_one_that_gives_the_step_its_time() -> None:
    machine = Machine(flops=3.21e10, bandwidth=2e10)
    seconds = step_seconds(STEP_SHAPE, STEP_LORA, STEP_PASS, machine).total
    found = sustained_flops(STEP_SHAPE, STEP_LORA, STEP_PASS, seconds, 2e10)
    assert found == pytest.approx(3.21e10, rel=1e-5)  # bisected to 1e-6


def test_a_step_that_is_faster_than_memory_allows_is_no_measurement() -> None:
    with pytest.raises(InputError, match="the machine is busy, measure again"):
        sustained_flops(STEP_SHAPE, STEP_LORA, STEP_PASS, 1e-4, 1e9)


def test_a_random_base_has_the_weights_of_its_shape() -> None:
    weights = random_base(STEP_SHAPE, torch.device("cpu")).weights
    assert weights.nbytes == 4 * base_parameters(STEP_SHAPE)


def test_random_examples_begin_apart_and_are_the_same_again() -> None:
    pass_ = Pass(examples=3, tokens=9, response=4)
    one, again = random_examples(pass_, 50), random_examples(pass_, 50)
    assert [len(e.tokens) - e.response_start for e in one] == [4, 4, 4]
    assert {len(e.tokens) for e in one} == {9}
    assert len({int(e.tokens[0]) for e in one}) == 3
    assert all((a.tokens == b.tokens).all() for a, b in zip(one, again, strict=True))


def test_this_machine_is_measured() -> None:
    # by a clock on which everything takes one second
    speed = measure_speed(0.0, clock=ticking(), pass_=SHORT)
    assert (speed.step.seconds, speed.mini.seconds) == (1.0, 1.0)
    assert speed.bandwidth == 2 * COPY_BYTES
    assert speed.flops > 0
    found = Machine(flops=speed.flops, bandwidth=speed.bandwidth)
    assert step_seconds(STEP_SHAPE, STEP_LORA, SHORT, found).total == pytest.approx(1.0)
    assert speed.step.predicted_seconds < 1.0  # the large product's rate is higher


# -- power -----------------------------------------------------------------------------------------

NO_METER = {"metered": None, "metered_idle": None, "meter": "no rails here"}
METER = {"metered": 12.0, "metered_idle": 3.0, "meter": "the whole board"}


def test_power_that_is_given_comes_first() -> None:
    power = known_power(given=20.0, given_idle=None, threads=2, **METER)  # type: ignore[arg-type]
    assert power == PowerFigures(watts=20.0, idle_watts=None, source="given by the user")


def test_power_that_is_metered_comes_before_a_guess() -> None:
    power = known_power(given=None, given_idle=None, threads=2, **METER)  # type: ignore[arg-type]
    assert (power.watts, power.idle_watts) == (12.0, 3.0)
    assert power.source == "measured: the whole board"


def test_waiting_never_takes_more_than_training() -> None:
    noisy = {**METER, "metered_idle": 12.5}
    power = known_power(given=None, given_idle=None, threads=2, **noisy)  # type: ignore[arg-type]
    assert power.idle_watts == 12.0


def test_a_guess_is_called_one() -> None:
    power = known_power(given=None, given_idle=None, threads=4, **NO_METER)  # type: ignore[arg-type]
    assert power.watts == 42.0  # 10 and four times 8
    assert power.source.startswith("assumed, so energy is modelled")
    assert "no rails here" in power.source


# -- the profile -----------------------------------------------------------------------------------

STEP = Step(seconds=0.5, predicted_seconds=0.4)
SPEED = Speed(gemm_flops=2e11, bandwidth=2.5e10, flops=1.5e11, step=STEP, mini=STEP)


def test_every_figure_says_where_it_is_from(tmp_path: Path) -> None:
    profile = machine_profile(
        name="shed",
        title="A box in the shed",
        stamp="2026-01-31, torch 9.9, 4 threads",
        speed=SPEED,
        power=PowerFigures(watts=30.0, idle_watts=5.0, source="measured: the board"),
        total_bytes=8 * 10**9,
        free=FreeMemory(bytes=6 * 10**9, source="says the system"),
        radio={"snr_db": 12.0},
        precisions=("fp32", "int8"),
        backends=("cpu",),
    )
    stamp = "measured on this machine, 2026-01-31, torch 9.9, 4 threads"
    assert (profile.compute.flops, profile.compute.watts, profile.compute.idle_watts) == (
        1.5e11,
        30.0,
        5.0,
    )
    assert profile.memory.free_bytes == 6 * 10**9
    assert profile.radio.snr_db == 12.0
    assert profile.sources["compute.flops"].startswith(stamp)
    assert profile.sources["compute.watts"] == f"{stamp}: the board"
    assert profile.sources["radio.snr_db"] == "given by the user"
    assert profile.sources["radio.transmit_watts"].startswith("assumed")
    path = tmp_path / "shed.toml"
    write_profile(profile, path)
    assert find_profile(str(path)) == profile


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Lab Box (2)", "lab-box-2"),
        ("__", "this-machine"),
        ("x" * 60, "x" * 42),
        ("", "this-machine"),
    ],
)
def test_a_machine_s_name_becomes_one_that_a_profile_may_have(words: str, name: str) -> None:
    assert profile_name(words) == name


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_a_profile_that_can_be_planned_with(tmp_path: Path) -> None:
    out = tmp_path / "here.toml"
    given = ["--seconds", "0.01", "--threads", "1", "--device", "cpu", "--watts", "33"]
    result = CliRunner().invoke(
        measure_command, [*given, "--name", "Here", "--out", str(out), "--json"]
    )
    assert result.exception is None, result.output
    said = json.loads(result.stdout)
    profile = find_profile(str(out))
    assert profile.name == said["profile"]["name"] == "here"
    assert profile.compute.watts == 33.0
    assert profile.sources["compute.watts"] == "given by the user"
    assert f"torch {torch.__version__}, 1 threads" in profile.sources["compute.flops"]
    assert "fp32" in profile.precisions
    assert said["timings"]["step"]["seconds"] > 0


def test_without_a_place_it_is_written_where_a_plan_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = catalog()["laptop-x86-cpu"]
    monkeypatch.setattr(command_module, "this_machine", lambda **_: (mine, SPEED))
    result = CliRunner(catch_exceptions=False).invoke(measure_command, [])
    assert "Written to this-machine.toml." in result.stdout
    assert "pwff devices plan --this-machine" in result.stdout
    assert find_profile(str(THIS_MACHINE)) == mine


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", "0"], "--seconds = 0"),
        (["--seconds", "nan"], "--seconds = nan"),
        (["--out", "profile.json"], r"ends in \.toml"),
        (["--threads", "0"], "--threads = 0"),
        (["--device", "tpu"], "choose auto, cpu or cuda"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(measure_command, arguments)
    with pytest.raises(InputError, match=words):
        raise result.exception or AssertionError(result.output)


def test_counters_are_read_while_it_waits_and_while_it_trains(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    counter = zone / "energy_uj"
    counter.write_text("0\n")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        counter.write_text(f"{10**9}\n")  # a thousand joules in no time: more than training takes

    profile, _ = this_machine(
        seconds=0.01,
        threads=1,
        device="cpu",
        rapl_folder=tmp_path,
        sleep=sleep,
    )
    assert slept
    # while it trained the counter stood still: no reading, so a guess, which says so
    assert profile.sources["compute.watts"].startswith("assumed")
    assert "RAPL" in profile.sources["compute.watts"]
