"""What a judge is asked, and what it may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edge_client.data.prompt_files import Prompt

#: Which is better; or that the judge passes the question over, gave no verdict, or wants to stop.
Verdict = Literal["first", "second", "passed", "nonsense", "quit"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Two responses to compare, their sides already exchanged by chance.

    Attributes:
        number: Of the pair that the verdict would make, from 1.
        total: How many pairs there are to be.
    """

    prompt: Prompt
    first: str
    second: str
    objective: str
    number: int
    total: int


Ranker = Callable[[Question], Verdict]


class RankingError(Exception):
    """A judge that does not answer, or answers nonsense."""

    exit_code = 1
