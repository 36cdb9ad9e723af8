"""Reading preference data and dividing it by prompt."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES
from edge_client.data.preferences import Pair, PairPart, load_preferences, partition_pairs
from quantization.errors import HubUnavailableError, MissingExtraError

GOOD = {"instruction": "Name a river.", "chosen": "The Severn.", "rejected": "No."}
SHARED = Path(__file__).parents[4] / "shared" / "data"
DIALOGUE = "\n\nHuman: Is tea hot?\n\nAssistant: Mostly.\n\nHuman: Why?\n\nAssistant:"
HH = {"chosen": f"{DIALOGUE} It is brewed.", "rejected": f"{DIALOGUE} Guess."}
PKU = {
    "prompt": "How do I open a tin?",
    "response_0": "With a tin opener.",
    "response_1": "With a tin opener; mind the sharp edge, and wear gloves if the ring is missing.",
    "better_response_id": 0,
    "safer_response_id": 1,
}


def write(folder: Path, rows: Sequence[object], name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def a_pair(prompt: str, number: int = 0, split: Any = None) -> Pair:
    return Pair(instruction=prompt, chosen=f"yes {number}", rejected=f"no {number}", split=split)


def divide(pairs: Sequence[Pair], clients: int, **changes: Any) -> list[PairPart]:
    wish = {"held_out_share": 0.2, "seed": 3, "objective": "helpfulness", **changes}
    return partition_pairs(pairs, clients=clients, **wish)


def test_the_projects_own_layout_is_read_from_json_and_jsonl(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "input": "in Wales", "split": "held_out", "dataset": "x"}]
    whole = tmp_path / "pairs.json"
    whole.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    read = [load_preferences(s, "helpfulness") for s in (write(tmp_path, rows), str(whole))]
    assert read[0].pairs == read[1].pairs
    assert read[0].sha256 == read[1].sha256
    assert read[0].pairs[1] == Pair(
        instruction="Name a river.",
        input="in Wales",
        chosen="The Severn.",
        rejected="No.",
        split="held_out",
    )


def test_the_hash_sees_which_side_was_chosen(tmp_path: Path) -> None:
    turned = {**GOOD, "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    hashes = {
        load_preferences(write(tmp_path, [row]), "helpfulness").sha256 for row in (GOOD, turned)
    }
    assert len(hashes) == 2


def test_of_hh_rlhf_the_last_answers_are_taken_apart_from_the_dialogue(tmp_path: Path) -> None:
    (pair,) = load_preferences(write(tmp_path, [HH]), "harmlessness").pairs
    assert pair == Pair(
        instruction="Human: Is tea hot?\n\nAssistant: Mostly.\n\nHuman: Why?",
        chosen="It is brewed.",
        rejected="Guess.",
    )


def test_an_hh_rlhf_dialogue_of_one_turn_is_its_question_alone(tmp_path: Path) -> None:
    row = {
        "chosen": "\n\nHuman: Is tea hot?\nSay so.\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Is tea hot?\nSay so.\n\nAssistant: No.",
    }
    (pair,) = load_preferences(write(tmp_path, [row]), "helpfulness").pairs
    assert (pair.instruction, pair.chosen, pair.rejected) == (
        "Is tea hot?\nSay so.",
        "Yes.",
        "No.",
    )


@pytest.mark.parametrize(
    ("objective", "chosen", "rejected"),
    [
        ("helpfulness", "response_0", "response_1"),
        ("harmlessness", "response_1", "response_0"),
    ],
)
def test_of_pku_saferlhf_each_objective_has_its_own_verdict(
    tmp_path: Path, objective: str, chosen: str, rejected: str
) -> None:
    (pair,) = load_preferences(write(tmp_path, [PKU]), objective).pairs
    assert pair == Pair(
        instruction="How do I open a tin?", chosen=PKU[chosen], rejected=PKU[rejected]
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "rejected": " The  Severn.\n"}, "chosen and rejected are equal"),
        ({**GOOD, "chosen": " \n"}, "chosen: "),
        ({**GOOD, "rejected": ""}, "rejected: "),
        ({**GOOD, "instruction": ""}, "instruction: "),
        ({**GOOD, "chosen": 5}, "chosen: Input should be a valid string"),
        ({**GOOD, "split": "test"}, "split: Input should be 'train' or 'held_out'"),
        ({**GOOD, "objective": "harmlessness"}, "the pair was ranked for harmlessness"),
        ({"question": "a", "chosen": "b"}, "the fields question, chosen are of no known layout"),
        ({}, r"the fields \(none\) are of no known layout"),
        ("a string", "a str in place of an object"),
        ({"chosen": "yes", "rejected": "no"}, "chosen: no transcript"),
        ({**HH, "rejected": None}, "rejected: no transcript"),
        ({**HH, "chosen": HH["chosen"] + "\n\nHuman: Oh."}, "chosen: the transcript does not end"),
        ({**HH, "chosen": "\n\nHuman: So?"}, "chosen: the transcript does not end"),
        ({**HH, "chosen": HH["chosen"].replace("Why", "How")}, "differ before the last answer"),
        ({**HH, "rejected": HH["chosen"]}, "chosen and rejected are equal"),
        ({**PKU, "better_response_id": 2}, "better_response_id: 2 is neither 0 nor 1"),
        ({**PKU, "better_response_id": True}, "better_response_id: True is neither 0 nor 1"),
        ({**PKU, "better_response_id": 1.0}, "better_response_id: 1.0 is neither 0 nor 1"),
        ({k: v for k, v in PKU.items() if k != "better_response_id"}, "None is neither"),
        ({**PKU, "response_1": None}, "rejected: Input should be a valid string"),
    ],
)
def test_a_broken_pair_is_left_out_and_listed_with_its_line_and_a_reason(
    tmp_path: Path, row: object, reason: str
) -> None:
    data = load_preferences(write(tmp_path, [GOOD, row, GOOD]), "helpfulness")
    assert len(data.pairs) == 2
    ((line, told),) = data.broken
    assert line == 2
    assert re.search(reason, told)


def test_too_many_broken_pairs_are_refused_with_file_line_reason_and_remedy(tmp_path: Path) -> None:
    # 5 % of 100 rows are 5.
    equal = {**GOOD, "rejected": GOOD["chosen"]}
    data = load_preferences(write(tmp_path, [GOOD] * 95 + [equal] * 5), "helpfulness")
    assert (len(data.pairs), [line for line, _ in data.broken]) == (95, [96, 97, 98, 99, 100])
    with pytest.raises(
        InputError,
        match=r"pairs\.jsonl: 6 of 100 rows are broken.*line 95: chosen and .* equal.*mend",
    ):
        load_preferences(write(tmp_path, [GOOD] * 94 + [equal] * 6), "helpfulness")


def test_what_is_no_source_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl: .*'kit', 'Anthropic/hh-rlhf' or 'PKU"):
        load_preferences(str(tmp_path / "missing.jsonl"), "helpfulness")
    with pytest.raises(InputError, match="unknown objective 'helpfullness'; did you mean"):
        load_preferences("kit", "helpfullness")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_kit_serves_ten_clients_with_the_split_that_it_names(objective: str) -> None:
    data = load_preferences("kit", objective)
    assert (len(data.pairs), data.broken) == (440, [])
    parts = divide(data.pairs, 10, objective=objective)
    # 352 and 88 prompts over ten clients: 35 or 36, and 8 or 9.
    assert Counter(len(part.train) for part in parts) == {36: 2, 35: 8}
    assert Counter(len(part.held_out) for part in parts) == {9: 8, 8: 2}
    assert {data.pairs[i].split for part in parts for i in part.held_out} == {"held_out"}
    assert {data.pairs[i].split for part in parts for i in part.train} == {"train"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data folder ../shared")
@pytest.mark.parametrize(
    ("objective", "pairs", "prompts"),
    # As that folder's README counts them; two harmlessness dialogues are the same.
    [("helpfulness", 2964, 556), ("harmlessness", 1736, 1735)],
)
def test_real_pairs_are_all_sound_and_no_prompt_is_torn_apart(
    objective: str, pairs: int, prompts: int
) -> None:
    data = load_preferences(str(SHARED / f"{objective}_preferences.jsonl"), objective)
    assert (len(data.pairs), data.broken) == (pairs, [])
    assert abs(len({pair.prompt for pair in data.pairs}) - prompts) <= 1  # case and spacing
    check_places(data.pairs, divide(data.pairs, 10, objective=objective))


def check_places(pairs: Sequence[Pair], parts: Sequence[PairPart]) -> None:
    """Every pair is in one place, and with all other pairs of its prompt; no place is empty."""
    places = [side for part in parts for side in (part.train, part.held_out)]
    assert all(places)
    assert all(list(place) == sorted(place) for place in places)
    assert sorted(index for place in places for index in place) == list(range(len(pairs)))
    homes = {(pairs[i].prompt, number) for number, place in enumerate(places) for i in place}
    assert len(homes) == len({prompt for prompt, _ in homes})


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=30),
    clients=st.integers(1, 8),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_a_prompt_is_never_on_two_clients_nor_on_both_sides(
    sizes: list[int], clients: int, share: float, seed: int
) -> None:
    clients = min(clients, len(sizes) // 2)
    pairs = [a_pair(f"prompt {i}", j) for i, size in enumerate(sizes) for j in range(size)]
    check_places(pairs, divide(pairs, clients, held_out_share=share, seed=seed))


def test_prompts_that_differ_in_case_and_spacing_only_are_one() -> None:
    pairs = [a_pair("Name a river."), a_pair(" name  a RIVER. "), a_pair("b"), a_pair("c")]
    parts = divide(pairs, 1, held_out_share=0.5)
    assert any({0, 1} <= set(side) for side in (parts[0].train, parts[0].held_out))


def test_a_share_of_the_prompts_is_held_out_and_not_of_the_pairs() -> None:
    # One prompt of 91 pairs among ten: with 0.3, three of ten prompts, wherever the large one is.
    pairs = [a_pair("large", i) for i in range(91)] + [a_pair(f"small {i}") for i in range(9)]
    for seed in range(10):
        (part,) = divide(pairs, 1, held_out_share=0.3, seed=seed)
        assert len({pairs[i].prompt for i in part.held_out}) == 3


def test_the_split_is_a_function_of_seed_and_objective() -> None:
    pairs = [a_pair(f"prompt {i}") for i in range(40)]
    assert divide(pairs, 4) == divide(pairs, 4)
    assert divide(pairs, 4) != divide(pairs, 4, seed=4)
    assert divide(pairs, 4) != divide(pairs, 4, objective="harmlessness")


@pytest.mark.parametrize(
    ("pairs", "clients", "words"),
    [
        ([a_pair("a", i) for i in range(9)], 1, "at least 2 prompts .* the helpfulness data has 1"),
        ([a_pair(str(i)) for i in range(7)], 4, "4 clients need at least 8 prompts .* has 7"),
        ([], 1, "has 0; use fewer clients or more data"),
        (
            [a_pair("a", split="train"), a_pair("b", split="train"), a_pair("c", split="held_out")],
            2,
            "at least 2 prompts with preference pairs marked held_out, and the data has 1",
        ),
        ([a_pair("a", split="train"), a_pair("b")], 1, "1 of 2 preference pairs carry no split"),
        (
            [a_pair("a", 1, "train"), a_pair("a", 2, "held_out"), a_pair("b")][:2],
            1,
            "prompt 'a' are marked train and held_out",
        ),
    ],
)
def test_data_that_does_not_go_round_is_refused(
    pairs: list[Pair], clients: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        divide(pairs, clients)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"clients": 0}, "clients = 0"), ({"held_out_share": 1.0}, "held_out_share = 1.0")],
)
def test_an_argument_out_of_range_is_refused(changes: dict[str, Any], words: str) -> None:
    pairs = [a_pair("a"), a_pair("b")]
    with pytest.raises(InputError, match=words):
        divide(pairs, **{"clients": 1, **changes})


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[object] | Exception) -> list[object]:
    """Let the package ``datasets`` give one answer, and return what it was asked."""
    asked: list[object] = []

    def load_dataset(name: str, **settings: str) -> list[object]:
        asked.append((name, settings))
        if isinstance(rows, Exception):
            raise rows
        return rows

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_each_objective_has_its_part_of_the_hubs_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, [HH, {**HH, "chosen": ""}])
    for objective in OBJECTIVES:
        data = load_preferences("Anthropic/hh-rlhf", objective)
        assert [pair.chosen for pair in data.pairs] == ["It is brewed."]
        assert [row for row, _ in data.broken] == [2]
    assert asked == [
        ("Anthropic/hh-rlhf", {"split": "train", "data_dir": "helpful-base"}),
        ("Anthropic/hh-rlhf", {"split": "train", "data_dir": "harmless-base"}),
    ]


def test_pku_saferlhf_is_asked_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, [PKU])
    assert len(load_preferences("PKU-Alignment/PKU-SafeRLHF", "harmlessness").pairs) == 1
    assert asked == [("PKU-Alignment/PKU-SafeRLHF", {"split": "train"})]


@pytest.mark.parametrize("error", [ConnectionError("no route"), Exception("of the hub's own kind")])
def test_a_hub_that_fails_is_told_with_the_other_sources(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    hub(monkeypatch, error)
    with pytest.raises(HubUnavailableError, match=r"hh-rlhf .*--harmlessness FILE.*kit") as told:
        load_preferences("Anthropic/hh-rlhf", "harmlessness")
    assert told.value.__cause__ is error
    assert told.value.exit_code == 1


def test_a_missing_package_for_the_hub_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pwff\[hub\]'.*--helpfulness FILE"):
        load_preferences("PKU-Alignment/PKU-SafeRLHF", "helpfulness")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra hub")
def test_the_real_hub_client_offline_fails_with_our_error(tmp_path: Path) -> None:
    program = (
        "from edge_client.data.preferences import HUB, load_preferences\n"
        "from quantization.errors import HubUnavailableError\n"
        "for name in HUB:\n"
        "    try:\n        load_preferences(name, 'helpfulness')\n"
        "    except HubUnavailableError:\n        print('unavailable')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "unavailable\n" * 2
