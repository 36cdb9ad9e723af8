"""What is said of airtime before a run: bytes by hand, seconds by Shannon's rate without fading."""

from __future__ import annotations

import pytest

from cloud_aggregator.emulation.airtime import airtime_lines
from cloud_aggregator.experiment import Experiment
from cloud_aggregator.methods import METHODS
from device_profiles.modules import BaseShape
from tests.cloud_aggregator.emulation.test_fleet import a_plan, dataset, identity


def said(base: BaseShape | None = None, **settings: object) -> list[str]:
    """Return the sentences of an experiment on a base of GPT-2 small's shape, or another."""
    experiment = Experiment(**{"fading": "none", **settings})  # type: ignore[arg-type]
    chosen = identity(base) if base else identity()
    return airtime_lines(experiment, chosen, a_plan(experiment, chosen, dataset()))


def test_adapters_take_their_bytes_at_the_rate_of_the_link() -> None:
    # 36 * (2*768*10 + 10 + 768) = 580,968 numbers of 4 bytes in 19 chunks with 64 bytes before
    # each; 8 * 2,325,088 bits at 1 MHz * log2(1 + 10**0.5) = 2.057 Mbit/s
    assert said() == [
        "Of instruction tuning, the adapters travel: an upload is 2.3 MB, about 9.0 s on the air "
        "(modelled, fp32)."
    ]


def test_reward_learning_says_what_every_choice_would_take() -> None:
    # two heads of 64*(2*768+1) + 2*64 + 1 numbers: 787,976 bytes; with the adapters 3,111,848, and
    # with 124,439,808 weights 498,547,208; 7, 26 and 4,060 chunks
    assert said(stages="reward") == [
        "Of reward learning, the heads travel: an upload is 788.0 kB, about 3.1 s on the air "
        "(modelled, fp32); with adapters on the trunk it would be 3.1 MB, about 12.1 s on the air, "
        "and with the whole trunk 498.5 MB, about 32 min on the air: neither is sent."
    ]


def test_costs_are_those_of_the_shape_that_a_run_is_priced_at() -> None:
    small = BaseShape(layers=12, width=192, inner=768)
    assert said(small, priced_at="gpt2-small") == said()
    assert said(small) != said()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_travels_or_nothing(method: str) -> None:
    lines = said(method=method)
    assert len(lines) == (1 if METHODS[method].shared else 0)


def test_devices_with_fewer_lora_modules_send_less() -> None:
    # 12 modules of 96 * (768 + 768) numbers are 7.1 MB, three times as many 21.2 MB
    few, all_of_them = (
        said(method="fedlora-own", lora_count=count, codec="fp32")[0] for count in (12, 36)
    )
    assert "7.1 MB" in few
    assert "21.2 MB" in all_of_them
