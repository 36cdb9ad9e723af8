"""What an export needs of a run's folder, read from ``run.json`` and ``config.toml``.

Read leniently: keys that later versions add are passed over; only what is needed must be there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_profiles.config_files import nearest, read_toml
from device_profiles.errors import InputError

_NAMED_CLIENTS = 12
_NEEDED = ("lora_count", "lora_rank", "adapter_count", "adapter_size", "placement")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run as its folder tells it.

    Attributes:
        model: The base, as the run found it.
        hashes: SHA-256 of ``base`` and ``tokenizer``.
        clients: Id to the client's record.
        rounds: Numbers of the finished rounds that trained the model, in their order; those of
            reward learning do not.
        settings: The experiment (emulated) or service (deployed).
        data_sha256: Of the examples that were divided among the clients.
    """

    folder: Path
    name: str
    method: str
    model: str
    hashes: Mapping[str, str]
    clients: Mapping[str, Mapping[str, Any]]
    rounds: tuple[int, ...]
    settings: Mapping[str, Any]
    data_sha256: str | None

    def global_path(self, round_: int) -> Path:
        """Return the newest global state at the end of a round: an empty round makes none."""
        kept = [int(p.name) for p in (self.folder / "global").glob("*") if p.name.isdecimal()]
        own = {0, *self.rounds}
        newest = max((n for n in kept if n <= round_ and n in own), default=round_)
        return self.folder / "global" / str(newest) / "shared.safetensors"


def read_run(folder: Path) -> RunFiles:
    """Return what a run's folder says.

    Raises:
        InputError: If it is no run's folder, or damaged.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_bytes())
    except OSError as err:
        raise InputError(f"{folder} holds no run: there is no {path}; give a run's folder") from err
    except ValueError as err:
        raise InputError(f"{path} is damaged: {err}") from err
    config = read_toml(folder / "config.toml")
    try:
        settings = config.get("experiment") or config["service"]
        run = RunFiles(
            folder=folder,
            name=str(record["run"]),
            method=str(record["method"]),
            model=str(settings["model"]),
            hashes={
                "base": str(record["model"]["sha256"]),
                "tokenizer": str(record["model"]["tokenizer_sha256"]),
            },
            clients={str(c["id"]): c for c in record["clients"]},
            rounds=tuple(int(r["round"]) for r in record["rounds"] if r["stage"] != "reward"),
            settings=settings,
            data_sha256=record.get("data", {}).get("sha256"),
        )
        for client in run.clients.values():
            _ = [client[key] for key in (*_NEEDED, "shared_parameters")]
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise InputError(
            f"{folder} is damaged: {path.name} or config.toml lacks {err}; it cannot be exported"
        ) from err
    return run


def finished_round(run: RunFiles) -> int:
    """Return the newest round that was finished.

    Raises:
        InputError: If none was.
    """
    if not run.rounds:
        raise InputError(
            f"the run in {run.folder} has finished no round yet; go on with it by "
            f"pwff emulate --resume --out {run.folder}"
        )
    return max(run.rounds)


def find_client(run: RunFiles, client: str) -> Mapping[str, Any]:
    """Return what the run's record says of a client.

    Raises:
        InputError: If there is none of that id, with the nearest.
    """
    if client in run.clients:
        return run.clients[client]
    ids = sorted(run.clients)
    hint = nearest(client, ids) or "."
    more = ", ..." if len(ids) > _NAMED_CLIENTS else ""
    raise InputError(
        f"the run in {run.folder} has no client '{client}'{hint} It has "
        f"{len(ids)}: {', '.join(ids[:_NAMED_CLIENTS])}{more}"
    )
