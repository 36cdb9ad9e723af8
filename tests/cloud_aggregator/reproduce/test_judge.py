"""The judge: pairs that never mix, a worth that is measured, and policies found as they were."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.reproduce import states
from cloud_aggregator.reproduce.command import reproduce
from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.fig5.plan import Settings, plan
from cloud_aggregator.reproduce.folder import folder_of
from cloud_aggregator.reproduce.judge import client_prompts, divide
from cloud_aggregator.reproduce.judge_records import judged_run, read_judge
from cloud_aggregator.reproduce.rewards_command import carry_out
from cloud_aggregator.reproduce.states import moments
from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES, Objective
from edge_client.data.preferences import Pair, load_preferences
from edge_client.export.personal import Personal
from edge_client.reward.judge import halve
from tests.cloud_aggregator.reproduce.rewards import a_judge

WIDTH = 16  # of the tiny base
HOW = {"transport": "memory"}


def a_pair(prompt: str, number: int = 0, split: str | None = None) -> Pair:
    """Return a pair of a prompt."""
    return Pair.model_validate(
        {"instruction": prompt, "chosen": f"good {number}", "rejected": "bad", "split": split}
    )


def test_a_prompt_is_in_one_half_alone_whatever_its_objectives() -> None:
    sets: dict[Objective, list[Pair]] = {
        "helpfulness": [a_pair(f"Ask {n % 20}", n) for n in range(60)],
        "harmlessness": [a_pair(f"  ask {n}") for n in range(10, 40)],  # 10 of them are the same
    }
    halves = halve(sets)
    run, judge = ({p.prompt for own in h.values() for p in own} for h in (halves.run, halves.judge))
    assert not run & judge
    assert len(run | judge) == 40
    for name, pairs in sets.items():
        both = [*halves.run[name], *halves.judge[name]]
        assert sorted(p.model_dump_json() for p in both) == sorted(
            p.model_dump_json() for p in pairs
        )
    # 10 prompts of the one alone, 10 of both, 20 of the other: half of each
    assert len({p.prompt for p in halves.run["helpfulness"]}) == 10
    assert len({p.prompt for p in halves.run["harmlessness"]}) == 15


def test_each_half_has_as_much_of_each_side_of_a_split() -> None:
    pairs = [a_pair(f"Ask {n}", split="held_out" if n < 10 else "train") for n in range(50)]
    halves = halve({"helpfulness": pairs})
    for half in (halves.run, halves.judge):
        splits = [p.split for p in half["helpfulness"]]
        assert (splits.count("held_out"), splits.count("train")) == (5, 20)


def test_halves_of_other_data_are_not_written_over(tmp_path: Path) -> None:
    files = divide(tmp_path, dict.fromkeys(OBJECTIVES, "kit"))
    assert divide(tmp_path, dict.fromkeys(OBJECTIVES, "kit")) == files
    run, judge = (
        {p.prompt for p in load_preferences(str(tmp_path / "pairs" / name), "helpfulness").pairs}
        for name in ("helpfulness.jsonl", "judge-helpfulness.jsonl")
    )
    assert not run & judge
    assert len(run | judge) == 440  # the kit's prompts
    other = tmp_path / "other.jsonl"
    other.write_text("".join(a_pair(f"Ask {n}").model_dump_json() + "\n" for n in range(9)))
    with pytest.raises(InputError, match=r"helpfulness\.jsonl was made of other preference data"):
        divide(tmp_path, {"helpfulness": str(other), "harmlessness": "kit"})


@pytest.fixture
def settings(tmp_path: Path, tiny_checkpoint: Path) -> Settings:
    """Return a comparison of two clients on the tiny base, with small pairs."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"Name {n} after {n % 7}", "output": f"It is {n}"} for n in range(20)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    sources = {}
    for name in OBJECTIVES:
        path = tmp_path / f"{name}.jsonl"
        pairs = [a_pair(f"Is {n} {name}?", n).model_dump_json(exclude_none=True) for n in range(32)]
        path.write_text("\n".join(pairs))
        sources[name] = str(path)
    return Settings.model_validate(
        {
            "seeds": (0,), "rounds": (1, 1, 2), "local_steps": (1, 2, 1), "clients": 2,
            "rollouts": 2, "max_new_tokens": 4, "held_out_prompts": 3, "batch_size": 2,
            "model": str(tiny_checkpoint), "data": str(rows), "experiments": ("paper-literal",),
            "methods": ("pwff", "shepherd"), **sources,
        }
    )  # fmt: skip


def tensors_of(clients: Mapping[str, Personal]) -> dict[str, dict[str, bytes]]:
    """Return every client's tensors as bytes."""
    return {
        client: {name: np.ascontiguousarray(t).tobytes() for name, t in own.tensors.items()}
        for client, own in clients.items()
    }


