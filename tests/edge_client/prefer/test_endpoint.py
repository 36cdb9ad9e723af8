"""The endpoint as judge, against a real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from device_profiles.errors import InputError
from edge_client.prefer.endpoint import Endpoint, EndpointJudge, check_url, find_key
from edge_client.prefer.ranking import RankingError, Verdict
from edge_client.prefer.rubrics import SYSTEM
from tests.edge_client.prefer.conftest import KEY, Api, Reply, a_question, said

NONSENSE = said("I cannot say.")


@contextmanager
def a_judge(api: Api, **changes: Any) -> Iterator[tuple[EndpointJudge, list[str]]]:
    fields = {"model": "judge-1", "key": KEY, "tries": 3, "first_wait_seconds": 0.0, **changes}
    told: list[str] = []
    judge = EndpointJudge(Endpoint(url=check_url(api.url), **fields), told.append)
    try:
        yield judge, told
    finally:
        judge.close()


def rank(api: Api, **changes: Any) -> Verdict:
    with a_judge(api, **changes) as (judge, _):
        return judge.rank(a_question())


def test_a_request_holds_the_rubric_the_prompt_and_both_responses_in_order(api: Api) -> None:
    with a_judge(api) as (judge, _):
        judge.rank(a_question("It boils.", "No idea.", objective="harmlessness"))
    assert api.heads == [("/v1/chat/completions", f"Bearer {KEY}")]
    (body,) = api.bodies
    system, user = body["messages"]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge-1", 8, 0)
    assert (system["role"], system["content"]) == ("system", SYSTEM["harmlessness"])
    asked = user["content"]
    places = [asked.index(t) for t in ("Is the kettle hot?", "A]\nIt boils.", "B]\nNo idea.")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "first"),
        ("B", "second"),
        (" b.\n", "second"),
        ("**A**", "first"),
        ('"B"', "second"),
        ("A or B", "nonsense"),
        ("Both", "nonsense"),
        ("", "nonsense"),
        (None, "nonsense"),
    ],
)
def test_a_letter_is_a_verdict_and_nothing_else_is(
    api: Api, text: str | None, verdict: str
) -> None:
    api.script(said(text))
    assert rank(api) == verdict


def test_nonsense_is_asked_again_twice_and_then_passed_over(api: Api) -> None:
    api.script(NONSENSE, NONSENSE, said("B"))
    assert rank(api) == "second"
    assert len(api.bodies) == 3
    api.script(NONSENSE)
    assert rank(api) == "nonsense"
    assert len(api.bodies) == 6


def test_more_nonsense_than_half_of_six_answers_ends_it(api: Api) -> None:
    # A, then three times nonsense: 3 of 4. Twice more: 5 of 6.
    api.script(said("A"), NONSENSE)
    with a_judge(api) as (judge, _):
        assert judge.rank(a_question()) == "first"
        assert judge.rank(a_question()) == "nonsense"
        with pytest.raises(RankingError, match=r"5 of 6 answers of 'judge-1'.*neither A nor B"):
            judge.rank(a_question())
    assert len(api.bodies) == 6


def test_half_nonsense_does_not_end_it(api: Api) -> None:
    api.answer = lambda _body, number: NONSENSE if number % 2 else said("A")
    with a_judge(api) as (judge, _):
        assert [judge.rank(a_question()) for _ in range(8)] == ["first"] * 8
    assert len(api.bodies) == 15  # one for the first question, two for each other


@pytest.mark.parametrize(
    "failure", [(429, {}, "slow down"), (500, {}, ""), (503, {}, ""), (408, {}, ""), (0, {}, "")]
)
def test_a_failure_that_may_pass_is_tried_again(api: Api, failure: Reply) -> None:
    api.script(failure, failure, said("B"))
    with a_judge(api) as (judge, told):
        assert judge.rank(a_question()) == "second"
    assert len(api.bodies) == 3
    assert [sentence[-17:] for sentence in told] == ["try 2 of 3 in 0 s", "try 3 of 3 in 0 s"]


def test_it_gives_up_after_the_tries_that_it_names(api: Api) -> None:
    api.script((503, {}, ""))
    with pytest.raises(RankingError, match=r"gave no answer in 3 tries .*HTTP 503"):
        rank(api)
    assert len(api.bodies) == 3


def test_waits_double_and_obey_the_endpoint_up_to_a_minute(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    asked = [{}, {}, {"Retry-After": "9"}, {"Retry-After": "soon"}, {"Retry-After": "9999"}]
    api.script(*((429, headers, "") for headers in asked), said("A"))
    assert rank(api, tries=6, first_wait_seconds=1.0) == "first"
    # 1, 2, then 4 < 9, 8, and 16 < 9999 held to 60.
    assert waits == [1, 2, 9, 8, 60]


def test_an_endpoint_that_is_not_there_is_one_clear_sentence(api: Api) -> None:
    api.close()
    with pytest.raises(RankingError, match=r"endpoint 127\.0\.0\.1:\d+ gave no answer in 2 tries"):
        rank(api, tries=2)


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        ((401, {}, f"bad key {KEY}"), InputError, r"refuses the key \(HTTP 401\)"),
        ((403, {}, ""), InputError, r"refuses the key \(HTTP 403\)"),
        ((404, {}, ""), InputError, "no model 'judge-1' at /v1/chat/completions"),
        ((400, {}, f"too long, {KEY}"), RankingError, r"HTTP 400\): too long, \*\*\*"),
        ((302, {"Location": "http://x.example/"}, ""), RankingError, "HTTP 302"),
        ((200, {}, "<html>"), RankingError, "not answer as a chat-completions API .*<html>"),
        ((200, {}, {"choices": []}), RankingError, "not answer as a chat-completions API"),
        ((200, {}, [1]), RankingError, "not answer as a chat-completions API"),
    ],
)
def test_a_refusal_is_told_at_once_and_never_with_the_key(
    api: Api, reply: Reply, kind: type[Exception], words: str
) -> None:
    api.script(reply)
    with pytest.raises(kind, match=words) as told:
        rank(api)
    assert KEY not in str(told.value)
    assert len(api.bodies) == 1


def test_an_option_that_the_api_does_not_know_is_replaced_or_left_out(api: Api) -> None:
    def picky(body: dict[str, Any], _number: int) -> Reply:
        for name in ("max_tokens", "temperature"):
            if name in body:
                return 400, {}, {"error": {"message": f"Unsupported parameter: '{name}'"}}
        return said("B")

    api.answer = picky
    with a_judge(api) as (judge, told):
        assert judge.rank(a_question()) == "second"
        assert judge.rank(a_question()) == "second"
    assert len(api.bodies) == 4  # two refusals, two verdicts
    assert api.bodies[-1]["max_completion_tokens"] == 8
    assert told == [
        "judge-1 does not take max_tokens: max_completion_tokens is used",
        "judge-1 does not take temperature: it is left out",
    ]


def test_tokens_are_added_up_as_the_endpoint_counts_them(api: Api) -> None:
    api.script(
        said("A", prompt_tokens=30, completion_tokens=1), said("B"), said("A", prompt_tokens=5)
    )
    with a_judge(api) as (judge, _):
        for _ in range(3):
            judge.rank(a_question())
        assert (judge.tokens_in, judge.tokens_out) == (35, 1)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("https://host.example/v1", "https://host.example/v1/chat/completions"),
        ("https://host.example/v1/", "https://host.example/v1/chat/completions"),
        ("http://[::1]:8080/v1/chat/completions", "http://[::1]:8080/v1/chat/completions"),
        ("https://h.example/x?api-version=1", "https://h.example/x/chat/completions?api-version=1"),
    ],
)
def test_the_path_of_chat_completions_is_added_where_it_is_missing(given: str, asked: str) -> None:
    assert str(check_url(given)) == asked


@pytest.mark.parametrize(
    "given", ["host/v1", "ftp://host/v1", "", "https://", "http://host:port/v1", "file:///etc"]
)
def test_what_is_no_address_is_refused_with_an_example(given: str) -> None:
    with pytest.raises(InputError, match=r"--endpoint .*https://host/v1"):
        check_url(given)


def test_a_password_in_the_address_is_refused_and_not_told() -> None:
    with pytest.raises(InputError, match="leave them out") as told:
        check_url("https://me:hush@host/v1")
    assert "hush" not in str(told.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "holds no key"), (" ", "holds no key"), ("hu sh\u00e9", "holds what cannot be")],
)
def test_a_key_that_is_none_is_refused_by_the_name_of_its_variable(
    value: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(InputError, match=rf"variable MY_KEY {words}") as told:
        find_key("MY_KEY")
    assert "hu sh" not in str(told.value)


def test_a_key_is_never_shown_with_its_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    assert find_key("MY_KEY") == KEY
    place = Endpoint(url=check_url("https://h/v1"), model="m", key=KEY, tries=1)
    assert KEY not in repr(place)


@pytest.mark.parametrize(
    ("url", "clear"),
    [("http://h.example/v1", True), ("https://h.example/v1", False), ("http://[::1]/v1", False)],
)
def test_what_goes_unencrypted_to_another_machine_is_known(url: str, clear: bool) -> None:
    assert Endpoint(url=check_url(url), model="m", key=KEY, tries=1).in_clear is clear
