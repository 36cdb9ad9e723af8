"""One judge for all runs of a comparison: its half of the pairs, what it is worth, what it says.

Before the runs, ``pairs/`` gets a half of the preference pairs of each objective for the runs, and
another, of other prompts, for the judge. After a run its clients' models answer held-out prompts of
the runs' half, and ``judge.json`` beside ``run.json`` holds the judge's scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.numpy import load, save

from cloud_aggregator.experiment import Experiment
from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.folder import folder_of, record_of
from cloud_aggregator.reproduce.judge_records import (
    HeadWorth,
    JudgedClient,
    JudgedMoment,
    JudgedRun,
    JudgeRecord,
    heads_path,
    judged_run,
    read_judge,
    write_judge,
    write_judged,
)
from cloud_aggregator.reproduce.states import moments
from cloud_aggregator.run_folder import write_atomically
from device_profiles.errors import InputError
from device_profiles.fleet import draw_fleet, find_fleet
from device_profiles.methods import OBJECTIVES, Objective
from edge_client.data.own_data import load_sources
from edge_client.data.preferences import Pair, load_preferences
from edge_client.data.prompt_files import Prompt
from edge_client.export.personal import Personal
from quantization.identity import identify

if TYPE_CHECKING:
    from edge_client.peft.packed_model import PackedModel
    from edge_client.reward.judging import Heads, Judging

_TRUNK = "fp32"  # the runs' own reward models read it in int8


def divide(out: Path, sources: Mapping[Objective, str]) -> dict[Objective, str]:
    """Write both halves of the pairs below ``out``, and return the runs' files.

    Raises:
        InputError: If a source is not usable, or the folder holds halves of other data.
    """
    from edge_client.reward.judge import halve

    halves = halve({name: load_preferences(sources[name], name).pairs for name in OBJECTIVES})
    for name in OBJECTIVES:
        _write_once(_file(out, name), halves.run[name])
        _write_once(_file(out, name, "judge-"), halves.judge[name])
    return {name: str(_file(out, name).resolve()) for name in OBJECTIVES}


class Judge:
    """Learns once, below ``judge/``, and judges every run that is done.

    Args:
        out: The folder of the comparison, with both halves of the pairs.
        model: The base that learns, which is the judge's trunk too.
        threads: That it computes with.

    Raises:
        InputError: If the pairs are not usable.
        BaseModelError: If the base is not.
    """

    def __init__(self, out: Path, model: str, threads: int = 1) -> None:
        from edge_client.quiet import import_quietly
        from quantization.base_model import set_threads

        import_quietly()
        set_threads(threads)
        self._out = out
        self._identity = identify(model)
        self._judging: Judging | None = None
        self._heads: Heads | None = None
        self.record = read_judge(out) or self._learn()
        if self.record.base != self._identity.sha256:
            raise InputError(
                f"the judge in {out / 'judge'} reads another base than {self._identity.name}; put "
                "that base back, or start in another --out"
            )

    def judge(self, run: PlannedRun) -> None:
        """Write a run's ``judge.json``, unless this judge has judged all of its rounds.

        Raises:
            InputError: If a file of the run is damaged, or a client has no prompt.
        """
        record = record_of(self._out, run)
        if record is None or record.status != "done":
            return
        known = judged_run(self._out, run)
        if known and (known.judge, known.rounds) == (self.record.sha256, len(record.rounds)):
            return
        prompts = client_prompts(self._out, run.experiment)
        found = JudgedRun(
            judge=self.record.sha256,
            rounds=len(record.rounds),
            moments=[
                JudgedMoment(
                    aligned=moment.aligned,
                    round=moment.round,
                    clients=self._clients(run.experiment, moment.clients, prompts),
                )
                for moment in moments(folder_of(self._out, run).path)
            ],
        )
        write_judged(self._out, run, found)

    def _clients(
        self,
        experiment: Experiment,
        clients: Mapping[str, Personal],
        prompts: Mapping[str, Sequence[Prompt]],
    ) -> list[JudgedClient]:
        from edge_client.reward.judge import assess

        _, heads = self._ready()
        models: dict[str, PackedModel] = {}
        found = []
        for name, own in sorted(clients.items()):
            if own.precision not in models:
                models[own.precision] = self._model(clients.values(), own)
            model = models[own.precision]
            model.activate(own.lora_count)
            model.put(own.tensors)
            said = assess(heads, model, prompts[name], most_tokens=experiment.max_new_tokens)
            found.append(
                JudgedClient(
                    id=name,
                    responses=said.responses,
                    helpfulness=said.scores["helpfulness"],
                    harmlessness=said.scores["harmlessness"],
                    tokens=said.tokens,
                    ended=said.ended,
                )
            )
        return found

    def _model(self, clients: Collection[Personal], own: Personal) -> PackedModel:
        from edge_client.peft.packed_model import PackedModel
        from quantization.frozen_gpt2 import load_frozen

        judging, _ = self._ready()
        same = judging.base.precision == own.precision
        return PackedModel(
            judging.base if same else load_frozen(self._identity, own.precision),
            adapter_size=own.adapter_size,
            placement=own.placement,
            lora_count=max(each.lora_count for each in clients),
            lora_rank=max(1, own.lora_rank),
        )

    def _ready(self) -> tuple[Judging, Heads]:
        judging = self._trunk()
        if self._heads is None:
            content = heads_path(self._out).read_bytes()
            self._heads = judging.heads(load(content), OBJECTIVES)
        return judging, self._heads

    def _trunk(self) -> Judging:
        from edge_client.reward.judging import Judging
        from quantization.frozen_gpt2 import load_frozen

        if self._judging is None:
            self._judging = Judging(load_frozen(self._identity, _TRUNK))
        return self._judging

    def _learn(self) -> JudgeRecord:
        from edge_client.reward.judge import teach

        sets = {
            name: load_preferences(str(_file(self._out, name, "judge-")), name)
            for name in OBJECTIVES
        }
        taught = teach(self._trunk(), {name: data.pairs for name, data in sets.items()})
        content = save(taught.tensors)
        hashes = "".join(data.sha256 for data in sets.values())
        record = JudgeRecord(
            sha256=hashlib.sha256(content).hexdigest(),
            base=self._identity.sha256,
            pairs=hashlib.sha256(hashes.encode()).hexdigest(),
            run_pairs={
                name: len(load_preferences(str(_file(self._out, name)), name).pairs)
                for name in OBJECTIVES
            },
            heads={
                name: HeadWorth(
                    learned_pairs=taught.pairs[name],
                    pairs=figures.pairs,
                    accuracy=figures.accuracy,
                    longer_wins=figures.longer_wins,
                    calibration_error=figures.calibration_error,
                )
                for name, figures in taught.figures.items()
            },
        )
        write_judge(self._out, record, content)
        return record


def client_prompts(out: Path, experiment: Experiment) -> dict[str, list[Prompt]]:
    """Return the prompts that each client's model is judged by: the same for every method.

    They are of the client's held-out pairs of both objectives, whichever of them it learns.
    """
    files = {name: str(_file(out, name)) for name in OBJECTIVES}
    data = load_sources(files, None, seed=experiment.seed)
    places = data.divide(
        clients=experiment.clients,
        held_out_share=experiment.held_out_share,
        seed=experiment.seed,
    )
    devices = draw_fleet(find_fleet(experiment.fleet), experiment.clients, experiment.seed)
    return {
        device.id: data.own(own, [], []).held_out_prompts[: experiment.held_out_prompts]
        for device, own in zip(devices, places, strict=True)
    }


def _file(out: Path, objective: str, whose: str = "") -> Path:
    return out / "pairs" / f"{whose}{objective}.jsonl"


def _write_once(path: Path, pairs: Sequence[Pair]) -> None:
    content = "".join(f"{pair.model_dump_json(exclude_none=True)}\n" for pair in pairs).encode()
    if not path.exists():
        write_atomically(path, content)
    elif path.read_bytes() != content:
        raise InputError(
            f"{path} was made of other preference data than what is given now; give the same, or "
            "start in another --out"
        )
