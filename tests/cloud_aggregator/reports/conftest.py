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
    summarise,
    weighted_mean,
)
from cloud_aggregator.reports import build_report
from messaging.protocol import Channel, DeviceRecord, Preference

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


@pytest.fixture
def read() -> Callable[..., Page]:
    """Build the page of these runs, by name, and read it."""
    return lambda *unnamed, **named: Page(
        build_report([*(("a run", run) for run in unnamed), *named.items()])
    )


@pytest.fixture
def page_of() -> type[Page]:
    """Read a page that is there already."""
    return Page
