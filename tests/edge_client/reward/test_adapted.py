"""Reward models with adapters on their trunk: gradients, what they start as, what travels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES
from device_profiles.modules import adapter_tensors
from device_profiles.reward_heads import TrunkShape, initial_rewards
from edge_client.data.instructions import Example
from edge_client.data.prompts import encode_example
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from edge_client.progress import Interruption, StoppedError
from edge_client.reward import adapted
from edge_client.reward.adapted import AdaptedTrunk, Sides, batch_gradient, train_with_trunk
from edge_client.reward.head import Head, of_objective, scores, trunk_tensors_of
from edge_client.reward.judging import Judging, reward_layout
from edge_client.reward.reference import load_reference
from edge_client.reward.training import PairSteps
from edge_client.stage_work import GlobalStates
from messaging.errors import PrivateTensorError
from messaging.layout import Tensors
from quantization.base_model import load_base
from quantization.identity import BaseIdentity
from tests.edge_client.conftest import ADAPTER_SIZE, RANK, Academy, own_data
from tests.edge_client.peft.test_packed_model import doubled
from tests.edge_client.reward.test_work import LAYOUT as HEADS
from tests.edge_client.reward.test_work import learn

ONE = "helpfulness"
PAIRS = own_data(OBJECTIVES).pairs[ONE]


@pytest.fixture(scope="module")
def judging(shared_judging: Judging) -> Judging:
    """Return a trunk with room for adapters."""
    return Judging(shared_judging.base, adapter_size=ADAPTER_SIZE)


@pytest.fixture
def adapters(academy: Academy, judging: Judging) -> Academy:
    """Return clients whose reward models have adapters on their trunks."""
    return dataclasses.replace(academy, judging=judging, reward_shares="adapters")


def sides(judging: Judging) -> list[Sides]:
    """Return four pairs, encoded."""
    tokenizer = judging.base.tokenizer

    def encoded(instruction: str, response: str) -> Any:
        return encode_example(Example(instruction=instruction, output=response), tokenizer, 128)

    return [(encoded(p.instruction, p.chosen), encoded(p.instruction, p.rejected)) for p in PAIRS]


def moved(judging: Judging, spread: float = 0.2) -> Tensors:
    """Return reward models of which no entry is zero."""
    rng = np.random.default_rng(3)
    first = initial_rewards(OBJECTIVES, judging.shape, seed=5)
    return {n: (t + rng.normal(0, spread, t.shape)).astype(np.float32) for n, t in first.items()}


# -- gradients -------------------------------------------------------------------------------------


def normal(rows: Tensor) -> Tensor:
    """Return a vector less its mean, over its deviation."""
    away = rows - rows.mean()
    return away / torch.sqrt((away**2).mean() + 1e-5)


def by_autograd(
    identity: BaseIdentity, tensors: Tensors, pairs: Sequence[Sides], margin: float
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss and its gradients by the library's model, in double precision.

    One response at a time; features, head and loss are written out.
    """
    model = TunedModel(
        load_base(identity),
        adapter_size=ADAPTER_SIZE,
        placement="qkv",
        lora_count=0,
        lora_rank=RANK,
    )
    model.put(trunk_tensors_of(tensors, ONE))
    model.model.double()
    head = {
        n.removeprefix(f"reward.{ONE}."): torch.from_numpy(t).double().requires_grad_(True)
        for n, t in of_objective(tensors, ONE).items()
    }

    def score(side: Any) -> Tensor:
        hidden = model.hidden(torch.from_numpy(side.tokens[:-1])[None])[0]  # (T, D)
        own = hidden[side.response_start - 1 :]
        length = torch.tensor([math.log(len(own))], dtype=torch.float64)
        features = torch.cat([normal(own[-1]), normal(own.sum(0) / len(own)), length])
        units = head["inner.weight"] @ features + head["inner.bias"]
        active = units * 0.5 * (1 + torch.erf(units / math.sqrt(2)))
        return (head["outer.weight"] @ active + head["outer.bias"])[0]

    terms = [-torch.log(torch.sigmoid(score(c) - score(r) - margin)) for c, r in pairs]
    loss = torch.stack(terms).mean()
    del head["outer.bias"]  # it cancels in every pair
    trained = {**head, **model.trainable()}
    found = torch.autograd.grad(loss, list(trained.values()))
    return loss.item(), dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("most", [10_000, 1])  # all pairs at once; each by itself
