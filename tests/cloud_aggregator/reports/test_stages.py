"""A run of several stages: each apart, with its own figures, whatever they say."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports import build_report

MakeRun = Callable[..., RunRecord]
Read = Callable[..., Any]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def source(make_staged: MakeRun) -> str:
    """The page of a run of three stages."""
    return build_report([("r", make_staged())])


@pytest.fixture(scope="module")
def text(source: str, page_of: Callable[[str], Any]) -> str:
    """What is read on it."""
    return str(page_of(source).text)


def chart_of(source: str, title: str) -> str:
    """Return the figure of that title."""
    return next(f for f in source.split("<figure")[1:] if f"<h3>{title}</h3>" in f)


def heights(figure: str, variable: str) -> list[float]:
    """Return how far down each corner of the longest line in that colour is."""
    paths = re.findall(rf'd="([^"]*)"[^>]*fill: none; stroke: var\(--{variable}\)', figure)
    return [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", max(paths, key=len))]


def keys_of(source: str, title: str, page_of: Callable[[str], Any]) -> list[str]:
    """Return the legend of the chart of that title."""
    legend = chart_of(source, title).split("</h3>")[1].split("<svg")[0]
    return [line.strip() for line in page_of(legend).text.split("\n") if line.strip()]


def rows_of(text: str, heading: str, count: int) -> list[str]:
    """Return so many cells that follow a heading."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    at = lines.index(heading)
    return lines[at + 1 : at + 1 + count]


def test_each_stage_is_summed_up_in_its_own_sentence(text: str) -> None:
    assert (
        "Instruction tuning: held-out accuracy rose for 2 of 2 clients: 30.0 % → 40.0 % "
        "(+10.0 points, example-weighted); loss fell: 3.500 → 3.000 nats; "
        "worst client a: 30.0 % (before: 20.0 %)."
    ) in text
    # 56 of 80 pairs against 48; before (20 * 0.5 + 60 * 0.25) / 80
    # helpfulness (6 + 27) / 40 against (5 + 21) / 40, harmlessness (8 + 15) and (4 + 18)
    assert (
        "Reward learning: the models tell the better response in 70.0 % of held-out pairs "
        "(before: 31.2 %), more often than 'the longer one wins' (60.0 %); above it for 2 of 2 "
        "clients; helpfulness 82.5 % against 65.0 %; harmlessness 57.5 % against 55.0 %."
    ) in text
    # a 0.25 to 0.75, b 0 to 0.25 - 0.45 = -0.2
    assert (
        "Alignment: weighted reward rose on average, 0.125 → 0.275; it rose for 1 and fell for 1 "
        "of 2 clients; helpfulness 0.000 → 1.000; harmlessness 0.500 → −0.300; "  # noqa: RUF001
        "KL from stage 1 3.000 nats; held-out accuracy of stage 1 fell: 40.0 % → 30.0 %."
    ) in text


def test_reward_models_below_the_longer_response_are_said_to_be(
    make_staged: MakeRun, page_of: Callable[[str], Any]
) -> None:
    figures = make_staged().rounds[1].clients[0].pairs["helpfulness"]
    poor = figures.model_copy(update={"accuracy": 0.4})  # the longer one: 0.5
    source = build_report(
        [("r", make_staged({i: {"helpfulness": poor} for i in "ab"}, without=["alignment"]))]
    )
    assert (
        "in 40.0 % of held-out pairs (before: 37.5 %), no better than a rule of thumb, less often "
        "than 'the longer one wins' (50.0 %); above it for none of 2 clients"
    ) in page_of(source).text
    assert re.search(r'<p class="lead fell">Reward learning', source)


def test_a_weighted_reward_that_fell_is_said_to_have_fallen(
    make_staged: MakeRun, page_of: Callable[[str], Any]
) -> None:
    start, worse = (0.5, 0.5, 0, 0, 0, 0.3), (0.0, 0.0, 1.0, 9.0, 0.0, 0.3)
    source = build_report([("r", make_staged(aligned={i: [start, worse] for i in "ab"}))])
    assert (
        "weighted reward fell on average, 0.500 → 0.000; it rose for none and fell for 2 of 2"
    ) in page_of(source).text
    assert re.search(r'<p class="lead fell">Alignment', source)


def test_the_charts_of_instruction_tuning_hold_its_rounds_alone(
    source: str, page_of: Callable[[str], Any]
) -> None:
    assert len(heights(chart_of(source, "Held-out accuracy per round"), "mean")) == 2
    keys = keys_of(source, "Held-out accuracy per round", page_of)
    assert "weighted mean (30.0 % before, 40.0 % after)" in keys


