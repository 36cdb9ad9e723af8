"""Figures out of records: what is averaged over whom, what is cut off, what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, plan
from cloud_aggregator.reproduce.folder import folder_of
from cloud_aggregator.reproduce.gather import figures, gather, read_records
from device_profiles.errors import InputError
from tests.cloud_aggregator.reports.conftest import make_run
from tests.cloud_aggregator.reproduce.conftest import (
    WIDTH,
    run_figures,
    settings_of,
    write_comparison,
    write_run,
)


def test_costs_are_means_over_the_clients_that_sent_and_accuracy_is_weighted() -> None:
    record = make_run({"a": [0.1, 0.2], "b": [0.1, 0.5], "c": [0.1, None]}, held_out={"a": 3})
    for client, joules in zip(record.rounds[0].clients[:2], (4.0, 8.0), strict=True):
        client.uplink_bits, client.uplink_seconds, client.uplink_joules = 1e6, joules / 2, joules
    (only,) = figures(record, 1).rounds
    assert only.accuracy == pytest.approx((3 * 0.2 + 0.5) / 4)  # one addition is rounded
    assert only.worst == 0.2
    assert (only.uplink_bits, only.uplink_seconds, only.uplink_joules) == (1e6, 3.0, 6.0)
    assert only.compute_joules == 500.0
    assert only.missed == 1  # c was lost


def test_a_client_that_was_late_has_spent_its_energy_all_the_same() -> None:
    record = make_run({"a": [0.1, 0.2], "b": [0.1, 0.2]})
    for client, joules in zip(record.rounds[0].clients, (4.0, 8.0), strict=True):
        client.uplink_bits, client.uplink_joules = 1e6, joules
    record.rounds[0].clients[1].status = "late"
    (only,) = figures(record, 1).rounds
    assert (only.uplink_joules, only.missed) == (6.0, 1)


def test_a_run_with_more_rounds_is_cut_to_those_that_are_compared() -> None:
    record = make_run({"a": [0.1, 0.2, 0.3, 0.4]})
    assert figures(record, 2).curve == (0.1, 0.2, 0.3)
    assert figures(record, 2).final == 0.3


def test_a_curve_reaches_an_accuracy_at_the_first_round_that_has_it() -> None:
    run = run_figures("pwff", 0, [20.0, None, 25.0, 24.0, 26.0])
    assert [run.reaches(share) for share in (0.2, 0.25, 0.255, 0.3)] == [0, 2, 4, None]


def test_the_shared_run_stands_in_both_experiments_in_the_order_of_the_methods(
    tmp_path: Path,
) -> None:
    comparison, runs = write_comparison(tmp_path, settings_of())
    both = gather(comparison.settings, WIDTH, runs, read_records(runs, tmp_path))
    assert [g.name for g in both] == [*EXPERIMENTS]
    assert [list(g.runs) for g in both] == [list(comparison.settings.methods)] * 2
    assert both[0].runs["fedada"] == both[1].runs["fedada"]
    assert [g.seeds for g in both] == [[0, 1], [0, 1]]


def test_labels_say_where_learning_happens_and_what_is_priced(tmp_path: Path) -> None:
    comparison, runs = write_comparison(tmp_path, settings_of())
    literal, consistent = gather(comparison.settings, WIDTH, runs, read_records(runs, tmp_path))
    assert literal.learning == "learning: mini, rank 16"
    assert literal.priced == "priced: GPT-2-small shape, rank 96, modelled"
    assert (consistent.learning, consistent.priced) == (
        "learning: mini, rank 2",
        "priced: GPT-2-small shape, rank 8, modelled",
    )


def test_what_is_not_run_or_broke_off_is_named_and_left_out(tmp_path: Path) -> None:
    settings = settings_of(methods=("pwff", "fedada"), seeds=(4,), experiments=EXPERIMENTS[:1])
    ours, theirs = plan(settings, WIDTH)
    write_run(tmp_path, theirs, rounds=1, status="stopped")
    (found,) = gather(settings, WIDTH, [ours, theirs], read_records([ours, theirs], tmp_path))
    assert found.runs == {}
    assert found.missing == (
        "pwff, seed 4: not run",
        "fedada, seed 4: broken off after 1 of 2 rounds",
    )


def test_runs_of_another_base_are_not_compared(tmp_path: Path) -> None:
    _, runs = write_comparison(tmp_path, settings_of())
    record = write_run(tmp_path, runs[3])
    record.model.sha256 = "f" * 64
    folder_of(tmp_path, runs[3]).write_record(record)
    with pytest.raises(InputError, match=f"{runs[3].name} are of unlike content of the base"):
        read_records(runs, tmp_path)
