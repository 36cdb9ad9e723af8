"""What a person sees while a run goes on, and at its end."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cloud_aggregator.progress import ProgressView, closing_lines, human_bytes, nats, percent
from cloud_aggregator.records import DataRecord, ModelRecord, RunRecord, Summary


def a_run(**summary: float) -> RunRecord:
    """Return a run of which nothing but the summary is known."""
    return RunRecord(
        version="0",
        run="trial",
        seed=0,
        method="pwff",
        stages=["instruction"],
        engine="local",
        workers=1,
        transport="mqtt",
        codec="fp32",
        model=ModelRecord(
            name="mini", parameters=3, layers=1, width=1, sha256="0", tokenizer_sha256="1"
        ),
        data=DataRecord(source="kit", examples=10),
        summary=Summary(**summary),  # type: ignore[arg-type]
    )


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


@pytest.mark.parametrize(("after", "word"), [(0.2, "rose"), (0.05, "fell"), (0.1, "stayed")])
def test_the_end_says_whether_accuracy_rose_or_fell(after: float, word: str) -> None:
    lines = closing_lines(a_run(eval_accuracy_before=0.1, eval_accuracy_after=after))
    assert lines[0].startswith(f"Held-out accuracy {word} from 10.0 % to {100 * after:.1f} %")


def test_the_end_says_what_was_sent_or_that_nothing_was() -> None:
    figures = {"eval_accuracy_before": 0.1, "eval_accuracy_after": 0.1}
    assert "Nothing was uploaded." in closing_lines(a_run(**figures))
    sent = closing_lines(a_run(**figures, upload_bytes_total=2_000_000, mean_uplink_seconds=1.5))
    assert any("2.0 MB" in line and "1.50 s" in line and "modelled" in line for line in sent)


@pytest.mark.parametrize("view_of", ["log", "terminal"])
def test_a_round_is_told_with_the_time_left(view_of: str) -> None:
    view, written = shown(view_of)
    with view:
        view("task", work="train", round=1, clients=["a"])
        view("update", client="a", round=1, verdict="taken", train_loss=4.5, bytes=1000)
        view(
            "round", round=1, accepted=1, clients=1, eval_loss=4.0, eval_accuracy=0.25,
            upload_bytes=1000, virtual_seconds=3.0, wall_seconds=10.0,
        )  # fmt: skip
    # three rounds of ten seconds are left
    assert "round 1/4: accuracy 25.0 %, loss 4.000" in written.getvalue()
    assert "about 30 s left" in written.getvalue()


def test_an_event_that_nobody_shows_is_no_error() -> None:
    view, written = shown("log")
    view("end", status="done", reason="rounds")
    assert written.getvalue() == ""
