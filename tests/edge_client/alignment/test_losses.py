"""Losses of alignment, by hand on both sides of the clip, and their derivatives by differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edge_client.alignment.losses import clipped_policy, clipped_value, preference


def entries(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# With a clip of 0.2 the ratio counts from 0.8 to 1.2.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # within: -q A, and its derivative by log q is the same
        (1.1, -2.0, 2.2, 2.2),
        (1.5, 2.0, -2.4, 0.0),  # good, and likelier than it may become: no more is gained
        (1.5, -2.0, 3.0, 3.0),  # bad, and likelier than it was: taken back in full
        (0.5, 2.0, -1.0, -1.0),  # good, and less likely than it was: taken back in full
        (0.5, -2.0, 1.6, 0.0),  # bad, and less likely than it may become
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_policy_loss_by_hand(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    old = entries(-3.0)
    found = clipped_policy(old + math.log(ratio), old, entries(advantage), 0.2)
    assert [float(f) for f in found] == pytest.approx([loss, slope], rel=1e-12)


# Old value 1, clip 0.2: a value counts from 0.8 to 1.2.
@pytest.mark.parametrize(
    ("value", "wanted", "loss", "slope"),
    [
        (1.1, 2.0, 0.5 * 0.9**2, -0.9),  # within
        (0.9, 0.5, 0.5 * 0.4**2, 0.4),
        (1.5, 2.0, 0.5 * 0.8**2, 0.0),  # nearer, but further than it may go: as if at 1.2
        (1.5, 1.0, 0.5 * 0.5**2, 0.5),  # beyond the clip and the wrong way: in full
        (0.5, 0.0, 0.5 * 0.8**2, 0.0),  # as if at 0.8
        (0.5, 2.0, 0.5 * 1.5**2, -1.5),
    ],
)
def test_the_clipped_value_loss_by_hand(
    value: float, wanted: float, loss: float, slope: float
) -> None:
    found = clipped_value(entries(value), entries(1.0), entries(wanted), 0.2)
    assert [float(f) for f in found] == pytest.approx([loss, slope], rel=1e-12)


def test_the_preference_loss_by_hand() -> None:
    # sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4; at 0 it is ln 2 with slope -1/2
    margins = entries(math.log(3), -math.log(3), 0.0)
    losses, slopes = preference(margins, entries(2.0, 2.0, 0.5))
    assert losses.tolist() == pytest.approx(
        [2 * math.log(4 / 3), 2 * math.log(4), 0.5 * math.log(2)], rel=1e-12
    )
    assert slopes.tolist() == pytest.approx([-0.5, -1.5, -0.25], rel=1e-12)


def test_a_preference_that_is_hopelessly_wrong_has_a_finite_loss() -> None:
    losses, slopes = preference(entries(-1e4), entries(1.0))
    assert (float(losses), float(slopes)) == (1e4, -1.0)


def differences(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    step = 1e-6
    return (loss(at + step) - loss(at - step)) / (2 * step)


def spread(seed: int, scale: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(200, generator=rng, dtype=torch.float64)


# Central differences of step 1e-6 are off by 1e-10 of rounding and less of curvature; 200 random
# entries are not within 1e-6 of a corner.
def test_slopes_are_those_of_differences() -> None:
    at, old, wanted = spread(0), spread(1, 0.5), spread(2)
    for loss in (
        lambda x: clipped_policy(x, at + old, wanted, 0.2),
        lambda x: clipped_value(x, at + old, wanted, 0.3),
        lambda x: preference(x, wanted),
    ):
        slopes = loss(at)[1]
        torch.testing.assert_close(
            slopes, differences(lambda x, f=loss: f(x)[0], at), rtol=1e-6, atol=1e-8
        )
