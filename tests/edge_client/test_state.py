"""What a device keeps between rounds: round trips, what is dropped, and what a crash leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from device_profiles.errors import InputError
from edge_client import disk
from edge_client.state import ClientState, StateStore, _flat, entering, settled
from messaging.protocol import Outcome, Stage


def a_state(round_: int = 3, **changes: Any) -> ClientState:
    """Return a state whose tensors say which round they are of."""
    fields: dict[str, Any] = {
        "round": round_,
        "personal": {"a.lora_A.weight": np.full((2, 3), round_, np.float32)},
        "first_moments": {"a.lora_A.weight": np.array([[0.5, -1.5]], np.float32)},
        "second_moments": {"a.lora_A.weight": np.array([[1e-30, 2.0]], np.float32)},
        "steps": 12,
    }
    return ClientState(**{**fields, **changes})


VECTOR = np.array([1.0, -2.0, 3.5], np.float32)
OTHER = np.array([0.0, 7.0, 0.25], np.float32)


def assert_same(one: ClientState, other: ClientState) -> None:
    """Compare every field bit by bit."""
    assert (one.round, one.stage, one.steps) == (other.round, other.stage, other.steps)
    assert one.numbers == other.numbers
    for field in ("personal", "first_moments", "second_moments", "extra"):
        left, right = getattr(one, field), getattr(other, field)
        assert set(left) == set(right)
        assert all(left[n].dtype == np.float32 for n in left)
        assert all(np.array_equal(left[n], right[n]) for n in left)
    for field in ("residual", "pending"):
        left, right = getattr(one, field), getattr(other, field)
        assert (left is None) == (right is None)
        assert left is None or np.array_equal(left, right)


@pytest.mark.parametrize("residual", [None, VECTOR])
@pytest.mark.parametrize("pending", [None, OTHER])
def test_a_state_comes_back_as_it_was(tmp_path: Path, residual: Any, pending: Any) -> None:
    state = a_state(residual=residual, pending=pending)
    StateStore(tmp_path / "new" / "folder").save(state)
    assert_same(StateStore(tmp_path / "new" / "folder").load(3), state)


@pytest.mark.parametrize("stage", ["instruction", "reward", "alignment"])
def test_what_a_stage_keeps_comes_back_as_it_was(tmp_path: Path, stage: Stage) -> None:
    extra = {
        "critic/helpfulness/value/reward.helpfulness.inner.weight": np.ones((2, 3), np.float32),
        "critic/helpfulness/m/reward.helpfulness.inner.weight": np.zeros((2, 3), np.float32),
    }
    numbers = {"kl": 0.1 + 0.2, "kl_coefficient": 1e-300, "critic_steps_helpfulness": 16.0}
    state = a_state(stage=stage, extra=extra, numbers=numbers)
    StateStore(tmp_path).save(state)
    assert_same(StateStore(tmp_path).load(3), state)


def test_a_stage_begins_with_the_modules_alone() -> None:
    state = a_state(residual=VECTOR, pending=OTHER, extra={"other": VECTOR}, numbers={"kl": 2.0})
    assert entering(state, "instruction") is state
    begun = entering(state, "reward")
    assert_same(begun, ClientState(round=3, stage="reward", personal=state.personal))
    assert_same(
        entering(begun, "alignment"),
        ClientState(round=3, stage="alignment", personal=state.personal),
    )


# -- the policy of stage 1 -------------------------------------------------------------------------


def test_the_policy_of_stage_1_is_kept_beside_the_states(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "new" / "folder")
    assert store.reference() is None
    store.keep_reference(VECTOR)
    for round_ in (4, 5, 6):
        store.save(a_state(round_, stage="alignment"))
    kept = StateStore(tmp_path / "new" / "folder").reference()
    assert kept is not None
    assert kept.dtype == np.float32
    assert np.array_equal(kept, VECTOR)
    assert store.rounds() == [5, 6]


@pytest.mark.parametrize("stage", ["instruction", "reward"])
def test_a_run_that_goes_back_behind_alignment_loses_the_policy_of_stage_1(
    tmp_path: Path, stage: Stage
) -> None:
    store = StateStore(tmp_path)
    store.save(a_state(3, stage="reward"))
    store.keep_reference(VECTOR)
    store.save(a_state(4, stage="alignment"))
    store.save(a_state(2, stage=stage))
    assert store.reference() is None


def test_a_tensor_that_is_a_view_is_kept_with_its_own_values(tmp_path: Path) -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    store = StateStore(tmp_path)
    store.save(a_state(personal={"a": turned}))
    assert np.array_equal(store.load(3).personal["a"], turned)


def test_tensors_of_a_kind_are_one_flat_array_in_a_file(tmp_path: Path) -> None:
    vector = np.arange(20, dtype=np.float32)
    parts = {"b": vector[2:8].reshape(2, 3), "a": vector[8:9], "none": vector[9:9], "c": vector[9:]}
    apart = {"x": vector[:4], "y": vector[5:9]}
    extra = {"ditto/b": vector[:3], "ditto-m/b": vector[3:6], "critic/value/w": vector[6:]}
    state = a_state(personal=parts, first_moments=apart, second_moments={}, extra=extra)
    StateStore(tmp_path).save(state)
    flat = load_file(tmp_path / "state-000003.safetensors")
    assert set(flat) == {"personal", "m", "extra/ditto", "extra/ditto-m", "extra/critic/value"}
    assert np.array_equal(flat["personal"], vector[2:])
    assert np.array_equal(flat["m"], np.delete(vector[:9], 4))
    kept = StateStore(tmp_path).load(3)
    assert_same(kept, state)
    assert list(kept.personal) == list(parts)
    assert {id(t.base) for t in kept.personal.values()} == {id(kept.personal["b"].base)}


def test_what_lies_in_one_run_of_memory_is_written_without_a_copy() -> None:
    vector = np.arange(20, dtype=np.float32)
    assert np.shares_memory(_flat({"a": vector[3:5], "b": vector[5:11].reshape(3, 2)}), vector)
    for apart in ({"a": vector[3:5], "b": vector[6:8]}, {"b": vector[5:7], "a": vector[3:5]}):
        assert not np.shares_memory(_flat(apart), vector)


def test_the_newest_state_before_a_round_is_found(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    assert store.newest(before=1) is None
    store.save(a_state(1))
    store.save(a_state(2))
    found = [store.newest(before=r) for r in (1, 2, 3, 9)]
    assert [s.round if s else None for s in found] == [None, 1, 2, 2]


@pytest.mark.parametrize(
    ("saved", "kept"),
    [
        ([1], [1]),
        ([1, 2, 3, 4], [3, 4]),
        ([1, 5], [1, 5]),  # rounds 2 to 4 went without this device
        ([1, 5, 12], [5, 12]),
        ([4, 5, 5], [4, 5]),  # round 5 was asked for again
        ([4, 5, 4], [4]),  # the run went back to round 4: round 5 never was
        ([8, 9, 1], [1]),  # and here to its beginning
        ([999_999, 1_000_000], [999_999, 1_000_000]),
    ],
)
def test_a_state_and_the_one_before_it_are_kept(
    tmp_path: Path, saved: list[int], kept: list[int]
) -> None:
    store = StateStore(tmp_path)
    for round_ in saved:
        store.save(a_state(round_))
    assert store.rounds() == kept
    assert store.load(kept[-1]).personal["a.lora_A.weight"][0, 0] == kept[-1]


def test_a_round_that_is_asked_for_again_starts_from_the_state_before_it(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for round_ in (2, 7, 7):
        before = store.newest(before=round_)
        store.save(a_state(round_, steps=(before.steps if before else 0) + 5))
    assert store.load(7).steps == 10


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for name in ("state-old.safetensors", "notes.txt", "state-3.txt"):
        (tmp_path / name).write_text("mine")
    for round_ in (1, 2, 3):
        store.save(a_state(round_))
    assert store.rounds() == [2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes.txt",
        "state-000002.safetensors",
        "state-000003.safetensors",
        "state-3.txt",
        "state-old.safetensors",
    ]


def test_a_write_that_is_broken_off_leaves_the_older_state_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StateStore(tmp_path)
    store.save(a_state(3))

    def full_disk(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            store.save(a_state(3, steps=99))
    assert [p.name for p in tmp_path.iterdir()] == ["state-000003.safetensors"]
    assert_same(store.load(3), a_state(3))


def said(without: str = "") -> str:
    """Return a header, perhaps without one of its entries."""
    shapes = {
        "personal": [["a.lora_A.weight", [2, 3]]],
        "m": [["a.lora_A.weight", [1, 2]]],
        "v": [["a.lora_A.weight", [1, 2]]],
    }
    header = {"round": 3, "stage": "instruction", "steps": 12, "numbers": {}, "tensors": shapes}
    return json.dumps({key: value for key, value in header.items() if key != without})


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    """Leave nothing of a file but its name."""
    path.write_bytes(b"")


def say_nothing(path: Path) -> None:
    """Take the header away."""
    save_file(load_file(path), path)


def say_too_little(path: Path) -> None:
    """Take the step count out of the header."""
    save_file(load_file(path), path, metadata={"pwff": said(without="steps")})


def say_a_list(path: Path) -> None:
    """Put something else in the header's place."""
    save_file(load_file(path), path, metadata={"pwff": "[3, 12]"})


