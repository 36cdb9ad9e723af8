"""What a run is: the plain values that the aggregator needs, not how devices train."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloud_aggregator.cohort import CohortRule
from cloud_aggregator.counting import Counting
from cloud_aggregator.presence import WhoIsThere
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.stages import StagePlan
from device_profiles.methods import ModuleShape
from messaging.claims import Claims
from messaging.protocol import Codec
from messaging.transfer import UploadLimits


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run.

    Attributes:
        run: Name; part of every topic.
        stages: In their order; at least one.
        binding: Hash of base, tokenizer and placement that a device must have.
        clients: How many devices the run waits for before it begins.
        minimum_clients: With how many it begins once ``gather_seconds`` have passed.
        virtual_time: Whether arrival is the devices' modelled time (emulation) or this clock's.
        patience_seconds: In emulation, how long the run waits for its own workers before it fails;
            in deployment, how long it waits for held-out results.
        known_clients: The only devices that may take part; without it, any that fits.
        cohort: Who trains in a round; without it every device (in deployment, that is there).
        refuses_hopeless_deadline: Whether a deadline that no client meets in the first round ends
            the run as a mistake, instead of rounds without an update.
        counting: Which updates count, and for how much.
        keep_states: Of each stage, the newest global states that stay; none keeps all.
        silence_seconds: In deployment, after how long without a word a device is taken for gone.
        claims: Where large updates and states lie; without it they travel in chunks.
        farewell_seconds: In deployment, how long the end is said to devices that have not left: a
            broker that falls just then has forgotten it.
        waits_for_channel: Whether an emulated upload waits for good coherence blocks.
        presence: In emulation, when devices are there; without it they always are.
    """

    run: str
    method: str
    seed: int
    modules: ModuleShape
    stages: tuple[StagePlan, ...]
    binding: str
    clients: int
    minimum_clients: int
    gather_seconds: float
    codec: Codec
    max_length: int
    chunk_bytes: int
    rules: RoundRules
    virtual_time: bool
    patience_seconds: float
    known_clients: frozenset[str] | None = None
    cohort: CohortRule | None = None
    waits_for_channel: bool = False
    presence: WhoIsThere | None = None
    refuses_hopeless_deadline: bool = False
    counting: Counting = field(default_factory=Counting)
    keep_states: int | None = None
    silence_seconds: float | None = None
    claims: Claims | None = None
    farewell_seconds: float = 0.0
    limits: UploadLimits = field(default_factory=UploadLimits)
