"""Methods that share LoRA, over whole runs of a mixed fleet on a base of twelve blocks of width 16.

Adapters of size 4 hold 36 * (2*16*4 + 16 + 4) parameters, and a LoRA module of rank 2 on query, key
or value 2*(16 + 16). Updates are read off the spool while they lie there; what the mean must be is
computed from their bytes and the places that follow from these sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tomli_w
from safetensors import safe_open
from safetensors.numpy import load_file

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.experiment import load_experiment
from device_profiles.config_files import read_toml
from edge_client.state import StateStore
from tests.end_to_end.conftest import comparable, pwff, read_run

ADAPTERS, MODULE, FACTOR = 36 * 148, 64, 32
#: Every LoRA module in the order in which they are filled: the first 12 are the queries.
ORDER = [
    f"transformer.h.{block}.attn.c_attn.{part}"
    for part in ("query", "value", "key")
    for block in reversed(range(12))
]

Array = npt.NDArray[np.float64]


@dataclass
class Kept:
    """A run, and every update of it as (round, client) -> (examples, packed float32)."""

    folder: Path
    updates: dict[tuple[int, str], tuple[int, Array]] = field(default_factory=dict)

    def state(self, round_: int) -> dict[str, npt.NDArray[np.float32]]:
        """Return the global tensors after a round."""
        path = self.folder / "global" / str(round_) / "shared.safetensors"
        return dict(load_file(path)) if path.exists() else {}

    def counts(self) -> dict[str, int]:
        """Return how many LoRA modules each client holds."""
        return {c["id"]: c["lora_count"] for c in read_run(self.folder)["clients"]}


def read_update(path: Path) -> tuple[int, Array]:
    """Return examples and entries of an fp32 update, without the codec."""
    with safe_open(path, "numpy") as blob:
        header = json.loads(blob.metadata()["pwff"])
        assert header["codec"] == "fp32"
        return header["examples"], blob.get_tensor("packed").astype(np.float64)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Kept]:
    """Return what runs two rounds of a mixed fleet of four in this process, once for a method."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"Say {i}", "output": f"The number {i}."} for i in range(24)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    done: dict[str, Kept] = {}

    def make(method: str, *, again: bool = False, **options: Any) -> Kept:
        name = f"{method}-{again}-{sorted(options.items())}"
        if name in done:
            return done[name]
        kept = Kept(tmp_path_factory.mktemp(method) / "run")
        experiment = load_experiment(
            None,
            {
                "method": method,
                "model": str(tiny_checkpoint),
                "data": str(data),
                "partition": "dirichlet",  # so that the clients weigh differently
                "clients": 4,
                "rounds": 2,
                "local_steps": 2,
                "batch_size": 2,
                "learning_rate": 0.01,
                "max_length": 64,
                "adapter_size": 4,
                "transport": "memory",
                **options,
            },
        )

        def keep(event: str, **fields: Any) -> None:
            if event == "update" and fields["bytes"]:
                place = (fields["round"], fields["client"])
                path = kept.folder / "spool" / str(place[0]) / f"{place[1]}.safetensors"
                kept.updates[place] = read_update(path)

        record = emulate(experiment, kept.folder, notify=keep)
        assert record.status == "done"
        done[name] = kept
        return kept

    return make


def test_the_fleet_is_mixed_and_its_devices_weigh_differently(run: Callable[..., Kept]) -> None:
    """Without this the tests below would show little."""
    kept = run("vanilla-fl-own")
    assert len(set(kept.counts().values())) == 3
    assert len({examples for examples, _ in kept.updates.values()}) > 1


@pytest.mark.parametrize(("method", "adapters"), [("vanilla-fl-own", True), ("fedlora-own", False)])
def test_each_device_uploads_what_it_holds(
    method: str, adapters: bool, run: Callable[..., Kept]
) -> None:
    kept = run(method)
    counts = kept.counts()
    for round_ in read_run(kept.folder)["rounds"]:
        assert round_["accepted"] == sorted(counts)
        for client in round_["clients"]:
            own = adapters * ADAPTERS + counts[client["id"]] * MODULE
            assert client["upload_parameters"] == own
            # four bytes a parameter and headers: one of some 600 bytes, and 64 a chunk
            assert 0 < client["upload_bytes"] - 4 * own < 1000
            assert client["uplink_bits"] == 8 * client["upload_bytes"]


