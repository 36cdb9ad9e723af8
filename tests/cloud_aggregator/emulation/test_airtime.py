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
    return airtime_lines(experiment, a_plan(experiment, chosen, dataset()))


def test_adapters_take_their_bytes_at_the_rate_of_the_link() -> None:
    # 36 * (2*768*10 + 10 + 768) = 580,968 numbers of 4 bytes in 19 chunks with 64 bytes before
    # each; 8 * 2,325,088 bits at 1 MHz * log2(1 + 10**0.5) = 2.057 Mbit/s
    assert said() == [
        "Of instruction tuning, the adapters travel: an upload is 2.3 MB, about 9.0 s on the air "
        "(modelled, fp32)."
    ]


def test_reward_learning_says_what_every_choice_would_take() -> None:
    # Two heads of 64*(2*768+1) + 2*64 + 1 numbers are 787,976 bytes in 7 chunks; with the adapters
    # of each trunk, 2 * 580,968 numbers more, 5,435,720 bytes in 45; with both trunks' weights,
    # 2 * 124,439,808 numbers more, 996,306,440 bytes in 8,113.
    assert said(stages="reward") == [
        "Of reward learning, the heads alone travel: an upload is 788.0 kB, about 3.1 s on the air "
        "(modelled, fp32); the heads and the adapters on each trunk (reward_shares = 'adapters') "
        "would be 5.4 MB, about 21.1 s on the air, and the heads and all weights of each trunk "
        "(reward_shares = 'all') would be 996.3 MB, about 65 min on the air."
    ]


def test_with_adapters_on_the_trunks_an_upload_is_all_of_the_layout() -> None:
    assert said(stages="reward", reward_shares="adapters") == [
        "Of reward learning, the heads and the adapters on each trunk travel: an upload is 5.4 MB, "
        "about 21.1 s on the air (modelled, fp32); the heads alone (reward_shares = 'head') would "
        "be 788.0 kB, about 3.1 s on the air, and the heads and all weights of each trunk "
        "(reward_shares = 'all') would be 996.3 MB, about 65 min on the air."
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