def add_a_stranger(path: Path) -> None:
    """Add a tensor of no known group."""
    header = {"pwff": said()}
    save_file({**load_file(path), "other/a": VECTOR}, path, metadata=header)


def keep_less_than_is_named(path: Path) -> None:
    """Take a number away from a flat array."""
    flat = load_file(path)
    save_file({**flat, "personal": flat["personal"][:-1]}, path, metadata={"pwff": said()})


def keep_more_than_is_named(path: Path) -> None:
    """Add a number to a flat array."""
    flat = load_file(path)
    more = np.append(flat["personal"], np.float32(0))
    save_file({**flat, "personal": more}, path, metadata={"pwff": said()})


def keep_each_by_its_name(path: Path) -> None:
    """Write tensors as they are."""
    state = a_state()
    arrays = {f"personal/{name}": tensor for name, tensor in state.personal.items()}
    header = {k: v for k, v in json.loads(said()).items() if k != "tensors"}
    save_file(arrays, path, metadata={"pwff": json.dumps(header)})


def test_what_the_damages_keep_of_a_header_is_what_a_file_says(tmp_path: Path) -> None:
    StateStore(tmp_path).save(a_state(3))
    path = tmp_path / "state-000003.safetensors"
    save_file(load_file(path), path, metadata={"pwff": said()})
    assert_same(StateStore(tmp_path).load(3), a_state(3))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        empty,
        say_nothing,
        say_too_little,
        say_a_list,
        add_a_stranger,
        keep_less_than_is_named,
        keep_more_than_is_named,
    ],
)
def test_a_damaged_file_is_named_with_what_to_do_about_it(tmp_path: Path, damage: Any) -> None:
    store = StateStore(tmp_path)
    store.save(a_state(2))
    store.save(a_state(3))
    damage(tmp_path / "state-000003.safetensors")
    with pytest.raises(InputError, match=r"state-000003\.safetensors is damaged; remove it"):
        store.newest(before=4)
    (tmp_path / "state-000003.safetensors").unlink()
    found = store.newest(before=4)
    assert found is not None
    assert_same(found, a_state(2))


