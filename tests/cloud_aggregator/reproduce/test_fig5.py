"""Fig. 5: its plan, its claims in both directions, and what it writes; all figures by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloud_aggregator.experiment import stored
from cloud_aggregator.reproduce.command import reproduce
from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, PlannedRun
from cloud_aggregator.reproduce.fig5.claims import (
    alignment_helps,
    hacking,
    judge,
    more_reward,
    saves_energy,
    shepherd_spends_least,
)
from cloud_aggregator.reproduce.fig5.document import command
from cloud_aggregator.reproduce.fig5.figure import draw
from cloud_aggregator.reproduce.fig5.gather import Gathered, gather, reward_run
from cloud_aggregator.reproduce.fig5.outputs import as_json, write
from cloud_aggregator.reproduce.fig5.plan import (
    FIG5,
    METHODS_OF_FIG5,
    PPO_UPDATES,
    QUICK,
    Comparison,
    Settings,
    method_of,
    per_stage,
    plan,
)
from cloud_aggregator.reproduce.folder import keep, rounds_left, take_up
from cloud_aggregator.reproduce.gather import read_records
from cloud_aggregator.reproduce.words import NO_EVIDENCE
from device_profiles.errors import InputError
from edge_client.alignment.settings import PpoSettings
from tests.cloud_aggregator.reproduce.rewards import (
    JOULES,
    a_judge,
    reward_run_of,
    reward_runs_of,
    said_of,
    three_stages,
    write_reward_run,
)

FILES = {"helpfulness": "h.jsonl", "harmlessness": "s.jsonl"}
SMALL = {"seeds": (0, 1), "rounds": (1, 1, 2), "clients": 2}


def runs_of(**changes: object) -> list[PlannedRun]:
    """Return the plan of a small comparison."""
    return plan(Settings.model_validate({**SMALL, **changes}), 128, {**FILES})


# -- the plan -------------------------------------------------------------------------------------


def test_every_method_runs_at_every_rank_and_seed() -> None:
    runs = plan(Settings(), 128, {**FILES})
    assert len(runs) == 5 * 2 * 3
    assert {run.experiment.method for run in runs[:5]} == set(METHODS_OF_FIG5)
    assert len({run.name for run in runs}) == 30


def test_a_method_without_rewards_stops_after_its_first_stage() -> None:
    by_method = {run.experiment.method: run.experiment for run in runs_of(seeds=(0,))}
    assert by_method["shepherd"].stage_names == ["instruction"]
    assert by_method["shepherd"].total_rounds == 1
    for method in set(METHODS_OF_FIG5) - {"shepherd"}:
        experiment = by_method[method]
        assert experiment.stage_names == ["instruction", "reward", "alignment"]
        assert [experiment.rounds_of(stage) for stage in experiment.stage_names] == [1, 1, 2]
        assert (experiment.helpfulness, experiment.harmlessness) == ("h.jsonl", "s.jsonl")


def test_learning_ranks_and_priced_ranks_are_those_of_fig4() -> None:
    runs = [run for run in runs_of(seeds=(0,)) if run.experiment.method == "pwff"]
    assert [(r.experiment.lora_rank, r.experiment.priced_lora_rank) for r in runs] == [
        (16, 96),
        (2, 8),
    ]


def test_an_ablation_is_ours_with_another_algorithm_after_the_same_stages() -> None:
    ours, rloo, dpo = runs_of(
        seeds=(0,), experiments=EXPERIMENTS[:1], methods=("pwff", "pwff-rloo", "pwff-dpo")
    )
    assert [method_of(run.experiment) for run in (ours, rloo, dpo)] == [
        "pwff", "pwff-rloo", "pwff-dpo",
    ]  # fmt: skip
    assert ours.words.startswith("pwff, seed 0")
    assert dpo.words.startswith("pwff by dpo, seed 0")
    first = stored(ours.experiment)
    changed = {
        run.name: {k: v for k, v in stored(run.experiment).items() if first[k] != v}
        for run in (rloo, dpo)
    }
    assert changed == {
        rloo.name: {"algorithm": "rloo", "alignment_learning_rate": 1e-3},
        # as many updates as two steps of PPO take
        dpo.name: {"algorithm": "dpo", "local_steps": [20, 40, 32]},
    }
    assert PpoSettings().epochs * PpoSettings().minibatches == PPO_UPDATES


def test_an_ablation_has_a_row_of_its_own_beside_ours(tmp_path: Path) -> None:
    comparison, runs = a_comparison(
        tmp_path, methods=("pwff", "pwff-dpo"), experiments=EXPERIMENTS[:1]
    )
    for run in runs:
        if method_of(run.experiment) == "pwff-dpo":
            write_reward_run(tmp_path, run, [(0.0, 0.0)] * 3, a_judge(tmp_path).sha256)
    write(tmp_path, comparison, runs)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "fig5.csv").read_text())))
    last = {(r["method"], r["seed"]): r["reward"] for r in rows if r["alignment_round"] == "2"}
    assert {key: round(float(value), 9) for key, value in last.items()} == {
        ("pwff", "0"): 0.3, ("pwff", "1"): 0.32, ("pwff-dpo", "0"): 0.0, ("pwff-dpo", "1"): 0.0,
    }  # fmt: skip
    text = (tmp_path / "fig5.md").read_text().replace("\u2212", "-")
    assert "| pwff-dpo | 0.00 ± 0.00 | -0.31 (-0.30, -0.32) |" in text


@pytest.mark.parametrize("text", ["6", "6,4", "6,4,x", "6,,4", "6,4,6,1"])
def test_rounds_that_are_not_one_number_a_stage_are_refused(text: str) -> None:
    assert per_stage("--rounds", "6, 4,6") == [6, 4, 6]
    with pytest.raises(InputError, match="--rounds"):
        per_stage("--rounds", text)


def test_a_folder_goes_on_by_its_name_and_keeps_its_half_of_the_pairs(tmp_path: Path) -> None:
    found = take_up(FIG5, tmp_path, {"seeds": [5]}, quick=True)
    assert (found.settings.rounds, found.settings.seeds) == (QUICK["rounds"], (5,))
    keep(tmp_path, found.model_copy(update={"files": FILES}))
    again = take_up(FIG5, tmp_path, {"seeds": [5, 6]})
    assert (again.files, again.settings.seeds, again.settings.quick) == (FILES, (5, 6), True)
    assert [path.name for path in tmp_path.iterdir()] == ["fig5.toml"]


def test_the_rounds_of_a_comparison_stay_what_they_were(tmp_path: Path) -> None:
    keep(tmp_path, Comparison(width=128, settings=Settings()))
    done = CliRunner().invoke(
        reproduce, ["fig5", "--out", str(tmp_path), "--rounds", "6,4,8", "--render-only"]
    )
    assert getattr(done.exception, "exit_code", None) == 2, done.output
    assert "--rounds 6,4,8" in str(done.exception)
    assert "of 6,4,6" in str(done.exception)


def test_a_method_that_is_not_of_the_figure_is_refused_and_nothing_written(tmp_path: Path) -> None:
    out = tmp_path / "new"
    done = CliRunner().invoke(reproduce, ["fig5", "--out", str(out), "--methods", "shepard"])
    assert "shepherd" in str(done.exception)
    assert not out.exists()


def test_a_run_whose_alignment_was_taken_back_is_done_with_fewer_rounds() -> None:
    run = next(r for r in runs_of() if r.experiment.method == "pwff")
    record = three_stages(run)
    short = record.model_copy(update={"rounds": record.rounds[:3]})
    assert rounds_left(run, short) == 1
    short.rounds[-1].taken_back = "kl-limit"
    assert rounds_left(run, short) == 0
    assert rounds_left(run, short.model_copy(update={"status": "stopped"})) == 1


# -- the figures ----------------------------------------------------------------------------------


def test_a_reward_is_the_sum_of_the_clients_means_and_energy_is_of_the_models_upload() -> None:
    run = next(r for r in runs_of() if r.experiment.method == "pwff")
    record = three_stages(run)
    found = reward_run(record, said_of(record, [(0.1, 0.3), (0.2, 0.0), (0.6, 0.5)], "j"))
    # client b has +0.2 and -0.2: half of it in the means, and nothing in their sum
    assert found.curve == pytest.approx((0.4, 0.2, 1.1))
    assert found.final.helpfulness == pytest.approx(0.7)
    assert found.final.harmlessness == pytest.approx(0.4)
    assert (found.before.kl, found.final.kl, found.final.tokens, found.final.ended) == (
        None, 2.0, 12.0, 0.25,
    )  # fmt: skip
    assert (found.uplink_joules, found.reward_joules) == (JOULES["pwff"], 0.5)
    # one round of instruction tuning, one of reward learning, two of alignment
    assert found.total_joules == pytest.approx(3 * JOULES["pwff"] + 0.5)


def test_clients_rise_by_their_own_users_weights() -> None:
    run = next(r for r in runs_of() if r.experiment.method == "pwff")
    record = three_stages(run)
    # 0.75 on helpfulness: +0.1 and -0.2 give 0.025 more, +0.1 and -0.4 give 0.025 less
    for harmless, risen in ((-0.2, 2), (-0.4, 0)):
        said = said_of(record, [(0.0, 0.0), (5.0, 5.0), (0.1, harmless)], "j")
        assert reward_run(record, said).risen == risen


def test_a_round_that_was_not_judged_is_a_gap_and_not_a_shift() -> None:
    run = next(r for r in runs_of() if r.experiment.method == "pwff")
    record = three_stages(run)
    said = said_of(record, [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)], "j")
    said.moments.pop(1)
    assert reward_run(record, said).curve == pytest.approx((0.2, None, 0.6))


def test_a_run_that_is_not_done_or_not_judged_is_named_and_left_out(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {**SMALL, "methods": ("pwff", "sfl", "pfl"), "seeds": (0,), "experiments": EXPERIMENTS[:1]}
    )
    ours, unjudged, absent = plan(settings, 128, {**FILES})
    write_reward_run(tmp_path, ours, [(0.1, 0.1)] * 3, "j")
    write_reward_run(tmp_path, unjudged, [(0.1, 0.1)] * 3, "j")
    (tmp_path / "runs" / unjudged.name / "judge.json").unlink()
    runs = [ours, unjudged, absent]
    (found,) = gather(settings, 128, runs, read_records(runs, tmp_path), tmp_path)
    assert {m: list(by_seed) for m, by_seed in found.runs.items()} == {"pwff": [0]}
    assert found.missing == ("sfl, seed 0: not judged", "pfl, seed 0: not run")
    assert (found.learning, found.rank) == ("learning: mini, rank 16", 96)


# -- the claims -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "words"),
    [
        ([1.5, 1.3, 1.4], [1.0, 0.9, 0.95], "held", "47 %"),  # 4.2 / 2.85 = 1.474
        ([1.2, 1.1, 1.15], [1.0, 0.9, 0.95], "not held", "21 %"),  # 3.45 / 2.85 = 1.2105
        ([0.8, 0.7, 0.6], [1.0, 0.9, 0.95], "not held", "does not win"),
        ([1.5, 0.8, 1.0], [1.0, 0.9, 0.95], "undecided", "not shown to win"),
        ([1.5], [1.0], "undecided", "one seed"),
        ([0.5, 0.6, 0.7], [-1.0, -0.9, -1.1], "undecided", "no percentage"),
    ],
)
def test_forty_percent_more_reward_needs_a_difference_and_a_zero(
    ours: list[float], theirs: list[float], verdict: str, words: str
) -> None:
    claim = more_reward(reward_runs_of({"pwff": ours, "sfl": theirs}))
    assert (claim.verdict, words in claim.sentence) == (verdict, True), claim.sentence


def test_energy_is_judged_at_the_upload_of_a_model() -> None:
    runs = reward_runs_of({method: [0.5] for method in METHODS_OF_FIG5})
    saving, least = saves_energy(runs), shepherd_spends_least(runs)
    assert (saving.verdict, "43.2 % less" in saving.sentence) == ("held", True)
    assert "than pfl, 10.8 against 19.1 J" in saving.sentence
    assert least.verdict == "held"
    at_96 = {**JOULES, "pfl": 109.83, "shepherd": 98.99, "shepherd-aligned": 98.99}
    runs = reward_runs_of({method: [0.5] for method in METHODS_OF_FIG5}, at_96)
    assert saves_energy(runs).verdict == shepherd_spends_least(runs).verdict == "not held"


@pytest.mark.parametrize(("risen", "verdict"), [((8, 10), "held"), ((10, 7), "not held")])
def test_alignment_has_to_help_eight_of_ten_clients_in_every_seed(
    risen: tuple[int, int], verdict: str
) -> None:
    runs = {"pwff": {s: reward_run_of("pwff", s, [0.1, 0.4], risen=n) for s, n in enumerate(risen)}}
    claim = alignment_helps(runs)
    assert claim.verdict == verdict
    assert f"{risen[0]} of 10, {risen[1]} of 10 clients" in claim.sentence
    assert "changed by +0.30" in claim.sentence


def test_nothing_at_all_leaves_every_claim_undecided_and_the_control_stands_last() -> None:
    claims = judge({})
    assert {claim.verdict for claim in claims} == {"undecided"}
    assert [claim.text.startswith("Control") for claim in claims] == [False] * 3 + [True]


def test_a_rise_that_only_the_runs_own_rewards_see_is_told_beside_the_judges() -> None:
    runs = {
        "pwff": {0: reward_run_of("pwff", 0, [0.4, 0.2], own_before=-0.5, own_after=1.5)},
        "shepherd": {0: reward_run_of("shepherd", 0, [0.3], own_before=None, own_after=None)},
    }
    (said,) = hacking(runs)  # the judge: -0.2 in the sum of two, -0.1 in their mean
    assert said.startswith("PWFF: +2.00 by its own reward models (weighted), \u22120.10 by the")


# -- what is written ------------------------------------------------------------------------------


def a_comparison(out: Path, **changes: object) -> tuple[Comparison, list[PlannedRun]]:
    """Write a comparison of every method, at two seeds, judged."""
    settings = Settings.model_validate({**SMALL, **changes})
    comparison = Comparison(width=128, settings=settings, files={**FILES})
    runs = plan(settings, 128, {**FILES})
    judge_sha256 = a_judge(out).sha256
    keep(out, comparison)
    for run in runs:
        moments = 1 if run.experiment.method == "shepherd" else 3
        rewards = [(0.1 * n, 0.05 * n + 0.02 * run.experiment.seed) for n in range(moments)]
        write_reward_run(out, run, rewards, judge_sha256)
    return comparison, runs


def test_the_text_has_the_rewards_the_judge_and_every_claim(tmp_path: Path) -> None:
    comparison, runs = a_comparison(tmp_path)
    found = write(tmp_path, comparison, runs)
    text = (tmp_path / "fig5.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## paper")] == [*EXPERIMENTS]
    for experiment in found:
        for claim in experiment.claims:
            assert f"**{claim.text}: {claim.verdict}.** {claim.sentence}" in text
    rows = [line for line in text.splitlines() if line.startswith("| pwff |")]
    # 0.2 + 0.1 at seed 0 and 0.02 more at seed 1: a deviation of 0.01 * sqrt(2)
    assert "| 0.31 ± 0.01 |" in rows[0]
    assert "2 of 2, 2 of 2" in rows[0]
    assert "not aligned" in next(r for r in text.splitlines() if r.startswith("| shepherd |"))
    assert "| helpfulness | 100 | 80 | 20 | 80.0 | 30.0 | 10.0 |" in text
    # the shorter one wins in 70 %
    assert "beats the better of 'the longer one wins' and 'the shorter one wins' (80.0" in text
    assert "against 70.0 %" in text
    assert NO_EVIDENCE not in text


def test_quick_says_in_every_output_that_it_is_no_evidence(tmp_path: Path) -> None:
    comparison, runs = a_comparison(tmp_path, quick=True)
    found = write(tmp_path, comparison, runs)
    for name in ("fig5.svg", "fig5.md"):
        assert NO_EVIDENCE in (tmp_path / name).read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "fig5.csv").read_text())))
    assert {row["evidence"] for row in rows} == {"none (quick)"}
    assert as_json(tmp_path, comparison, found)["evidence"] is False


def test_the_csv_has_a_row_for_each_moment_of_each_run(tmp_path: Path) -> None:
    comparison, runs = a_comparison(tmp_path)
    write(tmp_path, comparison, runs)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "fig5.csv").read_text())))
    assert len(rows) == 2 * 2 * (4 * 3 + 1)
    (row,) = [
        r for r in rows
        if (r["experiment"], r["method"], r["seed"], r["alignment_round"])
        == ("paper-literal", "sfl", "0", "2")
    ]  # fmt: skip
    assert float(row["reward"]) == pytest.approx(0.2 + 0.1)
    assert float(row["helpfulness"]) == pytest.approx(0.3)  # 0.2, and 0.4 on the other client
    assert float(row["uplink_joules_mean"]) == JOULES["sfl"]


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    comparison, runs = a_comparison(tmp_path)
    names = ("fig5.svg", "fig5.png", "fig5.csv", "fig5.md")
    write(tmp_path, comparison, runs)
    first = [(tmp_path / name).read_bytes() for name in names]
    write(tmp_path, comparison, runs)
    assert [(tmp_path / name).read_bytes() for name in names] == first


def test_the_command_in_the_text_has_no_path_and_gives_the_settings_back() -> None:
    settings = Settings(seeds=(3,), helpfulness="../data/h.jsonl", methods=("pwff", "sfl"))
    assert command(settings) == (
        "pwff reproduce fig5 --seeds 3 --rounds 6,4,6 --local-steps 20,40,2 --rollouts 16 "
        "--max-new-tokens 48 --held-out-prompts 16 --model mini --data kit --helpfulness h.jsonl "
        "--harmlessness kit --methods pwff,sfl"
    )


def test_a_method_without_alignment_is_a_level_dashed_line() -> None:
    runs = reward_runs_of({"pwff": [0.3, 0.5], "shepherd": [0.0]})
    runs["shepherd"] = {0: reward_run_of("shepherd", 0, [0.2])}
    gathered = Gathered(name="paper-literal", rank=96, learning="x", priced="y", runs=runs)
    ours, theirs = draw([gathered], quick=False).axes[0].get_lines()
    assert list(ours.get_ydata()) == pytest.approx([0.1, 0.4])
    assert list(theirs.get_ydata()) == pytest.approx([0.2, 0.2])
    assert (ours.get_linestyle(), theirs.get_linestyle()) == ("-", "--")


def test_pairs_of_another_half_are_not_compared(tmp_path: Path) -> None:
    _, runs = a_comparison(tmp_path)
    for run, sha256 in ((runs[0], "1" * 64), (runs[1], "2" * 64)):
        record = three_stages(run)
        record.data.preferences = {"helpfulness": sha256}
        (tmp_path / "runs" / run.name / "run.json").write_text(
            record.model_dump_json(by_alias=True)
        )
    with pytest.raises(InputError, match="unlike content of the helpfulness pairs"):
        read_records(runs, tmp_path)


def test_without_any_judged_run_there_is_nothing_to_render(tmp_path: Path) -> None:
    runs = runs_of()
    with pytest.raises(InputError, match="none of the 20 runs"):
        write(tmp_path, Comparison(width=128, settings=Settings.model_validate(SMALL)), runs)
