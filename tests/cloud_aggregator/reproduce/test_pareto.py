"""The front: its plan, its rank correlations against another implementation, what it writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import spearmanr

from cloud_aggregator.reproduce.command import reproduce
from cloud_aggregator.reproduce.pareto.gather import (
    FrontPoint,
    correlations,
    on_front,
    rank_correlation,
    ranks,
)
from cloud_aggregator.reproduce.pareto.outputs import as_json, write
from cloud_aggregator.reproduce.pareto.plan import Front, Settings, plan
from cloud_aggregator.reproduce.words import NO_EVIDENCE
from device_profiles.errors import InputError
from tests.cloud_aggregator.reproduce.rewards import (
    a_judge,
    point,
    write_reward_run,
)

FILES = {"helpfulness": "h.jsonl", "harmlessness": "s.jsonl"}
SMALL = {"seeds": (0, 1), "rounds": (1, 1, 1), "clients": 2, "weights": (0.0, 0.5, 1.0)}


def front_point(
    seed: int, weight: float, helpful: float, harmless: float, **clients: tuple[float, float]
) -> FrontPoint:
    """Return a point with those means, and each client's own rewards."""
    at = point(0.0)
    return FrontPoint(
        seed=seed,
        weight=weight,
        point=type(at)(helpfulness=helpful, harmlessness=harmless, tokens=1.0, ended=1.0),
        clients={name: {"helpfulness": h, "harmlessness": s} for name, (h, s) in clients.items()},
    )


def test_every_weight_runs_at_every_seed_and_differs_in_nothing_else() -> None:
    runs = plan(Settings(), 128, {**FILES})
    assert len(runs) == 15
    assert [r.experiment.preference for r in runs[:5]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    one = {r.experiment.model_copy(update={"preference": None}).run_name for r in runs[:5]}
    assert len(one) == 1
    assert {r.experiment.method for r in runs} == {"pwff"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0, 0.25, 0.5, 0.75, 1], [0.3, -1.0, 0.2, 4.0, 0.9]),
        ([0, 0, 0.5, 0.5, 1, 1], [2.0, 1.0, 1.0, 3.0, 3.0, -2.0]),  # ties on both sides
    ],
)
def test_the_rank_correlation_is_that_of_another_implementation(
    first: Sequence[float], second: Sequence[float]
) -> None:
    # both are sums of a few half-integers: only the last division and root round
    assert rank_correlation(first, second) == pytest.approx(
        spearmanr(first, second).statistic, abs=1e-12
    )


def test_equal_values_share_a_rank_and_a_side_that_does_not_vary_has_none() -> None:
    assert ranks([5.0, 1.0, 5.0, 7.0]).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert rank_correlation([0.0, 1.0], [2.0, 2.0]) is None
    assert rank_correlation([0.0], [2.0]) is None


def test_each_seeds_level_is_taken_off_before_all_runs_are_correlated() -> None:
    # both seeds fall with the weight; their levels would make it rise
    points = [
        front_point(seed, weight, 10.0 * seed - weight, 0.0)
        for seed, weights in ((0, (0.0, 0.5)), (1, (0.5, 1.0)))
        for weight in weights
    ]
    found = correlations(points)["helpfulness"]
    # rewards less their seed's mean: 0.25, -0.25, 0.25, -0.25 at 0, 0.5, 0.5, 1
    expected = spearmanr([0, 0.5, 0.5, 1], [0.25, -0.25, 0.25, -0.25]).statistic
    assert found.pooled == pytest.approx(expected, abs=1e-12)
    assert expected < 0
    assert found.points == 4


def test_clients_are_counted_by_the_sign_that_each_reward_should_have() -> None:
    points = [
        front_point(0, w, 0.0, 0.0, up=(w, w), down=(-w, -w), flat=(1.0, 1.0))
        for w in (0.0, 0.5, 1.0)
    ]
    found = correlations(points)
    for name in ("helpfulness", "harmlessness"):
        own = found[name]
        assert (own.clients, own.all_clients, own.weights) == (1, 3, 3)
        assert own.mean == pytest.approx(0.0)  # +1 and -1; the flat one has none
        assert own.pooled is None


