"""Energy on the page: each part apart, in figures of the record, and whether it was timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cloud_aggregator.records import PricedRecord, RunRecord
from cloud_aggregator.reports import build_report
from cloud_aggregator.reports.energy import PARTS, SAVED, by_client, by_round, columns, each, of_run
from cloud_aggregator.reports.words import energy as joules_in_words

MakeRun = Callable[..., RunRecord]
Read = Callable[..., Any]

FIELDS = (
    "compute_joules",
    "uplink_joules",
    "uplink_circuit_joules",
    "downlink_joules",
    "idle_joules",
)


def spent(run: RunRecord, figures: Sequence[Sequence[dict[str, float]]]) -> RunRecord:
    """Return the run with these figures of each client (inner) in each round (outer)."""
    rounds = [
        record.model_copy(
            update={
                "clients": [
                    client.model_copy(update={**dict.fromkeys(FIELDS, 0.0), **values})
                    for client, values in zip(record.clients, row, strict=True)
                ]
            }
        )
        for record, row in zip(run.rounds, figures, strict=True)
    ]
    return run.model_copy(update={"rounds": rounds})


@pytest.fixture
def run(make_run: MakeRun) -> RunRecord:
    """Two clients, two rounds; every part of every client's round is another power of ten."""
    powers = dict(zip(FIELDS, (1e4, 1e3, 1e2, 10.0, 1.0), strict=True))
    return spent(
        make_run({"a": [0.2, 0.3, 0.4], "b": [0.2, 0.3, 0.4]}),
        [
            [
                {**{f: 1 * v for f, v in powers.items()}, "battery_left": 0.9},
                {f: 2 * v for f, v in powers.items()},
            ],
            [
                {**{f: 3 * v for f, v in powers.items()}, "battery_left": 0.7},
                {f: 4 * v for f, v in powers.items()},
            ],
        ],
    )


def test_every_part_is_summed_apart_over_clients_rounds_and_the_run(run: RunRecord) -> None:
    powers = (1e4, 1e3, 1e2, 10.0, 1.0)
    rows = [*by_round(run, PARTS), *by_client(run, PARTS), of_run("r", run, PARTS)]
    assert [(row.key, row.joules) for row in rows] == [
        (("1",), tuple(3 * v for v in powers)),  # 1 + 2
        (("2",), tuple(7 * v for v in powers)),  # 3 + 4
        (("a",), tuple(4 * v for v in powers)),  # 1 + 3
        (("b",), tuple(6 * v for v in powers)),  # 2 + 4
        (("r",), tuple(10 * v for v in powers)),
    ]
    assert [(row.key, row.joules[0]) for row in each(run, PARTS)] == [
        (("1", "a"), 1e4),
        (("1", "b"), 2e4),
        (("2", "a"), 3e4),
        (("2", "b"), 4e4),
    ]


def test_a_battery_is_told_where_there_is_one(run: RunRecord, read: Read) -> None:
    assert [row.battery_left for row in by_client(run, PARTS)] == [0.7, None]
    assert [row.battery_left for row in by_round(run, PARTS)] == [0.9, 0.7]
    text = read(run).text
    assert "Battery left (modelled)" in text
    assert "least: a (70.0 % at the end)" in text
    assert "each of 1 client on battery" in text


def test_without_a_battery_none_is_drawn(make_run: MakeRun, read: Read) -> None:
    assert "attery" not in read(make_run({"a": [0.2, 0.3]})).text


@pytest.mark.parametrize("costs", ["modelled", "measured"])
def test_only_what_a_device_times_is_called_measured(
    make_run: MakeRun, costs: str, read: Read
) -> None:
    made = make_run({"a": [0.2, 0.3]}, device_changes={"costs": costs})
    text = read(spent(made, [[dict.fromkeys(FIELDS, 5.0)]])).text
    for title in ("Training", "Waiting"):
        assert f"{title} ({costs})" in text
    for title in ("Radiated", "Radio circuits", "Reception"):
        assert f"{title} (modelled)" in text
        assert f"{title} (measured)" not in text


def test_every_figure_of_the_tables_is_the_record_s(run: RunRecord, read: Read) -> None:
    lines = [line.strip() for line in read(run).text.split("\n") if line.strip()]
    # client b: 2 + 4 of each power of ten, no battery
    start = next(n for n, line in enumerate(lines) if lines[n : n + 2] == ["b", "60.0 kJ"])
    assert lines[start : start + 8] == [
        "b", "60.0 kJ", "6.00 kJ", "600 J", "60 J", "6 J", "none", "modelled",
    ]  # fmt: skip
    # client a in round 2
    start = next(n for n in range(len(lines)) if lines[n : n + 3] == ["2", "a", "30.0 kJ"])
    assert lines[start : start + 9] == [
        "2", "a", "30.0 kJ", "3.00 kJ", "300 J", "30 J", "3 J", "70.0 %", "modelled",
    ]  # fmt: skip