def test_each_objective_has_accuracy_loss_and_calibration_beside_the_longer_one(
    source: str, page_of: Callable[[str], Any]
) -> None:
    keys = keys_of(source, "Helpfulness: pair accuracy per round", page_of)
    assert keys == [
        "weighted mean (82.5 % after)", "the longer one wins (65.0 %)",
        "a (lowest at the end: 60.0 %)", "each of 2 clients",
    ]  # fmt: skip
    # (10 * 0.7 + 30 * 0.3) / 40, and log 2
    loss = keys_of(source, "Helpfulness: Bradley-Terry loss per round", page_of)
    assert loss[:2] == ["weighted mean (0.400 after)", "a coin (0.693)"]
    error = keys_of(source, "Harmlessness: calibration error per round", page_of)
    assert error[0] == "weighted mean (25.0 % after)"  # (10 * 0.1 + 30 * 0.3) / 40
    every = keys_of(source, "Pair accuracy, all objectives per round", page_of)
    assert every[:2] == [
        "weighted mean (31.2 % before, 70.0 % after)", "the longer one wins (60.0 %)"
    ]  # fmt: skip


def test_the_table_of_reward_models_has_every_client_and_objective(text: str) -> None:
    assert rows_of(text, "Calibration error", 32) == [
        "a", "helpfulness", "10", "60.0 %", "50.0 %", "+10.0", "0.700", "20.0 %",
        "a", "harmlessness", "10", "80.0 %", "40.0 %", "+40.0", "0.500", "10.0 %",
        "b", "helpfulness", "30", "90.0 %", "70.0 %", "+20.0", "0.300", "10.0 %",
        "b", "harmlessness", "30", "50.0 %", "60.0 %", "−10.0", "0.800", "30.0 %",  # noqa: RUF001
    ]  # fmt: skip


def test_reward_stands_beside_kl_and_length(source: str, page_of: Callable[[str], Any]) -> None:
    titles = re.findall(r"<h3>([^<]*)</h3>", source)
    at = titles.index("Weighted reward per round")
    assert titles[at : at + 3] == [
        "Weighted reward per round", "KL from stage 1 per round", "Response length per round"
    ]  # fmt: skip
    assert "mean (3.000 after)" in keys_of(source, "KL from stage 1 per round", page_of)
    assert "mean (30.0 after)" in keys_of(source, "Response length per round", page_of)
    ended = "Responses that ended by themselves per round"
    assert "mean (75.0 % after)" in keys_of(source, ended, page_of)


def test_the_line_of_weighted_reward_is_to_scale(make_staged: MakeRun) -> None:
    one = [(0.0, 0.0, 0, 0, 0, 0.3), (1.0, 1.0, 1, 9, 1, 0.3), (3.0, 3.0, 2, 9, 1, 0.3)]
    source = build_report([("r", make_staged(aligned={"a": one, "b": one}))])
    y0, y1, y2 = heights(chart_of(source, "Weighted reward per round"), "mean")
    assert y1 - y2 == pytest.approx(2 * (y0 - y1), abs=1e-3)  # the file has six decimals
    assert y2 < y0  # up is up


def test_each_client_stands_with_its_own_weights_and_rewards(text: str) -> None:
    assert rows_of(text, "Accuracy before", 1 + 28)[1:] == [
        "a", "0.75 : 0.25", "0.250", "0.750", "+0.500", "0.000", "1.000", "1.000", "0.000",
        "2.000", "20.0", "100.0 %", "30.0 %", "20.0 %",
        "b", "0.25 : 0.75", "0.000", "−0.200", "−0.200", "0.000", "1.000", "0.000",  # noqa: RUF001
        "−0.600", "4.000", "40.0", "50.0 %", "50.0 %", "40.0 %",  # noqa: RUF001
    ]  # fmt: skip


def test_what_alignment_did_to_stage_1_is_shown(source: str, page_of: Callable[[str], Any]) -> None:
    keys = keys_of(source, "Held-out accuracy in alignment per round", page_of)
    assert keys[0] == "mean (40.0 % before, 30.0 % after)"
    assert "Is stage 1 forgotten?" in source


def test_a_round_that_was_taken_back_is_marked_with_its_reason_and_what_was_dropped(
    make_staged: MakeRun, page_of: Callable[[str], Any]
) -> None:
    source = build_report([("r", make_staged(taken_back="kl-limit"))])
    text = page_of(source).text
    said = (
        "Round 3 was taken back: the policy went further from stage 1 than kl_limit allows. "
        "Dropped: weighted reward −1.500, helpfulness −1.000, harmlessness −2.000, "  # noqa: RUF001
        "KL 30.000 nats. Every device has again what it had before, and the stage ended."
    )
    assert text.count(said) == 2  # below the sentence of alignment, and in its section
    keys = keys_of(source, "Weighted reward per round", page_of)
    assert "dropped with a round: −1.500" in keys  # noqa: RUF001
    assert "dropped with a round: 30.000" in keys_of(source, "KL from stage 1 per round", page_of)
    assert rows_of(text, "3, dropped", 7)[:4] == [
        "−1.500", "−1.000", "−2.000", "30.000"  # noqa: RUF001
    ]  # fmt: skip
    assert "taken back: kl-limit" in text
    # what the axis shows reaches down to what was dropped: the rest moves up
    lowest = max(heights(chart_of(source, "Weighted reward per round"), "mean"))
    plain = build_report([("r", make_staged())])
    assert lowest < max(heights(chart_of(plain, "Weighted reward per round"), "mean"))


