"""A broker of each kind that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from messaging.broker import KINDS, embedded_broker, is_installed


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Name of a broker; skips where it is not installed."""
    name: str = request.param
    if not is_installed(name):
        pytest.skip(f"{name} is not installed on this machine")
    return name


@pytest.fixture
def broker(kind: str) -> Iterator[str]:
    """Address of a running broker of this kind."""
    with embedded_broker(kind=kind) as url:
        yield url
