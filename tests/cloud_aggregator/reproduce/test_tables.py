"""The tables, read back by hand and by another reader."""

from __future__ import annotations

import csv
import io

from cloud_aggregator.reproduce.gather import Runs
from cloud_aggregator.reproduce.tables import COLUMNS, csv_text, markdown_table
from tests.cloud_aggregator.reproduce.conftest import (
    curves_of,
    gathered_of,
    run_figures,
    runs_of,
)


def cells(runs: Runs) -> dict[str, dict[str, str]]:
    """Return the Markdown table as cells by method and heading."""
    lines = [line.strip("| ").split(" | ") for line in markdown_table(runs).splitlines()]
    return {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}


def test_a_row_holds_mean_spread_and_the_difference_in_each_seed() -> None:
    table = cells(
        runs_of({"pwff": [30.0, 32.0], "fedlora": [31.0, 32.5], "local-only": [29.0, 32]})
    )
    fedlora = table["fedlora"]
    assert fedlora["accuracy, %"] == "31.75 ± 1.06"  # deviation of 31 and 32.5: 0.75 * sqrt(2)
    assert fedlora["minus pwff, points (each seed)"] == "+0.75 (+1.00, +0.50)"
    assert fedlora["minus local-only, points (each seed)"] == "+1.25 (+2.00, +0.50)"
    assert fedlora["worst client, %"] == "26.75 ± 1.06"
    assert table["pwff"]["minus pwff, points (each seed)"] == "-"
    assert table["local-only"]["minus pwff, points (each seed)"] == "\u22120.50 (\u22121.00, 0.00)"


def test_costs_and_what_pwff_saves_stand_beside_compute() -> None:
    table = cells(runs_of({"pwff": [30.0], "fedlora": [30.0], "vanilla-fl": [30.0],
                           "local-only": [30.0]}))  # fmt: skip
    vanilla = table["vanilla-fl"]
    assert (vanilla["uplink, J"], vanilla["uplink, s"], vanilla["Mbit up"]) == (
        "19.1",
        "19.1",
        "38.2",
    )
    assert vanilla["pwff saves, %"] == "43.2"
    assert table["fedlora"]["pwff saves, %"] == "\u221231.3"  # 1 - 10.83 / 8.25
    assert vanilla["compute, J"] == "3.00"
    assert (table["local-only"]["uplink, J"], table["local-only"]["pwff saves, %"]) == ("0", "-")


def test_rounds_to_the_controls_accuracy_are_counted_in_each_seed() -> None:
    alone = [[20.0, 24.0, 25.0], [20.0, 24.0, 25.0], [26.0, 24.0, 25.0]]
    table = cells(
        curves_of(
            {"pwff": [[20.0, 25.0, 26.0], [20.0, 24.0, 24.9], [26.0, 26.0, 26.0]],
             "local-only": alone}
        )
    )  # fmt: skip
    assert table["pwff"]["rounds to local-only's"] == "1, never, 0"
    assert table["local-only"]["rounds to local-only's"] == "-"


def test_what_was_not_measured_is_a_dash_in_the_table_and_empty_in_the_csv() -> None:
    runs = {"pwff": {0: run_figures("pwff", 0, [None, None], loss=None)}}
    assert cells(runs)["pwff"]["accuracy, %"] == "-"
    last = csv_text([gathered_of(runs)], quick=False).splitlines()[-1]
    assert last.startswith("paper-literal,pwff,0,1,,,,2000000.0,1.0,1.0,3.0,")


def test_the_csv_has_a_row_for_each_experiment_method_seed_and_round() -> None:
    runs = runs_of({"pwff": [30.0, 31.0], "fedada": [29.0, 30.0]})
    both = [gathered_of(runs), gathered_of(runs, name="paper-consistent", rank=8)]
    rows = list(csv.DictReader(io.StringIO(csv_text(both, quick=False))))
    assert len(rows) == 2 * 2 * 2 * 3  # rounds 0, 1 and 2
    assert tuple(rows[0]) == COLUMNS
    (row,) = [
        r for r in rows
        if (r["experiment"], r["method"], r["seed"], r["round"])
        == ("paper-consistent", "pwff", "1", "2")
    ]  # fmt: skip
    assert float(row["accuracy"]) == 0.31
    assert float(row["uplink_joules_mean"]) == 10.83
    assert float(row["uplink_bits_mean"]) == 21.66e6
    before = [r for r in rows if r["round"] == "0"]
    assert {r["uplink_joules_mean"] for r in before} == {""}
    assert {r["evidence"] for r in rows} == {"full"}


def test_every_row_of_a_quick_csv_says_that_it_is_no_evidence() -> None:
    text = csv_text([gathered_of(runs_of({"pwff": [30.0]}))], quick=True)
    assert all(line.endswith(",none (quick)") for line in text.splitlines()[1:])
