"""TOML files into checked records; every mistake becomes one clear sentence.

Unknown keys are refused by name, with the nearest known key.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from device_profiles.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has 3.10
    import tomli as tomllib

_LOGIN = re.compile(r"//.*@")  # user and password of an address


class Config(BaseModel):
    """A frozen record read from a file, with no key that it does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Model = TypeVar("Model", bound=BaseModel)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the known word nearest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Return ``name`` if it is known.

    Raises:
        InputError: Naming the nearest known name and all of them.
    """
    names = sorted(known)
    if name in names:
        return name
    hint = nearest(name, names)
    choice = f"{hint} Choose" if hint else "; choose"
    raise InputError(f"unknown {kind} '{name}'{choice} one of {', '.join(names)}")


def check_belongs(record: object, key: str, choice: str, owners: Iterable[str]) -> None:
    """Refuse a key of a record that belongs to a choice not made.

    Args:
        record: Has both.
        key: Left out where it is None.
        choice: Name of the key that it depends on.
        owners: Choices that it belongs to.

    Raises:
        InputError: Naming both and the owners.
    """
    value, chosen = getattr(record, key), getattr(record, choice)
    if value is not None and chosen not in owners:
        made = "left out" if chosen is None else f"'{chosen}'"
        raise InputError(
            f"{key} = {value} with {choice} {made}; it belongs to "
            f"{' and '.join(repr(owner) for owner in owners)}, leave it out"
        )


def read_toml(path: Path) -> dict[str, Any]:
    """Return the file's content.

    Raises:
        InputError: If it is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise InputError(f"cannot read {path}: {err.strerror or err}") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise InputError(f"{path} is no valid TOML: {err}") from err


def check(kind: type[Model], values: Mapping[str, Any], source: str) -> Model:
    """Return ``values`` as a record of ``kind``.

    Raises:
        InputError: For the first field that is wrong: source, field, value, bound. An unknown key
            comes first: a misspelt one is why another is missing.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as err:
        wrong = err.errors(include_url=False)
    first = next((e for e in wrong if e["type"] == "extra_forbidden"), wrong[0])
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, place[:-1])
        raise InputError(
            f"{source}: unknown key '{'.'.join(place)}'{nearest(place[-1], known)}"
            + (f" (known: {', '.join(sorted(known))})" if known else "")
        )
    if first["type"] == "missing":
        raise InputError(f"{source}: '{'.'.join(place)}' is missing; add {_what(kind, place)}")
    message = first["msg"].removeprefix("Value error, ")
    if not place:  # several fields of the record contradict each other
        raise InputError(f"{source}: {message}")
    if isinstance(first["input"], Mapping):  # several fields of a part of it do
        raise InputError(f"{source}: {'.'.join(place)}: {message}")
    shown = _LOGIN.sub("//...@", repr(first["input"]))
    raise InputError(f"{source}: {'.'.join(place)} = {shown:.80}: {message}")


def load(kind: type[Model], path: Path) -> Model:
    """Return the record that the TOML file at ``path`` holds.

    Raises:
        InputError: See ``read_toml`` and ``check``.
    """
    return check(kind, read_toml(path), str(path))


def _keys_at(kind: type[BaseModel], place: list[str]) -> list[str]:
    """Return the keys that ``kind`` knows at ``place``."""
    record = _record_at(kind, place)
    if record is None:
        return []
    return [field.alias or name for name, field in record.model_fields.items()]


def _what(kind: type[BaseModel], place: list[str]) -> str:
    """Return what to add where ``place`` is missing: as its field is described, or the record."""
    holder = _record_at(kind, place[:-1])
    field = holder.model_fields.get(place[-1]) if holder else None
    if field is None:
        return "it"
    if field.description:
        return field.description
    record = _model_in(field.annotation)
    if record is None:
        return "it"
    names = [f"'{name}'" for name, inner in record.model_fields.items() if inner.is_required()]
    return f"a table [{'.'.join(place)}] with {' and '.join(names)}"


def _record_at(kind: type[BaseModel], place: list[str]) -> type[BaseModel] | None:
    """Return the record at ``place``; list positions and names in tables are stepped over."""
    current, parts = kind, iter(place)
    for part in parts:
        field = current.model_fields.get(part)
        inner = _model_in(field.annotation) if field else None
        if field is None or inner is None:
            return None
        if _holds_many(field.annotation):
            next(parts, None)
        current = inner
    return current


def _holds_many(annotation: Any) -> bool:
    many = get_origin(annotation) in (dict, list, tuple)
    return many or any(_holds_many(inner) for inner in get_args(annotation))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