def test_a_run_without_a_stage_has_no_chart_and_no_table_of_it(
    make_run: MakeRun, make_staged: MakeRun, read: Read
) -> None:
    plain = read(make_run({"a": [0.2, 0.3]})).text
    for word in ("Reward learning", "Alignment", "Pair accuracy", "Weighted reward", "KL"):
        assert word not in plain
    assert "Instruction tuning:" not in plain  # nothing to tell it from
    rewards = read(make_staged(without=["alignment"])).text
    assert "Reward learning:" in rewards
    assert "Weighted reward" not in rewards
    alone = read(make_staged(without=["instruction", "alignment"])).text
    assert "Held-out accuracy per round" not in alone
    assert "Held-out accuracy is not measured" not in alone
    assert "Pair accuracy, all objectives per round" in alone


def test_the_page_of_all_stages_reaches_for_nothing(
    source: str, page_of: Callable[[str], Any]
) -> None:
    page = page_of(source)
    ids = page.values("id")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', source))
    assert len(ids) == len(set(ids))
    assert used <= set(ids)
    assert not re.search(r"https?://|@import|url\((?!#)", source)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert all(page.values("aria-label"))
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


def test_a_comparison_shows_the_stages_of_the_runs_that_have_them(
    make_run: MakeRun, make_staged: MakeRun, read: Read
) -> None:
    plain = make_run({"a": [0.2, 0.35], "b": [0.4, 0.5]})
    text = read(one=make_staged(taken_back="kl-limit"), two=plain, three=make_staged()).text
    # stage 1 is held against stage 1: alignment took one's accuracy down to 30 %
    assert "42.50 % (example-weighted), two; next 40.00 %, one." in text
    assert rows_of(text, "Calibration error", 17) == [
        # loss (7 + 5 + 9 + 24) / 80, calibration error (2 + 1 + 3 + 9) / 80
        "one", "1", "31.2 %", "70.0 %", "60.0 %", "+10.0", "0.562", "18.8 %",
        "three", "1", "31.2 %", "70.0 %", "60.0 %", "+10.0", "0.562", "18.8 %",
        "Pair accuracy, all objectives over rounds of the stage",
    ]  # fmt: skip
    assert rows_of(text, "Taken back", 26) == [
        "one", "1", "0.125", "0.275", "1 of 2", "1.000", "−0.300", "3.000", "30.0",  # noqa: RUF001
        "75.0 %", "40.00 %", "30.00 %", "3: kl-limit",
        "three", "1", "0.125", "0.275", "1 of 2", "1.000", "−0.300", "3.000", "30.0",  # noqa: RUF001
        "75.0 %", "40.00 %", "30.00 %", "no round",
    ]  # fmt: skip
    assert "Weighted reward over rounds of the stage" in text


def test_a_comparison_of_runs_of_instruction_alone_has_no_other_stage(
    make_run: MakeRun, read: Read
) -> None:
    run = make_run({"a": [0.2, 0.3]})
    text = read(one=run, two=run).text
    assert "Reward learning" not in text
    assert "Alignment" not in text
    assert "preference data" not in text


def test_unlike_preference_data_are_not_comparable(make_staged: MakeRun, read: Read) -> None:
    run = make_staged(without=["alignment"])
    runs = {
        name: run.model_copy(
            update={"data": run.data.model_copy(update={"preferences": {"helpfulness": 64 * name}})}
        )
        for name in "xy"
    }
    assert (
        "Not comparable in preference data: x: helpfulness xxxxxxxx; y: helpfulness yyyyyyyy."
    ) in read(**runs).text


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_all_stages_without_complaint(source: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(source, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path / 'home'}",
        "--enable-logging=stderr", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    text = html.unescape(shown.stdout).replace("\u00a0", " ")
    assert "weighted reward rose on average, 0.125 → 0.275" in text
    # 9 charts and 2 of energy; 2 of all pairs, 3 an objective; 6, 1 and 2 of alignment
    assert shown.stdout.count("<svg ") == 11 + 2 + 6 + 9
    assert "CONSOLE" not in shown.stderr
