"""Log lines for people or machines, with run, round and client wherever they are known.

The run and, on a device, the client belong to a process; the round changes as the run goes on;
``bound`` adds what only one piece of work knows. Times are UTC in JSON and local in text.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Literal, TextIO

log = logging.getLogger(__name__)

Format = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")
FIELDS = ("run", "round", "client")

_process: dict[str, str | int] = {}
_bound: ContextVar[dict[str, str | int]] = ContextVar("bound")


def place(**fields: str | int) -> None:
    """Make fields of ``FIELDS`` stand on every later line of this process.

    Raises:
        ValueError: If a field is not one of them.
    """
    _process.update(_checked(fields))


@contextlib.contextmanager
def bound(**fields: str | int) -> Iterator[None]:
    """Put fields of ``FIELDS`` on the lines that this thread logs inside the context.

    Raises:
        ValueError: If a field is not one of them.
    """
    token = _bound.set({**_bound.get({}), **_checked(fields)})
    try:
        yield
    finally:
        _bound.reset(token)


def note_event(event: str, **fields: Any) -> None:
    """Take one event of a run: from a task on, lines carry its round."""
    if event == "task":
        place(round=fields["round"])


def tell_event(event: str, **fields: Any) -> None:
    """Log an event of a run for machines, with the plain ones of its fields."""
    known = {name: fields[name] for name in ("round", "client") if name in fields}
    plain = {k: v for k, v in fields.items() if isinstance(v, str | int | float | None)}
    with bound(**known):
        log.info(event, extra={"event": event, "fields": plain})


def _checked(fields: dict[str, str | int]) -> dict[str, str | int]:
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no field of a log line; {', '.join(FIELDS)} are")
    return fields


class _Where(logging.Filter):
    """Gives each record its run, round and client, and ``where``, which says them in words."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add what is known; what the caller gave as ``extra`` stands."""
        for name, value in {**_process, **_bound.get({})}.items():
            if not hasattr(record, name):
                setattr(record, name, value)
        known = [f"{n}={getattr(record, n)}" for n in FIELDS if hasattr(record, n)]
        record.where = f" [{' '.join(known)}]" if known else ""
        return True


def start(
    form: Format,
    level: str,
    *,
    handler: logging.Handler | None = None,
    stream: TextIO | None = None,
) -> None:
    """Send this process's log to a stream (standard error), in place of what was set up before.

    Args:
        form: ``text`` for people, ``json`` for one object a line.
        level: The least that is logged, one of ``LEVELS``.
        handler: What shows text instead of the stream; it brings its own time and level.
        stream: Where lines go; standard error by default.
    """
    own: logging.Handler = logging.StreamHandler(stream)
    if form == "json":
        own.setFormatter(_json_formatter())
    elif handler is not None:
        own = handler
        own.setFormatter(logging.Formatter("%(message)s%(where)s"))
    else:
        own.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s%(where)s"))
    own.addFilter(_Where())
    logging.basicConfig(level=level.upper(), handlers=[own], force=True)


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.core import RESERVED_ATTRS
    from pythonjsonlogger.json import JsonFormatter

    class _Formatter(JsonFormatter):
        def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
            del datefmt
            at = datetime.fromtimestamp(record.created, timezone.utc)
            return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    return _Formatter(
        ["asctime", "levelname", "name", "message"],
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, "where"],
    )
