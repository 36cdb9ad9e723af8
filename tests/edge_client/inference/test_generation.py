"""Answers, token by token, of a model that says what it is told to."""

from __future__ import annotations

from itertools import islice

import pytest

from device_profiles.errors import InputError
from edge_client.inference.generation import answer, draw_tokens
from edge_client.inference.sampling import Sampling
from tests.edge_client.inference.conftest import Parrot, a_speaker

GREEDY = Sampling(temperature=0)


def test_an_answer_ends_at_the_end_token_which_is_no_part_of_it() -> None:
    given = answer(a_speaker("well said"), "hm", GREEDY)
    assert (given.text, given.tokens, given.stopped) == ("well said", 9, "end")


def test_an_answer_ends_at_its_most_tokens() -> None:
    given = answer(a_speaker("well said"), "hm", Sampling(temperature=0, max_tokens=4))
    assert (given.text, given.tokens, given.stopped) == ("well", 4, "length")


def test_an_answer_ends_where_the_model_can_read_no_more() -> None:
    speaker = a_speaker("well said", positions=6)  # 2 of the prompt, so 4 are left
    given = answer(speaker, "hm", GREEDY)
    assert (given.text, given.tokens, given.stopped) == ("well", 4, "context")


def test_pieces_are_shown_as_they_come_and_a_cut_character_at_the_end() -> None:
    shown: list[str] = []
    given = answer(
        a_speaker("a\u00e4\u20ac"), "hm", Sampling(temperature=0, max_tokens=5), show=shown.append
    )
    assert shown == ["a", "\u00e4", "\ufffd"]
    assert given.text == "a\u00e4\ufffd"


def test_the_prompt_is_read_at_once_and_the_answer_token_by_token() -> None:
    speaker = a_speaker("ab")
    answer(speaker, "hello", GREEDY)
    assert isinstance(speaker.model, Parrot)
    assert [len(piece) for piece in speaker.model.fed] == [5, 1, 1]


def test_a_prompt_that_leaves_no_room_is_refused_with_by_how_much() -> None:
    with pytest.raises(
        InputError, match="12 tokens and the model reads 10; shorten it by at least 3"
    ):
        answer(a_speaker("x", positions=10), "twelve bytes", GREEDY)


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said() -> None:
    said: list[str] = []

    def show(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    given = answer(a_speaker("well said"), "hm", GREEDY, show=show)
    assert (given.text, given.tokens, given.stopped) == ("wel", 3, "interrupted")


def test_the_draws_belong_to_seed_and_words() -> None:
    def drawn(seed: int, *words: str) -> list[int]:
        model = Parrot([0] * 40, 50, 4096, sure=1.0)
        sampling = Sampling(temperature=1, top_p=1, seed=seed)
        return list(islice(draw_tokens(model, [1], sampling, words), 30))

    assert drawn(1, "a") == drawn(1, "a")
    assert drawn(1, "a") != drawn(1, "b")
    assert drawn(1, "a") != drawn(2, "a")
