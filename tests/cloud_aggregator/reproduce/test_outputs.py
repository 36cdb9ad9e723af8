"""What a comparison leaves: figure, table, text and JSON, each with its labels and its caveats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloud_aggregator.reproduce.document import command, summary
from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, FIGURE, QUICK, Settings, plan
from cloud_aggregator.reproduce.figure import draw
from cloud_aggregator.reproduce.folder import Comparison
from cloud_aggregator.reproduce.outputs import as_json, write
from cloud_aggregator.reproduce.words import NO_EVIDENCE
from device_profiles.errors import InputError
from tests.cloud_aggregator.reproduce.conftest import (
    WIDTH,
    gathered_of,
    runs_of,
    settings_of,
    write_comparison,
)

FILES = ("fig4.svg", "fig4.png", "fig4.csv", "fig4.md")


def text_of(out: Path, name: str) -> str:
    """Return a file's text, an SVG's lines joined as a reader sees them."""
    return (out / name).read_text()


def test_both_axes_of_the_figure_say_what_they_are_of(tmp_path: Path) -> None:
    comparison, runs = write_comparison(tmp_path, settings_of())
    write(tmp_path, comparison, runs)
    drawn = text_of(tmp_path, "fig4.svg")
    for words in (
        "learning: mini, rank 16", "learning: mini, rank 2",
        "priced: GPT-2-small shape, rank 96, modelled",
        "priced: GPT-2-small shape, rank 8, modelled", *FIGURE,
    ):  # fmt: skip
        assert words in drawn, words
    assert (tmp_path / "fig4.png").read_bytes().startswith(b"\x89PNG")
    assert NO_EVIDENCE not in drawn


def test_a_quick_comparison_says_in_every_output_that_it_is_no_evidence(tmp_path: Path) -> None:
    comparison, runs = write_comparison(tmp_path, Settings(**QUICK))
    found = write(tmp_path, comparison, runs)
    assert NO_EVIDENCE in text_of(tmp_path, "fig4.svg")
    assert NO_EVIDENCE in text_of(tmp_path, "fig4.md")
    assert "none (quick)" in text_of(tmp_path, "fig4.csv")
    assert as_json(tmp_path, comparison, found)["evidence"] is False
    assert "--quick" in text_of(tmp_path, "fig4.md")


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    comparison, runs = write_comparison(tmp_path, settings_of())
    write(tmp_path, comparison, runs)
    first = [(tmp_path / name).read_bytes() for name in FILES]
    write(tmp_path, comparison, runs)
    assert [(tmp_path / name).read_bytes() for name in FILES] == first


def test_the_text_has_a_table_and_every_claim_for_each_experiment(tmp_path: Path) -> None:
    comparison, runs = write_comparison(tmp_path, settings_of())
    found = write(tmp_path, comparison, runs)
    text = text_of(tmp_path, "fig4.md")
    assert [line[3:] for line in text.splitlines() if line.startswith("## paper")] == [*EXPERIMENTS]
    for experiment in found:
        assert summary(experiment) in text
        for claim in experiment.claims:
            assert f"**{claim.text}: {claim.verdict}.** {claim.sentence}" in text
    # every method of the builder learns alike, and a client sends what it does at rank 8
    assert [claim.verdict for claim in found[0].claims] == [
        "undecided", "undecided", "held", "held", "undecided",
    ]  # fmt: skip
    assert "Of the paper's 4 claims, at rank 96: 2 held and 2 undecided." in text


def test_the_text_ends_with_all_it_takes_to_repeat_it(tmp_path: Path) -> None:
    comparison, runs = write_comparison(tmp_path, settings_of(data="../somewhere/rows.jsonl"))
    write(tmp_path, comparison, runs)
    end = text_of(tmp_path, "fig4.md").partition("## How to repeat it")[2]
    assert "pwff reproduce fig4 --seeds 0,1 --rounds 2 --local-steps 20 --model mini" in end
    assert "--data rows.jsonl" in end
    assert "somewhere" not in end
    for words in ("Seeds: 0, 1.", "a processor, Linux", "Python 3.10", "torch 2.4",
                  "base mini aaaaaaaaaaaa", "data kit cccccccccccc"):  # fmt: skip
        assert words in end, words


def test_the_command_gives_the_settings_back() -> None:
    settings = Settings(
        seeds=(3,),
        methods=("pwff",),
        experiments=EXPERIMENTS[:1],
        batch_size=2,
        held_out_share=0.1,
        quick=True,
    )
    assert command(settings, 4, 5) == (
        "pwff reproduce fig4 --quick --seeds 3 --rounds 4 --local-steps 5 --model mini --data kit "
        "--batch-size 2 --held-out-share 0.1 --experiments paper-literal --methods pwff"
    )


def test_missing_runs_are_named_in_text_and_json(tmp_path: Path) -> None:
    comparison, _ = write_comparison(tmp_path, settings_of())
    more = settings_of(seeds=(0, 1, 2))
    found = write(tmp_path, Comparison(width=WIDTH, settings=more), plan(more, WIDTH))
    assert "**Missing runs**: pwff, seed 2: not run; vanilla-fl, seed 2" in text_of(
        tmp_path, "fig4.md"
    )
    told = as_json(tmp_path, comparison, found)["experiments"]["paper-literal"]
    assert len(told["missing"]) == len(FIGURE)
    assert told["methods"]["pwff"]["seeds"] == [0, 1]
    # clients end at 22 and 20 %, of equal weight
    assert told["methods"]["pwff"]["accuracy"] == pytest.approx(0.21)


def test_an_experiment_without_any_run_has_an_empty_place_in_the_figure() -> None:
    runs = runs_of({"pwff": [30.0]})
    figure = draw([gathered_of(runs), gathered_of({}, name="paper-consistent")], quick=False)
    assert [len(axes.get_lines()) for axes in figure.axes if axes.get_xlabel() == "round"] == [1, 0]
    assert [text.get_text() for text in figure.axes[3].texts] == ["not run"]


def test_the_band_is_from_the_lowest_to_the_highest_seed_around_the_mean() -> None:
    figure = draw([gathered_of(runs_of({"pwff": [28.0, 30.0, 35.0]}))], quick=False)
    axes = figure.axes[0]
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == pytest.approx([20.0, 25.0, 31.0])  # shares times 100
    (band,) = axes.collections[0].get_paths()
    at_the_end = [y for x, y in band.vertices if x == 2]
    assert (min(at_the_end), max(at_the_end)) == pytest.approx((28.0, 35.0))


def test_without_any_run_there_is_nothing_to_render(tmp_path: Path) -> None:
    settings = settings_of()
    with pytest.raises(InputError, match="none of the 18 runs"):
        write(tmp_path, Comparison(width=WIDTH, settings=settings), plan(settings, WIDTH))
    assert not (tmp_path / "fig4.md").exists()


def test_bars_far_apart_are_logarithmic_and_near_ones_are_not() -> None:
    finals = {method: [30.0] for method in FIGURE}
    figure = draw(
        [gathered_of(runs_of(finals, rank=96)), gathered_of(runs_of(finals, rank=8), rank=8)],
        quick=False,
    )
    scales = [axes.get_xscale() for axes in figure.axes]
    assert scales == ["linear", "log", "log", "linear", "linear", "linear"]
    labels = [re.sub(r"\s+", " ", axes.get_xlabel()) for axes in figure.axes]
    assert ["logarithmic" in label for label in labels] == [scale == "log" for scale in scales]
