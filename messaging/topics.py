"""Topic names, at most eight levels: what is published where.

    pwff/v1/<run>/c/<client>/state        HELLO, retained, and the last will
    pwff/v1/<run>/c/<client>/up/control   OFFER, WANT, REPORT
    pwff/v1/<run>/c/<client>/up/<blob>    DATA of one update
    pwff/v1/<run>/c/<client>/down         TASK, GRANT, HAVE, DONE, REJECT, DATA of a global state
    pwff/v1/<run>/model/latest            MANIFEST, retained

Run and client are protocol identifiers, so neither can hold a level or a wildcard of its own.
"""

from __future__ import annotations

ROOT = "pwff/v1"

#: Pattern of the name of a run or a client.
IDENTIFIER = r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?"


def state(run: str, client: str) -> str:
    """Return the topic on which a device says that it is there."""
    return f"{ROOT}/{run}/c/{client}/state"


def control(run: str, client: str) -> str:
    """Return the topic of a device's control messages."""
    return f"{ROOT}/{run}/c/{client}/up/control"


def data(run: str, client: str, blob: str) -> str:
    """Return the topic of one update's chunks."""
    return f"{ROOT}/{run}/c/{client}/up/{blob}"


def down(run: str, client: str) -> str:
    """Return the topic on which a device listens."""
    return f"{ROOT}/{run}/c/{client}/down"


def manifest(run: str) -> str:
    """Return the topic of the run's retained manifest."""
    return f"{ROOT}/{run}/model/latest"


def everything_up(run: str) -> list[str]:
    """Return the filters that an aggregator subscribes to."""
    return [f"{ROOT}/{run}/c/+/state", f"{ROOT}/{run}/c/+/up/+"]


def client_of(topic: str) -> str:
    """Return the client that a topic below ``c/`` belongs to, or an empty string."""
    parts = topic.split("/")
    return parts[4] if len(parts) >= 6 and parts[3] == "c" else ""
