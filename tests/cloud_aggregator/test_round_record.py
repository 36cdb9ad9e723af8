"""What a round costs each client, part by part, and what its battery has left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cloud_aggregator.intake import Contribution
from cloud_aggregator.records import ClientRound, Observed, RoundRecord
from cloud_aggregator.round_record import round_record
from cloud_aggregator.rounds import RoundRules, TrainingRound
from messaging.protocol import Channel, Costs, DeviceRecord, Power, Report


def device(name: str, power: Power) -> DeviceRecord:
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
            snr_db=5.0,
            bandwidth_hz=1e6,
            transmit_watts=1.0,
            fading="rayleigh",
            coherence_seconds=0.01,
        ),
        power=power,
        costs="modelled",
    )


def entry(power: Power, costs: Costs, *, waited: float, before: float | None) -> ClientRound:
    """Return the record of one client that took part in round 2."""
    taken = TrainingRound(["a"], RoundRules(quorum=1.0, deadline_seconds=100.0))
    taken.arrived("a", 5.0)
    intake: Any = SimpleNamespace(
        number=2,
        round=taken,
        contributions={"a": Contribution(costs=costs, train_loss=1.0)},
        reasons={},
        waited=lambda _client: waited,
        folded=lambda: None,
        moment=None,
    )
    report = Report(
        run="r",
        client="a",
        session="0" * 16,
        round=2,
        phase="evaluate",
        examples=1,
        eval_loss=1.0,
        eval_accuracy=0.5,
        costs=Costs(download_bytes=100, downlink_seconds=2.0, downlink_joules=0.5),
    )
    earlier = RoundRecord(
        stage="instruction",
        round=1,
        accepted=["a"],
        virtual_seconds=1.0,
        clients=[ClientRound(id="a", status="aggregated", battery_left=before)],
        global_={},  # type: ignore[arg-type]
        observed=Observed(),
    )
    made = round_record(
        [device("a", power)],
        intake,
        {"a": report},
        stage="instruction",
        before=earlier,
        observed=Observed(),
    )
    (only,) = made.clients
    return only


SPENT = Costs(
    compute_seconds=3.0,
    compute_joules=40.0,
    uplink_bits=800.0,
    uplink_seconds=2.0,
    uplink_air_seconds=1.5,
    uplink_joules=6.0,
    uplink_circuit_joules=3.0,
)


def test_every_part_of_a_rounds_energy_stands_apart() -> None:
    made = entry(Power(idle_watts=2.0), SPENT, waited=4.0, before=None)
    parts = (
        made.compute_joules,
        made.uplink_joules,
        made.uplink_circuit_joules,
        made.downlink_joules,
        made.idle_joules,
    )
    assert parts == (40.0, 6.0, 3.0, 0.5, 8.0)  # idle: 2 W for 4 s
    assert (made.uplink_seconds, made.uplink_air_seconds, made.idle_seconds) == (2.0, 1.5, 4.0)
    assert made.battery_left is None


def test_a_battery_gives_the_sum_of_all_parts() -> None:
    # 40 + 6 + 3 + 0.5 + 8 = 57.5 of 230 J is a quarter; half was left.
    power = Power(idle_watts=2.0, battery_joules=230.0)
    assert entry(power, SPENT, waited=4.0, before=0.5).battery_left == pytest.approx(0.25)


def test_a_battery_never_holds_less_than_nothing() -> None:
    power = Power(idle_watts=2.0, battery_joules=230.0)
    assert entry(power, SPENT, waited=4.0, before=0.1).battery_left == 0.0