@pytest.mark.parametrize("method", ["vanilla-fl", "fedlora", "fedlora-product"])
def test_under_a_baseline_every_device_uploads_all(method: str, run: Callable[..., Kept]) -> None:
    kept = run(method)
    assert set(kept.counts().values()) == {36}
    adapters = ADAPTERS if method == "vanilla-fl" else 0
    uploads = [
        c["upload_parameters"] for r in read_run(kept.folder)["rounds"] for c in r["clients"]
    ]
    assert uploads == [adapters + 36 * MODULE] * 8


@pytest.mark.parametrize(
    ("method", "adapters", "lora"),
    [
        ("vanilla-fl-own", True, True),
        ("fedlora-product", False, True),
        ("pwff", True, False),
    ],
)
def test_what_is_shared_is_in_the_global_state_and_nothing_else(
    method: str, adapters: bool, lora: bool, run: Callable[..., Kept]
) -> None:
    wanted = (
        {f"{path}.lora_{factor}.weight" for path in ORDER for factor in "AB"} if lora else set()
    )
    kept = run(method)
    for round_ in (0, 1, 2):
        names = set(kept.state(round_))
        assert {n for n in names if not n.startswith("adapters.")} == wanted
        assert len(names) - len(wanted) == adapters * 144


def held(update: Array, module: int, start: int) -> tuple[Array, Array] | None:
    """Return the factors A (R, 16) and B (16, R) of a module in an update, if it holds them."""
    at = start + module * MODULE
    if at + MODULE > update.size:
        return None
    a, b = update[at : at + FACTOR], update[at + FACTOR : at + MODULE]
    return a.reshape(2, 16), b.reshape(16, 2)


@pytest.mark.parametrize(
    ("method", "start"), [("vanilla-fl-own", ADAPTERS), ("fedlora-own", 0), ("fedlora", 0)]
)
def test_a_global_factor_moves_by_the_mean_over_the_devices_that_hold_it(
    method: str, start: int, run: Callable[..., Kept]
) -> None:
    kept = run(method)
    counts = kept.counts()
    for round_ in (1, 2):
        before, after = kept.state(round_ - 1), kept.state(round_)
        for module, path in enumerate(ORDER):
            holders = [
                (examples, factors)
                for (at, _), (examples, update) in kept.updates.items()
                if at == round_ and (factors := held(update, module, start)) is not None
            ]
            assert len(holders) == sum(count > module for count in counts.values()) > 0
            weight = sum(examples for examples, _ in holders)
            for side, factor in enumerate("AB"):
                name = f"{path}.lora_{factor}.weight"
                mean = sum(n * factors[side] for n, factors in holders) / weight
                # the mean and the sum are rounded to float32, once each: of values below 1
                np.testing.assert_allclose(after[name], before[name] + mean, rtol=0, atol=1.2e-7)
                moved = np.abs(after[name] - before[name]).max()
                assert moved > 1e-4  # far above the tolerance


def test_adapters_are_averaged_over_all_devices_beside_them(run: Callable[..., Kept]) -> None:
    kept = run("vanilla-fl-own")
    weight = sum(n for (at, _), (n, _u) in kept.updates.items() if at == 1)
    mean = sum(n * u[:ADAPTERS] for (at, _), (n, u) in kept.updates.items() if at == 1) / weight
    before, after = (
        np.concatenate([t.reshape(-1) for t in adapters_in_order(kept.state(r))]) for r in (0, 1)
    )
    np.testing.assert_allclose(after, before + mean, rtol=0, atol=1.2e-7)  # as above