def test_a_weight_is_off_the_front_where_another_is_better_in_both() -> None:
    points = [
        front_point(0, 0.0, 0.0, 1.0),
        front_point(0, 0.5, -0.1, 0.4),
        front_point(0, 1.0, 1.0, 0.5),
    ]
    assert on_front(points) == [0.0, 1.0]
    assert on_front([*points[:1], front_point(0, 0.5, 0.0, 1.0)]) == [0.0, 0.5]  # equal: both


def a_front(out: Path, **changes: object) -> Front:
    """Write the runs of a front where each reward follows its own weight."""
    settings = Settings.model_validate({**SMALL, **changes})
    judge = a_judge(out).sha256
    for run in plan(settings, 128, {**FILES}):
        weight = run.experiment.preference
        assert weight is not None
        write_reward_run(out, run, [(0.0, 0.0), (weight, 1 - weight)], judge)
    return Front(width=128, settings=settings, files={**FILES})


def test_the_text_has_the_front_and_both_correlations_with_their_points(tmp_path: Path) -> None:
    front = a_front(tmp_path)
    points = write(tmp_path, front, plan(front.settings, 128, front.files))
    text = (tmp_path / "pareto.md").read_text()
    assert "correlation is +1.00 over 6 points" in text
    assert "correlation is \u22121.00 over 6 points" in text
    assert "4 of 4 have that sign" in text  # two clients at two seeds
    assert "than 0, 0.5 and 1 (3 of 3 weights" in text
    # client b has 0.2 more helpfulness and 0.2 less harmlessness than a
    assert "| 0.5 | 0.60 ± 0.00 | 0.40 ± 0.00 | 2.00 ± 0.00 |" in text
    assert "--weights 0,0.5,1 --experiment paper-literal" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "pareto.csv").read_text())))
    assert np.allclose([float(r["helpfulness"]) for r in rows], [0.1, 0.6, 1.1] * 2)
    assert as_json(tmp_path, front, points)["front"] == [0.0, 0.5, 1.0]
    assert NO_EVIDENCE not in text


def test_a_quick_front_says_that_it_is_no_evidence(tmp_path: Path) -> None:
    front = a_front(tmp_path, quick=True)
    write(tmp_path, front, plan(front.settings, 128, front.files))
    for name in ("pareto.svg", "pareto.md"):
        assert NO_EVIDENCE in (tmp_path / name).read_text()
    assert (tmp_path / "pareto.csv").read_text().count("none (quick)") == 6


def test_missing_runs_are_named_and_without_any_there_is_no_front(tmp_path: Path) -> None:
    front = a_front(tmp_path)
    more = front.settings.model_copy(update={"weights": (0.0, 0.5, 0.75, 1.0), "seeds": (0,)})
    runs = plan(more, 128, front.files)
    write(tmp_path, front.model_copy(update={"settings": more}), runs)
    text = (tmp_path / "pareto.md").read_text()
    assert "**Missing runs**: pwff, seed 0, weight 0.75: not run." in text
    with pytest.raises(InputError, match="is done and judged"):
        write(tmp_path / "nowhere", front, runs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "0,x"], ["--weights", "'x'"]),
        (["--weights", "0,1.5"], ["weights", "1.5"]),
        (["--weights", "0,0.0"], ["--weights", "twice"]),
        (["--experiment", "paper-litral"], ["paper-literal"]),
        (["--rounds", "1"], ["--rounds", "instruction"]),
        (["--max-new-tokens", "9999"], ["max_new_tokens", "9999"]),
        (["--render-only"], ["--render-only"]),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    out = tmp_path / "new"
    done = CliRunner().invoke(reproduce, ["pareto", "--out", str(out), *arguments])
    assert getattr(done.exception, "exit_code", None) == 2, done.output
    assert all(word in str(done.exception) for word in words), str(done.exception)
    assert not out.exists()