def test_loss_and_every_gradient_are_those_of_autograd_in_double_precision(
    identity: BaseIdentity,
    judging: Judging,
    margin: float,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapted, "PASS_TOKENS", most)
    tensors, pairs = moved(judging), sides(judging)
    model = PackedModel(
        doubled(judging.base),
        adapter_size=ADAPTER_SIZE,
        placement="qkv",
        lora_count=0,
        lora_rank=RANK,
    )
    model.put(trunk_tensors_of(tensors, ONE))
    head = Head(of_objective(tensors, ONE)).double().requires_grad_(True)
    loss = batch_gradient(AdaptedTrunk(model), head, pairs, margin=margin)
    wanted, expected = by_autograd(identity, tensors, pairs, margin)
    assert loss == pytest.approx(wanted, rel=1e-12)
    found = {n.replace("_", ".", 1): p.grad for n, p in head.named_parameters()} | dict(
        model.gradients()
    )
    assert float(found.pop("outer.bias").abs().max()) < 1e-15
    assert list(found) == list(expected)
    for name, gradient in found.items():
        assert float(expected[name].abs().max()) > 0
        # both in float64, sums in another order
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


# -- what it starts as -----------------------------------------------------------------------------


def test_at_the_start_a_reward_model_reads_the_bare_trunk_to_the_bit(
    judging: Judging, shared_judging: Judging
) -> None:
    shape = judging.base.identity.shape
    first = initial_rewards(OBJECTIVES, judging.shape, seed=5)
    bare = initial_rewards(OBJECTIVES, TrunkShape(base=shape), seed=5)
    assert {n: t.tobytes() for n, t in bare.items()} == {
        n: t.tobytes() for n, t in first.items() if ".trunk." not in n
    }
    examples = [side for pair in sides(judging) for side in pair]
    for name in OBJECTIVES:
        assert torch.equal(
            judging.trunk_of(first, name).response_features(examples),
            shared_judging.trunk.response_features(examples),
        )
    with_adapters, without = (
        judging.heads(first, OBJECTIVES),
        shared_judging.heads(bare, OBJECTIVES),
    )
    assert with_adapters.scales == without.scales


def test_each_reward_model_reads_through_its_own_adapters(judging: Judging) -> None:
    tensors, shape = moved(judging), judging.base.identity.shape
    heads = judging.heads(tensors, OBJECTIVES)
    examples = [side for pair in sides(judging) for side in pair]
    features, lengths = heads.token_features(examples)
    rows = load_reference().examples
    for name in OBJECTIVES:
        own = PackedModel(
            judging.base, adapter_size=ADAPTER_SIZE, placement="qkv", lora_count=0, lora_rank=RANK
        )
        prefix = f"reward.{name}.trunk."
        own.put({t.name: tensors[prefix + t.name] for t in adapter_tensors(shape, ADAPTER_SIZE)})
        trunk = type(judging.trunk)(own)
        assert torch.equal(features[name], trunk.token_features(examples)[0])
        public = scores(
            Head(of_objective(tensors, name)),
            trunk.response_features(
                [encode_example(row, judging.base.tokenizer, 128) for row in rows]
            ),
        )
        assert (heads.scales[name].mean, heads.scales[name].deviation) == (
            public.mean(),
            public.std(),
        )
    assert sum(lengths) == len(features[ONE])
    assert not torch.equal(features["helpfulness"], features["harmlessness"])


# -- learning --------------------------------------------------------------------------------------


def taught(judging: Judging, **changes: Any) -> Any:
    how: dict[str, Any] = {
        "steps": 3, "batch_size": 2, "learning_rate": 0.01, "seed": 7, "words": ("pi", ONE, 2),
    }  # fmt: skip
    first = initial_rewards(OBJECTIVES, judging.shape, seed=5)
    given = changes.pop("pairs", sides(judging))
    rest = {n: changes.pop(n) for n in ("moments", "interruption") if n in changes}
    steps = PairSteps(**{**how, **changes})
    return train_with_trunk(judging.learning, first, given, steps, objective=ONE, **rest)


def test_learning_lowers_the_loss_and_moves_the_adapters(judging: Judging) -> None:
    short, long = (taught(judging, steps=steps, batch_size=4) for steps in (1, 30))
    assert long.loss < 0.5 * short.loss
    ups = [t for n, t in long.tensors.items() if n.endswith(".up.weight")]
    assert len(ups) == 36
    assert all(np.abs(up).max() > 0 for up in ups)
    assert not any("lora" in n or "harmlessness" in n for n in long.tensors)


def test_a_round_that_is_broken_off_is_left_before_its_next_step(judging: Judging) -> None:
    stop = Interruption()
    stop.stop()
    with pytest.raises(StoppedError):
        taught(judging, interruption=stop)


def test_without_a_pair_there_is_nothing_to_learn(judging: Judging) -> None:
    with pytest.raises(InputError, match="no pair to learn a reward model of helpfulness from"):
        taught(judging, pairs=[])