def adapters_in_order(state: dict[str, npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
    """Return the tensors of all adapters as they are packed."""
    return [
        state[f"adapters.{block}.{site}.{part}"]
        for block in range(12)
        for site in ("attention", "mlp", "block")
        for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    ]


def test_a_global_product_is_the_nearest_of_its_rank_to_the_mean_of_the_devices(
    run: Callable[..., Kept],
) -> None:
    kept = run("fedlora-product")
    lost: list[float] = []
    for round_ in (1, 2):
        before, after = kept.state(round_ - 1), kept.state(round_)
        for module, path in enumerate(ORDER):
            name_a, name_b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
            total, weight = np.zeros((16, 16)), 0
            for (at, _), (examples, update) in kept.updates.items():
                factors = held(update, module, 0)
                if at == round_ and factors is not None:
                    a, b = before[name_a] + factors[0], before[name_b] + factors[1]
                    total, weight = total + examples * (b @ a), weight + examples
            mean = total / weight
            values = np.sqrt(np.linalg.eigvalsh(mean @ mean.T).clip(0))[::-1]
            product = after[name_b].astype(np.float64) @ after[name_a].astype(np.float64)
            # Eckart and Young: the error is the tail. Products here are below 0.1, their factors
            # float32
            tail = np.sqrt(np.sum(values[2:] ** 2))
            assert np.linalg.norm(mean - product) == pytest.approx(tail, abs=1e-7)
            lost.append(tail)
    assert max(lost) > 1e-5  # far above the tolerance: the rank cuts something off


@pytest.mark.parametrize("method", ["vanilla-fl-own", "fedlora-product"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    method: str, run: Callable[..., Kept]
) -> None:
    first, again = run(method), run(method, again=True)
    assert comparable(again.folder) == comparable(first.folder)
    other = run(method, seed=1)
    assert comparable(other.folder)[1] != comparable(first.folder)[1]


def personal(kept: Kept) -> dict[str, set[str]]:
    """Return the names of the tensors that each client keeps, without its optimiser's."""
    folders = sorted((kept.folder / "clients").iterdir())
    return {folder.name: set(StateStore(folder).load(2).personal) for folder in folders}


def test_in_pwff_lora_stays_on_the_device_and_adapters_alone_travel(
    run: Callable[..., Kept],
) -> None:
    kept = run("pwff")
    rounds = read_run(kept.folder)["rounds"]
    assert {c["upload_parameters"] for r in rounds for c in r["clients"]} == {ADAPTERS}
    counts = kept.counts()
    assert len(set(counts.values())) == 3
    for client, names in personal(kept).items():
        own = ORDER[: counts[client]]
        assert names == {f"{path}.lora_{factor}.weight" for path in own for factor in "AB"}


def test_where_lora_is_shared_none_stays_on_the_device(run: Callable[..., Kept]) -> None:
    kept = run("vanilla-fl-own")
    assert personal(kept) == {client: set() for client in kept.counts()}


def test_alone_all_stays_on_the_device_and_nothing_is_uploaded(run: Callable[..., Kept]) -> None:
    kept = run("local-only")
    assert kept.updates == {}
    assert kept.state(0) == kept.state(2) == {}
    rounds = read_run(kept.folder)["rounds"]
    assert {(c["upload_parameters"], c["upload_bytes"], c["uplink_bits"], c["uplink_seconds"])
            for r in rounds for c in r["clients"]} == {(0, 0, 0, 0)}  # fmt: skip
    assert {len(names) for names in personal(kept).values()} == {
        144 + 2 * count for count in kept.counts().values()
    }


def test_priced_at_gpt2_small_a_run_learns_the_same_and_costs_more(
    run: Callable[..., Kept],
) -> None:
    plain = run("vanilla-fl-own")
    priced = run("vanilla-fl-own", priced_at="gpt2-small", priced_lora_rank=8)
    assert priced.state(2).keys() == plain.state(2).keys()
    assert all(np.array_equal(priced.state(2)[n], t) for n, t in plain.state(2).items())
    record, counts = read_run(priced.folder), priced.counts()
    assert record["model"]["layers"] == 12
    assert record["model"]["width"] == 16
    assert record["model"]["priced"] == {
        "name": "gpt2-small",
        "parameters": 124_439_808,
        "layers": 12,
        "width": 768,
        "lora_rank": 8,
    }
    assert read_run(plain.folder)["model"]["priced"] is None
    for client in record["rounds"][0]["clients"]:
        # adapters of size 4 and modules of rank 8 at width 768
        there = 36 * (2 * 768 * 4 + 768 + 4) + counts[client["id"]] * 8 * (768 + 768)
        assert 32 * there < client["uplink_bits"] < 1.002 * 32 * there
        assert client["upload_parameters"] == ADAPTERS + counts[client["id"]] * MODULE


@pytest.mark.broker
def test_over_mqtt_and_worker_processes_the_bits_are_the_same(
    run: Callable[..., Kept], broker: str, tmp_path: Path
) -> None:
    kept = run("vanilla-fl-own", priced_at="gpt2-small", priced_lora_rank=8)
    settings = read_toml(kept.folder / "config.toml")["experiment"]
    path, out = tmp_path / "experiment.toml", tmp_path / "run"
    path.write_text(tomli_w.dumps({**settings, "transport": "mqtt", "broker": broker}))
    done = pwff("emulate", str(path), "--workers", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(out) == comparable(kept.folder)
