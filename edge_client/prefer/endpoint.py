"""A model behind an OpenAI-compatible chat-completions API as judge.

It is asked for one letter by a rubric that is the same for every question. The key is read from
an environment variable and never printed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from device_profiles.errors import InputError
from edge_client.prefer.ranking import Question, RankingError, Verdict
from edge_client.prefer.rubrics import ANSWER_TOKENS, messages

ASKS = 3  # of one question, where the answer is nonsense
ENOUGH_ANSWERS = 6  # before their share of nonsense means anything
MOST_WAIT_SECONDS = 60.0
TIMEOUT_SECONDS = 60.0
_BUSY = (408, 429)
_REFUSED = (401, 403)
_LETTER = re.compile(r"\W*([AB])\W*", re.IGNORECASE)
# Where an API does not know a field, what takes its place.
_OTHERWISE = {"max_tokens": "max_completion_tokens", "temperature": None}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the judge is, and how often it is tried.

    Attributes:
        url: Of the API, as ``https://host/v1``.
        model: Which of its models judges.
        key: Secret.
        tries: Of one request, >= 1.
        first_wait_seconds: Before the second try; twice as long before each further one, or as
            long as the endpoint asks for, and at most ``MOST_WAIT_SECONDS``.
    """

    url: httpx.URL
    model: str
    key: str = field(repr=False)
    tries: int
    first_wait_seconds: float = 1.0

    @property
    def host(self) -> str:
        """Who reads what is sent."""
        return self.url.netloc.decode()

    @property
    def in_clear(self) -> bool:
        """Whether what is sent can be read on its way."""
        return self.url.scheme == "http" and self.url.host not in ("localhost", "127.0.0.1", "::1")