def test_a_state_of_an_earlier_version_is_not_called_damaged(tmp_path: Path) -> None:
    StateStore(tmp_path).save(a_state(3))
    keep_each_by_its_name(tmp_path / "state-000003.safetensors")
    with pytest.raises(InputError, match="is of an earlier version of pwff; finish the run with"):
        StateStore(tmp_path).newest(before=4)


def rename(path: Path) -> None:
    """Put the values under another name."""
    save_file({"other": load_file(path)["values"]}, path)


@pytest.mark.parametrize("damage", [cut, empty, rename])
def test_a_damaged_policy_of_stage_1_is_named(tmp_path: Path, damage: Any) -> None:
    store = StateStore(tmp_path)
    store.keep_reference(VECTOR)
    damage(tmp_path / "stage-1.safetensors")
    with pytest.raises(InputError, match=r"stage-1\.safetensors is damaged: .*start a new run"):
        store.reference()


@pytest.mark.parametrize(
    ("outcome", "residual"),
    [
        ("aggregated", OTHER),
        ("late", VECTOR),
        ("lost", VECTOR),
        ("rejected", VECTOR),
        ("skipped", VECTOR),
        ("none", VECTOR),
    ],
)
def test_the_new_residual_counts_only_if_the_update_was_aggregated(
    outcome: Outcome, residual: Any
) -> None:
    state = settled(a_state(residual=VECTOR, pending=OTHER), outcome)
    assert_same(state, a_state(residual=residual))


@pytest.mark.parametrize("outcome", ["aggregated", "lost"])
def test_a_state_with_nothing_pending_is_settled(outcome: Outcome) -> None:
    assert_same(settled(a_state(residual=VECTOR), outcome), a_state(residual=VECTOR))


def test_a_first_residual_that_was_not_aggregated_leaves_none() -> None:
    assert_same(settled(a_state(pending=OTHER), "late"), a_state())
