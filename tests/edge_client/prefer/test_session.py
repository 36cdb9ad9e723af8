"""A session: sides exchanged and put back, pairs kept one by one, resumed where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_client.data.preferences import load_preferences, partition_pairs
from edge_client.data.prompt_files import Prompt
from edge_client.prefer.ranking import Question, Ranker, RankingError, Verdict
from edge_client.prefer.session import Source, Tally, collect, sides_turned
from edge_client.prefer.store import PairStore

PROMPTS = [Prompt(instruction=f"Ask {i}.") for i in range(6)]


def a_source(**answers: tuple[str, str] | None) -> Source:
    """Return candidates ``one`` and ``two`` of each prompt, but for what the answers say."""

    def draw(prompt: Prompt) -> tuple[str, str] | None:
        key = prompt.instruction.removeprefix("Ask ").rstrip(".")
        return answers.get(f"p{key}", ("one", "two"))

    return Source(title="a model", has_room=lambda p: "long" not in p.instruction, draw=draw)


def prefers(wanted: str) -> Ranker:
    """Return a judge that knows what it wants, on whichever side it is."""

    def rank(question: Question) -> Verdict:
        assert {question.first, question.second} == {"one", "two"}
        return "first" if question.first == wanted else "second"

    return rank


def run(out: Path, rank: Ranker, prompts: Sequence[Prompt] = PROMPTS, **changes: Any) -> Tally:
    wish: dict[str, Any] = {"judge": "t", "most": 99, "seed": 5, "notice": lambda _: None}
    source = changes.pop("source", a_source())
    with PairStore(out, "helpfulness") as store:
        return collect(prompts, source, rank, store, **{**wish, **changes})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def test_sides_are_put_back_whatever_the_judge_saw(out: Path) -> None:
    assert run(out, prefers("two")) == Tally(judged=6, skipped={}, stopped="prompts")
    pairs = load_preferences(str(out), "helpfulness").pairs
    assert [pair.instruction for pair in pairs] == [p.instruction for p in PROMPTS]
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("two", "one")}


def test_each_candidate_comes_first_about_as_often() -> None:
    prompts = [Prompt(instruction=f"Ask {i}.") for i in range(1000)]
    turned = [sides_turned(5, "helpfulness", prompt) for prompt in prompts]
    # Binomial with a deviation of 16: 64 are four of them.
    assert abs(sum(turned) - 500) < 64
    assert turned != [sides_turned(6, "helpfulness", prompt) for prompt in prompts]
    assert turned != [sides_turned(5, "harmlessness", prompt) for prompt in prompts]


def test_a_judge_that_only_looks_at_the_side_prefers_neither_candidate(out: Path) -> None:
    prompts = [Prompt(instruction=f"Ask {i}.") for i in range(60)]
    run(out, lambda _: "first", prompts)
    chosen = [pair.chosen for pair in load_preferences(str(out), "helpfulness").pairs]
    # Binomial with a deviation of 3.9; 16 are four of them.
    assert abs(chosen.count("one") - 30) < 16


def test_a_second_session_goes_on_where_the_first_stopped(out: Path) -> None:
    seen: list[str] = []

    def rank(question: Question) -> Verdict:
        seen.append(f"{question.prompt.instruction} {question.number}/{question.total}")
        return "quit" if len(seen) == 3 else "first"

    assert run(out, rank, most=5) == Tally(judged=2, stopped="quit")
    assert run(out, rank, most=5) == Tally(judged=3, stopped="enough")
    assert run(out, rank, most=5) == Tally(judged=0, stopped="enough")
    # The question at which it was stopped is asked again.
    assert seen == [
        "Ask 0. 1/5",
        "Ask 1. 2/5",
        "Ask 2. 3/5",
        "Ask 2. 3/5",
        "Ask 3. 4/5",
        "Ask 4. 5/5",
    ]


def test_what_gives_no_pair_is_counted_by_its_reason_and_told(out: Path) -> None:
    told: list[str] = []
    prompts = [*PROMPTS, Prompt(instruction="A long one.")]
    verdicts: dict[str, Verdict] = {"Ask 3.": "passed", "Ask 4.": "nonsense"}
    tally = run(
        out,
        lambda question: verdicts.get(question.prompt.instruction, "first"),
        prompts,
        source=a_source(p1=None, p2=None),
        notice=told.append,
    )
    assert tally.skipped == {"alike": 2, "passed": 1, "nonsense": 1, "long": 1}
    assert (tally.judged, len(told)) == (2, 5)
    assert told[-1] == "skipped 'A long one.': it leaves the model no room to answer"


@pytest.mark.parametrize("where", ["rank", "draw"])
def test_ctrl_c_keeps_what_was_ranked(out: Path, where: str) -> None:
    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    def rank(question: Question) -> Verdict:
        if where == "rank" and question.number == 3:
            interrupt()
        return "first"

    source = a_source()
    if where == "draw":
        draw = source.draw
        source = Source(
            title="m",
            has_room=lambda _: True,
            draw=lambda prompt: interrupt() if prompt is PROMPTS[2] else draw(prompt),
        )
    assert run(out, rank, source=source) == Tally(judged=2, stopped="interrupted")
    assert len(load_preferences(str(out), "helpfulness").pairs) == 2


def test_a_judge_that_fails_leaves_what_was_ranked(out: Path) -> None:
    def rank(question: Question) -> Verdict:
        if question.number == 3:
            raise RankingError("gone")
        return "second"

    with pytest.raises(RankingError, match="gone"):
        run(out, rank)
    assert len(load_preferences(str(out), "helpfulness").pairs) == 2
    assert run(out, rank, most=2).judged == 0


def test_what_is_collected_can_be_divided_among_clients_by_the_split_of_its_prompts(
    out: Path,
) -> None:
    prompts = [
        Prompt(instruction=f"Ask {i}.", input="of it", split="held_out" if i % 3 == 0 else "train")
        for i in range(6)
    ]
    run(out, prefers("one"), prompts)
    pairs = load_preferences(str(out), "helpfulness").pairs
    (part,) = partition_pairs(pairs, clients=1, seed=1, objective="helpfulness")
    assert (part.held_out, part.train) == ((0, 3), (1, 2, 4, 5))
    assert {pair.input for pair in pairs} == {"of it"}
