"""Where a run is: its stage, the state that it goes on from, and what is over.

It is recomputed from the record and the run's folder, so a run that goes on after a break is where
it would have been.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from cloud_aggregator.cohort import able
from cloud_aggregator.methods import find_method, initial_state
from cloud_aggregator.records import GlobalRound, RoundRecord, RunRecord
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.shelf import Shelf
from cloud_aggregator.stages import StagePlan, collapse, stage_end
from cloud_aggregator.summary import global_figures, reward_change
from device_profiles.errors import InputError
from messaging.layout import Vector, joint_sha256
from messaging.protocol import DeviceRecord, Outcome, Report, StateRef


class Course:
    """The course of one run through its stages.

    Args:
        settings: What the run is.
        record: Its record so far; read here, and added to by whoever does the rounds.
        folder: Where the global states are.

    Attributes:
        plan: Of the stage that the run is in.
        shelf: The stage's newest state, and those that devices may still ask for.
        layouts_sha256: Hash of the tensors that travel, of all stages.
        reward: The reward models that alignment scores by.
        reference: The shared part of the stage-1 policy.
    """

    def __init__(self, settings: RunSettings, record: RunRecord, folder: RunFolder) -> None:
        self.settings = settings
        self.record = record
        self.plan = settings.stages[0]
        self.shelf = Shelf(
            settings.run, self.plan.layout, folder, settings.chunk_bytes, settings.claims
        )
        self.layouts_sha256 = joint_sha256(plan.layout for plan in settings.stages)
        self.reward: StateRef | None = None
        self.reference: StateRef | None = None
        self._policy: tuple[Vector, int] | None = None  # that instruction tuning ended with

    def fit(self, largest_packet: int | None) -> bool:
        """Cut the global states for a broker; return whether references to them have changed."""
        if not self.shelf.fit(largest_packet):
            return False
        self.reward = self.shelf.current(self.reward)
        self.reference = self.shelf.current(self.reference)
        return True

    def check_order(self) -> None:
        """Refuse more rounds of a stage that a later one has been built on.

        Raises:
            InputError: Naming both stages.
        """
        begun = {r.stage for r in self.record.rounds} | {b.stage for b in self.record.before}
        for plan, after in itertools.pairwise(self.settings.stages):
            rounds = self._rounds_of(plan)
            if after.stage in begun and not stage_end(plan, rounds):
                raise InputError(
                    f"the stage '{plan.stage}' ended after {len(rounds)} rounds and "
                    f"'{after.stage}' has begun; {plan.rounds} rounds of it cannot be done any "
                    "more: give its rounds, epsilon and patience as they were, or start a new run"
                )

    def _rounds_of(self, plan: StagePlan) -> list[RoundRecord]:
        return [r for r in self.record.rounds if r.stage == plan.stage]

    @property
    def first_round(self) -> int:
        """Number of the first round of the stage."""
        return 1 + sum(r.stage != self.plan.stage for r in self.record.rounds)

    @property
    def must_measure_first(self) -> bool:
        """Whether the stage begins, and nothing has been measured on what it begins with."""
        stage = self.plan.stage
        return not self._rounds_of(self.plan) and all(b.stage != stage for b in self.record.before)

    def stop_reason(self) -> str:
        """Return why the stage is over; empty while it goes on."""
        if reason := stage_end(self.plan, self._rounds_of(self.plan)):
            return reason
        known = {device.id: device for device in self.record.clients}
        return "" if able(known, self.record.rounds) or not known else "batteries"

    @property
    def is_over(self) -> bool:
        """Whether every stage has ended: nothing is left to do but to say so."""
        return all(stage_end(plan, self._rounds_of(plan)) for plan in self.settings.stages)

    def enter(self, plan: StagePlan) -> None:
        """Begin a stage or go on with it: put its newest global state on the shelf.

        Raises:
            InputError: If that state is missing or damaged.
        """
        shelf = self.shelf
        if plan.stage == "alignment":
            self.reward = shelf.newest
        elif shelf.newest is not None and shelf.vector is not None:
            self._policy = (shelf.vector, shelf.newest.round)
        self.plan = plan
        shelf.enter(plan.layout)
        if plan.layout.specs:
            self._put_first(plan)
            private = self.settings.counting.privacy is not None
            moved = [r.round for r in self._rounds_of(plan) if private or r.moved]
            if newest := max(moved, default=0):
                shelf.put(shelf.load(newest), newest)

    def _put_first(self, plan: StagePlan) -> None:
        """Put the state on the shelf that a stage begins with; alignment needs it to its end."""
        settings, shelf = self.settings, self.shelf
        if plan.stage == "alignment" and self._policy is not None:
            shelf.put(*self._policy, keep=False)
        else:
            first = initial_state(
                plan.stage, find_method(settings.method), settings.modules, settings.seed
            )
            begins = [r.stage for r in self.record.rounds].count  # rounds of the stages before
            earlier = settings.stages[: settings.stages.index(plan)]
            number = sum(begins(other.stage) for other in earlier)
            shelf.put(plan.layout.pack(first), number, keep=number == 0)
        if plan.stage == "alignment":
            self.reference = shelf.newest
            for ref in (self.reward, self.reference):
                if ref is not None:
                    shelf.pin(ref)

    def prune(self) -> None:
        """Remove the global states that the run's policy does not keep.

        Of each stage the newest ``keep_states`` stay. The newest of every stage is what a run goes
        on from, what alignment scores by and begins with, and what an export reads.
        """
        most = self.settings.keep_states
        if most is None:
            return
        for plan in self.settings.stages:
            made = [r.round for r in self._rounds_of(plan)]
            there = [n for n in made if self.shelf.has(n)]
            for number in there[:-most]:
                self.shelf.remove(number)

    def weight(self, device: DeviceRecord) -> int:
        """Return by how much a device's update counts in this stage."""
        return device.preference_pairs if self.plan.stage == "reward" else device.examples

    @property
    def average(self) -> str:
        """Name of what this stage averages: tensors, or products of factors."""
        average = find_method(self.settings.method).average
        return average if self.plan.stage != "reward" else "tensors"

    def outcomes(self) -> dict[str, tuple[Outcome, int]]:
        """Return what became of each client's last update, and of which round it was.

        A client that has given none stands with the last round, of which it was no part.
        """
        told: dict[str, tuple[Outcome, int]] = {}
        for record in self.record.rounds:
            for client in record.clients:
                if client.status != "skipped" or told.get(client.id, ("skipped",))[0] == "skipped":
                    told[client.id] = (client.status, record.round)
        return told

    def verdict(
        self, devices: Mapping[str, DeviceRecord], reports: Mapping[str, Report]
    ) -> tuple[str, GlobalRound]:
        """Return why a round of alignment must be taken back, if it must, and its figures."""
        figures = global_figures(devices, reports)
        if self.plan.stage != "alignment":
            return "", figures
        return collapse(self.plan, reward_change(self.record, reports), figures), figures
