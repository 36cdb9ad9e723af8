"""What counts as an action, what is paid, and what critics are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.alignment.rollouts import Rollout, judged, mean_scores, paid
from edge_client.data.prompts import Encoded

END = 9


@dataclass(frozen=True)
class Response:
    """What generation gives."""

    tokens: npt.NDArray[np.int64]
    ended: bool


def token_features(examples: Sequence[Encoded]) -> tuple[Mapping[str, Tensor], list[int]]:
    """Return as a place's features the token that it has just read, and the one that it predicts.

    Another objective reads the negatives. The places of an example run from the last token of its
    prompt to the last but one of all.
    """
    rows, lengths = [], []
    for e in examples:
        places = range(e.response_start - 1, len(e.tokens) - 1)
        rows += [[float(e.tokens[p]), float(e.tokens[p + 1])] for p in places]
        lengths.append(len(places))
    read = torch.tensor(rows)
    return {"helpfulness": read, "harmlessness": -read}, lengths


def judge(answers: Sequence[Response]) -> list[Rollout]:
    prompts = [np.array([1, 2]) for _ in answers]
    return judged(
        prompts,
        answers,
        end_token=END,
        token_features=token_features,
        scores={
            "helpfulness": lambda x: 10 * x[:, 0] + x[:, 1],
            "harmlessness": lambda x: x[:, 0],
        },
    )


def test_the_end_token_is_an_action_of_a_response_that_ended_and_of_no_other() -> None:
    ended, cut = judge([Response(np.array([5, 6]), True), Response(np.array([5, 6]), False)])
    assert ended.example.tokens.tolist() == [1, 2, 5, 6, END]
    assert cut.example.tokens.tolist() == [1, 2, 5, 6]
    assert (ended.actions, ended.tokens) == (3, 2)
    assert (cut.actions, cut.tokens) == (2, 2)
    assert ended.example.response_start == cut.example.response_start == 2


def test_critics_see_the_state_before_each_action() -> None:
    ended, cut = judge([Response(np.array([5, 6]), True), Response(np.array([5, 6]), False)])
    assert ended.features["helpfulness"].tolist() == [[2, 5], [5, 6], [6, END]]
    assert cut.features["helpfulness"].tolist() == [[2, 5], [5, 6]]
    assert cut.features["harmlessness"].tolist() == [[-2, -5], [-5, -6]]


def test_a_score_is_of_the_state_that_has_read_all_but_an_end_token() -> None:
    # a response that was cut off is scored as if an end token came next
    for ended in (True, False):
        (found,) = judge([Response(np.array([5, 6]), ended)])
        assert found.scores == {"helpfulness": 69.0, "harmlessness": -6.0}


def test_the_shortest_response_is_an_end_token_alone() -> None:
    (found,) = judge([Response(np.array([], np.int64), True)])
    assert (found.actions, found.tokens) == (1, 0)
    assert found.features["helpfulness"].tolist() == [[2, END]]


def test_an_empty_response_that_did_not_end_is_refused() -> None:
    with pytest.raises(InputError, match="set max_new_tokens to 1 or more"):
        judge([Response(np.array([], np.int64), False)])


def test_the_penalty_is_added_where_no_end_came_and_the_mean_leaves_it_out() -> None:
    rollouts = judge([Response(np.array([5]), True), Response(np.array([7]), False)])
    assert paid(rollouts, "helpfulness", -1.0).tolist() == [59.0, 78.0]
    assert mean_scores(rollouts) == {"helpfulness": (59 + 79) / 2, "harmlessness": -6.0}
