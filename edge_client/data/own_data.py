"""What a client holds besides its instructions: preference pairs of its objectives, and prompts.

In emulation one set is divided among the clients; a device has a set of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from device_profiles.errors import InputError
from device_profiles.methods import Objective
from device_profiles.seeds import stream
from edge_client.data.instructions import Example
from edge_client.data.preferences import Pair, PreferenceData, load_preferences, partition_pairs
from edge_client.data.prompt_files import Prompt, load_prompts


class Places(BaseModel):
    """One client's share of the data that a run divides: places in it.

    Attributes:
        train: Pairs to learn from, by objective.
        held_out: Pairs to measure on, of other prompts.
        prompts: That alignment answers, of a file of prompts; none where the pairs' are taken.
        held_out_prompts: That it is measured on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: dict[Objective, tuple[int, ...]] = {}
    held_out: dict[Objective, tuple[int, ...]] = {}
    prompts: tuple[int, ...] | None = None
    held_out_prompts: tuple[int, ...] | None = None

    @property
    def training_pairs(self) -> int:
        """Of all objectives."""
        return sum(len(places) for places in self.train.values())


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """What one client learns from and is measured on.

    Attributes:
        pairs: To learn from, by objective; empty in a run without reward learning.
        held_out_pairs: To measure on.
        prompts: That alignment answers.
        held_out_prompts: That it is measured on.
        others: Held-out examples of other clients, to measure on.
    """

    examples: list[Example]
    held_out: list[Example]
    pairs: dict[Objective, list[Pair]] = field(default_factory=dict)
    held_out_pairs: dict[Objective, list[Pair]] = field(default_factory=dict)
    prompts: list[Prompt] = field(default_factory=list)
    held_out_prompts: list[Prompt] = field(default_factory=list)
    others: list[Example] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Preference pairs by objective, and prompts where a file of them is given."""

    sets: Mapping[Objective, PreferenceData]
    prompts: Sequence[Prompt] | None

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of what was read, by name."""
        hashes: dict[str, str] = {name: data.sha256 for name, data in self.sets.items()}
        if self.prompts is not None:
            digest = hashlib.sha256()
            for prompt in self.prompts:
                digest.update(prompt.model_dump_json().encode())
            hashes["prompts"] = digest.hexdigest()
        return hashes

    def divide(self, *, clients: int, held_out_share: float, seed: int) -> list[Places]:
        """Return each client's share; a prompt is on one client, and on one side of the split.

        Where the data carry a split, it is obeyed. The two objectives are divided each by itself.

        Raises:
            InputError: If there are too few prompts for so many clients, or only some of the data
                carry a split.
        """
        parts = {
            name: partition_pairs(
                data.pairs,
                clients=clients,
                held_out_share=held_out_share,
                seed=seed,
                objective=name,
            )
            for name, data in self.sets.items()
        }
        prompts = self._divide_prompts(clients, held_out_share, seed)
        return [
            Places(
                train={name: part[i].train for name, part in parts.items()},
                held_out={name: part[i].held_out for name, part in parts.items()},
                prompts=prompts[i][0] if prompts else None,
                held_out_prompts=prompts[i][1] if prompts else None,
            )
            for i in range(clients)
        ]

    def _divide_prompts(
        self, clients: int, held_out_share: float, seed: int
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        if self.prompts is None:
            return []
        count = len(self.prompts)
        order = [int(i) for i in stream(seed, "prompts").permutation(count)]
        marked = {i: self.prompts[i].split for i in order if self.prompts[i].split}
        if marked and len(marked) < count:
            raise InputError(
                f"{count - len(marked)} of {count} prompts carry no split and the others do; mark "
                "every prompt 'train' or 'held_out', or none"
            )
        if marked:
            apart = [i for i in order if marked[i] == "held_out"]
            asked = [i for i in order if marked[i] == "train"]
        else:
            size = min(max(clients, round(held_out_share * count)), max(0, count - clients))
            apart, asked = order[:size], order[size:]
        if min(len(apart), len(asked)) < clients:
            raise InputError(
                f"{clients} clients need at least {clients} prompts to answer and {clients} held "
                f"out, and the file has {len(asked)} and {len(apart)}; use fewer clients or more "
                "prompts"
            )
        return [
            (tuple(sorted(asked[i::clients])), tuple(sorted(apart[i::clients])))
            for i in range(clients)
        ]

    def own(
        self,
        places: Places,
        examples: list[Example],
        held_out: list[Example],
        others: list[Example] | None = None,
    ) -> OwnData:
        """Return what a client holds; its pairs' own prompts where no file of prompts is given."""
        pairs, apart = (
            {name: [self.sets[name].pairs[i] for i in chosen] for name, chosen in side.items()}
            for side in (places.train, places.held_out)
        )
        if self.prompts is not None:
            asked = [self.prompts[i] for i in places.prompts or ()]
            measured = [self.prompts[i] for i in places.held_out_prompts or ()]
        else:
            measured = _prompts_of(list(apart.values()))
            there = {prompt.key for prompt in measured}
            asked = [p for p in _prompts_of(list(pairs.values())) if p.key not in there]
        return OwnData(
            examples=examples,
            held_out=held_out,
            pairs=pairs,
            held_out_pairs=apart,
            prompts=asked,
            held_out_prompts=measured,
            others=others or [],
        )


def load_sources(
    sources: Mapping[Objective, str], prompts: str | None, *, seed: int
) -> Preferences:
    """Return the preference data that a run names.

    Raises:
        InputError: If a file is missing or malformed, or too many of its rows are broken.
        HubUnavailableError: If the hub does not answer.
    """
    sets = {name: load_preferences(source, name) for name, source in sources.items()}
    chosen = load_prompts(prompts, "helpfulness", seed).prompts if prompts and sets else None
    return Preferences(sets=sets, prompts=chosen)


def _prompts_of(sides: Sequence[list[Pair]]) -> list[Prompt]:
    """Return the prompts of some pairs, each once, the objectives by turns."""
    by_turns: dict[str, Prompt] = {}
    for i in range(max(map(len, sides), default=0)):
        for side in sides:
            if i < len(side):
                pair = side[i]
                by_turns.setdefault(
                    pair.prompt, Prompt(instruction=pair.instruction, input=pair.input)
                )
    return list(by_turns.values())
