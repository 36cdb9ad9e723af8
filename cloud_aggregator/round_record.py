"""One finished round as an entry of ``run.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloud_aggregator.aggregation.asynchronous import staleness_weight
from cloud_aggregator.intake import Intake
from cloud_aggregator.privacy import PrivacyRecord
from cloud_aggregator.records import ClientRound, Observed, RoundRecord, StaleEntry
from cloud_aggregator.summary import global_figures, weighted_mean
from device_profiles.battery import Battery
from device_profiles.energy import power_cost
from messaging.chunks import wire_bytes
from messaging.protocol import Costs, DeviceRecord, Report, Stage


def round_record(
    devices: Sequence[DeviceRecord],
    intake: Intake,
    reports: Mapping[str, Report],
    *,
    stage: Stage,
    before: RoundRecord | None,
    observed: Observed,
    released: bool = False,
    unchanged: str = "",
) -> RoundRecord:
    """Return the record of a round.

    Args:
        devices: Every device of the run, asked or not, in client order.
        intake: What the round's cohort gave.
        reports: Held-out results on the round's new state, by client.
        stage: That the round is of.
        before: The record of the round before, for what its batteries had left.
        observed: What this machine saw.
        released: Whether a state came of it whoever's updates counted.
        unchanged: Why accepted updates moved nothing.
    """
    left = {c.id: c.battery_left for c in before.clients} if before else {}
    closed = intake.folded()
    # The state that the round made, once: what a device that was started again fetched anew
    # depends on what happened to it, and not on what the run is.
    fresh = released or bool(intake.round.accepted or (closed and closed.folded))
    entries = [
        _client_round(device, intake, reports.get(device.id), left.get(device.id), fresh=fresh)
        for device in devices
    ]
    slowest = max((entry.downlink_seconds for entry in entries), default=0.0)
    return RoundRecord(
        stage=stage,
        round=intake.number,
        accepted=intake.round.accepted,
        waited_seconds=intake.moment.waited if intake.moment else 0.0,
        virtual_seconds=(intake.round.closed_at or 0.0) + slowest,
        clients=entries,
        global_=global_figures({d.id: d for d in devices}, reports),
        stale=[
            StaleEntry(
                id=folded.client,
                round=folded.round,
                staleness=intake.number - folded.round,
                share=staleness_weight(intake.number - folded.round),
                examples=folded.examples,
            )
            for folded in (closed.folded if closed else ())
        ],
        stale_dropped=closed.dropped if closed else 0,
        unchanged=unchanged,
        observed=observed,
    )


def round_event(record: RoundRecord, spent: PrivacyRecord | None) -> dict[str, Any]:
    """Return what is told of a finished round.

    Args:
        record: Of it.
        spent: What the run has spent of its clients' privacy.
    """
    return {
        "stage": record.stage,
        "round": record.round,
        "accepted": len(record.accepted),
        "clients": len(record.clients),
        "taken_back": record.taken_back,
        "stale": len(record.stale),
        "unchanged": record.unchanged,
        "epsilon": spent.epsilon if spent else None,
        **record.global_.model_dump(),
        "upload_bytes": sum(c.upload_bytes for c in record.clients),
        "waited_seconds": record.waited_seconds,
        "virtual_seconds": record.virtual_seconds,
        "wall_seconds": record.observed.wall_seconds,
        "retransmitted_bytes": record.observed.retransmitted_bytes,
    }


def _client_round(
    device: DeviceRecord,
    intake: Intake,
    report: Report | None,
    battery_left: float | None,
    *,
    fresh: bool,
) -> ClientRound:
    client = device.id
    gave = intake.contributions.get(client)
    offer = gave.offer if gave else None
    costs = gave.costs if gave else Costs()
    down = report.costs if report and fresh else Costs()
    idle = power_cost(intake.waited(client), device.power.idle_watts)
    entry = ClientRound(
        id=client,
        status=intake.round.status(client) if client in intake.round.cohort else "skipped",
        reason=intake.reasons.get(client, ""),
        train_loss=gave.train_loss if gave else None,
        eval_loss=report.eval_loss if report else None,
        eval_accuracy=report.eval_accuracy if report else None,
        others_loss=report.others_loss if report else None,
        others_accuracy=report.others_accuracy if report else None,
        kept_steps=report.kept_steps if report else None,
        upload_bytes=wire_bytes(offer.bytes, offer.chunk_bytes) if offer else 0,
        upload_parameters=gave.parameters if gave else 0,
        download_bytes=down.download_bytes,
        downlink_seconds=down.downlink_seconds,
        downlink_joules=down.downlink_joules,
        uplink_bits=costs.uplink_bits,
        uplink_seconds=costs.uplink_seconds,
        uplink_joules=costs.uplink_joules,
        uplink_air_seconds=costs.uplink_air_seconds,
        uplink_circuit_joules=costs.uplink_circuit_joules,
        uplink_joules_saved=costs.uplink_joules_saved,
        compute_seconds=costs.compute_seconds,
        compute_joules=costs.compute_joules,
        idle_seconds=idle.seconds,
        idle_joules=idle.joules,
    )
    if report is not None:
        _add_rewards(entry, report)
    entry.battery_left = _battery_left(device, entry, battery_left)
    return entry


def _add_rewards(entry: ClientRound, report: Report) -> None:
    figures, responses = report.pairs.values(), report.responses
    entry.pairs = dict(report.pairs)
    entry.reward_accuracy = weighted_mean([(f.accuracy, f.pairs) for f in figures])
    if responses is not None:
        entry.reward_helpfulness = responses.scores.get("helpfulness")
        entry.reward_harmlessness = responses.scores.get("harmlessness")
        entry.kl, entry.drift = responses.kl, responses.drift
        entry.response_tokens = responses.tokens
        entry.responses_ended = responses.ended


def _battery_left(device: DeviceRecord, entry: ClientRound, before: float | None) -> float | None:
    """Return the share that a battery has left after a round; none where there is no battery."""
    capacity = device.power.battery_joules
    if capacity is None:
        return None
    taken = (
        entry.compute_joules
        + entry.uplink_joules
        + entry.uplink_circuit_joules
        + entry.downlink_joules
        + entry.idle_joules
    )
    share = 1.0 if before is None else before
    battery = Battery(capacity_joules=capacity, left_joules=share * capacity)
    return battery.after(taken).left_joules / capacity
