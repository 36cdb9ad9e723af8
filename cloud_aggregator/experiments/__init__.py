"""The experiments that come with the project: one TOML file each, known by the file's name.

The comment that a file begins with says what it studies; its first line stands for it in a list.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from device_profiles.config_files import nearest
from device_profiles.errors import InputError


def shipped() -> dict[str, Path]:
    """Return the files of the shipped experiments by name, in the order of their names."""
    folder = resources.files("cloud_aggregator") / "experiments"
    paths = [Path(str(e)) for e in folder.iterdir() if e.name.endswith(".toml")]
    return {path.stem: path for path in sorted(paths)}


def find_experiment(name: str) -> Path:
    """Return the file of an experiment: a path, or the name of a shipped one.

    What is there as a file, or looks like one (``.toml``, a folder's separator), is a path.

    Raises:
        InputError: If there is neither, with the nearest shipped name.
    """
    path, known = Path(name), shipped()
    if path.suffix == ".toml" or len(path.parts) > 1 or path.is_file():
        return path
    if name in known:
        return known[name]
    hint = nearest(name, known)
    raise InputError(
        f"no experiment '{name}'{hint or ';'} give a TOML file, or one of {', '.join(known)}"
    )


def about(path: Path) -> str:
    """Return what an experiment studies, in one line: the first of its file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def listing() -> list[str]:
    """Return a line for each shipped experiment: its name, and what it studies."""
    known = shipped()
    width = max(map(len, known))
    return [f"{name:<{width}}  {about(path)}" for name, path in known.items()]
