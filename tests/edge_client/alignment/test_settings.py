"""Settings are refused outside their ranges, and by unknown names."""

from __future__ import annotations

from typing import Any

import pytest

from device_profiles.config_files import check
from device_profiles.errors import InputError
from edge_client.alignment.settings import DpoSettings, PpoSettings, RlooSettings


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (PpoSettings, "temperature", 0.0),
        (PpoSettings, "clip", 1.5),
        (PpoSettings, "lam", -0.1),
        (PpoSettings, "gamma", 1.1),
        (PpoSettings, "minibatches", 0),
        (PpoSettings, "kl_coefficient", -0.1),
        (PpoSettings, "learning_rate", float("nan")),
        (RlooSettings, "samples", 1),
        (DpoSettings, "beta", 0.0),
    ],
)
def test_a_value_out_of_its_range_is_named(kind: Any, field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"alignment: {field} = "):
        check(kind, {field: value}, "alignment")


def test_an_unknown_setting_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match="unknown key 'kl_coeficient'; did you mean"):
        check(PpoSettings, {"kl_coeficient": 0.1}, "alignment")
