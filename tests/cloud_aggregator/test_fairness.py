"""How even a run is over its clients, and the gap between own and other clients' data."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_aggregator.closing import closing_lines
from cloud_aggregator.fairness import fairness_lines
from cloud_aggregator.records import ClientBefore, Summary
from cloud_aggregator.reports.build import fairness_of
from cloud_aggregator.summary import summarise, worst_decile
from tests.cloud_aggregator.reports.conftest import make_run


def test_the_worst_decile_is_the_mean_of_the_lowest_tenth_rounded_up() -> None:
    assert worst_decile([]) is None
    assert worst_decile([0.5, 0.2]) == 0.2
    # 11 clients: two of them, 0.1 and 0.3
    assert worst_decile([0.9] * 9 + [0.3, 0.1]) == pytest.approx(0.2)


def test_the_gap_and_jains_index_are_of_each_clients_last_results() -> None:
    run = make_run({"a": [0.1, 0.2, 0.4], "b": [0.1, 0.2, None]}, held_out={"a": 3, "b": 1})
    run.before = [
        ClientBefore(id="a", eval_loss=1.0, eval_accuracy=0.1, others_accuracy=0.1),
        ClientBefore(id="b", eval_loss=1.0, eval_accuracy=0.1, others_accuracy=0.3),
    ]
    for record in run.rounds:
        for client in record.clients:
            client.others_accuracy = None if client.eval_accuracy is None else 0.1 * record.round
    summary = summarise(run)
    assert summary.others_accuracy_before == pytest.approx(0.15)  # (3 * 0.1 + 0.3) / 4
    assert summary.others_accuracy_after == pytest.approx(0.175)  # (3 * 0.2 + 0.1) / 4
    assert summary.accuracy_fairness == pytest.approx(0.36 / 0.4)  # (0.4 + 0.2)^2 / (2 * 0.2)
    assert summary.worst_decile_accuracy == 0.2
    # own: (3 * 0.4 + 0.2) / 4 = 35 %, before 10 %
    assert fairness_lines(summary) == [
        "The lowest tenth of the clients has 20.0 % on average; Jain's index of their accuracies "
        "is 0.900 (1: all alike).",
        "On held-out data of other clients the personal models have 17.5 %: the gap to their own "
        "is +17.5 points (before the first round: -5.0).",
    ]
    run.summary = summary
    assert fairness_lines(summary)[1] in closing_lines(run)


def test_what_was_not_measured_is_not_spoken_of() -> None:
    assert fairness_lines(Summary()) == []


def test_a_report_says_it_of_each_run_by_its_folder(tmp_path: Path) -> None:
    folders = []
    for name, accuracy in (("one", 0.4), ("two", 0.3)):
        run = make_run({"a": [0.1, accuracy], "b": [0.1, accuracy]})
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(run.model_dump_json(by_alias=True))
        folders.append(folder)
    assert fairness_of(folders[:1]) == [
        "The lowest tenth of the clients has 40.0 % on average; Jain's index of their accuracies "
        "is 1.000 (1: all alike)."
    ]
    assert [line.partition(" on average")[0] for line in fairness_of(folders)] == [
        "one: The lowest tenth of the clients has 40.0 %",
        "two: The lowest tenth of the clients has 30.0 %",
    ]
