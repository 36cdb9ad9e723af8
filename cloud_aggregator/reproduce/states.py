"""The policies that a run's clients had before alignment and after each of its rounds.

A client keeps the newest two of its own states; a comparison keeps the personal part of each round
of alignment besides, below ``states/`` in the run's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from cloud_aggregator.run_folder import RunFolder, read_record
from device_profiles.errors import InputError
from device_profiles.modules import adapter_tensors, first_lora_sites, lora_tensors
from edge_client.export.personal import Personal, find_in_run
from edge_client.export.run_files import read_run
from edge_client.state import ClientState, StateStore
from messaging.layout import Tensors, Vector


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Every client's policy at one moment of a run.

    Attributes:
        aligned: Rounds of alignment before it.
        round: Of the run, after which it is.
        clients: What each client's model is made of, by its id.
    """

    aligned: int
    round: int
    clients: Mapping[str, Personal]


def watch(folder: RunFolder) -> Callable[..., None]:
    """Return what keeps the clients' personal part after each round of alignment."""

    def take(event: str, **fields: Any) -> None:
        if event == "round" and fields["stage"] == "alignment":
            keep(folder.path, int(fields["round"]))

    return take


def keep(folder: Path, round_: int) -> None:
    """Keep the personal part of each client as it is after a round.

    Raises:
        InputError: If a client's state is damaged.
    """
    for client in sorted((folder / "clients").glob("*")):
        state = StateStore(client).newest(before=round_ + 1)
        if state is not None and state.personal:
            kept = ClientState(round=round_, stage=state.stage, personal=state.personal)
            _store(folder, client.name, round_).save(kept)


def moments(folder: Path) -> Iterator[Moment]:
    """Yield the clients' policies after stage 1, and after each round of alignment.

    A round of which a client's own part was not kept is passed over.

    Raises:
        InputError: If the run's folder is damaged, or its base is not the run's.
    """
    run = read_run(folder)
    rounds = {
        stage: [r.round for r in read_record(folder).rounds if r.stage == stage]
        for stage in ("instruction", "alignment")
    }
    last = {client: find_in_run(folder, client) for client in run.clients}
    if not rounds["alignment"]:
        yield Moment(aligned=0, round=max(rounds["instruction"]), clients=last)
        return
    began = {client: _with(own, _reference(folder, own)) for client, own in last.items()}
    yield Moment(aligned=0, round=max(rounds["instruction"], default=0), clients=began)
    for number, round_ in enumerate(rounds["alignment"], 1):
        if round_ == rounds["alignment"][-1]:
            yield Moment(aligned=number, round=round_, clients=last)
            return
        shared = _shared(run.global_path(round_))
        there = {client: _at(folder, own, shared, round_) for client, own in last.items()}
        found = {client: own for client, own in there.items() if own is not None}
        if len(found) == len(last):
            yield Moment(aligned=number, round=round_, clients=found)


def _store(folder: Path, client: str, round_: int) -> StateStore:
    return StateStore(folder / "states" / str(round_) / client)


def _at(folder: Path, own: Personal, shared: Tensors, round_: int) -> Personal | None:
    store = _store(folder, own.client, round_)
    personal = store.load(round_).personal if store.rounds() else {}
    there = shared | personal
    return _with(own, there) if set(own.tensors) <= set(there) else None


def _with(own: Personal, tensors: Tensors) -> Personal:
    return replace(own, tensors={name: tensors[name] for name in own.tensors})


def _reference(folder: Path, own: Personal) -> Tensors:
    """Return the policy of stage 1, kept as one vector: adapters, then LoRA in order of filling."""
    vector = StateStore(folder / "clients" / own.client).reference()
    if vector is None:
        raise InputError(
            f"the policy of stage 1 of '{own.client}' is gone from {folder}; remove that folder "
            "to do its run again"
        )
    return _named(vector, own)


def _named(vector: Vector, own: Personal) -> Tensors:
    shape = own.identity.shape
    sites = first_lora_sites(shape, own.placement, own.lora_count)
    order = adapter_tensors(shape, own.adapter_size) if own.adapter_size else []
    tensors: Tensors = {}
    start = 0
    for tensor in [*order, *lora_tensors(sites, own.lora_rank)]:
        tensors[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return tensors


def _shared(path: Path) -> Tensors:
    try:
        tensors: Tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as err:
        raise InputError(f"{path} is missing or damaged: remove its run to do it again") from err
    return tensors
