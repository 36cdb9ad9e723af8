"""Who trains in a round: chosen by pilots, repeatable, and never with an empty battery."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from cloud_aggregator.cohort import CohortRule, able, choose_cohort
from cloud_aggregator.records import ClientRound, GlobalRound, Observed, RoundRecord
from device_profiles.channel import Link, pilot_rate
from device_profiles.seeds import stream
from device_profiles.selection import jain_index
from messaging.protocol import Channel, DeviceRecord

Selection = Literal["uniform", "best-channel", "proportional-fair", "utility"]

SNR_DB = {"a": 0.0, "b": 5.0, "c": 10.0, "d": 15.0, "e": 20.0}


def device(name: str, snr_db: float) -> DeviceRecord:
    return DeviceRecord(
        id=name,
        profile="laptop-x86-cpu",
        lora_count=12,
        lora_rank=2,
        lora_rank_rule="given",
        adapter_count=6,
        adapter_size=4,
        placement="qkv",
        precision="fp32",
        threads=1,
        base_bytes=400,
        examples=1,
        held_out_examples=1,
        categories={},
        trainable_parameters=100,
        shared_parameters=10,
        preference={"helpfulness": 0.5, "harmlessness": 0.5},  # type: ignore[arg-type]
        channel=Channel(
            snr_db=snr_db,
            bandwidth_hz=1e6,
            transmit_watts=1.0,
            fading="rayleigh",
            coherence_seconds=0.01,
        ),
        costs="modelled",
    )


DEVICES = {name: device(name, snr_db) for name, snr_db in SNR_DB.items()}


def record(number: int, asked: list[str], **battery_left: float) -> RoundRecord:
    """Return a round in which some clients were asked."""
    return RoundRecord(
        stage="instruction",
        round=number,
        accepted=asked,
        virtual_seconds=1.0,
        clients=[
            ClientRound(
                id=name,
                status="aggregated" if name in asked else "skipped",
                battery_left=battery_left.get(name),
            )
            for name in DEVICES
        ],
        global_=GlobalRound(),
        observed=Observed(),
    )


def course(selection: Selection, rounds: int, size: int = 2) -> list[list[str]]:
    """Return the cohorts of a whole run."""
    rule = CohortRule(size=size, selection=selection, seed=3)
    records: list[RoundRecord] = []
    for number in range(1, rounds + 1):
        done = record(number, choose_cohort(rule, DEVICES, records))
        for client in done.clients:
            client.train_loss = 1.0 if client.id in done.accepted else None
        records.append(done)
    return [r.accepted for r in records]


def fairness(cohorts: list[list[str]]) -> float:
    return jain_index([sum(name in cohort for cohort in cohorts) for name in DEVICES])


@pytest.mark.parametrize("selection", ["uniform", "best-channel", "proportional-fair", "utility"])
def test_a_cohort_has_its_size_in_client_order_and_nobody_twice(selection: Selection) -> None:
    for cohort in course(selection, 5, size=3):
        assert len(cohort) == 3
        assert cohort == sorted(set(cohort))


def test_the_best_channels_are_those_whose_uploads_begin_fastest() -> None:
    for number, cohort in enumerate(course("best-channel", 6), 1):
        first = {
            name: pilot_rate(Link(**d.channel.model_dump()), stream(3, "channel", number, name))
            for name, d in DEVICES.items()
        }
        assert cohort == sorted(sorted(first, key=lambda name: -first[name])[:2])


def test_proportional_fair_asks_more_evenly_than_best_channel() -> None:
    # Mean SNRs from 0 to 20 dB: the best channels are nearly always those of d and e.
    assert fairness(course("best-channel", 40)) < 0.75
    assert fairness(course("proportional-fair", 40)) > 0.9


def test_a_run_that_goes_on_chooses_as_it_would_have() -> None:
    whole = course("proportional-fair", 6)
    rule = CohortRule(size=2, selection="proportional-fair", seed=3)
    kept = [record(i, cohort) for i, cohort in enumerate(whole[:5], 1)]
    assert choose_cohort(rule, DEVICES, kept) == whole[5]


def test_uniform_cohorts_ask_everybody_alike_in_the_long_run() -> None:
    cohorts = course("uniform", 400)
    counts = np.array([sum(name in cohort for cohort in cohorts) for name in DEVICES])
    # Each is asked with 2/5: 160 of 400, with a deviation of sqrt(400 * 0.4 * 0.6) = 9.8.
    assert np.all(abs(counts - 160) < 5 * 9.8)


def test_a_device_whose_battery_is_empty_is_not_asked() -> None:
    rounds = [record(1, ["a"], a=0.0, b=0.3)]
    assert able(DEVICES, rounds) == ["b", "c", "d", "e"]
    rule = CohortRule(size=5, selection="uniform", seed=3)
    assert choose_cohort(rule, DEVICES, rounds) == ["b", "c", "d", "e"]


# -- by utility ------------------------------------------------------------------------------------


def trained(loss: dict[str, float], seconds: dict[str, float]) -> RoundRecord:
    """Return a first round in which everybody trained."""
    done = record(1, list(DEVICES))
    for client in done.clients:
        client.train_loss = loss[client.id]
        client.compute_seconds = seconds[client.id]
    return done


def test_utility_asks_those_whose_loss_is_highest_once_all_were_tried() -> None:
    rule = CohortRule(size=2, selection="utility", seed=3)
    alike = dict.fromkeys(DEVICES, 10.0)
    losses = {"a": 1.0, "b": 90.0, "c": 1.0, "d": 100.0, "e": 1.0}
    # nobody is new; 0.95 of the second best, 85.5, is what two exceed
    assert choose_cohort(rule, DEVICES, [trained(losses, alike)]) == ["b", "d"]


def test_utility_leaves_out_who_is_slow_unless_its_loss_makes_up_for_it() -> None:
    rule = CohortRule(size=1, selection="utility", seed=3)
    losses = {"a": 1.0, "b": 5.0, "c": 1.0, "d": 100.0, "e": 1.0}
    slow = {"a": 10.0, "b": 10.0, "c": 10.0, "d": 100.0, "e": 10.0}
    # ten times the median: a hundredth of its worth, 1 against 5
    assert choose_cohort(rule, DEVICES, [trained(losses, slow)]) == ["b"]
    # twice the median: a quarter, 25 against 5
    assert choose_cohort(rule, DEVICES, [trained(losses, slow | {"d": 20.0})]) == ["d"]


def test_utility_tries_everybody_and_chooses_again_as_it_did() -> None:
    cohorts = course("utility", 12)
    assert {name for cohort in cohorts for name in cohort} == set(DEVICES)
    assert cohorts == course("utility", 12)
