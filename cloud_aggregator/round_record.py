"""One finished round as an entry of ``run.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cloud_aggregator.intake import Intake
from cloud_aggregator.records import (
    ClientRound,
    GlobalRound,
    Observed,
    RoundRecord,
    weighted_mean,
)
from messaging.chunks import wire_bytes
from messaging.protocol import Costs, Report


def round_record(
    clients: Sequence[str],
    intake: Intake,
    reports: Mapping[str, Report],
    *,
    parameters: int,
    observed: Observed,
) -> RoundRecord:
    """Return the record of a round.

    Args:
        clients: Every device of the run, asked or not, in client order.
        intake: What the round's cohort gave.
        reports: Held-out results on the round's new state, by client.
        parameters: Number of entries of an update.
        observed: What this machine saw.
    """
    entries = [_client_round(client, intake, reports.get(client), parameters) for client in clients]
    slowest = max((entry.downlink_seconds for entry in entries), default=0.0)
    figures = reports.values()
    return RoundRecord(
        stage="instruction",
        round=intake.number,
        accepted=intake.round.accepted,
        virtual_seconds=(intake.round.closed_at or 0.0) + slowest,
        clients=entries,
        global_=GlobalRound(
            eval_loss=weighted_mean([(r.eval_loss, r.examples) for r in figures]),
            eval_accuracy=weighted_mean([(r.eval_accuracy, r.examples) for r in figures]),
        ),
        observed=observed,
    )


def _client_round(
    client: str, intake: Intake, report: Report | None, parameters: int
) -> ClientRound:
    gave = intake.contributions.get(client)
    offer = gave.offer if gave else None
    costs = gave.costs if gave else Costs()
    # The state that the round made, once: what a device that was started again fetched anew
    # depends on what happened to it, and not on what the run is.
    fresh = bool(intake.round.accepted)
    down = report.costs if report and fresh else Costs()
    return ClientRound(
        id=client,
        status=intake.round.status(client) if client in intake.round.cohort else "skipped",
        reason=intake.reasons.get(client, ""),
        train_loss=gave.train_loss if gave else None,
        eval_loss=report.eval_loss if report else None,
        eval_accuracy=report.eval_accuracy if report else None,
        upload_bytes=wire_bytes(offer.bytes, offer.chunk_bytes) if offer else 0,
        upload_parameters=parameters if offer else 0,
        download_bytes=down.download_bytes,
        downlink_seconds=down.downlink_seconds,
        uplink_seconds=costs.uplink_seconds,
        uplink_joules=costs.uplink_joules,
        compute_seconds=costs.compute_seconds,
        compute_joules=costs.compute_joules,
    )
