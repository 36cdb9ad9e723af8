"""An experiment from a file and options: what it may say, and what a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.experiment import HOW, Experiment, check_same, load_experiment, stored
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.service_config import AlignmentSection
from device_profiles.config_files import read_toml
from device_profiles.errors import InputError
from messaging.protocol import AlignmentSettings


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def refusal(path: Path | None = None, **options: Any) -> str:
    with pytest.raises(InputError) as told:
        load_experiment(path, options)
    return str(told.value)


def test_without_a_word_it_is_the_default_experiment() -> None:
    assert load_experiment(None, {}) == Experiment()


def test_options_go_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "clients = 4\nrounds = 5\n")
    chosen = load_experiment(path, {"rounds": "7"})
    assert (chosen.clients, chosen.rounds, chosen.local_steps) == (4, 7, Experiment().local_steps)


def test_each_algorithm_of_alignment_has_its_own_learning_rate_but_where_one_is_given() -> None:
    for name, rate in {"ppo": 3e-4, "rloo": 1e-3, "dpo": 3e-4}.items():
        section = AlignmentSection(settings=AlignmentSettings.model_validate({"algorithm": name}))
        found = load_experiment(None, {"algorithm": name}).alignment_learning_rate
        assert found == section.learning_rate == rate
    given = load_experiment(None, {"algorithm": "rloo", "alignment_learning_rate": 2e-4})
    assert given.alignment_learning_rate == 2e-4
    with pytest.raises(InputError, match="algorithm = 'reinforce'"):
        load_experiment(None, {"algorithm": "reinforce"})


def test_an_unknown_key_is_told_with_file_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "clients = 4\nlora_cuont = 12\n")
    said = refusal(path)
    assert str(path) in said
    assert "unknown key 'lora_cuont'; did you mean 'lora_count'?" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_rank", "eight"),
        ("lora_count", 12.5),
        ("adapter_size", 0),
        ("clients", 0),
        ("clients", 10_001),
        ("rounds", 0),
        ("seed", -1),
        ("seed", 2**31),
        ("alpha", 0),
        ("alpha", "nan"),
        ("alpha", "inf"),
        ("learning_rate", "nan"),
        ("quorum", 1.01),
        ("quorum", "nan"),
        ("deadline_seconds", 0),
        ("epsilon", "nan"),
        ("held_out_share", 1),
        ("codec", "int5"),
        ("reward_shares", "trunk"),
        ("channel", "wire"),
        ("priced_at", "gpt2-large"),
        ("priced_lora_rank", 7.5),
        ("engine", "spark"),
        ("chunk_bytes", 1023),
    ],
)
def test_a_value_out_of_its_bounds_is_told_with_key_and_value(key: str, value: object) -> None:
    said = refusal(**{key: value})
    assert f"options: {key} = {value!r}" in said


def test_what_a_reward_model_may_share_is_told_with_the_choices() -> None:
    said = refusal(reward_shares="trunk")
    assert said == "options: reward_shares = 'trunk': Input should be 'head', 'adapters' or 'all'"


def test_whole_trunks_are_of_this_machine() -> None:
    said = refusal(reward_shares="all", trunk_precision="fp32", engine="ray")
    assert "give engine local, or reward_shares = 'adapters'" in said


@pytest.mark.parametrize(
    ("key", "value", "nearest"), [("method", "pwf", "pwff"), ("placement", "qvk", "qkv")]
)
def test_an_unknown_name_is_told_with_the_nearest(key: str, value: str, nearest: str) -> None:
    assert f"unknown {'LoRA ' if key == 'placement' else ''}{key} '{value}'" in refusal(
        **{key: value}
    )
    assert f"did you mean '{nearest}'?" in refusal(**{key: value})


def test_responses_that_leave_no_room_for_a_prompt_are_refused_where_there_is_alignment() -> None:
    lengths = {"max_length": 64, "max_new_tokens": 63}
    assert load_experiment(None, lengths).max_new_tokens == 63  # nothing is answered in stage 1
    said = refusal(stages="instruction,reward,alignment", **lengths)
    assert "max_new_tokens = 63 leaves no room for a prompt in max_length = 64" in said


def test_lora_count_and_rank_may_be_given_or_left_to_the_devices() -> None:
    free = load_experiment(None, {})
    given = load_experiment(None, {"lora_count": 24, "lora_rank": 8})
    assert (free.lora_count, free.lora_rank) == (None, None)
    assert (given.lora_count, given.lora_rank) == (24, 8)


def test_costs_are_priced_at_a_shape_that_is_named_and_at_a_rank_only_with_it() -> None:
    assert load_experiment(None, {}).priced_at == "base"
    given = load_experiment(None, {"priced_at": "gpt2-small", "priced_lora_rank": 8})
    assert (given.priced_at, given.priced_lora_rank) == ("gpt2-small", 8)
    assert load_experiment(None, {"priced_at": "gpt2-small"}).priced_lora_rank is None
    for alone in ({"priced_lora_rank": 8}, {"priced_lora_rank": 8, "priced_at": "base"}):
        said = refusal(**alone)
        assert "priced_lora_rank = 8 with priced_at 'base'" in said
        assert "name another shape, or leave it out" in said


def test_memory_stays_in_one_process() -> None:
    assert "workers = 2" in refusal(transport="memory", workers=2)
    assert load_experiment(None, {"transport": "memory", "workers": 1}).workers == 1
    assert load_experiment(None, {"transport": "memory"}).workers == 0


def test_memory_has_no_broker() -> None:
    assert "leave one of them out" in refusal(transport="memory", broker="mqtt://127.0.0.1")


def test_two_seeds_of_a_method_do_not_share_topics() -> None:
    names = {load_experiment(None, {"seed": s, "method": m}).run_name
             for s in (0, 1) for m in ("pwff", "fedada")}  # fmt: skip
    kinds = {name.rsplit("-", 1)[0] for name in names}
    assert kinds == {"pwff-0", "pwff-1", "fedada-0", "fedada-1"}


def test_what_is_stored_is_the_experiment_again() -> None:
    chosen = load_experiment(None, {"seed": 3, "lora_count": 24, "alpha": 0.25})
    kept = stored(chosen)
    assert "lora_rank" not in kept  # TOML has no word for nothing
    assert load_experiment(None, kept) == chosen


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"local_steps": 13},
        {"lora_rank": 8},
        {"priced_at": "gpt2-small"},
        {"quorum": 0.5},
        {"reward_shares": "adapters"},
        {"threads": 2},
        {"chunk_bytes": 61_440},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_is_not_resumed_with_what_would_change_its_outcome(changes: dict[str, Any]) -> None:
    kept = stored(Experiment())
    key, value = next(iter(changes.items()))
    with pytest.raises(InputError, match="resume with its own settings") as told:
        check_same(kept, load_experiment(None, changes))
    assert f"{key} = {value!r}, but the run to resume has {kept.get(key)!r}" in str(told.value)


def test_a_setting_that_was_given_cannot_be_left_out() -> None:
    with pytest.raises(InputError, match="lora_rank = None, but the run to resume has 8"):
        check_same(stored(Experiment(lora_rank=8)), Experiment())


def test_how_a_run_is_done_may_change_when_it_is_resumed() -> None:
    changed = {"workers": 1, "transport": "memory", "broker_wait_seconds": 3.0, "rounds": 20}
    check_same(stored(Experiment()), load_experiment(None, changed))
    check_same(stored(Experiment()), Experiment(broker="mqtt://127.0.0.1:1883"))
    check_same(stored(Experiment()), Experiment(engine="ray", address="10.0.0.1:6379"))
    assert {*changed, "broker", "broker_port", "engine", "address", "features"} == HOW


def test_a_file_that_is_no_toml_is_told(tmp_path: Path) -> None:
    assert "is no valid TOML" in refusal(write(tmp_path, "clients = \n"))
    assert "cannot read" in refusal(tmp_path / "nowhere.toml")


def test_a_stored_experiment_survives_its_file(tmp_path: Path) -> None:
    chosen = load_experiment(None, {"seed": 3, "learning_rate": 1e-3})
    RunFolder(tmp_path).write_config({"experiment": stored(chosen)})
    kept = read_toml(tmp_path / "config.toml")["experiment"]
    check_same(kept, chosen)
    assert load_experiment(None, kept) == chosen


def test_a_brokers_password_is_not_kept() -> None:
    kept = stored(Experiment(broker="mqtt://someone:secret@localhost:1884"))
    assert kept["broker"] == "mqtt://localhost:1884"
    assert "secret" not in str(kept)


def test_a_port_of_the_embedded_broker_and_a_broker_exclude_each_other() -> None:
    with pytest.raises(InputError, match="broker_port"):
        load_experiment(None, {"broker": "mqtt://localhost", "broker_port": 1884})


def test_experiments_with_another_outcome_have_another_name() -> None:
    names = {Experiment(rounds=9, workers=2).run_name, Experiment().run_name}
    assert len(names) == 1
    assert Experiment(codec="int8").run_name not in names