def planned(settings: Settings, out: Path, **changes: object) -> PlannedRun:
    """Return the plan of PWFF."""
    files = divide(out, settings.sources)
    own = Settings.model_validate({**settings.model_dump(), "methods": ("pwff",), **changes})
    (run,) = plan(own, WIDTH, files, HOW)
    return run


@pytest.mark.slow
def test_policies_are_found_as_they_were_before_and_after_each_round(
    tmp_path: Path, settings: Settings
) -> None:
    """Shorter runs, which end where a longer one passes by, say what its policies were."""
    out = tmp_path / "out"
    found: dict[int, list[states.Moment]] = {}
    for rounds in (1, 2):
        run = planned(settings, out, rounds=(1, 1, rounds))
        folder = folder_of(out / str(rounds), run)
        emulate(run.experiment, folder.path, notify=states.watch(folder))
        found[rounds] = [*moments(folder.path)]
    alone = run.experiment.model_copy(
        update={"stages": "instruction", "rounds": [1], "local_steps": [1]}
    )
    emulate(alone, out / "alone")
    (stage_1,) = moments(out / "alone")

    assert [m.aligned for m in found[2]] == [0, 1, 2]
    assert tensors_of(found[2][0].clients) == tensors_of(stage_1.clients)
    assert tensors_of(found[2][1].clients) == tensors_of(found[1][1].clients)
    assert tensors_of(found[2][1].clients) != tensors_of(found[2][0].clients)
    assert tensors_of(found[2][1].clients) != tensors_of(found[2][2].clients)
    # both parts changed: what travels, and what stays
    changed = {
        name
        for name, values in tensors_of(found[2][2].clients)["pi5-00"].items()
        if values != tensors_of(found[2][1].clients)["pi5-00"][name]
    }
    assert any("adapters" in name for name in changed)
    assert any("lora" in name for name in changed)


@pytest.mark.slow
def test_the_command_does_and_judges_every_run_once(tmp_path: Path, settings: Settings) -> None:
    out = tmp_path / "fig5"
    arguments = [
        "fig5", "--out", str(out), "--quick", "--seeds", "0", "--transport", "memory",
        "--rounds", "1,1,1", "--local-steps", "1,2,1", "--clients", "2", "--rollouts", "2",
        "--batch-size", "2",
        "--max-new-tokens", "4", "--held-out-prompts", "3", "--model", settings.model,
        "--data", settings.data, "--helpfulness", settings.helpfulness,
        "--harmlessness", settings.harmlessness, "--experiments", "paper-literal",
        "--methods", "pwff,shepherd",
    ]  # fmt: skip
    done = CliRunner().invoke(reproduce, arguments)
    assert done.exception is None, done.output
    assert "run 2 of 2" in done.output
    judge = read_judge(out)
    assert judge is not None
    # 16 of 32 prompts are the judge's, three of them held out
    assert {h.learned_pairs + h.pairs for h in judge.heads.values()} == {16}
    files = sorted(out.glob("runs/*/judge.json"))
    assert len(files) == 2
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    again = CliRunner().invoke(reproduce, ["fig5", "--out", str(out), "--transport", "memory"])
    assert again.exception is None, again.output
    assert "2 of 2 runs are there already" in again.output
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before

    # another judge's word does not count: it is asked again, and says the same
    files[0].write_text(files[0].read_text().replace(judge.sha256, "0" * 64))
    small = {"rounds": (1, 1, 1), "local_steps": (1, 2, 1)}
    divided = {name: str((out / "pairs" / f"{name}.jsonl").resolve()) for name in OBJECTIVES}
    runs = plan(settings.model_copy(update=small), WIDTH, divided, HOW)
    carry_out(
        [r for r in runs if folder_of(out, r).path == files[0].parent],
        out,
        Console(file=io.StringIO()),
        name="fig5",
        model=settings.model,
    )
    assert files[0].read_bytes() == before[0][0]

    aligned, level = (judged_run(out, run) for run in runs)
    assert aligned is not None
    assert level is not None
    assert ([m.aligned for m in aligned.moments], [m.aligned for m in level.moments]) == (
        [0, 1],
        [0],
    )
    prompts = [client_prompts(out, run.experiment) for run in runs]
    assert prompts[0] == prompts[1]
    asked = {p.key for own in prompts[0].values() for p in own}
    learned = {
        p.prompt
        for name in OBJECTIVES
        for p in load_preferences(str(out / "pairs" / f"judge-{name}.jsonl"), name).pairs
    }
    assert not asked & learned


def test_a_judge_whose_heads_are_gone_is_not_asked(tmp_path: Path) -> None:
    a_judge(tmp_path)
    assert read_judge(tmp_path) is not None
    (tmp_path / "judge" / "heads.safetensors").write_bytes(b"others")
    with pytest.raises(InputError, match="missing or changed"):
        read_judge(tmp_path)