def test_a_chart_names_the_client_that_spends_most(run: RunRecord, read: Read) -> None:
    text = read(run).text
    assert "most: b (60.0 kJ in all)" in text  # training
    assert "Total over clients and rounds: 100 kJ." in text
    assert "most: b (6 J in all)" in text  # waiting


def test_the_mean_line_is_to_scale(run: RunRecord) -> None:
    # means 1.5 and 3.5, the highest 2 and 4: steps of the same height
    chart = next(
        part
        for part in build_report([("r", run)]).split("<svg ")[1:]
        if 'aria-label="Radiated' in part
    )

    def step(shade: str) -> float:
        paths = re.findall(rf'd="([^"]*)"[^>]*fill: none; stroke: var\(--{shade}\)', chart)
        (_, y0), (_, y1) = re.findall(r"([\d.]+) ([\d.]+)", max(paths, key=len))
        return float(y0) - float(y1)

    assert step("mean") == pytest.approx(step("worst"), abs=1e-3)  # the file has six decimals
    assert step("mean") > 0


def test_parts_that_nothing_took_are_called_so(make_run: MakeRun, read: Read) -> None:
    text = read(make_run({"a": [0.2, 0.3]})).text
    assert "Reception: none recorded." in text
    assert "Radiated: none recorded." not in text


def test_what_waiting_for_a_channel_saved_is_shown_where_a_policy_waits(
    run: RunRecord, make_run: MakeRun, read: Read
) -> None:
    assert columns([run]) == PARTS
    assert "Uplink energy saved" not in read(run).text
    made = make_run({"a": [0.2, 0.3], "b": [0.2, 0.3]})
    patient = spent(made, [[{"uplink_joules_saved": 7.0}, {"uplink_joules_saved": -2.5}]])
    assert columns([run, patient]) == (*PARTS, SAVED)
    text = read(patient).text
    assert "Uplink energy saved (modelled)" in text
    assert "Total over clients and rounds: 4.50 J." in text  # 7 - 2.5
    assert "\u22122.50 J" in text
    assert "below 0 where it cost more" in text


def test_joules_below_zero_have_a_minus() -> None:
    assert joules_in_words(-12_340.0) == "\u2212" + joules_in_words(12_340.0)


def test_a_comparison_has_each_run_s_parts_and_their_means(run: RunRecord, read: Read) -> None:
    text = read(one=run, two=spent(run, [[{}, {}], [{}, {"idle_joules": 8.0}]])).text
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    start = next(n for n in range(len(lines)) if lines[n : n + 2] == ["one", "100 kJ"])
    assert lines[start : start + 6] == ["one", "100 kJ", "10.0 kJ", "1.00 kJ", "100 J", "10 J"]
    # means over two clients and two rounds
    assert "25.0 kJ" in lines  # training of one: 100 / 4
    assert "2 J" in lines  # waiting of two: 8 / 4
    assert "Mean over clients and rounds." in text


def test_participation_is_shown_by_its_index(make_run: MakeRun, read: Read) -> None:
    # a counts twice, b once: (2 + 1)^2 / (2 * (4 + 1)) = 0.9
    uneven = make_run({"a": [0.2, 0.3, 0.4], "b": [0.2, 0.3, None]})
    tiles = re.sub(r"\s+", " ", read(uneven).text)
    assert "Even participation 0.900 Jain's index" in tiles
    lines = [line.strip() for line in read(one=uneven, two=uneven).text.split("\n")]
    assert lines.count("0.900") == 2


def test_another_shape_that_costs_are_computed_at_is_named(make_run: MakeRun, read: Read) -> None:
    run = make_run({"a": [0.2, 0.3]})
    shape = PricedRecord(
        name="gpt2-small", parameters=124_439_808, layers=12, width=768, lora_rank=96
    )
    priced = run.model_copy(update={"model": run.model.model_copy(update={"priced": shape})})
    words = "gpt2-small: 124,439,808 parameters, 12 layers, width 768, LoRA rank 96"
    assert words in read(priced).text
    assert "another shape" not in read(run).text
    both = read(plain=run, priced=priced).text
    assert (
        "Not comparable in the shape that costs are computed at: plain: the model's own; "
        f"priced: {words}."
    ) in both
