"""What a run may ask its devices to hold back, and who is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_aggregator.emulation.fleet import stage_plans
from cloud_aggregator.experiment import Experiment, load_experiment
from cloud_aggregator.restraint import RestraintSettings
from cloud_aggregator.service_config import load_service
from device_profiles.errors import InputError
from messaging.layout import Layout, TensorSpec
from messaging.protocol import Task

LAYOUT = Layout((TensorSpec(name="w", shape=(2,), scale_axis=None),))
GIVEN = {
    "proximal": 0.1,
    "lora_dropout": 0.2,
    "weight_decay": 0.3,
    "stopping_patience": 4,
    "validation_share": 0.5,
    "validation_every": 6,
}


def refusal(**options: object) -> str:
    with pytest.raises(InputError) as told:
        load_experiment(None, options)
    return str(told.value)


def test_nothing_is_held_back_unless_it_is_asked_for() -> None:
    assert Experiment().restraint == RestraintSettings()
    plain = RestraintSettings().model_dump()
    assert {name: plain[name] for name in GIVEN if not name.startswith("validation")} == {
        "proximal": 0, "lora_dropout": 0, "weight_decay": 0, "stopping_patience": 0
    }  # fmt: skip


def test_a_restraint_is_a_tasks_fields_by_their_names() -> None:
    asked = set(RestraintSettings.model_fields)
    assert asked == set(GIVEN)
    assert asked <= set(Task.model_fields)
    assert Experiment(**GIVEN).restraint.model_dump() == GIVEN  # type: ignore[arg-type]


def test_instruction_tuning_is_held_back_and_no_other_stage() -> None:
    held = {**GIVEN, "proximal": 0.0}
    experiment = load_experiment(None, {**held, "stages": "instruction,reward"})
    first, second = stage_plans(experiment, {"instruction": LAYOUT, "reward": LAYOUT})
    assert first.restraint.model_dump() == held
    assert second.restraint == RestraintSettings()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "local-only", "proximal": 0.1}, "the method 'local-only' shares nothing"),
        (
            {"stages": "instruction,reward", "proximal": 0.1},
            "proximal = 0.1 makes a personal copy, which no later stage goes on from",
        ),
        (
            {"stages": "reward", "weight_decay": 0.1},
            "weight_decay = 0.1 holds instruction tuning back, which is not among the stages",
        ),
        ({"clients": 1, "others_sample": 5}, "others_sample = 5 of one client"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
        ({"validation_share": 0.0}, "validation_share = 0.0"),
        ({"stopping_patience": -1}, "stopping_patience = -1"),
    ],
)
def test_what_a_run_has_no_use_for_is_refused(options: dict[str, object], words: str) -> None:
    assert words in refusal(**options)


def test_a_service_has_it_in_a_section(tmp_path: Path) -> None:
    path = tmp_path / "cloud.toml"
    text = 'run = "r"\nbroker = "mqtt://127.0.0.1"\nout = "x"\nclients = 3\n'
    path.write_text(f"{text}[restraint]\nproximal = 0.5\nlora_dropout = 0.1\n")
    assert load_service(path).restraint == RestraintSettings(proximal=0.5, lora_dropout=0.1)
    path.write_text(f'{text}method = "local-only"\n[restraint]\nproximal = 0.5\n')
    with pytest.raises(InputError, match="shares nothing"):
        load_service(path)
