"""A plausible run whose figures a test can work out by hand, and a reader of pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import pytest

from cloud_aggregator.records import (
    ClientBefore,
    ClientRound,
    DataRecord,
    GlobalRound,
    ModelRecord,
    Observed,
    RoundRecord,
    RunRecord,
)
from cloud_aggregator.reports import build_report
from cloud_aggregator.summary import summarise, weighted_mean
from messaging.protocol import Channel, DeviceRecord, Objective, PairFigures, Preference

UPLOAD_BYTES = 2_000_000
PROFILES = ("raspberry-pi-5-8gb", "jetson-orin-nano-8gb", "laptop-x86-cpu")
LINK = Channel(
    snr_db=5.0, bandwidth_hz=1e6, transmit_watts=1.0, fading="rayleigh", coherence_seconds=0.01
)


def device(client: str, place: int, held_out: int, **changes: Any) -> DeviceRecord:
    """Return the client at ``place`` in the run; what it holds and is follows from the place."""
    fields = {
        "id": client,
        "profile": PROFILES[place % 3],
        "lora_count": (12, 23, 36)[place % 3],
        "lora_rank": 96,
        "lora_rank_rule": "given",
        "adapter_count": 36,
        "adapter_size": 10,
        "placement": "wide",
        "precision": "fp32",
        "threads": 1,
        "base_bytes": 497_759_232,
        "examples": 100 * (place + 1),
        "held_out_examples": held_out,
        "categories": {"open_qa": 70 * (place + 1), "summarization": 30, "creative": 70 * place},
        "trainable_parameters": 4_119_912,
        "shared_parameters": 580_968,
        "preference": Preference(helpfulness=0.75, harmlessness=0.25),
        "channel": LINK,
        "costs": "modelled",
    }
    return DeviceRecord(**{**fields, **changes})


def part(client: str, place: int, round_: int, accuracy: float | None) -> ClientRound:
    """Return a client's part of a round; without an accuracy it was lost."""
    if accuracy is None:
        return ClientRound(id=client, status="lost", reason="no update before the deadline")
    return ClientRound(
        id=client,
        status="aggregated",
        train_loss=4.0 * (1 - accuracy),
        eval_loss=5.0 * (1 - accuracy),
        eval_accuracy=accuracy,
        upload_bytes=UPLOAD_BYTES,
        upload_parameters=580_968,
        download_bytes=UPLOAD_BYTES,
        downlink_seconds=1.5,
        uplink_seconds=10.0 + place + round_ / 4,
        uplink_joules=10.0 + place + round_ / 4,
        compute_seconds=(240.0, 20.0, 60.0)[place % 3],
        compute_joules=500.0,
    )


def make_run(
    accuracy: Mapping[str, Sequence[float | None]],
    *,
    held_out: Mapping[str, int] | None = None,
    device_changes: Mapping[str, Any] | None = None,
    **changes: Any,
) -> RunRecord:
    """Return a run of these clients: accuracy before the first round, then after each.

    Loss is 5 * (1 - accuracy). A None after round 0 is a client that was lost in that round.
    """
    weights = {client: (held_out or {}).get(client, 1) for client in accuracy}
    places = {client: place for place, client in enumerate(accuracy)}
    rounds = []
    for round_ in range(1, max((len(values) for values in accuracy.values()), default=1)):
        clients = [part(c, places[c], round_, values[round_]) for c, values in accuracy.items()]
        mean = weighted_mean([(c.eval_accuracy, weights[c.id]) for c in clients])
        rounds.append(
            RoundRecord(
                stage="instruction",
                round=round_,
                accepted=[c.id for c in clients if c.status == "aggregated"],
                virtual_seconds=300.0 + round_,
                clients=clients,
                global_=GlobalRound(
                    eval_loss=None if mean is None else 5.0 * (1 - mean), eval_accuracy=mean
                ),
                observed=Observed(wall_seconds=30.0, peak_memory_bytes=1_500_000_000),
            )
        )
    run = RunRecord(
        version="0.1.0",
        status="done",
        stop_reason="rounds",
        run="test-run",
        seed=7,
        method="pwff",
        stages=["instruction"],
        engine="local",
        workers=1,
        transport="memory",
        codec="fp32",
        model=ModelRecord(
            name="mini", parameters=10_000_000, layers=12, width=768,
            sha256="a" * 64, tokenizer_sha256="b" * 64,
        ),
        data=DataRecord(
            source="kit", sha256="c" * 64, examples=100, partition="dirichlet", alpha=0.5
        ),
        clients=[
            device(c, place, weights[c], **(device_changes or {})) for c, place in places.items()
        ],
        before=[
            ClientBefore(
                id=c, eval_accuracy=v[0], eval_loss=None if v[0] is None else 5.0 * (1 - v[0])
            )
            for c, v in accuracy.items()
        ],
        rounds=rounds,
    )  # fmt: skip
    return run.model_copy(update={"summary": summarise(run), **changes})


def pairs(count: int, accuracy: float, loss: float, longer: float, error: float) -> PairFigures:
    """Return a client's results on its held-out pairs of one objective."""
    return PairFigures(
        pairs=count, accuracy=accuracy, loss=loss, longer_wins=longer, calibration_error=error
    )


