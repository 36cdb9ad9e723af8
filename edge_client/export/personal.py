"""A client's personal model, found: its base, and its tensors from a run's folder or a device.

A tensor is taken by its name from wherever the method keeps it: among the client's own, or in the
global state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from device_profiles.errors import InputError
from device_profiles.modules import (
    PLACEMENTS,
    adapter_tensors,
    first_lora_sites,
    lora_sites,
    lora_tensors,
)
from edge_client.export.run_files import find_client, finished_round, read_run
from edge_client.state import ClientState, StateStore, personal_copy
from messaging.layout import Tensors
from quantization.errors import BaseModelError
from quantization.identity import BaseIdentity, identify, require_gpt2

_ADAPTER = "adapters.0.attention.down.weight"
_FACTOR = ".lora_A.weight"
_NO_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True)
class Personal:
    """A client's model as its parts.

    Attributes:
        run: Name of its run, or an empty string where a device's folder does not say.
        method: Of the run, likewise.
        round: After which it is.
        adapter_size: Bottleneck size M; 0 for no adapters.
        placement: Of its LoRA modules.
        lora_rank: R; 0 for no LoRA modules.
        tensors: All of them, whoever holds them, by name.
        precision: In which the base was held in training; empty where nobody says.
        record: What ``run.json`` says of the client.
        settings: What ``config.toml`` says of the run.
        data_sha256: Of the examples that the run divided, if it had them all.
    """

    client: str
    run: str
    method: str
    round: int
    identity: BaseIdentity
    adapter_size: int
    placement: str
    lora_count: int
    lora_rank: int
    tensors: Tensors
    precision: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_sha256: str | None = None


def find_in_run(folder: Path, client: str, base: str | None = None) -> Personal:
    """Return a client's personal model after the newest finished round of an emulated run.

    Args:
        folder: The run's.
        client: Its id.
        base: Where the base is now, if not where the run found it.

    Raises:
        InputError: If there is no such run, round or client, a file is damaged, or the base or its
            tokenizer are not those of the run.
    """
    run = read_run(folder)
    record = find_client(run, client)
    number = finished_round(run)
    if not (folder / "clients").is_dir():
        raise InputError(
            f"{folder} is of a deployed run, whose devices keep their own part; export on the "
            "device: pwff export --state FOLDER --global FILE --base NAME --out DIR"
        )
    identity = _identify(base or run.model, given=base is not None)
    _check_hashes(identity, run.hashes, folder)
    state = StateStore(folder / "clients" / client).newest(before=number + 1)
    if state is None:
        raise InputError(
            f"client '{client}' of {folder} has trained no round, so it has nothing of its own; "
            "choose another client"
        )
    shared = _read_tensors(run.global_path(number)) if record["shared_parameters"] else {}
    count, size = int(record["lora_count"]), int(record["adapter_size"])
    personal = Personal(
        client=client,
        run=run.name,
        method=run.method,
        round=number,
        identity=identity,
        adapter_size=size if record["adapter_count"] else 0,
        placement=str(record["placement"]),
        lora_count=count,
        lora_rank=int(record["lora_rank"]) if count else 0,
        tensors=shared | state.personal | personal_copy(state),
        precision=str(record.get("precision", "")),
        record=record,
        settings=run.settings,
        data_sha256=run.data_sha256,
    )
    return _checked(personal, own=set(state.personal) | set(personal_copy(state)))


def find_on_device(state_folder: Path, shared: Path | None, base: str) -> Personal:
    """Return a device's personal model from its own state and a global state.

    Which modules there are is read off the tensors; that the base is the run's is not checked
    beyond their shapes, as neither file names it.

    Args:
        state_folder: Where the device keeps its states of one run.
        shared: ``shared.safetensors`` of a round; none where the method shares nothing.
        base: ``mini``, a folder or a hub id.

    Raises:
        InputError: If there is no state, a file is damaged, or the tensors do not fit the base.
    """
    state = StateStore(state_folder).newest(before=_NO_LIMIT)
    if state is None:
        raise InputError(
            f"{state_folder} holds no state of a device; give the folder of one run in what the "
            "device's configuration calls 'folder'"
        )
    tensors = _of_device(state, _read_tensors(shared) if shared is not None else {}, state_folder)
    identity = _identify(base, given=True)
    require_gpt2(identity, "a model from a device's folder")
    factors = {n.removesuffix(_FACTOR): t for n, t in tensors.items() if n.endswith(_FACTOR)}
    placement = next(
        (p for p in PLACEMENTS if set(factors) <= {s.path for s in lora_sites(identity.shape, p)}),
        None,
    )
    if placement is None:
        raise InputError(
            f"the LoRA modules in {state_folder} sit on no known places of {identity.name}, "
            f"'{sorted(factors)[0]}' for one; name the base that the device trained on with --base"
        )
    personal = Personal(
        client=state_folder.resolve().parent.name,
        run=state_folder.resolve().name,
        method="",
        round=state.round,
        identity=identity,
        adapter_size=len(tensors[_ADAPTER]) if _ADAPTER in tensors else 0,
        placement=placement,
        lora_count=len(factors),
        lora_rank=len(next(iter(factors.values()))) if factors else 0,
        tensors=tensors,
    )
    return _checked(personal, own=set(tensors))


def _of_device(state: ClientState, shared: Tensors, folder: Path) -> Tensors:
    """Return what the device trained: its moments name it, whoever holds the tensors.

    Where it keeps a copy of its own, that is its personal model, and nothing global is in it.
    """
    if copy := personal_copy(state):
        return copy
    if shared and not state.first_moments:
        raise InputError(
            f"the newest state in {folder} is of a stage that has not trained the model yet "
            f"('{state.stage}', round {state.round}); export again after a round of alignment"
        )
    tensors = {n: t for n, t in shared.items() if n in state.first_moments} | state.personal
    absent = sorted(set(state.first_moments) - set(tensors))
    if absent:
        raise InputError(
            f"the device of {folder} trained '{absent[0]}', which is neither its own nor in the "
            "global state that is given; give the run's shared.safetensors with --global"
        )
    return tensors


def _checked(personal: Personal, own: set[str]) -> Personal:
    """Return it with exactly the tensors that its modules have.

    A global state may hold LoRA modules that this client has not; its own may not.
    """
    shape = personal.identity.shape
    sites = first_lora_sites(shape, personal.placement, personal.lora_count)
    wanted = {t.name: t.shape for t in lora_tensors(sites, personal.lora_rank)}
    if personal.adapter_size:
        wanted |= {t.name: t.shape for t in adapter_tensors(shape, personal.adapter_size)}
    found = personal.tensors
    absent = sorted(set(wanted) - set(found))
    if absent:
        raise InputError(
            f"the model of '{personal.client}' lacks {len(absent)} of its {len(wanted)} tensors, "
            f"'{absent[0]}' for one: the state that it is kept in is damaged"
        )
    strangers = sorted(own - set(wanted))
    if strangers:
        raise InputError(
            f"the state of '{personal.client}' holds '{strangers[0]}', which is of no module that "
            "it has; it is of another run"
        )
    for name, expected in wanted.items():
        if found[name].shape != expected:
            raise InputError(
                f"'{name}' of '{personal.client}' has shape {found[name].shape} where the base "
                f"{personal.identity.name} has {expected}; name the base that it was trained on "
                "with --base"
            )
        if not np.isfinite(found[name]).all():
            raise InputError(
                f"'{name}' of '{personal.client}' holds a value that is not finite: its training "
                "diverged, or the state is damaged"
            )
    kept = {name: found[name] for name in wanted}
    return replace(personal, tensors=kept)


def _identify(base: str, *, given: bool) -> BaseIdentity:
    try:
        return identify(base)
    except BaseModelError as err:
        if given:
            raise
        raise BaseModelError(f"{err}; if the base has moved, name it with --base") from err


def _check_hashes(identity: BaseIdentity, hashes: Mapping[str, str], folder: Path) -> None:
    pairs = {"base": identity.sha256, "tokenizer": identity.tokenizer_sha256}
    for kind, now in pairs.items():
        if now != hashes[kind]:
            raise InputError(
                f"the {kind} of {identity.name} is not the one of the run in {folder} (SHA-256 "
                f"{now[:12]}, the run's is {hashes[kind][:12]}); name the right one with --base"
            )


def _read_tensors(path: Path) -> Tensors:
    try:
        tensors: Tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as err:
        raise InputError(f"{path} is missing or damaged: the global state is needed") from err
    return tensors