def test_a_learning_rate_that_is_far_too_high_is_named(judging: Judging) -> None:
    with pytest.raises(InputError, match="learning_rate = 1e"):
        taught(judging, learning_rate=1e30, weight_decay=0.0, steps=5)


# -- on a client -----------------------------------------------------------------------------------


def given(academy: Academy) -> GlobalStates:
    return GlobalStates(shared=academy.heads(*OBJECTIVES))


def test_heads_and_trunk_tensors_of_each_objective_travel_and_no_lora(adapters: Academy) -> None:
    layout = adapters.setup().layouts["reward"]
    # two heads, and with each 36 adapters of 2 * 16 * 4 + 4 + 16 numbers
    assert layout.size == HEADS.size + 2 * 36 * 148
    names = [spec.name for spec in layout.specs]
    assert sum(n.startswith("reward.harmlessness.trunk.adapters.") for n in names) == 4 * 36
    with pytest.raises(PrivateTensorError):
        layout.pack({**moved(adapters.judging), **adapters.model.take()})
    result = adapters.make().perform(learn(), given(adapters))
    assert result.blob is not None
    # four bytes a number; a header and 64 bytes a chunk
    assert 0 < result.costs.uplink_bits - 8 * 4 * layout.size < 8 * 1500


def test_the_same_task_gives_the_same_bytes_whoever_trained_between(adapters: Academy) -> None:
    states, client = given(adapters), adapters.make()
    client.perform(learn(2), states)
    first = client.perform(learn(3), states).blob
    adapters.make("pi5-02").perform(learn(2, client="pi5-02"), states)
    assert client.perform(learn(3), states).blob == first
    assert adapters.make().perform(learn(3), states).blob == first  # started again
    fresh = adapters.elsewhere("fresh").make().perform(learn(3), states).blob
    assert fresh != first  # moments go on over rounds, and through the disk


def test_every_round_pays_for_its_way_through_the_trunk_and_back(adapters: Academy) -> None:
    client, states = adapters.make(), given(adapters)
    costs = [client.perform(learn(r), states).costs for r in (2, 3)]
    tokens = [
        sum(len(side.tokens) for pair in sides(adapters.judging) for side in pair),
    ]
    assert costs[0].compute_seconds > 0
    # four steps of two pairs go through all four pairs twice, in either round
    assert costs[1].compute_seconds == costs[0].compute_seconds
    work = adapters.make("pi5-03")._works["reward"]
    done = work.train(learn(client="pi5-03"), work.begin(0), states)
    assert (done.rows, done.read_tokens) == (2 * 4 * 2 * 2, 0)
    harmless = own_data(OBJECTIVES).pairs["harmlessness"]
    tokenizer = adapters.judging.base.tokenizer
    tokens += [
        len(encode_example(Example(instruction=p.instruction, output=t), tokenizer, 128).tokens)
        for p in harmless
        for t in (p.chosen, p.rejected)
    ]
    assert done.tokens == 2 * sum(tokens)


def test_figures_are_of_the_pairs_as_the_given_adapters_read_them(adapters: Academy) -> None:
    layout = adapters.setup().layouts["reward"]
    tensors = moved(adapters.judging)
    client = adapters.make()
    first = client.perform(learn(1, work="evaluate"), given(adapters)).pairs[ONE]
    found = client.perform(
        learn(1, work="evaluate"), GlobalStates(shared=layout.pack(tensors))
    ).pairs[ONE]
    trunk, head = adapters.judging.trunk_of(tensors, ONE), Head(of_objective(tensors, ONE))
    ahead = []
    for pair in own_data(OBJECTIVES).held_out_pairs[ONE]:
        both = [
            encode_example(
                Example(instruction=pair.instruction, output=text),
                adapters.judging.base.tokenizer,
                128,
            )
            for text in (pair.chosen, pair.rejected)
        ]
        chosen, rejected = (scores(head, trunk.response_features([e]))[0] for e in both)
        ahead.append(chosen - rejected)
    # fp32, one response at a time
    assert found.loss == pytest.approx(np.logaddexp(0, -np.array(ahead)).mean(), abs=1e-4)
    assert found.loss != first.loss


def test_a_device_of_another_choice_shares_other_tensors(
    academy: Academy, adapters: Academy
) -> None:
    head, both = academy.setup(), adapters.setup()
    assert head.layouts["reward"].sha256 != both.layouts["reward"].sha256
    assert head.layouts_sha256 != both.layouts_sha256
    assert reward_layout(OBJECTIVES, TrunkShape(base=academy.shape.base)) == head.layouts["reward"]
