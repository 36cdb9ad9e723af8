"""What a private device keeps to itself: nothing of its data's size or results leaves it."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from device_profiles.errors import InputError
from device_profiles.link import PAPER_LINK
from device_profiles.methods import METHODS
from device_profiles.profile import find_profile
from edge_client.data.partition import Part
from edge_client.device_record import Modules, describe_device
from edge_client.local_client import Result
from edge_client.privacy import withheld, withheld_record, withheld_training, withholds
from edge_client.stage_work import Trained
from edge_client.state import ClientState
from messaging.protocol import AlignmentSettings, Costs, PairFigures, ResponseFigures
from quantization.identity import BaseIdentity
from tests.edge_client.conftest import ADAPTER_SIZE, RANK, a_device, a_task

FULL = Result(
    costs=Costs(download_bytes=9),
    examples=51,
    blob=b"update",
    spent={"training": 1.0},
    train_loss=1.5,
    eval_loss=2.5,
    eval_accuracy=0.25,
    pairs={
        "helpfulness": PairFigures(
            pairs=8, loss=0.5, accuracy=0.75, longer_wins=0.5, calibration_error=0.1
        )
    },
    responses=ResponseFigures(responses=3, scores={}, tokens=7.0, ended=1.0),
    url="file:///store/update",
    others_loss=2.75,
    others_accuracy=0.125,
    kept_steps=2,
)


def trained(rows: int = 5) -> Trained:
    """Return a training on so many rows of the device's data."""
    return Trained(
        state=ClientState(round=0, personal={}, first_moments={}, second_moments={}),
        after=np.ones(2, np.float32),
        loss=1.5,
        weight=51,
        tokens=31 * rows,
        rows=rows,
        read_tokens=7 * rows,
    )


def test_of_a_result_only_the_update_and_its_costs_leave_the_device() -> None:
    told = withheld(FULL)
    assert (told.blob, told.costs, told.examples) == (b"update", Costs(download_bytes=9), 1)
    bare = Result(costs=FULL.costs, examples=1)
    for field in dataclasses.fields(Result):
        if field.name not in ("blob", "costs", "examples"):
            assert getattr(told, field.name) == getattr(bare, field.name), field.name
            assert getattr(FULL, field.name) != getattr(bare, field.name), field.name


@pytest.mark.parametrize("stage", ["instruction", "reward", "alignment"])
def test_two_devices_with_other_data_say_the_same_of_their_training(stage: str) -> None:
    settings = AlignmentSettings() if stage == "alignment" else None
    task = a_task(stage=stage, alignment=settings)
    one = withheld_training(trained(rows=2), task)
    other = withheld_training(replace(trained(rows=6), loss=0.1, weight=3), task)
    assert replace(one, state=other.state, after=other.after) == other
    assert (one.loss, one.weight) == (None, 1)
    assert one.after is not None


def test_a_training_is_priced_by_what_its_task_asks_for() -> None:
    # 3 steps of batches of 2 in length 96
    told = withheld_training(trained(), a_task())
    assert (told.rows, told.tokens, told.read_tokens) == (6, 576, 0)
    # 6 pairs for each of two reward models have two sides, which are read
    told = withheld_training(trained(), a_task(stage="reward"), rewards=2)
    assert (told.rows, told.tokens, told.read_tokens) == (0, 0, 2304)
    # through adapters on the trunks, both learn from as many
    told = withheld_training(trained(), a_task(stage="reward"), rewards=2, adapted=True)
    assert (told.rows, told.tokens, told.read_tokens) == (24, 2304, 0)
    # or are read by an encoder
    told = withheld_training(trained(), a_task(stage="reward"), rewards=2, encoded=True)
    assert (told.tokens, told.read_tokens, told.encoder_tokens) == (0, 0, 2304)
    # 3 steps of 16 rollouts, four epochs of PPO and one of RLOO; drawn, two policies, the trunk
    aligned = a_task(stage="alignment", alignment=AlignmentSettings(rollouts=16))
    told = withheld_training(trained(), aligned, rewards=2)
    assert (told.rows, told.read_tokens) == (4 * 48, 4 * 48 * 96)
    told = withheld_training(trained(), aligned, rewards=2, adapted=True)
    assert (told.rows, told.read_tokens) == (4 * 48, 5 * 48 * 96)
    told = withheld_training(trained(), aligned, rewards=2, encoded=True)
    assert (told.read_tokens, told.encoder_tokens) == (4 * 48 * 96, 48 * 96)
    without = AlignmentSettings(algorithm="rloo", rollouts=16)
    told = withheld_training(trained(), a_task(stage="alignment", alignment=without), rewards=2)
    assert (told.rows, told.read_tokens) == (48, 4 * 48 * 96)
    # 3 steps of 2 pairs of two sides
    compared = a_task(stage="alignment", alignment=AlignmentSettings(algorithm="dpo"))
    assert withheld_training(trained(), compared, rewards=2).rows == 12


@pytest.mark.parametrize(("held", "said"), [(0, 0), (1, 1), (700, 1)])
def test_a_private_device_says_one_example_and_no_more_than_one_pair(held: int, said: int) -> None:
    device = a_device(
        examples=40, held_out_examples=10, preference_pairs=held, categories={"poetry": 50}
    )
    told = withheld_record(device)
    assert (told.examples, told.held_out_examples, told.preference_pairs) == (1, 0, said)
    assert told.categories == {}
    assert told.costs == "modelled"
    kept = {"examples", "held_out_examples", "preference_pairs", "categories", "costs"}
    assert told.model_dump(exclude=kept) == device.model_dump(exclude=kept)


def test_devices_with_other_data_describe_themselves_alike_if_they_are_private(
    identity: BaseIdentity,
) -> None:
    modules = Modules(
        method=METHODS["pwff"],
        identity=identity,
        adapter_size=ADAPTER_SIZE,
        placement="qkv",
        rank=RANK,
    )

    def said(examples: int, *, private: bool) -> object:
        return describe_device(
            modules,
            Part(train=tuple(range(examples)), held_out=(examples,), groups={"a": examples + 1}),
            PAPER_LINK,
            client="pi5-01",
            profile=find_profile("raspberry-pi-5-8gb"),
            lora_count=12,
            threads=1,
            helpfulness=0.5,
            preference_pairs=examples,
            costs="measured",
            private=private,
        )

    assert said(3, private=True) == said(900, private=True)
    assert said(3, private=False) != said(900, private=False)


def test_a_device_withholds_by_its_own_configuration_and_not_by_the_runs_word() -> None:
    assert withholds(a_task(private=True), private=True, client="pi5-01")
    assert withholds(a_task(), private=True, client="pi5-01")
    assert not withholds(a_task(), private=False, client="pi5-01")
    with pytest.raises(InputError, match=r"'trial' is private and 'pi5-01' is not.*private = true"):
        withholds(a_task(private=True), private=False, client="pi5-01")
