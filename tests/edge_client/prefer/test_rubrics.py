"""What a judge is told, and what it costs at most."""

from __future__ import annotations

import pytest

from device_profiles.methods import OBJECTIVES
from edge_client.data.prompt_files import Prompt
from edge_client.prefer.rubrics import Estimate, estimate, messages
from tests.edge_client.prefer.conftest import a_question


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_session_reads_more_than_the_estimate(objective: str) -> None:
    prompts = [Prompt(instruction="word " * n, input="more " * (n % 3)) for n in range(1, 9)]
    guess = estimate(
        prompts, requests=3, objective=objective, response_tokens=20, count_tokens=words
    )
    sizes = []
    for prompt in prompts:
        asked = a_question("yes " * 20, "no " * 20, prompt=prompt, objective=objective)
        sizes.append(sum(words(message["content"]) for message in messages(asked)))
    largest = sum(sorted(sizes)[-3:])
    # Beyond the texts, 16 tokens a request for what an API puts around them.
    assert guess.tokens_in == largest + 3 * 16
    assert (guess.requests, guess.tokens_out) == (3, 3 * 8)


def test_the_cost_is_that_of_all_tokens() -> None:
    # 1.5 million at 2 a million.
    assert Estimate(requests=1, tokens_in=1_400_000, tokens_out=100_000).cost(2.0) == 3.0


def test_the_rubric_is_of_the_objective_and_asks_for_one_letter() -> None:
    for objective in OBJECTIVES:
        system = messages(a_question(objective=objective))[0]["content"]
        assert f"by {objective}" in system
        assert "exactly one letter, A or B" in system


def test_an_input_stands_with_its_instruction() -> None:
    asked = a_question(prompt=Prompt(instruction="Sum up.", input="A tale."))
    assert "Sum up.\n\nA tale.\n" in messages(asked)[1]["content"]
