"""The plan of Fig. 4: how many runs, at which ranks, and which are shared."""

from __future__ import annotations

import pytest

from cloud_aggregator.experiment import load_experiment
from cloud_aggregator.reproduce.fig4 import (
    EXPERIMENTS,
    FIGURE,
    VARIANTS,
    PlannedRun,
    Settings,
    experiment_file,
    learning_rank,
    names_of,
    plan,
    priced_rank,
    seeds_of,
)
from device_profiles.channel import PAPER_LINK
from device_profiles.config_files import read_toml
from device_profiles.errors import InputError


def find(runs: list[PlannedRun], method: str, seed: int = 0) -> list[PlannedRun]:
    """Return the runs of a method at a seed."""
    return [r for r in runs if (r.experiment.method, r.experiment.seed) == (method, seed)]


def test_the_whole_comparison_is_45_runs_of_which_the_figure_takes_27() -> None:
    # (8 methods x 2 experiments - fedada once) x 3 seeds, and 5 instead of 8
    assert len(plan(Settings(), 128)) == 45
    assert len(plan(Settings(methods=FIGURE), 128)) == 27


def test_only_the_method_without_lora_is_shared_between_the_experiments() -> None:
    runs = plan(Settings(seeds=(0,)), 128)
    shared = {run.experiment.method for run in runs if run.serves == EXPERIMENTS}
    assert shared == {"fedada"}
    assert len(find(runs, "fedada")) == 1
    assert all(
        len(find(runs, method)) == 2 for method in (*FIGURE, *VARIANTS) if method != "fedada"
    )


def test_every_run_has_a_folder_name_of_its_own() -> None:
    runs = plan(Settings(), 128)
    assert len({run.name for run in runs}) == len(runs)


def test_the_figure_is_whole_seed_by_seed_before_any_variant_runs() -> None:
    runs = plan(Settings(), 128)
    assert {run.experiment.method for run in runs[:27]} == set(FIGURE)
    assert [run.experiment.seed for run in runs[:27]] == [0] * 9 + [1] * 9 + [2] * 9


@pytest.mark.parametrize(
    ("width", "literal", "consistent"),
    # 96 and 8 of 768; 8 * 128 / 768 is 1.33, 8 * 16 / 768 is 0.17
    [(768, 96, 8), (128, 16, 2), (16, 2, 1), (384, 48, 4)],
)
def test_ranks_are_in_proportion_to_the_width_rounded_up(
    width: int, literal: int, consistent: int
) -> None:
    assert (learning_rank(96, width), learning_rank(8, width)) == (literal, consistent)
    runs = find(plan(Settings(seeds=(0,)), width), "pwff")
    assert [run.experiment.lora_rank for run in runs] == [literal, consistent]
    assert [run.experiment.priced_lora_rank for run in runs] == [96, 8]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_file_by_itself_has_the_ranks_of_the_plan_on_the_bundled_base(name: str) -> None:
    alone = load_experiment(experiment_file(name), {})
    (planned,) = [r for r in find(plan(Settings(), 128), "pwff") if name in r.serves]
    assert alone == planned.experiment
    assert alone.lora_rank == learning_rank(priced_rank(name), 128)


def test_the_two_files_differ_in_nothing_but_the_rank() -> None:
    literal, consistent = (read_toml(experiment_file(name)) for name in EXPERIMENTS)
    assert {key for key in literal | consistent if literal.get(key) != consistent.get(key)} == {
        "lora_rank",
        "priced_lora_rank",
    }


def test_the_setting_is_the_papers() -> None:
    run = plan(Settings(seeds=(0,)), 128)[0].experiment
    assert (run.clients, run.channel, run.codec, run.placement) == (10, "paper", "fp32", "qkv")
    assert (run.rounds, run.local_steps, run.priced_at) == (10, 20, "gpt2-small")
    assert run.partition != "iid"
    assert (PAPER_LINK.snr_db, PAPER_LINK.bandwidth_hz, PAPER_LINK.transmit_watts) == (5, 1e6, 1)


def test_workers_and_rounds_do_not_make_it_another_run() -> None:
    names = [run.name for run in plan(Settings(), 128)]
    assert [run.name for run in plan(Settings(rounds=3), 128, {"workers": 1})] == names
    assert [run.name for run in plan(Settings(local_steps=3), 128)] != names


@pytest.mark.parametrize(
    ("text", "words"),
    [("0,a", ["'a'"]), ("0,-1", ["'-1'"]), ("1.5", ["'1.5'"]), ("0,,1", ["empty"]), ("", ["empty"]),
     ("1,2,1", ["'1'", "twice"]), ("1,01", ["'1'", "twice"])],
)  # fmt: skip
def test_seeds_that_are_no_list_of_different_numbers_are_refused(
    text: str, words: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        seeds_of(text)
    assert all(word in str(refused.value) for word in words)
    assert "--seeds" in str(refused.value)


def test_names_come_in_the_tables_order_and_an_unknown_one_with_the_nearest() -> None:
    assert names_of("--methods", "method", "fedada, pwff", FIGURE) == ["pwff", "fedada"]
    with pytest.raises(InputError, match="'fedlorra'; did you mean 'fedlora'"):
        names_of("--methods", "method", "pwff,fedlorra", FIGURE)
    with pytest.raises(InputError, match="'pwff' twice"):
        names_of("--methods", "method", "pwff,pwff", FIGURE)
