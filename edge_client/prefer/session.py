"""One session: prompts in their order, two candidates each, a verdict, a line in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Literal

from device_profiles.seeds import stream
from edge_client.data.preferences import Pair
from edge_client.data.prompt_files import Prompt
from edge_client.prefer.ranking import Question, Ranker
from edge_client.prefer.store import PairStore

#: Why a prompt got no pair.
SKIPPED = {
    "alike": "the model gave the same response to it each time, or none",
    "long": "it leaves the model no room to answer",
    "passed": "it was passed over",
    "nonsense": "the judge named neither response",
}


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What a session came to.

    Attributes:
        judged: Pairs that it added.
        skipped: How many prompts got none, by the words of ``SKIPPED``.
        stopped: By having enough pairs, by the last prompt, by the judge, or by Ctrl-C.
    """

    judged: int
    skipped: dict[str, int] = field(default_factory=dict)
    stopped: Literal["enough", "prompts", "quit", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where candidates come from.

    Attributes:
        title: Whose they are.
        has_room: Whether a prompt leaves room to answer.
        draw: Two responses that differ, or None.
    """

    title: str
    has_room: Callable[[Prompt], bool]
    draw: Callable[[Prompt], tuple[str, str] | None]


def collect(
    prompts: Iterable[Prompt],
    source: Source,
    rank: Ranker,
    store: PairStore,
    *,
    judge: str,
    most: int,
    seed: int,
    notice: Callable[[str], None],
) -> Tally:
    """Rank candidates prompt by prompt until the file holds enough pairs; Ctrl-C ends it early.

    Args:
        prompts: In their order; those with a pair are left out.
        source: Of the candidates.
        rank: The judge.
        store: Takes each pair as soon as it is ranked.
        judge: What is noted as who judged.
        most: Pairs that the file is to hold in the end.
        seed: With a prompt's words, decides which candidate the judge sees first.
        notice: Told why a prompt is skipped.

    Raises:
        InputError: If the model is damaged.
        RankingError: If the judge cannot go on; what was ranked is in the file.
        StoreError: If the file cannot be written.
    """
    before = store.count
    skipped: Counter[str] = Counter()
    objective = store.objective

    def tally(stopped: Literal["enough", "prompts", "quit", "interrupted"]) -> Tally:
        return Tally(judged=store.count - before, skipped=dict(skipped), stopped=stopped)

    try:
        for prompt in prompts:
            if store.count >= most:
                return tally("enough")
            if prompt.key in store.judged:
                continue
            drawn = source.draw(prompt) if source.has_room(prompt) else None
            if drawn is None:
                reason = "alike" if source.has_room(prompt) else "long"
            else:
                turned = sides_turned(seed, objective, prompt)
                first, second = drawn[::-1] if turned else drawn
                verdict = rank(
                    Question(
                        prompt=prompt,
                        first=first,
                        second=second,
                        objective=objective,
                        number=store.count + 1,
                        total=most,
                    )
                )
                if verdict == "quit":
                    return tally("quit")
                if verdict in ("first", "second"):
                    chosen, rejected = (first, second) if verdict == "first" else (second, first)
                    pair = Pair(**prompt.model_dump(), chosen=chosen, rejected=rejected)
                    store.add(pair, judge=judge, model=source.title)
                    continue
                reason = verdict
            skipped[reason] += 1
            name = shorten(prompt.instruction, 60, placeholder="...")
            notice(f"skipped {name!r}: {SKIPPED[reason]}")
    except KeyboardInterrupt:
        return tally("interrupted")
    return tally("enough" if store.count >= most else "prompts")


def sides_turned(seed: int, objective: str, prompt: Prompt) -> bool:
    """Return whether the judge sees the second candidate first: a fair draw for each prompt."""
    return bool(stream(seed, "prefer", "sides", objective, prompt.key).random() < 0.5)
