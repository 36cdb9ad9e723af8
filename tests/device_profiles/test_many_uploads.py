"""Many uploads against one at a time, and the fast law against the drawn one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from device_profiles.airtime import expected_upload
from device_profiles.channel import Link, Upload, upload
from device_profiles.errors import InputError
from device_profiles.many_uploads import upload_many, upload_seconds_many
from device_profiles.normal_passage import LEAST_NORMAL_BLOCKS
from device_profiles.philox import Words, named_keys, numbered_keys
from device_profiles.seeds import stream

FIGURES = ("seconds", "air_seconds", "radio_seconds", "transmit_joules", "delivered")


def link(**changes: object) -> Link:
    values: dict[str, object] = {"snr_db": 5.0, "bandwidth_hz": 1e6, "transmit_watts": 2.0}
    return Link(**(values | changes))  # type: ignore[arg-type]


LINKS = [
    link(),
    link(fading="rician", rician_k=3.0),
    link(fading="none"),
    link(shadowing_db=12.0),
    link(shadowing_db=8.0, fading="none"),
    link(shadowing_db=8.0, fading="rician", rician_k=3.0, csi_error_variance=0.1),
    link(sharing="tdma", sharers=3),
    link(sharing="fdma", sharers=3),
    link(scheme="fixed-rate"),
    link(scheme="outage", rate_bits_per_hz=0.05, shadowing_db=4.0),
    link(scheme="inversion"),
]


@pytest.mark.parametrize("over", LINKS, ids=str)
def test_exact_uploads_are_the_bits_of_one_upload_at_a_time(over: Link) -> None:
    # From part of a block to more blocks than are drawn at a time, and nothing to send.
    bits = np.array([0.0, 1.0, 7e3, 5e4, 1.8e7, 3e6, 4e7, 1e5])
    names = [f"client-{i}" for i in range(bits.size)]
    got = upload_many(bits, over, named_keys(7, "channel", 3, names=names))
    one_by_one = [
        upload(float(b), over, stream(7, "channel", 3, name))
        for b, name in zip(bits, names, strict=True)
    ]
    for figure in FIGURES:
        assert getattr(got, figure).tolist() == [getattr(one, figure) for one in one_by_one]
    assert isinstance(one_by_one[0], Upload)


@pytest.mark.parametrize("method", ["exact", "normal"])
def test_an_upload_does_not_depend_on_what_is_computed_beside_it(method: str) -> None:
    keys = numbered_keys(1, "x", count=300)
    bits = np.linspace(4e6, 3e7, 300)
    over = link(shadowing_db=3.0)
    whole = upload_seconds_many(bits, over, keys, method)  # type: ignore[arg-type]
    chosen = np.array([250, 3, 77])
    some = upload_seconds_many(bits[chosen], over, keys[chosen], method)  # type: ignore[arg-type]
    assert some.tolist() == whole[chosen].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"snr_db": -10.0},
        {"snr_db": 30.0},
        {"fading": "rician", "rician_k": 3.0},
        {"sharing": "tdma", "sharers": 4},
    ],
)
def test_the_normal_law_is_the_drawn_one(changes: dict[str, object]) -> None:
    # At the fewest blocks allowed. Two samples of n are told apart from 1.95*sqrt(2/n) = 0.0087 on
    # at p = 0.001. Without the correction of the last block the distance is 0.013 at 5 dB, without
    # that of the skewness 0.015 at -10 dB and 0.011 at 30 dB. The seeds are fixed.
    n, over = 100_000, link(**changes)
    bits = 1.02 * LEAST_NORMAL_BLOCKS * 0.01 * 1e6 / expected_upload(1e6, over).seconds
    drawn = upload_seconds_many(bits, over, numbered_keys(5, "drawn", count=n))
    fast = upload_seconds_many(bits, over, numbered_keys(6, "fast", count=n), "normal")
    assert stats.ks_2samp(drawn, fast).pvalue > 1e-3
    # Five standard deviations of a ratio of two; the part of a block that is left out is 0.2 %.
    assert fast.std() == pytest.approx(drawn.std(), rel=5 / n**0.5 + 2e-3)


def test_the_normal_law_of_a_shadowed_link_is_the_drawn_one() -> None:
    n, over = 20_000, link(shadowing_db=4.0)
    drawn = upload_seconds_many(6e6, over, numbered_keys(7, "drawn", count=n))
    fast = upload_seconds_many(6e6, over, numbered_keys(8, "fast", count=n), "normal")
    assert stats.ks_2samp(drawn, fast).pvalue > 1e-3


def test_the_normal_law_without_fading_is_no_law() -> None:
    still, keys = link(fading="none"), numbered_keys(1, count=5)
    fast = upload_seconds_many(2.057373e6, still, keys, "normal")
    assert fast.tolist() == pytest.approx([1.0] * 5, rel=3e-7)
    # Neither too few blocks nor too many: it has none.
    for bits in (2.057373, 2.057373e15):
        fast = upload_seconds_many(bits, still, keys, "normal")
        assert fast.tolist() == pytest.approx([bits / 2.057373e6] * 5, rel=3e-7)


def test_uploads_longer_than_are_done_together_are_the_bits_of_one_at_a_time() -> None:
    bits = np.array([6e9, 1e6])  # 349,656 blocks, and some 58
    got = upload_seconds_many(bits, link(), named_keys(7, "long", names=["a", "b"]))
    for seconds, amount, name in zip(got, bits, ["a", "b"], strict=True):
        assert seconds == upload(float(amount), link(), stream(7, "long", name)).seconds


def test_no_uploads_are_empty_figures() -> None:
    for method in ("exact", "normal"):
        got = upload_many(1e6, link(), numbered_keys(1, count=0), method)  # type: ignore[arg-type]
        assert [getattr(got, figure).shape for figure in FIGURES] == [(0,)] * 5


def test_shadowed_uploads_that_need_many_more_blocks_than_most_are_walked_to_their_end() -> None:
    # 20 dB of shadowing: some need a thousand times the blocks of the median.
    over = link(shadowing_db=20.0)
    got = upload_many(1e5, over, numbered_keys(2, "deep", count=200))
    assert got.delivered.all()
    assert got.seconds.max() > 100 * np.median(got.seconds)


@pytest.mark.parametrize("method", ["exact", "normal"])
def test_uploads_behind_too_deep_a_shadow_are_given_up(method: str) -> None:
    # Without fading 1e9 bits take 48,605 blocks; 206 times that is 10,000,000, at a rate of
    # 0.01000 bit/s/Hz, which is an SNR of 0.006956, -21.58 dB: 26.58 dB or 1.329 sigma below.
    n, over = 300, link(shadowing_db=20.0)
    keys = numbered_keys(3, "deeper", count=n)
    if method == "exact":  # long walks: only those that are given up are walked to the point
        shadows = np.array([stream_shadow(key) for key in keys])
        keys = keys[shadows < -1.4][:2]
        got = upload_many(1e9, over, keys, "exact")
        assert not got.delivered.any()
    else:
        got = upload_many(1e9, over, keys, "normal")
        share = 0.0919  # P[z < -1.329]
        spread = (share * (1 - share) / n) ** 0.5
        assert (~got.delivered).mean() == pytest.approx(share, abs=5 * spread)
    lost = ~got.delivered
    assert set(got.seconds[lost].tolist()) == {1e5}
    assert set(got.transmit_joules[lost].tolist()) == {2e5}


def stream_shadow(key: Words) -> float:
    low, high = key.tolist()
    return float(np.random.Generator(np.random.Philox(key=low + (high << 64))).standard_normal())


@pytest.mark.parametrize(
    ("changes", "bits", "method", "told"),
    [
        ({}, -1.0, "exact", "bits = -1.0; "),
        ({}, np.nan, "normal", "bits = nan; "),
        ({}, 1e5, "normal", r"'normal' for an upload of 1e\+05 bits, which may be of 5.83"),
        ({}, 1e6, "gauss", "unknown method 'gauss'"),
        ({"scheme": "fixed-rate"}, 1e6, "normal", "method 'normal' under scheme 'fixed-rate'"),
        ({"snr_db": -80.0}, 1e7, "exact", "above 10,000,000; raise one of the three"),
        ({"snr_db": -80.0}, 1e7, "normal", "above 10,000,000; raise one of the three"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    changes: dict[str, object], bits: float, method: str, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        upload_many(bits, link(**changes), numbered_keys(1, count=3), method)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keys", [np.zeros(4, dtype=np.uint64), np.zeros((2, 3), dtype=np.uint64), np.zeros((2, 2))]
)
def test_keys_that_are_none_are_refused(keys: Words) -> None:
    with pytest.raises(InputError, match=r"keys of shape .*; give \(n, 2\) and uint64"):
        upload_many(1e6, link(), keys)
