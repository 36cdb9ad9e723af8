"""The record of a run: its figures by hand, and every key that scripts and dashboards rely on."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from pydantic import ValidationError

from cloud_aggregator.records import (
    ClientBefore,
    ClientRound,
    GlobalRound,
    Observed,
    RoundRecord,
    RunRecord,
    Summary,
)
from cloud_aggregator.summary import summarise, weighted_mean
from tests.cloud_aggregator.conftest import device, record_of


def test_a_mean_of_results_weights_clients_by_their_examples() -> None:
    assert weighted_mean([(2.0, 1), (6.0, 3)]) == 5.0


def test_who_measured_nothing_has_no_part_in_the_mean() -> None:
    assert weighted_mean([(None, 100), (2.0, 1), (6.0, 3), (9.0, 0)]) == 5.0
    assert weighted_mean([(0.0, 2), (None, 1)]) == 0.0  # zero is a result


@pytest.mark.parametrize("pairs", [[], [(None, 3)], [(4.0, 0)]])
def test_a_mean_over_nobody_is_none(pairs: list[tuple[float | None, int]]) -> None:
    assert weighted_mean(pairs) is None


def test_a_mean_does_not_depend_on_who_reported_first() -> None:
    # added from left to right, 1e16 + 1 - 1e16 is 0 and 1e16 - 1e16 + 1 is 1
    pairs: list[tuple[float | None, int]] = [(1e16, 1), (1.0, 1), (-1e16, 1), (0.1, 1)]
    means = {weighted_mean(list(order)) for order in itertools.permutations(pairs)}
    assert means == {1.1 / 4}


def part(client: str, accuracy: float | None, loss: float | None, **changes: Any) -> ClientRound:
    fields: dict[str, Any] = {
        "id": client,
        "status": "aggregated",
        "eval_accuracy": accuracy,
        "eval_loss": loss,
    }
    return ClientRound(**{**fields, **changes})


def round_of(number: int, *clients: ClientRound) -> RoundRecord:
    return RoundRecord(
        stage="instruction",
        round=number,
        accepted=[c.id for c in clients if c.status == "aggregated"],
        virtual_seconds=1.0,
        clients=list(clients),
        global_=GlobalRound(eval_loss=1.0, eval_accuracy=0.5),
        observed=Observed(),
    )


def a_run() -> RunRecord:
    """Return two rounds of two clients, of which the second is lost in the first round."""
    return record_of(
        clients=[device("a", held_out=1), device("b", held_out=3)],
        before=[
            ClientBefore(id="a", eval_loss=4.0, eval_accuracy=0.25),
            ClientBefore(id="b", eval_loss=2.0, eval_accuracy=0.5),
        ],
        rounds=[
            round_of(
                1,
                part("a", 0.5, 3.0, upload_bytes=1000, uplink_seconds=2.0, uplink_joules=4.0),
                part("b", None, None, status="lost"),
            ),
            round_of(
                2,
                part("a", 0.125, 5.0, upload_bytes=1000, uplink_seconds=4.0, uplink_joules=6.0),
                part("b", 0.625, 1.0, upload_bytes=3000, uplink_seconds=6.0, uplink_joules=11.0),
            ),
        ],
    )


def test_the_summary_of_a_run_by_hand() -> None:
    assert summarise(a_run()) == Summary(
        eval_loss_before=2.5,  # (1*4 + 3*2) / 4
        eval_loss_after=2.0,  # (1*5 + 3*1) / 4
        eval_accuracy_before=0.4375,  # (0.25 + 3*0.5) / 4
        eval_accuracy_after=0.5,  # (0.125 + 3*0.625) / 4
        worst_client_accuracy=0.125,
        worst_decile_accuracy=0.125,  # a tenth of two clients is one
        accuracy_fairness=0.5625 / 0.8125,  # (0.75)**2 / (2 * (1/64 + 25/64))
        clients_improved=1,  # b
        mean_uplink_seconds=4.0,  # (2 + 4 + 6) / 3: the lost client sent nothing
        mean_uplink_joules=7.0,
        participation_fairness=0.9,  # Jain's index of 2 and 1: (2 + 1)**2 / (2 * (4 + 1))
        upload_bytes_total=5000,
    )


def test_a_client_that_was_lost_at_the_end_counts_with_its_last_results() -> None:
    run = a_run()
    run.rounds.reverse()  # now b is lost in the last round
    summary = summarise(run)
    assert summary.eval_accuracy_after == 0.59375  # (0.5 + 3*0.625) / 4
    assert summary.worst_client_accuracy == 0.5
    assert summary.clients_improved == 2


def test_a_client_that_joined_later_is_in_the_results_and_not_among_the_improved() -> None:
    run = a_run()
    run.clients.append(device("c", held_out=4))
    run.rounds[1].clients.append(part("c", 1.0, 0.0, status="skipped"))
    summary = summarise(run)
    assert summary.eval_accuracy_before == 0.4375
    assert summary.eval_accuracy_after == 0.75  # (0.125 + 3*0.625 + 4*1) / 8
    assert summary.clients_improved == 1


def test_a_run_before_its_first_round_has_no_results_after() -> None:
    run = a_run()
    run.rounds.clear()
    summary = summarise(run)
    assert summary.eval_loss_before == 2.5
    assert (summary.eval_loss_after, summary.eval_accuracy_after) == (None, None)
    assert (summary.worst_client_accuracy, summary.clients_improved) == (None, None)
    assert (summary.mean_uplink_seconds, summary.upload_bytes_total) == (0.0, 0)


def test_a_run_that_has_not_begun_has_an_empty_summary() -> None:
    assert summarise(record_of()) == Summary()


#: Every key that the contract names, at its place. More may be there.
CONTRACT: dict[str, Any] = {
    "schema": 1,
    "version": None,
    "status": None,
    "stop_reason": None,
    "seed": None,
    "method": None,
    "stages": None,
    "engine": None,
    "workers": None,
    "transport": None,
    "model": dict.fromkeys(["name", "parameters", "layers", "width", "sha256"]),
    "data": dict.fromkeys(["source", "examples", "partition", "alpha"]),
    "clients": [
        {
            **dict.fromkeys(
                [
                    "id", "profile", "lora_count", "lora_rank", "adapter_count", "adapter_size",
                    "precision", "base_bytes", "examples", "trainable_parameters",
                    "shared_parameters",
                ]
            ),
            "preference": dict.fromkeys(["helpfulness", "harmlessness"]),
            "channel": dict.fromkeys(
                ["snr_db", "bandwidth_hz", "transmit_watts", "fading", "sharing",
                 "coherence_seconds"]
            ),
        }
    ],
    "rounds": [
        {
            **dict.fromkeys(["stage", "round", "accepted", "virtual_seconds"]),
            "clients": [
                dict.fromkeys(
                    [
                        "id", "status", "train_loss", "eval_loss", "eval_accuracy",
                        "upload_bytes", "upload_parameters", "download_bytes", "uplink_seconds",
                        "uplink_joules", "compute_seconds", "compute_joules",
                        "reward_helpfulness", "reward_harmlessness", "kl", "reward_accuracy",
                    ]
                )
            ],
            "global": dict.fromkeys(["eval_loss", "eval_accuracy"]),
            "observed": dict.fromkeys(
                ["wall_seconds", "retransmitted_bytes", "peak_memory_bytes"]
            ),
        }
    ],
    "summary": dict.fromkeys(
        [
            "eval_accuracy_before", "eval_accuracy_after", "worst_client_accuracy",
            "mean_uplink_seconds", "mean_uplink_joules", "upload_bytes_total",
        ]
    ),
}  # fmt: skip


def absent(wanted: Any, there: Any, place: str = "run") -> list[str]:
    """Return the places of the contract that a record does not have."""
    if isinstance(wanted, dict):
        if not isinstance(there, dict):
            return [place]
        gone = [f"{place}.{key}" for key in wanted if key not in there]
        return gone + [
            deeper
            for key, value in wanted.items()
            if key in there
            for deeper in absent(value, there[key], f"{place}.{key}")
        ]
    if isinstance(wanted, list):
        if not there:
            return [f"{place}[]"]
        return [deeper for entry in there for deeper in absent(wanted[0], entry, f"{place}[]")]
    return [] if wanted is None or wanted == there else [place]


def test_every_key_of_the_contract_is_at_its_place() -> None:
    written = json.loads(a_run().model_dump_json(by_alias=True))
    assert absent(CONTRACT, written) == []


def test_a_record_read_back_is_the_record_written() -> None:
    run = a_run()
    assert RunRecord.model_validate_json(run.model_dump_json(by_alias=True)) == run


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"schema": 2}, ("schema",)),
        ({"status": "perhaps"}, ("status",)),
        ({"surprise": 1}, ("surprise",)),
    ],
)
def test_a_record_of_another_schema_is_refused(
    changed: dict[str, Any], place: tuple[str, ...]
) -> None:
    written = {**json.loads(a_run().model_dump_json(by_alias=True)), **changed}
    with pytest.raises(ValidationError) as refusal:
        RunRecord.model_validate(written)
    assert refusal.value.errors()[0]["loc"] == place