def check_url(text: str) -> httpx.URL:
    """Return the address of the chat completions of an API.

    Raises:
        InputError: If ``text`` is no http or https address, or holds a password.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as err:
        raise InputError(f"--endpoint {text!r:.80}: {err}; give one like https://host/v1") from err
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(
            f"--endpoint {text!r:.80} is no http or https address; give one like https://host/v1"
        )
    if url.userinfo:
        raise InputError("--endpoint holds a user or a password; leave them out of the address")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.copy_with(path=f"{path}/chat/completions")


def find_key(variable: str) -> str:
    """Return the key in an environment variable.

    Raises:
        InputError: If it is not set, or cannot be a key; its value is not told.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable} holds no key for the endpoint; set it (to any "
            "word where the endpoint asks for none), or name another one with --key-variable"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise InputError(
            f"the environment variable {variable} holds what cannot be a key: there are spaces, "
            "line breaks or letters beyond ASCII in it; set it again"
        )
    return key


class _Transient(Exception):
    """A failure that another try may not meet; ``wait_seconds`` is what the endpoint asks for."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class EndpointJudge:
    """Ranks by asking an endpoint.

    Args:
        endpoint: Who is asked.
        notice: Told of each try that failed and what is done about it.

    Attributes:
        tokens_in: Read so far, as the endpoint counts (0 where it does not say).
        tokens_out: Written so far, likewise.
    """

    def __init__(self, endpoint: Endpoint, notice: Callable[[str], None]) -> None:
        self.tokens_in = 0
        self.tokens_out = 0
        self._endpoint = endpoint
        self._notice = notice
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {endpoint.key}"}, timeout=TIMEOUT_SECONDS
        )
        self._options: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0}
        self._answers = 0
        self._nonsense = 0

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def rank(self, question: Question) -> Verdict:
        """Return the endpoint's verdict; nonsense is asked again, ``ASKS`` times in all.

        Raises:
            InputError: If the endpoint refuses the key, or knows no such model or address.
            RankingError: If it does not answer, or more than half of its answers are nonsense.
        """
        for _ in range(ASKS):
            said = self._ask(question)
            self._answers += 1
            letter = _LETTER.fullmatch(said)
            if letter:
                return "first" if letter[1].upper() == "A" else "second"
            self._nonsense += 1
            if self._answers >= ENOUGH_ANSWERS and 2 * self._nonsense > self._answers:
                raise RankingError(
                    f"{self._nonsense} of {self._answers} answers of '{self._endpoint.model}' at "
                    f"{self._endpoint.host} are neither A nor B (the last: "
                    f"{self._safe(said)!r:.60}); choose another --judge-model"
                )
        return "nonsense"

    def _ask(self, question: Question) -> str:
        retrying = Retrying(
            retry=retry_if_exception_type(_Transient),
            stop=stop_after_attempt(self._endpoint.tries),
            wait=self._wait_seconds,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            reply: httpx.Response = retrying(self._send, messages(question))
        except _Transient as err:
            raise RankingError(
                f"the endpoint {self._endpoint.host} gave no answer in {self._endpoint.tries} "
                f"tries (the last: {err})"
            ) from err
        return self._read(reply)

    def _send(self, chat: list[dict[str, str]]) -> httpx.Response:
        """Send one request, without the options that this API turns out not to know."""
        while True:
            body = {"model": self._endpoint.model, "messages": chat, **self._options}
            try:
                reply = self._client.post(self._endpoint.url, json=body)
            except httpx.TransportError as err:
                reason = self._safe(str(err) or type(err).__name__)
                raise _Transient(reason) from err
            if reply.status_code != 400 or not self._do_without(reply.text):
                break
        if reply.status_code in _BUSY or reply.status_code >= 500:
            raise _Transient(
                f"HTTP {reply.status_code} {reply.reason_phrase}",
                _seconds(reply.headers.get("Retry-After", "")),
            )
        return reply

    def _do_without(self, complaint: str) -> bool:
        """Replace or drop an option that a complaint names; whether there was one."""
        for name in list(self._options):
            if re.search(rf"\b{name}\b", complaint) and name in _OTHERWISE:
                value, other = self._options.pop(name), _OTHERWISE[name]
                if other:
                    self._options[other] = value
                self._notice(
                    f"{self._endpoint.model} does not take {name}: "
                    + (f"{other} is used" if other else "it is left out")
                )
                return True
        return False

    def _read(self, reply: httpx.Response) -> str:
        """Return what the judge said; an empty text where it said nothing."""
        host, status = self._endpoint.host, reply.status_code
        if status in _REFUSED:
            raise InputError(f"{host} refuses the key (HTTP {status}); set another one")
        if status == 404:
            raise InputError(
                f"{host} knows no model '{self._endpoint.model}' at {self._endpoint.url.path} "
                "(HTTP 404); correct --endpoint or --judge-model"
            )
        try:
            record = reply.raise_for_status().json()
            said = record["choices"][0]["message"].get("content")
        except httpx.HTTPStatusError as err:
            raise RankingError(
                f"{host} refuses the request (HTTP {status}): {self._safe(reply.text)[:200]}"
            ) from err
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise RankingError(
                f"{host} does not answer as a chat-completions API does "
                f"({self._safe(reply.text)!r:.80}); correct --endpoint"
            ) from err
        self.tokens_in += _tokens(record, "prompt_tokens")
        self.tokens_out += _tokens(record, "completion_tokens")
        return said if isinstance(said, str) else ""

    def _wait_seconds(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait_seconds if isinstance(error, _Transient) else 0.0
        own = self._endpoint.first_wait_seconds * 2.0 ** (state.attempt_number - 1)
        return min(max(own, asked), MOST_WAIT_SECONDS)

    def _tell(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._notice(
            f"{self._endpoint.host}: {error}; try {state.attempt_number + 1} of "
            f"{self._endpoint.tries} in {state.upcoming_sleep:.0f} s"
        )

    def _safe(self, text: str) -> str:
        """Return a text of the endpoint's as one line without the key."""
        return " ".join(text.replace(self._endpoint.key, "***").split())


def _seconds(header: str) -> float:
    """Return how long a ``Retry-After`` asks to wait, 0 where it names no number of seconds."""
    return float(header) if re.fullmatch(r"\d{1,6}", header.strip()) else 0.0


def _tokens(record: dict[str, Any], name: str) -> int:
    """Return a count of an answer's ``usage``, 0 where it does not say."""
    usage = record.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0