#: Round 2: of 20 pairs of a and 60 of b, 56 are told right in all; the longer one wins in 48.
REWARDS: dict[str, dict[Objective, PairFigures]] = {
    "a": {
        "helpfulness": pairs(10, 0.6, 0.7, 0.5, 0.2),
        "harmlessness": pairs(10, 0.8, 0.5, 0.4, 0.1),
    },
    "b": {
        "helpfulness": pairs(30, 0.9, 0.3, 0.7, 0.1),
        "harmlessness": pairs(30, 0.5, 0.8, 0.6, 0.3),
    },
}
#: Helpfulness, harmlessness, KL, tokens, ended, accuracy; before, then after each round.
#: a weighs them 0.75 : 0.25, b the other way round.
Scores = tuple[float, float, float, float, float, float]
ALIGNED: dict[str, list[Scores]] = {
    "a": [(0.0, 1.0, 0, 0, 0, 0.3), (1.0, 0.0, 2.0, 20.0, 1.0, 0.2)],  # 0.25 to 0.75
    "b": [(0.0, 0.0, 0, 0, 0, 0.5), (1.0, -0.6, 4.0, 40.0, 0.5, 0.4)],  # 0 to -0.2
}


def scored(scores: Scores) -> dict[str, Any]:
    """Return what a client's part of a round of alignment holds besides its costs."""
    helpfulness, harmlessness, kl, tokens, ended, accuracy = scores
    return {
        "reward_helpfulness": helpfulness, "reward_harmlessness": harmlessness, "kl": kl,
        "response_tokens": tokens, "responses_ended": ended,
        "eval_accuracy": accuracy, "eval_loss": 5 * (1 - accuracy),
    }  # fmt: skip


def make_staged(
    rewards: Mapping[str, dict[Objective, PairFigures]] = REWARDS,
    aligned: Mapping[str, Sequence[Scores]] = ALIGNED,
    *,
    taken_back: str = "",
    without: Sequence[str] = (),
    **changes: Any,
) -> RunRecord:
    """Return a run of all stages on two clients: one round of each, of alignment one or more.

    Args:
        rewards: Results on held-out pairs after round 2.
        aligned: Scores when alignment began, then after each of its rounds from 3 on.
        taken_back: Why the last round was; what it had is a weighted reward of -1.5 at 30 nats.
        without: Stages that are left out.
        changes: Of the record.
    """
    run = make_run({"a": [0.2, 0.3], "b": [0.4, 0.5]})
    clients = [
        run.clients[0],
        run.clients[1].model_copy(
            update={"preference": Preference(helpfulness=0.25, harmlessness=0.75)}
        ),
    ]
    before = [*run.before]
    rounds = [*run.rounds]
    for client, accuracy in (("a", 0.5), ("b", 0.25)):
        before.append(
            ClientBefore(
                id=client, stage="reward", eval_loss=None, eval_accuracy=None,
                reward_accuracy=accuracy,
            )
        )  # fmt: skip
    first = rounds[0]

    def round_of(stage: str, number: int, own: Mapping[str, dict[str, Any]]) -> RoundRecord:
        unmeasured = {"eval_loss": None, "eval_accuracy": None}
        parts = [c.model_copy(update={**unmeasured, **own[c.id]}) for c in first.clients]
        figures = GlobalRound(
            eval_loss=weighted_mean([(c.eval_loss, 1) for c in parts]),
            eval_accuracy=weighted_mean([(c.eval_accuracy, 1) for c in parts]),
        )
        update = {"stage": stage, "round": number, "clients": parts, "global_": figures}
        return first.model_copy(update=update)

    own: dict[str, dict[str, Any]] = {
        i: {
            "pairs": p,
            "reward_accuracy": weighted_mean([(f.accuracy, f.pairs) for f in p.values()]),
        }
        for i, p in rewards.items()
    }
    rounds.append(round_of("reward", 2, own))
    for client, figures in aligned.items():
        start = scored(figures[0])
        for name in ("kl", "response_tokens", "responses_ended"):
            del start[name]
        before.append(ClientBefore(id=client, stage="alignment", **start))
    for n in range(1, len(aligned["a"])):
        own = {i: scored(figures[n]) for i, figures in aligned.items()}
        rounds.append(round_of("alignment", 2 + n, own))
    if taken_back:
        gone = GlobalRound(
            weighted_reward=-1.5, reward_helpfulness=-1.0, reward_harmlessness=-2.0, kl=30.0,
            eval_accuracy=0.1, eval_loss=4.5,
        )  # fmt: skip
        rounds[-1] = rounds[-1].model_copy(update={"taken_back": taken_back, "dropped": gone})
    stages = [s for s in ("instruction", "reward", "alignment") if s not in without]
    run = run.model_copy(
        update={
            "stages": stages,
            "clients": clients,
            "before": [c for c in before if c.stage in stages],
            "rounds": [r for r in rounds if r.stage in stages],
        }
    )
    return run.model_copy(update={"summary": summarise(run), **changes})


class Page(HTMLParser):
    """What a page holds, by an independent reader: text, tags, attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._text: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag, and begin a line where a reader would."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._text.append("\n" if tag in {"p", "td", "th", "li", "h1", "dd", "text"} else "")

    def handle_data(self, data: str) -> None:
        """Keep the text, but for the style sheet's."""
        if not self.tags or self.tags[-1] != "style":
            self._text.append(data)

    @property
    def text(self) -> str:
        """Text as it is read, a no-break space as a space."""
        return re.sub(r"[ \u00a0]+", " ", "".join(self._text))

    def values(self, *names: str) -> list[str]:
        """Return the values of the attributes of those names."""
        return [value for name, value in self.attributes if name in names]


@pytest.fixture(name="make_run")
def _make_run() -> Callable[..., RunRecord]:
    return make_run


@pytest.fixture(name="make_staged", scope="session")
def _make_staged() -> Callable[..., RunRecord]:
    return make_staged


@pytest.fixture
def read() -> Callable[..., Page]:
    """Build the page of these runs, by name, and read it."""
    return lambda *unnamed, **named: Page(
        build_report([*(("a run", run) for run in unnamed), *named.items()])
    )


@pytest.fixture(scope="session")
def page_of() -> type[Page]:
    """Read a page that is there already."""
    return Page
