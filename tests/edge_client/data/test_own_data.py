"""What a client holds besides its instructions: how one set is divided, and what a client gets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES
from edge_client.data.own_data import Places, Preferences, load_sources
from edge_client.data.preferences import Pair, PreferenceData
from edge_client.data.prompt_files import Prompt
from tests.edge_client.conftest import EXAMPLES

CLIENTS, SHARE = 3, 0.25


def pairs_of(prompts: Sequence[str], *, each: int = 2, split: Any = None) -> list[Pair]:
    """Return some pairs of each prompt, the prompts by turns."""
    return [
        Pair(instruction=prompt, chosen=f"yes {i}", rejected=f"no {i}", split=split)
        for i in range(each)
        for prompt in prompts
    ]


def named(objective: str, pairs: list[Pair]) -> PreferenceData:
    return PreferenceData(source="hand-made", objective=objective, pairs=pairs)


def both(
    helpful: Sequence[str], harmless: Sequence[str], prompts: Sequence[Prompt] | None = None
) -> Preferences:
    """Return pairs of these prompts."""
    return Preferences(
        sets={
            "helpfulness": named("helpfulness", pairs_of(helpful)),
            "harmlessness": named("harmlessness", pairs_of(harmless)),
        },
        prompts=prompts,
    )


NUMBERS = [f"prompt {i}" for i in range(20)]
APART = both(NUMBERS, [f"other {i}" for i in range(20)])
ALIKE = both(NUMBERS, NUMBERS)
FILE = [Prompt(instruction=f"asked {i}") for i in range(12)]


def divide(preferences: Preferences, seed: int = 3) -> list[Places]:
    return preferences.divide(clients=CLIENTS, held_out_share=SHARE, seed=seed)


def test_every_pair_is_in_one_place_with_its_whole_prompt() -> None:
    places = divide(APART)
    assert len(places) == CLIENTS
    for name, data in APART.sets.items():
        sides = [side for p in places for side in (p.train[name], p.held_out[name])]
        assert sorted(i for side in sides for i in side) == list(range(len(data.pairs)))
        prompts = [{data.pairs[i].prompt for i in side} for side in sides]
        assert sum(map(len, prompts)) == len(set().union(*prompts)) == 20
        # a quarter of 20 prompts is held out: two pairs each, dealt to three clients
        assert sorted(len(p.held_out[name]) for p in places) == [2, 4, 4]
    assert [p.training_pairs for p in places] == [
        sum(len(side) for side in p.train.values()) for p in places
    ]
    assert sum(p.training_pairs for p in places) == 2 * 30


def test_the_same_pairs_are_divided_otherwise_for_another_objective_and_another_seed() -> None:
    places = divide(ALIKE)
    assert places == divide(ALIKE)
    assert all(p.train["helpfulness"] != p.train["harmlessness"] for p in places)
    assert places != divide(ALIKE, seed=4)


def test_a_client_gets_what_its_places_name() -> None:
    for places in divide(APART):
        own = APART.own(places, EXAMPLES[:4], EXAMPLES[4:])
        assert (own.examples, own.held_out) == (EXAMPLES[:4], EXAMPLES[4:])
        for name in OBJECTIVES:
            pairs = APART.sets[name].pairs
            assert own.pairs[name] == [pairs[i] for i in places.train[name]]
            assert own.held_out_pairs[name] == [pairs[i] for i in places.held_out[name]]


def test_places_come_back_from_json_as_they_were() -> None:
    for places in [*divide(APART), *divide(both(NUMBERS, NUMBERS, FILE))]:
        assert Places.model_validate_json(places.model_dump_json()) == places


# -- prompts ---------------------------------------------------------------------------------------


def test_without_a_file_a_client_answers_its_own_pairs_prompts_each_once_and_by_turns() -> None:
    for places in divide(APART):
        own = APART.own(places, [], [])
        for asked, pairs in (
            (own.prompts, own.pairs),
            (own.held_out_prompts, own.held_out_pairs),
        ):
            keys = [p.key for p in asked]
            assert Counter(keys) == Counter({pair.prompt for s in pairs.values() for pair in s})
            words = [key.split()[0] for key in keys]
            least = 2 * min(words.count("prompt"), words.count("other"))
            # helpfulness first, and one of each as long as there are both
            assert words[:least] == ["prompt", "other"] * (least // 2)


@pytest.mark.parametrize("seed", range(8))
def test_a_prompt_that_either_objective_holds_out_is_not_trained_on(seed: int) -> None:
    overlaps = 0
    for places in divide(ALIKE, seed):
        own = ALIKE.own(places, [], [])
        held_out = {p.key for p in own.held_out_prompts}
        learned = {pair.prompt for side in own.pairs.values() for pair in side}
        assert held_out == {pair.prompt for s in own.held_out_pairs.values() for pair in s}
        assert {p.key for p in own.prompts} == learned - held_out
        overlaps += len(learned & held_out)
    assert overlaps  # or this test would say nothing


def test_a_file_of_prompts_is_divided_by_itself_and_replaces_the_pairs_prompts() -> None:
    preferences = both(NUMBERS, NUMBERS, FILE)
    places = divide(preferences)
    owned = [preferences.own(p, [], []) for p in places]
    asked = [p.instruction for own in owned for p in own.prompts]
    measured = [p.instruction for own in owned for p in own.held_out_prompts]
    assert sorted(asked + measured) == sorted(p.instruction for p in FILE)
    assert [len(own.held_out_prompts) for own in owned] == [1, 1, 1]  # a quarter of 12
    assert [len(own.prompts) for own in owned] == [3, 3, 3]
    assert places == divide(preferences)
    assert places != divide(preferences, seed=4)
    alone = divide(ALIKE)
    assert [(p.train, p.held_out) for p in places] == [(p.train, p.held_out) for p in alone]


def test_a_file_of_prompts_that_carries_a_split_is_divided_by_it() -> None:
    held_out = {0, 2, 5, 7, 11}
    marked = [
        p.model_copy(update={"split": "held_out" if i in held_out else "train"})
        for i, p in enumerate(FILE)
    ]
    places = divide(both(NUMBERS, NUMBERS, marked))
    assert sorted(i for p in places for i in p.held_out_prompts or ()) == sorted(held_out)
    assert sorted(i for p in places for i in p.prompts or ()) == [1, 3, 4, 6, 8, 9, 10]


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (FILE[:5], "3 clients need at least 3 prompts to answer and 3 held out, .* has 3 and 2;"),
        (FILE[:2], "and the file has 2 and 0; use fewer clients or more prompts"),
        (
            [p.model_copy(update={"split": "train"}) for p in FILE],
            "and the file has 12 and 0; use fewer clients",
        ),
        (
            [FILE[0].model_copy(update={"split": "train"}), *FILE[1:]],
            "11 of 12 prompts carry no split and the others do; mark every prompt",
        ),
    ],
)
def test_a_file_of_prompts_that_cannot_be_divided_is_refused(
    prompts: list[Prompt], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        divide(both(NUMBERS, NUMBERS, prompts))


def test_as_few_prompts_as_each_client_needs_are_enough() -> None:
    places = divide(both(NUMBERS, NUMBERS, FILE[:6]))
    assert [(len(p.prompts or ()), len(p.held_out_prompts or ())) for p in places] == [(1, 1)] * 3


def test_pairs_of_too_few_prompts_are_refused() -> None:
    with pytest.raises(InputError, match=r"3 clients need at least 6 prompts .*harmlessness .* 5;"):
        divide(both(NUMBERS, NUMBERS[:5]))


# -- reading ---------------------------------------------------------------------------------------


def written(folder: Path, prompts: Sequence[str], name: str = "pairs.jsonl") -> str:
    path = folder / name
    rows = [pair.model_dump(exclude_none=True) for pair in pairs_of(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_hashes_are_of_the_data_and_change_with_it(tmp_path: Path) -> None:
    source, asked = written(tmp_path, NUMBERS), tmp_path / "asked.txt"
    asked.write_text("Name a river.\nName a lake.\n")
    first = load_sources({"helpfulness": source}, str(asked), seed=3)
    assert set(first.hashes) == {"helpfulness", "prompts"}
    assert load_sources({"helpfulness": source}, str(asked), seed=3).hashes == first.hashes
    written(tmp_path, [*NUMBERS[:-1], "another"])
    asked.write_text("Name a river.\nName a town.\n")
    changed = load_sources({"helpfulness": source}, str(asked), seed=3).hashes
    assert all(changed[name] != first.hashes[name] for name in first.hashes)


def test_each_objective_is_read_from_its_own_source(tmp_path: Path) -> None:
    sources = {
        "helpfulness": written(tmp_path, NUMBERS, "a.jsonl"),
        "harmlessness": written(tmp_path, ["other"], "b.jsonl"),
    }
    preferences = load_sources(sources, None, seed=3)  # type: ignore[arg-type]
    assert preferences.prompts is None
    assert {n: {p.instruction for p in d.pairs} for n, d in preferences.sets.items()} == {
        "helpfulness": set(NUMBERS),
        "harmlessness": {"other"},
    }


def test_a_run_without_objectives_reads_and_divides_nothing() -> None:
    nothing = load_sources({}, "nowhere.txt", seed=3)
    assert nothing.hashes == {}
    (places,) = nothing.divide(clients=1, held_out_share=SHARE, seed=3)
    assert (places, places.training_pairs) == (Places(), 0)
    own = nothing.own(places, EXAMPLES[:4], EXAMPLES[4:])
    assert (own.pairs, own.held_out_pairs, own.prompts, own.held_out_prompts) == ({}, {}, [], [])
