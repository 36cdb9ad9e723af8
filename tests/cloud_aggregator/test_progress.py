"""What a person sees while a run goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cloud_aggregator.progress import ProgressView, human_bytes, nats, percent


def shown(view_of: str) -> tuple[ProgressView, io.StringIO]:
    """Return a view on a log or on a terminal, and what it writes."""
    written = io.StringIO()
    terminal = view_of == "terminal"
    return ProgressView(Console(file=written, force_terminal=terminal, width=120), 4), written


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_325_400, "2.3 MB"), (5e12, "5.0 TB")],
)
def test_bytes_are_told_in_the_unit_that_reads_best(number: float, text: str) -> None:
    assert human_bytes(number) == text


def test_what_was_not_measured_is_a_dash() -> None:
    assert (percent(None), nats(None)) == ("-", "-")
    assert (percent(0.1234), nats(1.23456)) == ("12.3 %", "1.235")


@pytest.mark.parametrize("view_of", ["log", "terminal"])
def test_a_round_is_told_with_the_time_left(view_of: str) -> None:
    view, written = shown(view_of)
    with view:
        view("task", work="train", stage="instruction", round=1, clients=["a"])
        view("update", client="a", round=1, verdict="taken", train_loss=4.5, bytes=1000)
        view(
            "round", stage="instruction", taken_back="", round=1, accepted=1, clients=1,
            eval_loss=4.0, eval_accuracy=0.25,
            upload_bytes=1000, virtual_seconds=3.0, wall_seconds=10.0,
        )  # fmt: skip
    # three rounds of ten seconds are left
    assert "round 1/4: accuracy 25.0 %, loss 4.000" in written.getvalue()
    assert "about 30 s left" in written.getvalue()


def test_an_event_that_nobody_shows_is_no_error() -> None:
    view, written = shown("log")
    view("end", status="done", reason="rounds")
    assert written.getvalue() == ""
