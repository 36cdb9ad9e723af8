"""The page: costs with their source, charts to scale, nothing from outside, and in a browser."""

from __future__ import annotations

import base64
import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.records import ClientBefore, ClientRound, RunRecord
from cloud_aggregator.reports import build_report, canvas, write_report
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.summary import summarise
from device_profiles.errors import InputError

MakeRun = Callable[..., RunRecord]
Read = Callable[..., Any]
HOSTILE = "a\"'--><script>alert(1)</script><img src=https://evil.test/x onerror=alert(2)>$x_1$"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


def points_of(source: str, variable: str, label: str) -> list[tuple[float, float]]:
    """Return the corners of the longest line in that colour, in the chart so labelled."""
    chart = next(s for s in source.split("<svg ")[1:] if f'aria-label="{label}' in s)
    paths = re.findall(rf'd="([^"]*)"[^>]*fill: none; stroke: var\(--{variable}\)', chart)
    longest = max(paths, key=len)
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", longest)]


def test_tiles_hold_the_costs_of_the_record(make_run: MakeRun, read: Read) -> None:
    # two clients, two rounds: 4 uploads of 2 MB; seconds 10.25, 11.25, 10.5, 11.5: mean 10.875
    text = read(make_run({"a": [0.2, 0.3, 0.4], "b": [0.2, 0.3, 0.4]})).text
    tiles = re.sub(r"\s+", " ", text)
    assert "Bytes up 8.00 MB 4 uploads" in tiles
    assert "Airtime per upload 10.9 s mean modelled" in tiles
    assert "Radiated per upload 10.9 J mean modelled" in tiles
    assert "Wall time 60.0 s sum of rounds measured" in tiles
    assert "Peak memory 1.50 GB all processes measured" in tiles


@pytest.mark.parametrize("costs", ["modelled", "measured"])
def test_times_and_energy_carry_the_source_that_devices_state(
    make_run: MakeRun, costs: str, read: Read
) -> None:
    text = read(make_run({"a": [0.2, 0.3]}, device_changes={"costs": costs})).text
    for title in ("Compute per round", "Virtual time per round"):
        assert f"{title} ({costs})" in text
    # what a real device sends goes over a modelled channel
    assert "Uplink per round (modelled)" in text
    assert re.search(r"Airtime per upload\s+10.2 s mean modelled", text)


def test_a_fleet_of_emulated_and_real_devices_says_how_many_of_each(
    make_run: MakeRun, read: Read
) -> None:
    run = make_run({"a": [0.2, 0.3], "b": [0.2, 0.3], "c": [0.2, 0.3]})
    real = run.clients[0].model_copy(update={"costs": "measured"})
    page = read(run.model_copy(update={"clients": [real, *run.clients[1:]]}))
    assert "Virtual time per round (modelled for 2, measured for 1 clients)" in page.text


def test_nothing_uploaded_is_not_called_a_time_of_zero(make_run: MakeRun, read: Read) -> None:
    run = make_run({"a": [0.2, 0.3]})
    silent = run.rounds[0].clients[0].model_copy(update={"upload_bytes": 0})
    rounds = [run.rounds[0].model_copy(update={"clients": [silent]})]
    summary = run.summary.model_copy(
        update={"upload_bytes_total": 0, "mean_uplink_seconds": 0.0, "mean_uplink_joules": 0.0}
    )
    text = read(run.model_copy(update={"rounds": rounds, "summary": summary})).text
    assert re.search(r"Airtime per upload\s+none nothing was uploaded", text)


def test_the_bold_line_is_the_weighted_mean_to_scale(make_run: MakeRun) -> None:
    # means 0.2, 0.3, 0.5 over rounds 0, 1, 2: equal steps across, steps of 1 to 2 up
    page = build_report([("r", make_run({"a": [0.1, 0.2, 0.3], "b": [0.3, 0.4, 0.7]}))])
    (x0, y0), (x1, y1), (x2, y2) = points_of(page, "mean", "Held-out accuracy per round")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3)  # the file has six decimals
    assert y1 - y2 == pytest.approx(2 * (y0 - y1), abs=1e-3)
    assert y2 < y0  # up is up


def test_the_marked_line_is_the_client_that_ends_lowest(
    make_run: MakeRun, page_of: Callable[[str], Any]
) -> None:
    # b ends lowest (0.25) although a began lowest; it falls by 0.2, then by 0.05
    page = build_report([("r", make_run({"a": [0.1, 0.2, 0.4], "b": [0.5, 0.3, 0.25]}))])
    (_, y0), (_, y1), (_, y2) = points_of(page, "worst", "Held-out accuracy per round")
    assert y1 - y0 == pytest.approx(4 * (y2 - y1), abs=1e-3)
    assert "b (lowest at the end: 25.0 %)" in page_of(page).text
    assert "b (highest at the end: 3.750)" in page_of(page).text  # 5 * (1 - 0.25)


def test_the_page_reaches_for_nothing_and_runs_nothing(
    make_run: MakeRun, page_of: Callable[[str], Any]
) -> None:
    run = make_run({"a": [0.2, 0.3], "b": [0.3, 0.4]})
    for source in (build_report([("r", run)]), build_report([("r", run), ("s", run)])):
        page = page_of(source)
        links = page.values("src", "href", "xlink:href", "srcset", "data", "action")
        assert all(link.startswith(("#", "data:")) for link in links)
        assert not re.search(r"https?://|@import|url\((?!#)", source)
        assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
        assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.values(
            "content"
        )


