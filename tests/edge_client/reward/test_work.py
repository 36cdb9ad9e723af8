"""Reward learning on one client: what travels, what stays, and what the trunk reads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES, Objective
from device_profiles.modules import BaseShape
from device_profiles.reward_heads import TrunkShape, head_tensors
from edge_client.data.instructions import Example
from edge_client.data.preferences import Pair
from edge_client.data.prompts import Encoded, encode_example
from edge_client.reward.evaluation import evaluate_pairs
from edge_client.reward.head import Head, of_objective, scores
from edge_client.reward.judging import reward_layout
from edge_client.reward.training import PairSteps, train_head
from edge_client.reward.work import RewardWork
from edge_client.stage_work import GlobalStates
from edge_client.state import ClientState
from messaging.codecs import decode_blob
from messaging.errors import PrivateTensorError
from messaging.layout import Layout, Vector
from messaging.protocol import Task
from tests.edge_client.conftest import Academy, a_device, a_task, own_data

WIDTH = 16
LAYOUT = reward_layout(
    OBJECTIVES, TrunkShape(base=BaseShape(layers=12, width=WIDTH, inner=4 * WIDTH))
)
DATA = own_data(OBJECTIVES)
FRESH = ClientState(round=0, stage="reward", personal={"a.lora_A.weight": np.ones((2, 3), "f4")})


def learn(round_: int = 2, **changes: Any) -> Task:
    """Return a task of reward learning."""
    fields = {"local_steps": 4, "batch_size": 2, "learning_rate": 0.003, "max_length": 128}
    return a_task(stage="reward", round=round_, **{**fields, **changes})


def a_work(academy: Academy, layout: Layout = LAYOUT) -> RewardWork:
    return RewardWork(
        academy.judging,
        objectives=OBJECTIVES,
        layout=layout,
        device=a_device(preference_pairs=8),
        pairs=DATA.pairs,
        held_out=DATA.held_out_pairs,
        begin=lambda _seed: FRESH,
    )


def given(academy: Academy) -> GlobalStates:
    return GlobalStates(shared=academy.heads(*OBJECTIVES))


def encoded(academy: Academy, pairs: Sequence[Pair], side: str) -> list[Encoded]:
    return [
        encode_example(
            Example(instruction=p.instruction, input=p.input, output=getattr(p, side)),
            academy.judging.base.tokenizer,
            128,
        )
        for p in pairs
    ]


def updated(academy: Academy, blob: bytes | None) -> Vector:
    """Return what the aggregator reads of an update."""
    assert blob is not None
    return decode_blob(blob, academy.setup().layouts["reward"])[1]


def test_the_layout_is_that_of_the_heads_in_the_order_of_the_objectives(academy: Academy) -> None:
    names = [t.name for name in OBJECTIVES for t in head_tensors(name, WIDTH)]
    assert [s.name for s in academy.setup().layouts["reward"].specs] == names
    # H*F + 2*H + 1 of 64 units on 2*16 + 1 features, for each of two
    assert LAYOUT.size == 2 * (64 * 33 + 2 * 64 + 1)


def test_an_update_is_after_minus_before_of_heads_that_learned_from_the_clients_own_pairs(
    academy: Academy,
) -> None:
    states = given(academy)
    assert states.shared is not None
    result = academy.make().perform(learn(), states)
    before, after = LAYOUT.unpack(states.shared), {}
    for name in OBJECTIVES:
        chosen, rejected = (
            academy.judging.trunk.response_features(encoded(academy, DATA.pairs[name], side))
            for side in ("chosen", "rejected")
        )
        after |= train_head(
            of_objective(before, name),
            chosen,
            rejected,
            PairSteps(
                steps=4, batch_size=2, learning_rate=0.003, seed=7, words=("pi5-01", name, 2)
            ),
        ).tensors
    wanted = LAYOUT.pack(after) - states.shared
    # features of all pairs of a batch against those of one side alone: fp32 through 12 blocks,
    # and Adam's steps of 0.003 made of them
    np.testing.assert_allclose(updated(academy, result.blob), wanted, atol=1e-4)
    assert np.abs(wanted).max() > 1e-3
    assert result.examples == 8  # pairs, by which the heads are averaged
    assert result.blob is not None
    assert set(load(result.blob)) == {"packed"}


def test_neither_lora_nor_adapters_can_travel_with_the_heads(academy: Academy) -> None:
    with pytest.raises(PrivateTensorError):
        academy.setup().layouts["reward"].pack(academy.model.take())


def test_the_same_task_gives_the_same_bytes(academy: Academy) -> None:
    states, client = given(academy), academy.make()
    client.perform(learn(), states)
    first = client.perform(learn(3), states).blob
    assert first is not None
    assert client.perform(learn(3), states).blob == first
    assert academy.make().perform(learn(3), states).blob == first  # started again
    academy.make("pi5-02").perform(learn(2, client="pi5-02"), states)
    assert client.perform(learn(3), states).blob == first
    assert client.perform(learn(3, seed=8), states).blob != first


def test_moments_go_on_over_rounds_and_through_the_disk(academy: Academy) -> None:
    states, work = given(academy), a_work(academy)
    first = work.train(learn(2), FRESH, states)
    second = work.train(learn(3), first.state, states)
    anew = work.train(learn(3), FRESH, states)
    assert [first.state.numbers, second.state.numbers, anew.state.numbers] == [
        {f"steps_{name}": steps for name in OBJECTIVES} for steps in (4.0, 8.0, 4.0)
    ]
    assert second.after is not None
    assert anew.after is not None
    assert not np.array_equal(second.after, anew.after)
    client = academy.make()
    client.perform(learn(2), states)
    assert states.shared is not None
    blob = academy.make().perform(learn(3), states).blob
    assert np.array_equal(updated(academy, blob), second.after - states.shared)


def test_what_the_client_keeps_of_its_model_is_left_as_it_is(academy: Academy) -> None:
    client = academy.make()
    client.perform(a_task(), GlobalStates(shared=academy.adapters()))
    before, on_model = academy.store().load(1), academy.model.take_flat()
    client.perform(learn(), given(academy))
    after = academy.store().load(2)
    assert {n: t.tobytes() for n, t in after.personal.items()} == {
        n: t.tobytes() for n, t in before.personal.items()
    }
    assert len(after.personal) == 24
    assert (after.stage, after.first_moments, after.steps) == ("reward", {}, 0)
    assert np.array_equal(academy.model.take_flat(), on_model)


def test_figures_are_those_of_the_heads_on_held_out_pairs(academy: Academy) -> None:
    states = given(academy)
    assert states.shared is not None
    result = academy.make().perform(learn(1, work="evaluate"), states)
    heads = LAYOUT.unpack(states.shared)
    for name in OBJECTIVES:
        sides = [encoded(academy, DATA.held_out_pairs[name], s) for s in ("chosen", "rejected")]
        head = Head(of_objective(heads, name))
        found = [
            # one response at a time, from the last of its places
            [float(scores(head, academy.judging.trunk.token_features([e])[0][-1:])[0]) for e in s]
            for s in sides
        ]
        lengths = [[len(e.tokens) - e.response_start for e in s] for s in sides]
        wanted = evaluate_pairs(*found, *lengths)
        figures = result.pairs[name]
        assert (figures.pairs, figures.accuracy) == (2, wanted.accuracy)
        assert figures.longer_wins == wanted.longer_wins == 1.0  # "No." and "Go and run."
        # fp32 sums in another order
        assert figures.loss == pytest.approx(wanted.loss, abs=1e-5)
        assert figures.calibration_error == pytest.approx(wanted.calibration_error, abs=1e-5)
    assert (result.examples, result.eval_loss, result.blob) == (4, None, None)


def test_learning_lowers_the_loss(academy: Academy) -> None:
    work, states, state = a_work(academy), given(academy), FRESH
    losses = []
    for round_ in range(2, 6):
        done = work.train(learn(round_, local_steps=10, batch_size=4), state, states)
        state, states = done.state, GlobalStates(shared=done.after)
        losses.append(done.loss)
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.5 * losses[0]


def test_a_margin_makes_the_loss_larger(academy: Academy) -> None:
    plain, wide = (
        a_work(academy).train(learn(margin=margin), FRESH, given(academy)) for margin in (0.0, 1.0)
    )
    assert plain.loss is not None
    assert wide.loss is not None
    assert wide.loss > plain.loss + 0.1
    assert not np.array_equal(np.asarray(plain.after), np.asarray(wide.after))


def test_pairs_are_read_by_the_trunk_once(academy: Academy) -> None:
    work, states = a_work(academy), given(academy)
    tokens = sum(
        len(e.tokens)
        for name in OBJECTIVES
        for side in ("chosen", "rejected")
        for e in encoded(academy, DATA.pairs[name], side)
    )
    first = work.train(learn(2), FRESH, states)
    second = work.train(learn(3), first.state, states)
    assert [(d.read_tokens, d.tokens) for d in (first, second)] == [(tokens, 0), (0, 0)]
    asked: list[int] = []

    def count(examples: Sequence[Encoded]) -> Tensor:
        asked.append(len(examples))
        return academy.judging.trunk.response_features(examples)

    work = a_work(dataclasses.replace(academy, judging=copy.copy(academy.judging)))
    work._judging.trunk = copy.copy(academy.judging.trunk)
    work._judging.trunk.response_features = count  # type: ignore[method-assign]
    for round_ in (2, 3):
        work.train(learn(round_), FRESH, states)
    assert asked == [8, 8]  # both sides of four pairs, for each objective


def test_reading_is_paid_for_in_the_first_round_alone(academy: Academy) -> None:
    client, states = academy.make(), given(academy)
    costs = [client.perform(learn(r), states).costs for r in (2, 3)]
    assert costs[0].compute_seconds > 0
    assert costs[1].compute_seconds == 0.0
    assert costs[1].uplink_bits == costs[0].uplink_bits > 32 * LAYOUT.size
    again = [academy.make().perform(learn(r), states).costs for r in (3, 2)]  # started again
    assert again == costs[::-1]


def test_without_reward_models_to_start_from_the_client_says_so(academy: Academy) -> None:
    for task in (learn(), learn(work="evaluate")):
        with pytest.raises(InputError, match="'pi5-01' is asked to learn reward models and is giv"):
            academy.make().perform(task)


def test_a_client_of_one_objective_learns_that_one_alone(academy: Academy) -> None:
    only: tuple[Objective, ...] = ("helpfulness",)
    client = academy.make(method="sfl")
    result = client.perform(learn(), GlobalStates(shared=academy.heads(*only)))
    assert result.blob is not None
    layout = client.setup.layouts["reward"]
    assert decode_blob(result.blob, layout)[1].shape == (LAYOUT.size // 2,)
    figures = client.perform(
        learn(work="evaluate"), GlobalStates(shared=academy.heads(*only))
    ).pairs
    assert set(figures) == set(only)


def test_a_client_without_pairs_of_its_own_cannot_learn(academy: Academy) -> None:
    data = dataclasses.replace(DATA, pairs={name: [] for name in OBJECTIVES})
    with pytest.raises(InputError, match="at least 1 pair"):
        academy.make(data=data).perform(learn(), given(academy))
