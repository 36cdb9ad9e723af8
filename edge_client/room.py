"""Whether a device has the memory and the disk for what its configuration says."""

from __future__ import annotations

import logging
from dataclasses import replace

from device_profiles.families import GPT2
from device_profiles.methods import find_method
from edge_client.device_record import held_bytes
from edge_client.plain_memory import CountError, plain_memory
from edge_client.preflight import (
    check_disk,
    check_memory,
    client_memory,
    encoder_memory,
    free_memory,
    reward_memory,
    step_shape,
    whole_memory,
    whole_states,
)
from edge_client.service_config import Client
from messaging.protocol import DeviceRecord
from quantization.checkpoint import look_through
from quantization.encoder_identity import EncoderIdentity
from quantization.identity import BaseIdentity

log = logging.getLogger(__name__)

#: What an aggregator asks for if it says nothing else.
_USUAL_BATCH, _USUAL_LENGTH = 4, 256
_USUAL = f"training on {_USUAL_BATCH} examples of {_USUAL_LENGTH} tokens"
_FREE = "free memory on this device"


def check_room(
    client: Client,
    identity: BaseIdentity,
    device: DeviceRecord,
    encoder: EncoderIdentity | None,
) -> None:
    """Refuse, before the base is loaded, what this machine has no room for.

    Raises:
        NotEnoughMemoryError: If training on a usual batch would take more than is free.
        NotEnoughDiskError: If the states of whole reward models would.
    """
    if identity.shape.family != GPT2:
        _check_plain(client, identity, device)
        return
    shape = step_shape(
        identity,
        look_through(identity).heads,
        adapter_size=device.adapter_size,
        placement=client.placement,
        lora_rank=device.lora_rank,
    )
    precision = device.precision.removesuffix("-dynamic")
    usual = client_memory(
        shape,
        device.lora_count,
        batch_size=_USUAL_BATCH,
        max_length=_USUAL_LENGTH,
        precision=precision,
    )
    other = device.scoring and client.trunk_precision != device.precision
    needed = usual.total + (held_bytes(identity, client.trunk_precision) if other else 0)
    if device.scoring and client.reward_shares == "adapters":
        learning = reward_memory(
            replace(shape, adapter_size=client.adapter_size),
            max_length=_USUAL_LENGTH,
            precision=client.trunk_precision,
        )
        policy = usual.state + usual.before + (usual.base if other else 0)
        needed = max(needed, learning.total + policy)
    if device.scoring and client.reward_shares == "all":
        rewards = len(find_method(client.method).objectives)
        bare = replace(shape, adapter_size=0)
        learning_all = whole_memory(bare, identity.parameters, rewards, max_length=_USUAL_LENGTH)
        needed = max(needed, learning_all + usual.state + usual.before + usual.base)
    remedies = ["give precision = 'int8' or 'nf4'", "a smaller lora_count"]
    if client.reward_shares == "all" and device.scoring:
        remedies = ["give reward_shares = 'adapters' or 'head' here and in the run"]
    elif encoder is not None:
        needed += encoder_memory(encoder.parameters, encoder.width)
        remedies.append("reward_trunk = 'base' here and in the run")
    check_memory(
        needed,
        free_memory(),
        what=_USUAL,
        remedies=[*remedies, _FREE],
    )
    if device.scoring and client.reward_shares == "all":
        _check_disk(client, identity)


def _check_plain(client: Client, identity: BaseIdentity, device: DeviceRecord) -> None:
    """Refuse what a base of another family has no room for.

    Raises:
        NotEnoughMemoryError: If training on a usual batch would take more than is free.
    """
    free = free_memory()  # before the libraries are here, which are counted with the rest
    try:
        needed = plain_memory(
            identity,
            adapter_size=device.adapter_size,
            placement=client.placement,
            lora_count=device.lora_count,
            lora_rank=device.lora_rank,
            batch_size=_USUAL_BATCH,
            max_length=_USUAL_LENGTH,
        )
    except CountError as err:
        log.warning("what memory %s takes is not predicted (%s)", identity.name, err)
        return
    check_memory(
        needed.total,
        free,
        what=_USUAL,
        remedies=["give a smaller base", "a smaller lora_count", _FREE],
    )


def _check_disk(client: Client, identity: BaseIdentity) -> None:
    """Refuse a device whose disk would not take the states of whole reward models.

    Raises:
        NotEnoughDiskError: If they would take more than is free, whatever the run's codec is.
    """
    rewards = len(find_method(client.method).objectives)
    check_disk(
        whole_states(identity.parameters, rewards, lossy=False),
        client.place,
        what="what this device keeps of whole reward models",
        remedies=[
            "name a folder on a larger disk",
            "give reward_shares = 'adapters' or 'head' here and in the run",
        ],
    )
