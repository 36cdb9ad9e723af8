"""The block fading of this project against Sionna's, an independent simulator of radio links."""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from device_profiles.channel import PAPER_LINK, block_rates, upload_seconds
from device_profiles.closed_forms import rate_moments
from device_profiles.fading import draw_gains

if importlib.util.find_spec("sionna") is None:
    pytest.skip(
        "Sionna is not installed (pip install sionna-no-rt, Python 3.11 or later)",
        allow_module_level=True,
    )

BLOCKS = 200_000


@pytest.fixture(scope="module")
def sionna_gains() -> npt.NDArray[np.float64]:
    """Power gains of one antenna to one antenna, a block each. Shape (BLOCKS,)."""
    import sionna.phy
    import torch
    from sionna.phy.channel import RayleighBlockFading

    torch.set_num_threads(1)
    sionna.phy.config.seed = 11
    channel = RayleighBlockFading(num_rx=1, num_rx_ant=1, num_tx=1, num_tx_ant=1)
    coefficients, _delays = channel(BLOCKS, 1)
    return np.abs(coefficients.numpy().reshape(-1).astype(np.complex128)) ** 2


def test_gains_have_the_law_of_sionnas(sionna_gains: npt.NDArray[np.float64]) -> None:
    ours = draw_gains(0.0, BLOCKS, np.random.default_rng(12))
    assert stats.ks_2samp(ours, sionna_gains).pvalue > 1e-3  # of fixed seeds


def test_mean_rate_is_that_over_sionnas_blocks(sionna_gains: npt.NDArray[np.float64]) -> None:
    theirs = np.log2(1 + PAPER_LINK.snr * sionna_gains)
    ours = block_rates(PAPER_LINK, BLOCKS, np.random.default_rng(13)) / 1e6
    moments = rate_moments(PAPER_LINK.snr)
    tolerance = 5 * (moments.variance / BLOCKS) ** 0.5  # of a mean of independent blocks
    assert theirs.mean() == pytest.approx(moments.mean, abs=tolerance)
    assert ours.mean() == pytest.approx(theirs.mean(), abs=2**0.5 * tolerance)


def test_uploads_take_as_long_as_over_sionnas_blocks(
    sionna_gains: npt.NDArray[np.float64],
) -> None:
    bits, blocks = 1e6, 100  # some 58 blocks of 10 ms; 100 are enough for all of them
    rates = 1e6 * np.log2(1 + PAPER_LINK.snr * sionna_gains.reshape(-1, blocks))
    through = np.cumsum(rates * 0.01, axis=1)
    assert (through[:, -1] > bits).all()
    last = (through < bits).sum(axis=1)
    rows = np.arange(len(rates))
    before = np.where(last > 0, through[rows, last - 1], 0.0)
    theirs = last * 0.01 + (bits - before) / rates[rows, last]
    generator = np.random.default_rng(14)
    ours = [upload_seconds(bits, PAPER_LINK, generator) for _ in range(len(theirs))]
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