def test_every_identifier_is_unique_and_every_reference_resolves(
    make_run: MakeRun, page_of: Callable[[str], Any]
) -> None:
    source = build_report([("r", make_run({"a": [0.2, 0.3], "b": [0.3, 0.4]}))])
    ids = page_of(source).values("id")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', source))
    assert len(ids) == len(set(ids))
    assert used
    assert used <= set(ids)


def test_hostile_text_stays_text(make_run: MakeRun, page_of: Callable[[str], Any]) -> None:
    run = make_run({"a": [0.2, 0.3]}, device_changes={"categories": {HOSTILE: 3, "_b": 2}})
    record = run.rounds[0]
    evil = ClientRound(id=HOSTILE, status="rejected", reason=HOSTILE, eval_accuracy=0.1)
    rounds = [record.model_copy(update={"clients": [*record.clients, evil]})]
    before = [*run.before, ClientBefore(id=HOSTILE, eval_loss=4.0, eval_accuracy=0.2)]
    changes = {
        "before": before,
        "rounds": rounds,
        "status": "failed",
        "stop_reason": HOSTILE,
        "model": run.model.model_copy(update={"name": HOSTILE}),
        "data": run.data.model_copy(update={"source": HOSTILE}),
    }
    hostile = run.model_copy(update=changes)
    for source in (
        build_report([(HOSTILE, hostile)]),
        build_report([(HOSTILE, hostile), (HOSTILE, hostile), ("fair", run)]),
    ):
        page = page_of(source)
        assert "script" not in page.tags
        assert "img" not in page.tags
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert page.text.count(HOSTILE) >= 3


def test_every_chart_has_a_text_alternative(make_run: MakeRun, read: Read) -> None:
    page = read(make_run({"a": [0.2, 0.3], "b": [0.3, 0.4]}))
    # of the five parts of energy the run has two, training and radiated
    assert page.tags.count("svg") == page.values("role").count("img") == 9 + 2
    assert page.tags.count("figcaption") == page.tags.count("figure") == 9 + 5
    assert all(page.values("aria-label"))


def test_a_chart_too_large_as_lines_becomes_a_picture(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, read: Read
) -> None:
    monkeypatch.setattr(canvas, "MAX_SVG_BYTES", 0)
    page = read(make_run({"a": [0.2, 0.3]}))
    kinds, data = zip(*(picture.split(",") for picture in page.values("src")), strict=True)
    assert kinds == ("data:image/png;base64",) * 11
    assert all(base64.b64decode(picture).startswith(b"\x89PNG\r\n") for picture in data)
    assert all(page.values("alt"))


def test_a_large_fleet_is_thinned_in_charts_and_whole_in_the_table(
    make_run: MakeRun, read: Read
) -> None:
    fleet = {f"c{n:02d}": [0.2, 0.2 + n / 100] for n in range(50)}
    page = read(make_run(fleet))
    assert "Shown: 40 of 50, evenly over the order; the table has all." in page.text
    assert all(f"\n{client}" in page.text for client in fleet)


def test_the_same_record_gives_the_same_page(make_run: MakeRun) -> None:
    run = make_run({"a": [0.2, 0.3], "b": [0.3, 0.4]})
    assert build_report([("r", run)]) == build_report([("r", run)])


def test_a_report_goes_into_the_folder_of_its_run(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    RunFolder(folder).write_record(make_run({"a": [0.2, 0.3]}))
    assert write_report([folder], None) == folder / "report.html"
    assert "<h1>first</h1>" in (folder / "report.html").read_text(encoding="utf-8")
    assert write_report([folder / "run.json"], None) == folder / "report.html"
    assert "<h1>first</h1>" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_comparison_goes_where_it_is_told_or_into_the_current_folder(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        RunFolder(folder).write_record(make_run({"a": [0.2, 0.3]}))
    monkeypatch.chdir(tmp_path)
    assert write_report(folders, None) == Path("comparison.html")
    assert "first and second tie" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    out = tmp_path / "deep" / "page.html"
    assert write_report(folders, out) == out
    assert out.exists()


def test_what_cannot_be_read_or_written_is_said_in_one_sentence(
    make_run: MakeRun, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no run is named"):
        build_report([])
    with pytest.raises(InputError, match="holds no run"):
        write_report([tmp_path], None)
    RunFolder(tmp_path / "run").write_record(make_run({"a": [0.2, 0.3]}))
    with pytest.raises(InputError, match=r"cannot write .*: Is a directory"):
        write_report([tmp_path / "run"], tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page_without_complaint(make_run: MakeRun, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run = make_run({"a": [0.2, 0.3], "b": [0.4, 0.5]})
    page.write_text(build_report([("r", run)]), encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path / 'home'}",
        "--enable-logging=stderr", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    text = html.unescape(shown.stdout).replace("\u00a0", " ")
    assert "rose for 2 of 2 clients: 30.0 % → 40.0 % (+10.0 points, example-weighted)" in text
    assert shown.stdout.count("<svg ") == 11
    assert "CONSOLE" not in shown.stderr


def test_the_page_has_the_gap_to_other_clients_data_where_it_was_measured(
    make_run: MakeRun, read: Read
) -> None:
    run = make_run({"a": [0.2, 0.4], "b": [0.2, 0.3]})
    plain = read(run).text
    assert "On others' data" not in plain
    for client in run.rounds[0].clients:
        client.others_accuracy = 0.25
    run.rounds[0].global_.others_accuracy = 0.25
    run.summary = summarise(run)
    text = re.sub(r"\s+", " ", read(run).text)
    assert "On others' data gap, points" in text
    assert "the personal models have 25.0 %: the gap to their own is +10.0 points" in text
    assert "the same models on other clients' data (25.0 %)" in text.replace("\u00a0", " ")
    assert "The lowest tenth of the clients has 30.0 % on average" in text
