"""What an upload takes on average against uploads that are drawn, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from device_profiles.airtime import expected_upload
from device_profiles.channel import Link, upload
from device_profiles.errors import InputError
from device_profiles.many_uploads import upload_seconds_many
from device_profiles.philox import numbered_keys

ADAPTER_BITS = 580_968 * 32


def link(**changes: object) -> Link:
    values: dict[str, object] = {"snr_db": 5.0, "bandwidth_hz": 1e6, "transmit_watts": 2.0}
    return Link(**(values | changes))  # type: ignore[arg-type]


LINKS = [
    link(),
    link(fading="rician", rician_k=3.0, csi_error_variance=0.05),
    link(sharing="tdma", sharers=5),
    link(sharing="fdma", sharers=5),
    link(scheme="fixed-rate"),
    link(scheme="fixed-rate", rate_bits_per_hz=1.0, fading="rician", rician_k=3.0),
    link(scheme="inversion", cut_off_gain=0.3, sharing="tdma", sharers=2),
    link(scheme="outage", rate_bits_per_hz=0.01),
    link(shadowing_db=3.0),
    link(shadowing_db=4.0, scheme="fixed-rate"),
    link(shadowing_db=2.0, scheme="inversion"),
]


@pytest.mark.parametrize("over", LINKS, ids=str)
def test_the_mean_of_each_figure_is_that_of_drawn_uploads(over: Link) -> None:
    n, bits = 4_000, 333_333.0  # some 20 blocks, and a piece
    generator = np.random.default_rng(1)
    drawn = [upload(bits, over, generator) for _ in range(n)]
    expected = expected_upload(bits, over)
    for name in ("seconds", "air_seconds", "transmit_joules", "delivered"):
        values = np.array([float(getattr(one, name)) for one in drawn])
        # Five standard deviations of a mean, and what is left of renewal theory at 20 blocks.
        tolerance = 5 * values.std() / n**0.5 + 1e-4 * values.mean()
        assert values.mean() == pytest.approx(getattr(expected, name), abs=tolerance), name


@pytest.mark.parametrize("over", [one for one in LINKS if one.scheme != "outage"], ids=str)
def test_the_spread_of_the_delay_is_that_of_drawn_uploads(over: Link) -> None:
    n, bits = 4_000, 333_333.0
    generator = np.random.default_rng(2)
    seconds = np.array([upload(bits, over, generator).seconds for _ in range(n)])
    # The variance of a sample variance from the sample's own fourth moment; and at 20 blocks the
    # last, partly used one moves the spread by less than 2 %.
    kurtosis = float(np.mean((seconds - seconds.mean()) ** 4) / seconds.var() ** 2)
    tolerance = 5 * math.sqrt((kurtosis - 1) / n) / 2 + 0.02
    assert seconds.std() == pytest.approx(expected_upload(bits, over).spread_seconds, rel=tolerance)


def test_the_papers_adapters_take_10_834_seconds_give_or_take_0_1875() -> None:
    expected = expected_upload(ADAPTER_BITS, link(transmit_watts=1.0))
    # 18.590976 / 1.715974 = 10.83407, and 1.62 ms for the last block.
    assert expected.seconds == pytest.approx(10.83569, abs=5e-6)
    assert expected.spread_seconds == pytest.approx(0.1875, abs=5e-4)
    assert expected.transmit_joules == expected.air_seconds == expected.seconds
    assert expected.delivered == 1.0


@pytest.mark.parametrize(("blocks", "within"), [(3, 5e-3), (10, 1e-3)])
def test_the_stated_accuracy_at_few_blocks(blocks: int, within: float) -> None:
    n, bits = 40_000, blocks * 17_159.74
    seconds = upload_seconds_many(bits, link(), numbered_keys(3, count=n))
    tolerance = within * seconds.mean() + 5 * seconds.std() / n**0.5
    assert seconds.mean() == pytest.approx(expected_upload(bits, link()).seconds, abs=tolerance)


def test_shadowing_of_a_still_channel_by_hand() -> None:
    # At -60 dB log2(1 + x) is x/ln 2 to six digits, so the time is log-normal:
    # mean exp(s^2/2) of the median and spread sqrt(exp(s^2) - 1) of the mean, s = 3 dB * ln(10)/10.
    still = link(snr_db=-60.0, fading="none", shadowing_db=3.0)
    expected = expected_upload(1.0, still)
    s = 0.3 * math.log(10)
    assert expected.seconds == pytest.approx(math.log(2) * math.exp(s**2 / 2), rel=1e-5)
    assert expected.spread_seconds == pytest.approx(
        expected.seconds * math.sqrt(math.exp(s**2) - 1), rel=1e-4
    )


def test_a_still_channel_behind_a_shadow_gives_up_as_often_as_the_shadow_is_too_deep() -> None:
    # 1 bit/s/Hz needs 0 dB; the median is 3 dB above that, and the shadow 6 dB: P[z < -0.5].
    over = link(
        snr_db=3.0, scheme="fixed-rate", rate_bits_per_hz=1.0, fading="none", shadowing_db=6.0
    )
    expected = expected_upload(1e6, over)
    # Steps of 0.05 standard deviations round the edge by half a step of density 0.352.
    assert expected.delivered == pytest.approx(1 - 0.308538, abs=0.352 * 0.025)
    got_through, given_up = 1.0, 1e5  # seconds; 10,000,000 blocks of 10 ms
    mean = expected.delivered * got_through + (1 - expected.delivered) * given_up
    assert expected.seconds == pytest.approx(mean)


def test_a_rate_above_a_still_channels_is_refused() -> None:
    over = link(scheme="fixed-rate", rate_bits_per_hz=3.0, fading="none")
    with pytest.raises(InputError, match="spans inf coherence blocks"):
        expected_upload(1e6, over)


def test_nothing_takes_nothing_and_less_is_refused() -> None:
    nothing = expected_upload(0.0, link())
    assert (nothing.seconds, nothing.transmit_joules, nothing.delivered) == (0.0, 0.0, 1.0)
    with pytest.raises(InputError, match="bits = -1"):
        expected_upload(-1.0, link())
