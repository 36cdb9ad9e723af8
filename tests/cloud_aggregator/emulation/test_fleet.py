"""From an experiment to its clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_aggregator.emulation.fleet import FleetPlan, WorkerSpec, plan_fleet, preference_sources
from cloud_aggregator.experiment import Experiment
from device_profiles.errors import InputError
from device_profiles.modules import BaseShape
from edge_client.data.instructions import Dataset, Example
from edge_client.data.own_data import load_sources
from edge_client.device_record import link_of
from quantization.identity import BaseIdentity

SMALL = BaseShape(layers=12, width=768, inner=3072, vocabulary=50_257, positions=1024)


def identity(shape: BaseShape = SMALL) -> BaseIdentity:
    """Return a base that is described and not there."""
    return BaseIdentity(
        name="described",
        folder=Path("nowhere"),
        tokenizer_folder=Path("nowhere"),
        sha256="0" * 64,
        tokenizer_sha256="1" * 64,
        parameters=124_439_808,
        positions=1024,
        vocabulary=50_257,
        shape=shape,
    )


def a_plan(experiment: Experiment, base: BaseIdentity, data: Dataset) -> FleetPlan:
    """Return the fleet of an experiment, with the preference data that it names."""
    named = preference_sources(experiment)
    preferences = load_sources(named, experiment.prompts, seed=experiment.seed)
    return plan_fleet(experiment, base, data, preferences)


def dataset(rows: int = 200) -> Dataset:
    """Return rows in two categories."""
    examples = [
        Example(instruction=f"Say {i}", output=f"word {i}", category="ab"[i % 2])
        for i in range(rows)
    ]
    return Dataset(source="rows", examples=examples)


def test_the_mixed_fleet_of_ten_is_four_jetsons_three_pis_and_three_laptops() -> None:
    plan = a_plan(Experiment(), identity(), dataset())
    counts = sorted((c.device.profile, c.device.lora_count) for c in plan.clients)
    assert counts == (
        [("jetson-orin-nano-8gb", 24)] * 4
        + [("laptop-x86-cpu", 36)] * 3
        + [("raspberry-pi-5-8gb", 12)] * 3
    )


def test_trainable_parameters_are_adapters_and_as_many_lora_modules_as_the_device_has() -> None:
    plan = a_plan(Experiment(), identity(), dataset())
    # 36 adapters of 580,968 parameters in all, and 96 * (768 + 768) a LoRA module on q, k or v
    for client in plan.clients:
        expected = 580_968 + client.device.lora_count * 147_456
        assert client.device.trainable_parameters == expected
        assert client.device.shared_parameters == 580_968
        assert (client.device.lora_rank, client.device.lora_rank_rule) == (96, "proportional")


def test_a_rank_that_is_given_is_recorded_as_given() -> None:
    plan = a_plan(Experiment(lora_rank=8), identity(), dataset())
    assert {(c.device.lora_rank, c.device.lora_rank_rule) for c in plan.clients} == {(8, "given")}


def test_a_base_with_fewer_sites_than_a_device_affords_gives_it_all_of_them() -> None:
    shallow = BaseShape(layers=3, width=64, inner=256)  # nine sites of q, k and v
    plan = a_plan(Experiment(), identity(shallow), dataset())
    assert {c.device.lora_count for c in plan.clients} == {9}
    assert {c.device.adapter_count for c in plan.clients} == {9}


def test_a_count_that_is_given_and_does_not_fit_is_refused_with_what_there_is() -> None:
    shallow = BaseShape(layers=3, width=64, inner=256)
    with pytest.raises(InputError, match="9 sites"):
        a_plan(Experiment(lora_count=12), identity(shallow), dataset())
    with pytest.raises(InputError, match=r"adapter count 36.*9"):
        a_plan(Experiment(adapter_count=36), identity(shallow), dataset())


def test_methods_differ_in_what_is_trained_and_what_travels() -> None:
    fedada = a_plan(Experiment(method="fedada"), identity(), dataset()).clients[0].device
    alone = a_plan(Experiment(method="local-only"), identity(), dataset()).clients[0].device
    assert (fedada.lora_count, fedada.trainable_parameters) == (0, 580_968)
    assert (alone.adapter_count, alone.shared_parameters) == (36, 0)


#: The adapters of size 10 and a LoRA module of rank 8 on query, key or value, at GPT-2 small.
ADAPTERS, MODULE = 580_968, 8 * (768 + 768)


@pytest.mark.parametrize(
    ("method", "trained", "shared"),
    [
        ("vanilla-fl", lambda n: ADAPTERS + n * MODULE, lambda n: ADAPTERS + n * MODULE),
        ("vanilla-fl-own", lambda n: ADAPTERS + n * MODULE, lambda n: ADAPTERS + n * MODULE),
        ("fedlora", lambda n: n * MODULE, lambda n: n * MODULE),
        ("fedlora-own", lambda n: n * MODULE, lambda n: n * MODULE),
        ("fedlora-product", lambda n: n * MODULE, lambda n: n * MODULE),
        ("pwff", lambda n: ADAPTERS + n * MODULE, lambda _n: ADAPTERS),
        ("local-only", lambda n: ADAPTERS + n * MODULE, lambda _n: 0),
    ],
)
def test_each_device_trains_and_shares_what_its_method_and_count_say(
    method: str, trained: Callable[[int], int], shared: Callable[[int], int]
) -> None:
    plan = a_plan(Experiment(method=method, lora_rank=8), identity(), dataset())
    for device in (client.device for client in plan.clients):
        assert device.trainable_parameters == trained(device.lora_count)
        assert device.shared_parameters == shared(device.lora_count)
        assert device.adapter_count == (0 if method.startswith("fedlora") else 36)


@pytest.mark.parametrize("method", ["vanilla-fl", "fedlora", "fedlora-product"])
def test_the_baselines_hold_36_modules_on_every_device_whatever_its_profile(method: str) -> None:
    plan = a_plan(Experiment(method=method), identity(), dataset())
    assert len({client.device.profile for client in plan.clients}) == 3
    assert {client.device.lora_count for client in plan.clients} == {36}
    assert {client.device.shared_parameters for client in plan.clients} == {
        plan.layouts["instruction"].size
    }


@pytest.mark.parametrize("method", ["vanilla-fl-own", "fedlora-own", "pwff", "local-only"])
def test_the_others_hold_what_each_device_affords(method: str) -> None:
    plan = a_plan(Experiment(method=method), identity(), dataset())
    assert sorted(client.device.lora_count for client in plan.clients) == (
        [12] * 3 + [24] * 4 + [36] * 3
    )


def test_a_count_that_is_given_is_every_devices_under_every_method() -> None:
    for method in ("vanilla-fl", "fedlora-own", "pwff"):
        plan = a_plan(Experiment(method=method, lora_count=20), identity(), dataset())
        assert {client.device.lora_count for client in plan.clients} == {20}


# -- the shape that costs are computed on ---------------------------------------------------------

MINI = BaseShape(layers=12, width=128, inner=512)


def test_costs_are_the_bases_own_unless_another_shape_is_named() -> None:
    assert a_plan(Experiment(), identity(MINI), dataset()).priced is None


@pytest.mark.parametrize(("given", "rank"), [(None, 96), (8, 8)])
def test_priced_at_gpt2_small_the_rank_there_is_96_or_as_given(
    given: int | None, rank: int
) -> None:
    experiment = Experiment(lora_rank=1, priced_at="gpt2-small", priced_lora_rank=given)
    plan = a_plan(experiment, identity(MINI), dataset())
    assert plan.priced is not None
    assert (plan.priced.name, plan.priced.lora_rank) == ("gpt2-small", rank)
    assert (plan.priced.base, plan.priced.parameters) == (SMALL, 124_439_808)
    # what is learned stays what it was
    assert (plan.modules.base, plan.modules.lora_rank) == (MINI, 1)
    assert {client.device.lora_rank for client in plan.clients} == {1}
    assert plan.layouts == a_plan(Experiment(), identity(MINI), dataset()).layouts


def test_a_base_that_cannot_be_priced_so_is_refused() -> None:
    shallow = BaseShape(layers=3, width=64, inner=256)
    with pytest.raises(InputError, match="has 12 blocks and the base 3"):
        a_plan(Experiment(priced_at="gpt2-small"), identity(shallow), dataset())
    too_wide = Experiment(priced_at="gpt2-small", priced_lora_rank=769)
    with pytest.raises(InputError, match="LoRA rank 769; choose 1 to 768"):
        a_plan(too_wide, identity(MINI), dataset())


def test_a_worker_is_told_the_priced_shape_in_a_file() -> None:
    """A worker of its own process reads its specification as JSON."""
    experiment = Experiment(priced_at="gpt2-small", priced_lora_rank=8)
    plan = a_plan(experiment, identity(MINI), dataset())
    for priced in (plan.priced, None):
        spec = WorkerSpec(
            run="trial",
            run_folder="nowhere",
            features="nowhere",
            model="mini",
            binding="0" * 64,
            data="kit",
            data_sha256="0" * 64,
            stages=["instruction"],
            seed=0,
            preferences={},
            prompts=None,
            hashes={},
            trunk_precision="int8",
            placement="qkv",
            adapter_size=10,
            lora_rank=16,
            threads=1,
            chunk_bytes=122_880,
            method="pwff",
            priced=priced,
            clients=plan.clients,
        )
        assert WorkerSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_preference_that_is_given_is_every_users(weight: float) -> None:
    own = a_plan(Experiment(), identity(), dataset())
    assert len({c.device.preference.helpfulness for c in own.clients}) > 1
    plan = a_plan(Experiment(preference=weight), identity(), dataset())
    assert {
        (c.device.preference.helpfulness, c.device.preference.harmlessness) for c in plan.clients
    } == {(weight, 1 - weight)}
    assert [c.device.profile for c in plan.clients] == [c.device.profile for c in own.clients]


def test_every_example_is_with_one_client() -> None:
    plan = a_plan(Experiment(partition="iid"), identity(), dataset())
    held = [i for c in plan.clients for i in [*c.train, *c.held_out]]
    assert sorted(held) == list(range(200))
    assert all(c.device.examples == len(c.train) for c in plan.clients)


def test_links_are_the_papers_or_the_devices_own() -> None:
    paper = a_plan(Experiment(), identity(), dataset())
    assert {
        (link_of(c.device).snr_db, link_of(c.device).transmit_watts) for c in paper.clients
    } == {(5.0, 1.0)}
    own = a_plan(Experiment(channel="profile"), identity(), dataset())
    assert {link_of(c.device).snr_db for c in own.clients} == {2.0, 5.0, 10.0}


def test_the_same_seed_draws_the_same_fleet_and_another_seed_another() -> None:
    first, again, other = (
        a_plan(Experiment(seed=s), identity(), dataset()).clients for s in (0, 0, 1)
    )
    assert first == again
    assert first != other
