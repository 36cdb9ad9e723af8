"""What is asked of every engine; no engine pays for another's imports by reading it."""

from __future__ import annotations

from dataclasses import dataclass

ADAPTER_SIZE, LORA_COUNT, PLACEMENT, LEARNING_RATE, MAX_LENGTH = 10, 36, "qkv", 1e-3, 256
HELD_OUT_SHARE = 0.02


@dataclass(frozen=True)
class Job:
    """What is asked of each engine; every part of it reaches a child as JSON."""

    model: str
    clients: int
    rounds: int
    steps: int
    batch: int
    data: str
    seed: int = 0
