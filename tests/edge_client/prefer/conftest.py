"""What the tests of ranking share: a model that babbles, questions, an endpoint on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_client.data.prompt_files import Prompt
from edge_client.inference.generation import Speaker
from edge_client.prefer.ranking import Question
from tests.edge_client.inference.conftest import END, byte_tokenizer

KEY = "sk-secret-0123456789"
Reply = tuple[int, dict[str, str], Any]  # status, headers, body


class Babbler:
    """A model that says a word of letters, each as likely as the others, and then ends."""

    name = "babbler"

    def __init__(self, letters: Sequence[int], end: int, vocabulary: int, length: int) -> None:
        self.positions = 2048
        self._letters = letters
        self._end = end
        self._vocabulary = vocabulary
        self._length = length
        self._fed = 0

    def reset(self) -> None:
        """Begin anew."""
        self._fed = 0

    def feed(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits of one more letter, or of the end."""
        del tokens
        self._fed += 1
        logits = np.full(self._vocabulary, -1e4, np.float32)
        logits[list(self._letters) if self._fed <= self._length else self._end] = 0
        return logits


def a_babbler(letters: str = "abcdefgh", length: int = 8) -> Speaker:
    """Return a speaker of random words."""
    tokenizer = byte_tokenizer()
    end = tokenizer.token_to_id(END)
    model = Babbler(tokenizer.encode(letters).ids, end, tokenizer.get_vocab_size(), length)
    return Speaker(model=model, tokenizer=tokenizer, end_tokens=frozenset([end]), title="a babbler")


def a_question(first: str = "Yes.", second: str = "No.", **changes: Any) -> Question:
    """Return a question about a kettle."""
    fields: dict[str, Any] = {
        "prompt": Prompt(instruction="Is the kettle hot?"),
        "objective": "helpfulness",
        "number": 1,
        "total": 9,
        **changes,
    }
    return Question(first=first, second=second, **fields)


def said(text: str | None, **usage: int) -> Reply:
    """Return a judge's answer as a chat-completions API gives it."""
    return 200, {}, {"choices": [{"message": {"content": text}}], "usage": usage}


class Api:
    """A real HTTP server that answers as it is told to.

    Attributes:
        answer: From the body of a request and its number, from 0, to a reply.
        bodies: Of the requests so far.
        heads: Path and ``Authorization`` of the requests so far.
    """

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Reply] = lambda _body, _number: said("A")
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[tuple[str, str | None]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                api.heads.append((self.path, self.headers["Authorization"]))
                api.bodies.append(body)
                status, headers, reply = api.answer(body, len(api.bodies) - 1)
                if not status:  # hang up
                    return
                content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Keep quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def script(self, *replies: Reply) -> None:
        """Give these replies, the last one for ever."""
        self.answer = lambda _body, number: replies[min(number, len(replies) - 1)]

    def close(self) -> None:
        """Stop listening; later requests are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """Start an endpoint for one test."""
    monkeypatch.setenv("NO_PROXY", "*")
    server = Api()
    yield server
    server.close()
