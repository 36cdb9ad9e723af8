"""Plans: a count that only ever falls, limits that are the largest that fit, and reasons."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_profiles.channel import PAPER_LINK, profile_link
from device_profiles.errors import InputError
from device_profiles.modules import BaseShape
from device_profiles.plan_limits import MEMORY_SHARE, UPLINK_SHARE
from device_profiles.plan_words import listed, reasons
from device_profiles.planning import (
    REFERENCE_BUDGET,
    REFERENCE_JOB,
    Budget,
    InfeasiblePlanError,
    Plan,
    plan,
    planned_precision,
    policy_count,
    profile_lora_count,
)
from device_profiles.profile import Profile, catalog
from device_profiles.round_estimate import Setting, round_estimate

BOARD = Profile.model_validate(
    {
        "name": "board",
        "title": "A board",
        "short": "board",
        "compute": {"flops": 1e11, "watts": 10.0},
        "memory": {"bytes": 64 * 10**9, "bandwidth": 2e10, "reserved_bytes": 0},
        "radio": {"snr_db": 5.0, "bandwidth_hz": 1e6, "transmit_watts": 1.0},
        "precisions": ["fp32", "nf4"],
    }
)
PLENTY = Budget(deadline_seconds=1e6, energy_joules=1e9)
JOB = replace(REFERENCE_JOB, samples=1_000_000)


def board(free_bytes: float = 64e9, **radio: float) -> Profile:
    memory = BOARD.memory.model_copy(update={"reserved_bytes": 64 * 10**9 - int(free_bytes)})
    link = BOARD.radio.model_copy(update=radio)
    return BOARD.model_copy(update={"memory": memory, "radio": link})


def spend(seconds: float = 1e6, joules: float = 1e9) -> Budget:
    return Budget(deadline_seconds=seconds, energy_joules=joules)


def way(**changes: object) -> Setting:
    whole = Setting(precision="fp32", codec="fp32", checkpoint=False, micro_batch=4, max_length=256)
    return replace(whole, **changes)  # type: ignore[arg-type]


def memory_of(count: int, setting: Setting) -> int:
    return round_estimate(BOARD, JOB, PAPER_LINK, count, setting).memory.total


# -- the policy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "count"),
    [
        ({"memory": 1.0, "time": 1.0}, 36),
        ({"memory": 7.0, "time": 1.2}, 36),
        ({"memory": 0.5, "time": 0.75}, 24),  # 12 + 12
        ({"memory": 0.999, "time": 1.0}, 35),  # 12 + floor(23.976)
        ({"memory": 0.04, "time": 1.0}, 12),  # 12 + floor(0.96)
        ({"memory": -3.0, "time": 1.0}, 12),
    ],
)
def test_the_policy_counts_from_12_by_the_lowest_score(
    scores: dict[str, float], count: int
) -> None:
    assert policy_count(scores) == count


def test_the_scores_are_those_of_the_rule() -> None:
    found = plan(board(8e9), replace(JOB, samples=5000), spend())
    trained = found.canonical.compute_seconds
    assert found.scores["memory"] == pytest.approx(2 / 3)  # log2(8/2) / 3
    assert found.scores["data"] == pytest.approx(1.0)  # log10(5000/500)
    tenfold = plan(board(), JOB, spend(seconds=10 * trained))
    assert tenfold.scores["time"] == pytest.approx(1.0)
    # ten watts for the training, and one watt of airtime at 5 dB and 1 MHz: 10.83 s
    joules = 10 * trained + 10.834
    spent = plan(board(), JOB, spend(joules=100 * joules))
    assert spent.scores["energy"] == pytest.approx(2.0, abs=1e-4)  # the airtime is rounded


def test_what_the_scores_see_does_not_depend_on_how_the_device_trains() -> None:
    only = board().model_copy(update={"precisions": ("nf4",)})
    assert plan(only, JOB, PLENTY).scores == plan(board(), JOB, PLENTY).scores
    assert plan(only, JOB, PLENTY).setting.precision == "nf4"


@pytest.mark.parametrize(
    ("profile", "job", "budget", "binds", "count"),
    [
        (board(), JOB, PLENTY, (), 36),
        (board(4e9), JOB, PLENTY, ("memory",), 20),  # 12 + floor(24/3)
        (board(), replace(JOB, samples=500), PLENTY, ("data",), 12),
        (board(), replace(JOB, samples=2500), PLENTY, ("data",), 28),  # 24 * 0.699 = 16.8
    ],
)
def test_the_lowest_score_binds(
    profile: Profile, job: object, budget: Budget, binds: tuple[str, ...], count: int
) -> None:
    found = plan(profile, job, budget)  # type: ignore[arg-type]
    assert (found.binds, found.lora_count) == (binds, count)
    assert found.hard_count == 36


def test_time_and_energy_bind_by_their_scores_too() -> None:
    trained = plan(board(), JOB, PLENTY).canonical.compute_seconds
    timed = plan(board(), JOB, spend(seconds=trained * 10**0.505))
    assert (timed.binds, timed.lora_count) == (("time",), 24)  # 24 * 0.505 = 12.1
    fuelled = plan(board(), JOB, spend(joules=(10 * trained + 10.834) * 10**0.505))
    assert (fuelled.binds, fuelled.lora_count) == (("energy",), 24)


# -- monotone --------------------------------------------------------------------------------------

BUDGETS = st.fixed_dictionaries(
    {
        "free": st.floats(0.4e9, 40e9),
        "seconds": st.floats(50, 5000),
        "joules": st.floats(500, 50_000),
        "samples": st.integers(50, 20_000),
    }
)
MORE = st.fixed_dictionaries(
    dict.fromkeys(("free", "seconds", "joules", "samples"), st.floats(1, 4))
)


def count_of(values: dict[str, float]) -> int:
    """Return the count, 0 for a refusal: a refusal is less than any plan."""
    try:
        found = plan(
            board(min(values["free"], 64e9)),
            replace(JOB, samples=int(values["samples"])),
            spend(values["seconds"], values["joules"]),
        )
    except InfeasiblePlanError:
        return 0
    assert 12 <= found.lora_count <= 36
    assert found.lora_count == min(found.policy_count, found.hard_count)
    return found.lora_count


@settings(max_examples=60, deadline=None)
@given(BUDGETS, MORE)
def test_more_of_anything_never_lowers_the_count(
    values: dict[str, float], more: dict[str, float]
) -> None:
    before = count_of(values)
    larger = {name: value * more[name] for name, value in values.items()}
    assert count_of(larger) >= before
    for name in values:
        assert count_of({**values, name: larger[name]}) >= before


@settings(max_examples=40, deadline=None)
@given(st.floats(0.6e9, 2.5e9), st.floats(1.0, 1.3))
def test_the_count_does_not_fall_where_text_begins_to_be_cut(free: float, more: float) -> None:
    values = {"seconds": 1e6, "joules": 1e9, "samples": 10_000}
    assert count_of({**values, "free": free * more}) >= count_of({**values, "free": free})


# -- hard limits -----------------------------------------------------------------------------------


def fits(profile: Profile, budget: Budget, count: int, setting: Setting) -> bool:
    taken = round_estimate(profile, JOB, profile_link(profile.radio), count, setting)
    return (
        taken.memory.total <= MEMORY_SHARE * profile.memory.free_bytes
        and taken.seconds <= budget.deadline_seconds
        and taken.joules <= budget.energy_joules
    )


def ways() -> list[Setting]:
    """Return every way of training with whole text, in the stated order."""
    order = product(("fp32", "nf4"), ("fp32", "fp16", "int8", "int4"), (False, True), (4, 2, 1))
    return [
        way(precision=precision, codec=codec, checkpoint=twice, micro_batch=part)
        for precision, codec, twice, part in order
    ]


# Deadlines and energy between what 12 and what 36 modules take, memory likewise: all three bind.
@pytest.mark.parametrize("free", [1.35e9, 1.12e9, 1.06e9])
@pytest.mark.parametrize("seconds", [1e6, 123.0, 126.0])
@pytest.mark.parametrize("joules", [1e9, 1240.0])
def test_the_hard_count_is_the_largest_that_fits_in_any_way(
    free: float, seconds: float, joules: float
) -> None:
    profile, budget = board(free), spend(seconds, joules)
    largest = max(
        (n for n in range(12, 37) if any(fits(profile, budget, n, w) for w in ways())), default=None
    )
    if largest is None:
        assert count_of({"free": free, "seconds": seconds, "joules": joules, "samples": 1}) in (
            0,
            12,
        )
        return
    found = plan(profile, JOB, budget)
    assert found.hard_count == largest
    assert found.lora_count == min(found.policy_count, largest)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 10.0])
def test_the_first_way_that_fits_is_taken(share: float) -> None:
    leanest = min(memory_of(12, setting) for setting in ways())
    free = (leanest + share * (memory_of(12, way()) - leanest)) / MEMORY_SHARE
    found = plan(board(free), JOB, PLENTY)
    first = next(w for w in ways() if fits(board(free), PLENTY, found.lora_count, w))
    assert found.setting == first


def test_memory_alone_takes_smaller_parts_and_then_a_lower_precision() -> None:
    def chosen(least: Setting) -> Setting:
        return plan(board(memory_of(12, least) / MEMORY_SHARE + 1), JOB, PLENTY).setting

    assert chosen(way()) == way()
    assert chosen(way(micro_batch=2)) == way(micro_batch=2)
    # Smaller parts and blocks that go twice no longer help: the held-out results hold memory.
    floor = memory_of(12, way(micro_batch=1, checkpoint=True))
    assert floor == memory_of(12, way(micro_batch=1))
    lower = plan(board(floor / MEMORY_SHARE - 1e6), JOB, PLENTY)
    assert lower.setting.precision == "nf4"
    assert any("The base is held in nf4" in line for line in reasons(lower))


def test_the_smallest_codec_is_what_a_hard_deadline_is_held_against() -> None:
    slow_link = board(snr_db=-15.0)
    link = profile_link(slow_link.radio)
    twenty = round_estimate(slow_link, JOB, link, 20, way(codec="int4")).seconds
    held = plan(slow_link, JOB, spend(seconds=twenty))
    assert (held.hard_count, held.setting.codec) == (20, "int4")


def test_limits_are_named_where_they_hold_the_count() -> None:
    # many seconds of upload and few of training, which are all that the policy sees
    profile, job = board(snr_db=-10.0), replace(JOB, local_steps=2)
    limit = round_estimate(profile, job, profile_link(profile.radio), 14, way(codec="int4"))
    found = plan(profile, job, spend(seconds=limit.seconds))
    assert found.policy_count > found.hard_count == found.lora_count == 14
    assert found.binds == ("deadline",)
    assert any("one more does not fit deadline" in line for line in reasons(found))


def test_text_is_cut_only_for_the_least_count_and_said_loudly() -> None:
    least = min(memory_of(12, setting) for setting in ways())
    whole = plan(board(least / MEMORY_SHARE + 1), JOB, PLENTY)
    assert whole.setting.max_length == 256
    cut = plan(board(0.97 * least / MEMORY_SHARE), JOB, PLENTY)
    assert (cut.lora_count, cut.hard_count) == (12, 12)
    assert cut.setting.max_length in (192, 128)
    assert any(line.startswith("TEXT IS CUT") for line in reasons(cut))
    assert not any("TEXT" in line for line in reasons(whole))


def test_an_upload_that_takes_too_much_is_sent_smaller() -> None:
    job = replace(JOB, local_steps=2)
    link = replace(PAPER_LINK, sharing="tdma", sharers=20)  # minutes of upload, seconds of all else
    sent = round_estimate(BOARD, job, link, 12, way())

    def codec(budget: Budget) -> str:
        found = plan(board(), job, budget, link)
        said = any("Uploads are in" in line for line in reasons(found))
        assert said == (found.setting.codec != "fp32")
        return found.setting.codec

    roomy, tight = (x * sent.uplink_seconds / UPLINK_SHARE for x in (1.01, 0.99))
    assert sent.seconds < tight  # every codec would fit
    assert (codec(spend(seconds=roomy)), codec(spend(seconds=tight))) == ("fp32", "fp16")
    thrifty = BOARD.model_copy(update={"compute": BOARD.compute.model_copy(update={"watts": 0.1})})
    joules = round_estimate(thrifty, job, link, 12, way()).uplink_joules
    budgets = [spend(joules=share * joules / UPLINK_SHARE) for share in (1.01, 0.99, 0.49)]
    codecs = [plan(thrifty, job, budget, link).setting.codec for budget in budgets]
    assert codecs == ["fp32", "fp16", "int8"]


def test_a_base_of_fewer_sites_holds_the_count() -> None:
    small = replace(JOB.shape, base=BaseShape(layers=6, width=768, inner=3072))
    found = plan(board(), replace(JOB, shape=small), PLENTY)
    assert (found.lora_count, found.binds) == (18, ("base",))
    tiny = replace(JOB.shape, base=BaseShape(layers=3, width=768, inner=3072))
    with pytest.raises(InputError, match="9 sites on a base of 3 blocks"):
        plan(board(), replace(JOB, shape=tiny), PLENTY)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "budget", "words"),
    [
        (5e8, PLENTY, r"takes 0\.\d+ GB of memory, and 0\.45 GB may be filled; free memory"),
        (
            64e9,
            spend(seconds=9.5),
            r"round takes 1\d\d\.?\d* s, and the deadline is 9\.5 s; give a",
        ),
        (64e9, spend(joules=7), r"takes 1\d{3}\.?\d* J, and the budget is 7 J; give more energy"),
        (5e8, spend(seconds=9.5), "GB may be filled, and the fastest round"),
    ],
)
def test_a_refusal_says_what_does_not_fit_and_what_would_help(
    free: float, budget: Budget, words: str
) -> None:
    with pytest.raises(InfeasiblePlanError, match=words) as caught:
        plan(board(free), JOB, budget)
    assert caught.value.exit_code == 2
    assert "board cannot train even 12 LoRA modules" in str(caught.value)


def test_limits_that_only_together_are_too_tight_are_named_together() -> None:
    # the fastest way needs the base in fp32, the leanest has it in nf4 and goes twice
    short = way(max_length=128)
    fastest = round_estimate(BOARD, JOB, PAPER_LINK, 12, replace(short, codec="int4"))
    lean = round_estimate(
        BOARD, JOB, PAPER_LINK, 12, replace(short, precision="nf4", micro_batch=1)
    )
    assert lean.seconds > 1.005 * fastest.seconds
    free = lean.memory.total / MEMORY_SHARE * 1.001
    with pytest.raises(InfeasiblePlanError, match="no way of training meets memory and deadline"):
        plan(board(free), JOB, spend(seconds=fastest.seconds * 1.001))


@pytest.mark.parametrize("field", ["deadline_seconds", "energy_joules"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_positive_and_finite(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        replace(PLENTY, **{field: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 0}, "samples = 0"),
        ({"local_steps": 0}, "local_steps = 0"),
        ({"batch_size": -1}, "batch_size = -1"),
        ({"max_length": 4}, "max_length = 4; give 8 to 1024"),
        ({"max_length": 2000}, "max_length = 2000; give 8 to 1024"),
        ({"tokens": 1}, "tokens = 1"),
        ({"tokens": 40, "response": 40}, "response = 40"),
        ({"response": 0}, "response = 0"),
    ],
)
def test_a_job_that_cannot_be_is_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(JOB, **change)


# -- the catalog -----------------------------------------------------------------------------------


def modes() -> list[Profile]:
    found: list[Profile] = []
    for profile in catalog().values():
        found += [profile.at_mode(mode) for mode in profile.modes] or [profile]
    return found


@pytest.mark.parametrize("profile", modes(), ids=lambda p: f"{p.name}@{p.mode}")
def test_every_catalog_device_has_a_plan_for_the_reference_job(profile: Profile) -> None:
    found: Plan = plan(profile, REFERENCE_JOB, REFERENCE_BUDGET)
    assert 12 <= found.lora_count == profile_lora_count(profile) <= 36
    assert planned_precision(profile) == found.setting.precision
    assert found.estimate.memory.total <= MEMORY_SHARE * profile.memory.free_bytes
    assert found.estimate.seconds <= REFERENCE_BUDGET.deadline_seconds
    assert found.estimate.joules <= REFERENCE_BUDGET.energy_joules
    assert found.free_bytes == profile.memory.free_bytes


def test_the_reference_job_tells_devices_apart() -> None:
    counts = {profile.name: profile_lora_count(profile) for profile in catalog().values()}
    assert len(set(counts.values())) >= 6
    assert counts["raspberry-pi-5-8gb"] < counts["laptop-x86-cpu"]
    assert (
        counts["jetson-nano-4gb"] < counts["jetson-orin-nano-8gb"] < counts["jetson-orin-nx-16gb"]
    )


def test_a_plan_over_the_paper_link_is_of_that_link() -> None:
    phone = catalog()["phone-8gb"]
    own = plan(phone, REFERENCE_JOB, REFERENCE_BUDGET)
    paper = plan(phone, REFERENCE_JOB, REFERENCE_BUDGET, PAPER_LINK)
    assert paper.estimate.uplink_seconds < own.estimate.uplink_seconds


@pytest.mark.parametrize(
    ("words", "sentence"), [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_words_are_listed(words: list[str], sentence: str) -> None:
    assert listed(words) == sentence
