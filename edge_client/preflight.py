"""Whether training will fit into memory and on the disk, asked before anything is loaded.

A process that takes more memory than there is is ended by the system without a word; a run whose
states do not fit stops in the middle. Bytes; what memory is free is read from Linux where it says
so, control groups included (a container's limit, a service's).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from device_profiles.errors import InputError
from device_profiles.reward_heads import PASS_TOKENS
from device_profiles.step_memory import StepMemory, evaluation_memory, in_process, training_memory
from device_profiles.step_model import Pass, StepShape
from quantization.identity import BaseIdentity

_STATES = ("state-*.safetensors", "shared.safetensors")  # of clients and of rounds
_TRANSFORMERS_BYTES = 180_000_000  # imported where a whole trunk learns or an encoder reads


class NotEnoughMemoryError(InputError):
    """Training would take more memory than is free."""


class NotEnoughDiskError(InputError):
    """What must be kept would take more than is free on the disk."""


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """What can still be had.

    Attributes:
        bytes: >= 0.
        source: What says so, in words.
    """

    bytes: int
    source: str


def check_memory(
    predicted_bytes: float, free: FreeMemory, *, what: str, remedies: Sequence[str]
) -> None:
    """Refuse what will not fit.

    Args:
        predicted_bytes: What it will take (``client_memory``, ``fleet_bytes``).
        free: What there is (``free_memory``).
        what: What is to be started, as the beginning of a sentence.
        remedies: What would help, the most helpful first.

    Raises:
        NotEnoughMemoryError: If it takes more than is free.
    """
    if predicted_bytes <= free.bytes:
        return
    raise NotEnoughMemoryError(
        f"{what} would take {predicted_bytes / 1e9:.2f} GB of memory (modelled), and "
        f"{free.bytes / 1e9:.2f} GB are free ({free.source}); {', or '.join(remedies)}"
    )


def check_disk(predicted_bytes: int, folder: Path, *, what: str, remedies: Sequence[str]) -> None:
    """Refuse what the disk will not take.

    Args:
        predicted_bytes: What is kept (``kept_states``, ``whole_states``).
        folder: Where; it need not be there yet, and the states that it holds are counted once.
        what: What is kept, as the beginning of a sentence.
        remedies: What would help, the most helpful first.

    Raises:
        NotEnoughDiskError: If it takes more than is free.
    """
    states = (path for name in _STATES for path in folder.rglob(name))
    held = sum(map(_size, states))
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if predicted_bytes - held > free:
        raise NotEnoughDiskError(
            f"{what} would take {(predicted_bytes - held) / 1e9:.2f} GB of disk (modelled), and "
            f"{free / 1e9:.2f} GB are free in {there}; {', or '.join(remedies)}"
        )


def kept_states(trainable: int, personal: int, *, lossy: bool) -> int:
    """Return what a client at least keeps after a round, bytes.

    That is its own modules, AdamW's two moments, and what a lossy codec left out; of two rounds:
    an aggregator that is started again may want the one before.

    Args:
        trainable: Parameters that it trains.
        personal: Those of them that never leave it.
        lossy: Whether the codec leaves something out.
    """
    return 2 * 4 * (personal + 2 * trainable + (trainable - personal if lossy else 0))


def whole_states(parameters: int, rewards: int, *, lossy: bool) -> int:
    """Return what a client keeps at most while whole trunks learn, bytes; estimated.

    Two states of two moments of each weight of each reward model and an update that is owed; with
    a lossy codec what it leaves out too, in three states. Measured with two reward models of 2.97
    million weights: 4.2 and 10.1 copies of each; with one at GPT-2 small's shape 4.2.

    Args:
        parameters: Weights of a trunk.
        rewards: Reward models of the method.
        lossy: Whether the codec leaves something out.
    """
    return 4 * parameters * rewards * (11 if lossy else 5)


def client_memory(
    shape: StepShape,
    lora_count: int,
    *,
    batch_size: int,
    max_length: int,
    precision: str = "fp32",
    checkpoint: bool = False,
) -> StepMemory:
    """Return what a process that trains and measures one client at a time takes at its peak.

    Args:
        shape: Base and modules.
        lora_count: The most that any of its clients trains.
        batch_size: Examples that go through at once, every one as long as ``max_length``.
        max_length: Tokens.
        precision: Of the base.
        checkpoint: Whether blocks are computed twice to keep less.
    """
    length = min(max_length, shape.positions)
    pass_ = Pass(examples=batch_size, tokens=length, response=length - 1)
    training = training_memory(shape, lora_count, pass_, precision=precision, checkpoint=checkpoint)
    held_out = evaluation_memory(shape, lora_count, pass_, precision=precision)
    return max(map(in_process, (training, held_out)), key=lambda memory: memory.total)


def reward_memory(shape: StepShape, *, max_length: int, precision: str) -> StepMemory:
    """Return what a process takes at its peak while a reward model learns through its trunk.

    That is where adapters on the trunk train. The loss of a language model, which is counted with
    the rest, is more than a head's.

    Args:
        shape: Trunk and adapters.
        max_length: Tokens of either side of a pair.
        precision: Of the trunk.
    """
    length = min(max_length, shape.positions)
    sides = max(2, PASS_TOKENS // length)
    pass_ = Pass(examples=sides, tokens=length, response=length - 1)
    return in_process(training_memory(shape, 0, pass_, precision=precision))


def whole_memory(shape: StepShape, parameters: int, rewards: int, *, max_length: int) -> int:
    """Return what a process takes at its peak while a whole trunk learns, bytes; estimated.

    That is fp32 copies of all weights: the base, the change, their sum, its gradient and two
    moments of the reward model at hand; of each reward model what came, what goes, the moments of
    before and after, the update, its bytes and what a lossy one leaves out; twice what the way back
    keeps of a step through a frozen trunk; and the library whose GPT-2 it is. Measured in a second
    round, two rewards, 42.3 million weights, torch 2.13: 4.50 GB in fp32 and 4.92 in int8.

    Args:
        shape: The trunk; it has no module on it.
        parameters: Its weights.
        rewards: Reward models of the method.
        max_length: Tokens of either side of a pair.
    """
    frozen = reward_memory(shape, max_length=max_length, precision="fp32")
    copies = 4 * parameters * (6 + 9 * rewards)
    passes = 2 * (frozen.kept + frozen.working) + frozen.holes
    return copies + passes + frozen.runtime + _TRANSFORMERS_BYTES


def encoder_memory(parameters: int, width: int) -> int:
    """Return what a process takes more because reward models read an encoder, bytes; estimated.

    Its weights in fp32, the library that computes it, and a batch of 16 texts of 512 tokens on its
    way through a layer: 17 numbers for each of a token's. Measured for MiniLM-L6 (22.7 million
    weights, width 384; torch 2.13): 0.48 GB more, as predicted.

    Args:
        parameters: Weights.
        width: Of the hidden states.
    """
    return 4 * parameters + _TRANSFORMERS_BYTES + 4 * 17 * 16 * 512 * width


def step_shape(
    identity: BaseIdentity, heads: int, *, adapter_size: int, placement: str, lora_rank: int
) -> StepShape:
    """Return a base and the modules on it, as predictions take them."""
    return StepShape(
        base=identity.shape,
        heads=heads,
        vocabulary=identity.vocabulary,
        positions=identity.positions,
        adapter_size=adapter_size,
        placement=placement,
        lora_rank=lora_rank,
    )


def fleet_bytes(worker: StepMemory, workers: int, precision: str) -> int:
    """Return what so many workers take together; a base in fp32 is one file that all map."""
    shared = worker.base if precision == "fp32" else 0
    return shared + workers * (worker.total - shared)


def free_memory(root: Path = Path("/")) -> FreeMemory:
    """Return what is free on this machine, and to this process.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    found = [_of_system(root)]
    for line in _lines(root / "proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            found += _of_groups(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            found += _of_groups(
                root / "sys/fs/cgroup/memory",
                path,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
    return min(found, key=lambda free: free.bytes)


def _of_system(root: Path) -> FreeMemory:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return FreeMemory(bytes=1024 * int(line.split()[1]), source="says the system")
    import psutil

    return FreeMemory(bytes=int(psutil.virtual_memory().available), source="says the system")


def _of_groups(mount: Path, path: str, limit_file: str, used_file: str) -> list[FreeMemory]:
    """Return what each control group that has a limit leaves, from the process's own upwards."""
    inner = mount / path.strip("/")
    found = []
    for folder in (inner, *inner.parents):
        if not folder.is_relative_to(mount):
            break
        limit = "".join(_lines(folder / limit_file))
        used = "".join(_lines(folder / used_file))
        if limit.isdecimal() and used.isdecimal():  # no limit: a word, or a number past all memory
            free = int(limit) - int(used) + _droppable(folder / "memory.stat")
            name = "/" + str(folder.relative_to(mount)).strip(".")
            found.append(
                FreeMemory(bytes=max(0, free), source=f"by the limit of control group {name}")
            )
    return found


def _droppable(stat: Path) -> int:
    """Return the file pages that a group would let go of before it refuses memory."""
    values = dict(line.split(" ", 1) for line in _lines(stat))
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # another process took it away
        return 0
