"""What a report says first: the record's figures, and a fall as plainly as a rise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports import build_report

MakeRun = Callable[..., RunRecord]
Read = Callable[..., Any]


def test_the_first_sentence_has_the_figures_of_the_record(make_run: MakeRun, read: Read) -> None:
    # before (1*0.2 + 3*0.5)/4 = 0.425, after (1*0.6 + 3*0.4)/4 = 0.45; loss 5*(1 - accuracy)
    run = make_run({"a": [0.2, 0.3, 0.6], "b": [0.5, 0.5, 0.4]}, held_out={"a": 1, "b": 3})
    assert (
        "Held-out accuracy rose for 1 of 2 clients and fell for 1: 42.5 % → 45.0 % "
        "(+2.5 points, example-weighted); loss fell: 2.875 → 2.750 nats; "
        "worst client b: 40.0 % (before: 50.0 %)."
    ) in read(run).text


def test_a_fall_is_said_where_and_as_a_rise_would_be(
    make_run: MakeRun, page_of: Callable[[str], Any]
) -> None:
    rising = build_report([("r", make_run({"a": [0.3, 0.4], "b": [0.4, 0.6]}))])
    falling = build_report([("r", make_run({"a": [0.4, 0.3], "b": [0.6, 0.4]}))])
    # (0.4 + 0.6)/2 = 0.5 and (0.3 + 0.4)/2 = 0.35
    assert (
        "No client improved: held-out accuracy fell for 2 of 2 clients: 50.0 % → 35.0 % "
        "(−15.0 points, example-weighted); loss rose: 2.500 → 3.250 nats; "  # noqa: RUF001
        "worst client a: 30.0 % (before: 40.0 %)."
    ) in page_of(falling).text
    for page, way in ((rising, "rose"), (falling, "fell")):
        assert page.count(f'<p class="lead {way}">') == 1
        assert page.index(f'<p class="lead {way}">') < page.index('<dl class="tiles">')


def test_no_change_is_called_no_change(make_run: MakeRun, read: Read) -> None:
    text = read(make_run({"a": [0.25, 0.25], "b": [0.5, 0.5]})).text
    assert (
        "No client improved: held-out accuracy did not change for 2 of 2 clients: "
        "37.5 % → 37.5 % (example-weighted)" in text
    )
    mixed = read(make_run({"a": [0.25, 0.5], "b": [0.5, 0.25]})).text
    assert "did not change on average: it rose for 1 and fell for 1 of 2 clients" in mixed


def test_a_small_change_is_shown_with_digits_that_tell_it(make_run: MakeRun, read: Read) -> None:
    assert "33.33 % → 33.34 %" in read(make_run({"a": [0.3333, 0.3334]})).text


def test_the_lowest_clients_are_all_named_when_they_tie(make_run: MakeRun, read: Read) -> None:
    text = read(make_run({"a": [0.1, 0.3], "b": [0.2, 0.3], "c": [0.2, 0.4]})).text
    assert "worst clients, equal, a and b: 30.0 %." in text


def test_a_client_lost_in_the_last_round_counts_with_its_latest_result(
    make_run: MakeRun, read: Read
) -> None:
    # after: a 0.4 of round 1, b 0.6 of round 2; mean 0.5
    page = read(make_run({"a": [0.2, 0.4, None], "b": [0.4, 0.5, 0.6]}))
    assert "rose for 2 of 2 clients: 30.0 % → 50.0 %" in page.text
    assert "1 client not evaluated after the last round: the latest evaluation counts." in page.text
    assert "1 of 2" in page.text  # accepted in round 2
    assert "no update before the deadline" in page.text


def test_a_client_that_never_reports_is_said_to_bend_the_means(
    make_run: MakeRun, read: Read
) -> None:
    text = read(make_run({"a": [0.2, None], "b": [0.5, 0.5]})).text
    assert "rose on average, yet for none of 1 client" in text
    assert "1 client measured only before or only after: the two means are not over" in text


def test_what_was_not_measured_is_called_so(make_run: MakeRun, read: Read) -> None:
    page = read(make_run({"a": [None, None], "b": [None, None]}))
    assert "Held-out accuracy is not measured (1 round finished); loss not measured" in page.text
    assert "Held-out accuracy: not measured." in page.text
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


def test_only_after_and_only_before_are_not_made_into_a_change(
    make_run: MakeRun, read: Read
) -> None:
    after = read(make_run({"a": [None, 0.5]})).text
    assert "Held-out accuracy is 50.0 % (example-weighted) after 1 round; before" in after
    before = read(make_run({"a": [0.5]})).text
    assert "before the first round is 50.0 % (example-weighted); no round is finished" in before
    assert "No round is finished yet." in before


def test_a_record_without_clients_or_rounds_gives_a_page(make_run: MakeRun, read: Read) -> None:
    text = read(make_run({}, status="failed", stop_reason="no client came within 60 s")).text
    assert "This run failed: no client came within 60 s. No round is finished." in text
    assert "No client is in the record." in text


@pytest.mark.parametrize(
    ("status", "reason", "said"),
    [
        ("stopped", "interrupted", "This run was stopped before its end: interrupted."),
        ("failed", None, "This run failed (no reason recorded). The figures are those of 1"),
        ("running", None, "This run was still running when its record was written; 1 finished"),
    ],
)
def test_a_run_that_is_not_done_says_so_before_its_figures(
    make_run: MakeRun, status: str, reason: str | None, said: str, read: Read
) -> None:
    text = read(make_run({"a": [0.2, 0.3]}, status=status, stop_reason=reason)).text
    assert text.index(said) < text.index("Held-out accuracy rose")


def test_a_run_that_is_done_has_no_banner(make_run: MakeRun) -> None:
    assert '<p class="banner"' not in build_report([("r", make_run({"a": [0.2, 0.3]}))])
