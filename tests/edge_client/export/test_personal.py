"""A personal model is found in a run's folder, or on a device."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file, save_file

from device_profiles.errors import InputError
from edge_client.export.personal import find_in_run, find_on_device
from edge_client.state import StateStore
from messaging.layout import Tensors
from tests.conftest import write_checkpoint
from tests.edge_client.export.conftest import (
    ADAPTER_SIZE,
    CLIENT,
    LORA_COUNT,
    METHODS,
    RANK,
    ROUND,
    MakeRun,
)

Trained = Callable[..., Tensors]


def same(found: Tensors, expected: Tensors) -> bool:
    return set(found) == set(expected) and all(
        np.array_equal(found[n], t) for n, t in expected.items()
    )


def change_record(run: Path, **changes: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **changes}))


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_found_whoever_holds_it(
    make_run: MakeRun, trained: Trained, method: str
) -> None:
    personal = find_in_run(make_run(method), CLIENT)
    assert same(personal.tensors, trained(method))
    assert (personal.round, personal.method, personal.run) == (ROUND, method, "trial")
    modules = METHODS[method][0]
    assert personal.adapter_size == (ADAPTER_SIZE if "adapters" in modules else 0)
    assert personal.lora_count == (LORA_COUNT if "lora" in modules else 0)


def test_a_round_that_made_no_state_has_the_one_before(make_run: MakeRun, trained: Trained) -> None:
    run = make_run()
    (run / "global" / str(ROUND)).rename(run / "global" / "1")
    shutil.rmtree(run / "global" / str(ROUND - 1))
    assert same(find_in_run(run, CLIENT).tensors, trained())


def test_an_unknown_client_is_told_with_the_nearest(make_run: MakeRun) -> None:
    with pytest.raises(InputError, match="'pi5-10'; did you mean 'pi5-01'"):
        find_in_run(make_run(), "pi5-10")


def test_a_client_that_never_trained_has_nothing_of_its_own(make_run: MakeRun) -> None:
    with pytest.raises(InputError, match=r"'laptop-02'.*trained no round"):
        find_in_run(make_run(), "laptop-02")


def test_a_run_without_a_finished_round_is_told(make_run: MakeRun) -> None:
    with pytest.raises(InputError, match=r"finished no round.*--resume"):
        find_in_run(make_run(rounds=[]), CLIENT)


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        find_in_run(tmp_path, CLIENT)


@pytest.mark.parametrize("content", ["{broken", '{"run": "x"}', "[]"])
def test_a_damaged_record_is_told(make_run: MakeRun, content: str) -> None:
    run = make_run()
    (run / "run.json").write_text(content)
    with pytest.raises(InputError, match="damaged"):
        find_in_run(run, CLIENT)


def test_keys_of_later_versions_are_passed_over(make_run: MakeRun, trained: Trained) -> None:
    run = make_run(weather="fine")
    assert same(find_in_run(run, CLIENT).tensors, trained())


@pytest.mark.parametrize(
    "path",
    [f"global/{ROUND}/shared.safetensors", f"clients/{CLIENT}/state-{ROUND:06d}.safetensors"],
)
def test_a_damaged_state_is_named(make_run: MakeRun, path: str) -> None:
    run = make_run()
    (run / path).write_bytes(b"\x08")
    with pytest.raises(InputError, match=path.rpartition("/")[2]):
        find_in_run(run, CLIENT)


def test_a_tensor_that_is_not_there_is_named(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "global" / str(ROUND) / "shared.safetensors"
    tensors = load_file(path)
    del tensors["adapters.4.mlp.up.weight"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"'adapters\.4\.mlp\.up\.weight'"):
        find_in_run(run, CLIENT)


def test_a_value_that_is_no_number_is_told(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "global" / str(ROUND) / "shared.safetensors"
    tensors = load_file(path)
    tensors["adapters.4.mlp.up.weight"][0, 0] = np.inf
    save_file(tensors, path)
    with pytest.raises(InputError, match="not finite"):
        find_in_run(run, CLIENT)


def test_state_of_other_modules_than_the_record_says_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    record = json.loads((run / "run.json").read_text())
    change_record(run, clients=[{**record["clients"][0], "lora_count": LORA_COUNT - 1}])
    with pytest.raises(InputError, match="of no module"):
        find_in_run(run, CLIENT)


@pytest.mark.parametrize("kind", ["base", "tokenizer"])
def test_another_base_or_tokenizer_than_the_run_s_is_refused(make_run: MakeRun, kind: str) -> None:
    run = make_run()
    key = "sha256" if kind == "base" else "tokenizer_sha256"
    record = json.loads((run / "run.json").read_text())
    change_record(run, model={**record["model"], key: "0" * 64})
    with pytest.raises(InputError, match=f"the {kind} of .* --base"):
        find_in_run(run, CLIENT)


def test_a_base_that_has_moved_is_found_where_it_is_said_to_be(
    make_run: MakeRun, trained: Trained, tiny_checkpoint: Path
) -> None:
    run = make_run()
    (run / "config.toml").write_text(tomli_w.dumps({"experiment": {"model": "./was-here"}}))
    with pytest.raises(InputError, match="if the base has moved, name it with --base"):
        find_in_run(run, CLIENT)
    assert same(find_in_run(run, CLIENT, str(tiny_checkpoint)).tensors, trained())


def test_a_deployed_run_says_where_its_personal_parts_are(make_run: MakeRun) -> None:
    run = make_run()
    shutil.rmtree(run / "clients")
    with pytest.raises(InputError, match="--state"):
        find_in_run(run, CLIENT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("placement", ["qkv", "wide"])
def test_on_a_device_the_modules_are_read_off_its_tensors(
    make_run: MakeRun, trained: Trained, tiny_checkpoint: Path, method: str, placement: str
) -> None:
    run = make_run(method, placement)
    state = run / "clients" / CLIENT
    (state / f"state-{ROUND + 1:06d}.safetensors").unlink()
    shared = run / "global" / str(ROUND) / "shared.safetensors"
    personal = find_on_device(state, shared if METHODS[method][1] else None, str(tiny_checkpoint))
    assert same(personal.tensors, trained(method, placement))
    assert personal.round == ROUND
    if "lora" in METHODS[method][0]:
        assert (personal.placement, personal.lora_count, personal.lora_rank) == (
            placement, LORA_COUNT, RANK,
        )  # fmt: skip


def test_on_a_device_a_global_state_that_is_left_out_is_missed(
    make_run: MakeRun, tiny_checkpoint: Path
) -> None:
    with pytest.raises(InputError, match="--global"):
        find_on_device(make_run() / "clients" / CLIENT, None, str(tiny_checkpoint))


def test_on_a_device_another_base_is_told_by_the_shapes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    other = write_checkpoint(tmp_path / "other", width=32)
    shared = run / "global" / str(ROUND) / "shared.safetensors"
    with pytest.raises(InputError, match=r"shape.*--base"):
        find_on_device(run / "clients" / CLIENT, shared, str(other))


def test_on_a_device_a_folder_without_a_state_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no state"):
        find_on_device(tmp_path, None, "mini")


def test_a_copy_that_is_kept_apart_is_the_personal_model_wherever_it_is_looked_for(
    make_run: MakeRun, trained: Trained, tiny_checkpoint: Path
) -> None:
    run = make_run()
    copy = {n: 3 * t for n, t in trained().items()}
    store = StateStore(run / "clients" / CLIENT)
    kept = store.load(ROUND)
    store.save(dataclasses.replace(kept, extra={f"ditto/{n}": t for n, t in copy.items()}))
    assert same(find_in_run(run, CLIENT).tensors, copy)
    on_device = find_on_device(run / "clients" / CLIENT, None, str(tiny_checkpoint))
    assert same(on_device.tensors, copy)
