"""What each of several clients on one band gets, by hand."""

from __future__ import annotations

import math

import pytest

from device_profiles.errors import InputError
from device_profiles.sharing import Share, share_of


def test_each_way_of_sharing_by_hand() -> None:
    assert share_of("dedicated", 1) == Share(band=1, time=1, snr=1)
    assert share_of("tdma", 4) == Share(band=1, time=0.25, snr=1)
    # The same watts over a quarter of the noise.
    assert share_of("fdma", 4) == Share(band=0.25, time=1, snr=4)


@pytest.mark.parametrize("sharing", ["tdma", "fdma"])
def test_one_client_has_the_band_to_itself(sharing: str) -> None:
    assert share_of(sharing, 1) == Share()  # type: ignore[arg-type]


@pytest.mark.parametrize("sharers", [0, -1, 2.5, math.nan, 100_001])
def test_a_number_of_sharers_that_cannot_be_is_refused(sharers: int) -> None:
    with pytest.raises(
        InputError, match=rf"^sharers = {sharers}; give a whole number from 1 to 10"
    ):
        share_of("tdma", sharers)


def test_sharing_a_dedicated_band_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"^sharers = 3 with sharing 'dedicated'.*choose 'tdma'"):
        share_of("dedicated", 3)


def test_an_unknown_way_of_sharing_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown sharing 'ofdma'; did you mean 'fdma'"):
        share_of("ofdma", 3)  # type: ignore[arg-type]
