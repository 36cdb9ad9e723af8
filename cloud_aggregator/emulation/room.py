"""Whether this machine has the memory and the disk for an emulated run."""

from __future__ import annotations

import logging
from dataclasses import replace

from cloud_aggregator.emulation.plan import Planned
from device_profiles.families import GPT2
from device_profiles.methods import find_method
from edge_client.device_record import held_bytes
from edge_client.plain_memory import CountError, plain_memory, plain_memory_apart
from edge_client.preflight import (
    check_disk,
    check_memory,
    client_memory,
    encoder_memory,
    fleet_bytes,
    free_memory,
    kept_states,
    reward_memory,
    step_shape,
    whole_memory,
    whole_states,
)
from quantization.checkpoint import look_through

log = logging.getLogger(__name__)

#: Of the aggregator, on the same machine, for each parameter that travels: its sums in float64, an
#: update and its bytes, and states. It counts where that is many.
_CLOUD_BYTES = 40


def check_room(planned: Planned) -> None:
    """Refuse, before any worker starts and anything is written, what there is no room for.

    Raises:
        NotEnoughMemoryError: If the workers would take more than is free.
        NotEnoughDiskError: If clients and rounds would keep more than is free.
    """
    _check_memory(planned)
    _check_disk(planned)


def _check_memory(planned: Planned) -> None:
    """Refuse, before any worker starts, a run that the system would stop for its memory.

    Raises:
        NotEnoughMemoryError: If the workers would take more than is free.
    """
    whole = planned.experiment.reward_shares == "all"
    quantised = planned.identity.shape.family == GPT2
    free = free_memory()  # before anything is imported that is counted with the rest
    try:
        needed = _needed(planned) if quantised else _plain(planned)
    except CountError as err:
        log.warning("what memory %s takes is not predicted (%s)", planned.identity.name, err)
        return
    check_memory(
        needed,
        free,
        what=f"{planned.workers} worker(s) on {planned.identity.name}",
        remedies=[
            *(["give --workers 1"] if planned.workers > 1 else []),
            *(["--reward-shares adapters or head"] if whole else []),
            *(["--reward-trunk base"] if planned.encoder is not None else []),
            "--precision int8 or nf4" if quantised else "a smaller --model",
            "a smaller --batch-size or --max-length",
        ],
    )


def _check_disk(planned: Planned) -> None:
    """Refuse, before anything is written, a run whose states the disk would not take.

    Raises:
        NotEnoughDiskError: If clients and rounds would keep more than is free.
    """
    experiment, fleet = planned.experiment, planned.fleet
    devices = [client.device for client in fleet.clients]
    lossy = experiment.codec != "fp32"
    clients = sum(
        kept_states(
            d.trainable_parameters, d.trainable_parameters - d.shared_parameters, lossy=lossy
        )
        for d in devices
    )
    whole = experiment.reward_shares == "all" and bool(fleet.clients[0].own.train)
    if whole:
        rewards = len(find_method(experiment.method).objectives)
        clients += len(devices) * whole_states(planned.identity.parameters, rewards, lossy=lossy)
    kept = experiment.keep_states or experiment.total_rounds
    states = sum(
        4 * layout.size * min(experiment.rounds_of(name), kept)
        for name, layout in fleet.layouts.items()
    )
    check_disk(
        clients + states,
        planned.folder.path,
        what=f"what {len(devices)} clients and {experiment.total_rounds} rounds keep",
        remedies=[
            "give --out on a larger disk",
            *(["--reward-shares adapters or head"] if whole else []),
            *(["--keep-states 1"] if kept > 1 else []),
            "fewer --clients",
            "a smaller --lora-rank",
        ],
    )


def _plain(planned: Planned) -> int:
    """Return what the workers take where the base is of another family, bytes.

    Weights are read, not mapped: each worker has its own.
    """
    modules, experiment = planned.fleet.modules, planned.experiment
    devices = [client.device for client in planned.fleet.clients]
    # with a transport in memory, this process has the libraries in any case
    count = plain_memory if experiment.transport == "memory" else plain_memory_apart
    one = count(
        planned.identity,
        adapter_size=max(device.adapter_size for device in devices),
        placement=modules.placement,
        lora_count=max(device.lora_count for device in devices),
        lora_rank=modules.lora_rank,
        batch_size=experiment.batch_size,
        max_length=experiment.max_length,
    )
    return planned.workers * one.total


def _needed(planned: Planned) -> int:
    """Return what the workers take at their peak, bytes; of whole trunks, the aggregator too."""
    experiment, fleet, workers = planned.experiment, planned.fleet, planned.workers
    shape = step_shape(
        planned.identity,
        look_through(planned.identity).heads,
        adapter_size=fleet.modules.adapter_size,
        placement=fleet.modules.placement,
        lora_rank=fleet.modules.lora_rank,
    )
    devices = [client.device for client in fleet.clients]
    worst = max(devices, key=lambda device: (device.lora_count, device.base_bytes))
    precision = worst.precision.removesuffix("-dynamic")
    one = client_memory(
        shape,
        worst.lora_count,
        batch_size=experiment.batch_size,
        max_length=experiment.max_length,
        precision=precision,
    )
    bases = {device.precision for device in devices}
    if fleet.clients[0].own.train:
        bases.add(experiment.trunk_precision)
    others = sum(held_bytes(planned.identity, p) for p in bases - {worst.precision})
    needed = fleet_bytes(one, workers, precision) + workers * others
    if fleet.clients[0].own.train and experiment.reward_shares == "adapters":
        trunk = experiment.trunk_precision
        learning = reward_memory(shape, max_length=experiment.max_length, precision=trunk)
        rest = sum(held_bytes(planned.identity, p) for p in bases - {trunk})
        policies = workers * (one.state + one.before + rest)
        needed = max(needed, fleet_bytes(learning, workers, trunk) + policies)
    if fleet.clients[0].own.train and experiment.reward_shares == "all":
        rewards = len(find_method(experiment.method).objectives)
        learning_all = whole_memory(
            replace(shape, adapter_size=0),
            planned.identity.parameters,
            rewards,
            max_length=experiment.max_length,
        )
        rest = sum(held_bytes(planned.identity, p) for p in bases)
        needed = max(needed, workers * (learning_all + one.state + one.before + rest))
        needed += _CLOUD_BYTES * fleet.layouts["reward"].size
    if planned.encoder is not None:
        needed += workers * encoder_memory(planned.encoder.parameters, planned.encoder.width)
    return needed
