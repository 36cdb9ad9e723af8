"""A comparison: the highest named by its figure, ties as ties, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloud_aggregator.records import RunRecord, Summary
from cloud_aggregator.reports import build_report

MakeRun = Callable[..., RunRecord]
Read = Callable[..., Any]


def test_a_comparison_names_the_highest_by_its_figure_and_each_difference(
    make_run: MakeRun, read: Read
) -> None:
    text = read(
        one=make_run({"a": [0.2, 0.3], "b": [0.2, 0.5]}),  # 0.4
        two=make_run({"a": [0.2, 0.5], "b": [0.2, 0.35]}, method="fedada"),  # 0.425
    ).text
    assert (
        "Highest held-out accuracy at the end: 42.50 % (example-weighted), two; next 40.00 %, one."
    ) in text
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    heading = lines.index("two − one")  # noqa: RUF001
    assert lines[heading + 1 : heading + 9] == [
        "a", "30.00 %", "50.00 %", "+20.00", "b", "50.00 %", "35.00 %", "−15.00",  # noqa: RUF001
    ]  # fmt: skip
    assert "Not comparable" not in text
    assert "30.0 % (a)" in text  # worst of one
    assert "35.0 % (b)" in text  # worst of two


def test_equal_runs_are_called_a_tie(make_run: MakeRun, read: Read) -> None:
    run = make_run({"a": [0.2, 0.3]})
    text = read(one=run, two=run, low=make_run({"a": [0.2, 0.25]})).text
    assert "30.00 % (example-weighted), one and two tie; next 25.00 %, low." in text


def test_runs_of_one_name_are_told_apart(make_run: MakeRun, page_of: Callable[[str], Any]) -> None:
    run = make_run({"a": [0.2, 0.3]})
    assert "same and same (2) tie" in page_of(build_report([("same", run), ("same", run)])).text


def test_unlike_runs_are_called_not_comparable_in_what_differs(
    make_run: MakeRun, read: Read
) -> None:
    one = make_run({"a": [0.2, 0.3], "b": [0.2, 0.3]})
    model = one.model.model_copy(update={"name": "gpt2", "sha256": "d" * 64})
    data = one.data.model_copy(update={"source": "alpaca", "sha256": None, "examples": 2000})
    two = make_run({"b": [0.2, 0.3, 0.4], "c": [0.2, 0.3, 0.3]}, model=model, data=data)
    text = read(one=one, two=two).text
    assert "Not comparable in model: one: mini (aaaaaaaa); two: gpt2 (dddddddd)." in text
    assert "in data: one: kit (100 examples); two: alpaca (2,000 examples)." in text
    assert "in clients: one: 2 clients; two: 2 clients, but not the same ones." in text
    assert "in number of finished rounds: one: 1 round; two: 2 rounds." in text
    assert "Not comparable client by client: b holds different examples" in text
    assert "not checked: no hash in two." in text
    assert "Only the 1 client that every run has." in text


def test_a_comparison_with_an_unmeasured_run_leaves_it_out_by_name(
    make_run: MakeRun, read: Read
) -> None:
    text = read(one=make_run({"a": [0.2, 0.3]}), two=make_run({"a": [None, None]})).text
    assert (
        "Only one has a held-out accuracy: 30.00 % (example-weighted). Not measured in two." in text
    )
    none = make_run({"a": [0.2, 0.3]}, summary=Summary(), rounds=[])
    assert "not measured in any of these runs" in read(one=none, two=none).text
