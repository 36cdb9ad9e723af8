"""Local training and evaluation, against transformers' own loss and loops written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from device_profiles.errors import InputError
from device_profiles.modules import initial_adapters, initial_lora, lora_sites
from device_profiles.seeds import stream
from edge_client.data.batches import make_batch, training_order
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft import packed_model
from edge_client.peft.flat_state import named
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.packed_network import block_forward
from edge_client.peft.tuned_model import TunedModel
from edge_client.restraint import Restraint
from edge_client.state import ClientState
from edge_client.trainer import Training, evaluate, train
from messaging.layout import Tensors
from quantization.base_model import Base
from quantization.frozen_gpt2 import load_frozen
from quantization.identity import BaseIdentity
from tests.edge_client.conftest import ADAPTER_SIZE, EXAMPLES, RANK, random_tensors

Model = PackedModel | TunedModel
Make = Callable[..., Model]

NOTHING_YET = ClientState(round=0, personal={})


@pytest.fixture
def packed(identity: BaseIdentity) -> Callable[..., PackedModel]:
    """Make packed models, each on a base of its own."""

    def make(count: int = 36) -> PackedModel:
        return PackedModel(
            load_frozen(identity),
            adapter_size=ADAPTER_SIZE,
            placement="qkv",
            lora_count=count,
            lora_rank=RANK,
        )

    return make


@pytest.fixture(params=["packed", "padded"])
def make(
    request: pytest.FixtureRequest,
    packed: Callable[..., PackedModel],
    tuned: Callable[..., TunedModel],
) -> Make:
    """Make models of one of the two kinds that train, each on a base of its own."""
    return packed if request.param == "packed" else tuned


@pytest.fixture
def examples(base: Base) -> list[Encoded]:
    """Return five examples of different lengths."""
    encoded = [encode_example(e, base.tokenizer, 128) for e in EXAMPLES]
    assert len({len(e.tokens) for e in encoded}) > 2
    return encoded


def begin(model: Model, identity: BaseIdentity, count: int) -> None:
    """Put what a client of a run begins with on the model."""
    model.activate(count)
    model.put(initial_adapters(identity.shape, ADAPTER_SIZE, seed=0))
    model.put(initial_lora(lora_sites(identity.shape, "qkv")[:count], RANK, seed=0))


def take_steps(
    model: Model, examples: Sequence[Encoded], state: ClientState = NOTHING_YET, **changes: int
) -> Training:
    """Train with the settings of these tests."""
    settings = {"steps": 3, "batch_size": 2, "seed": 0, "round_": 1, **changes}
    words = ("pi5-01", settings.pop("round_"))
    return train(model, state, examples, learning_rate=0.01, words=words, **settings)


def full_loss(model: TunedModel, examples: Sequence[Encoded], pad: int = 77) -> torch.Tensor:
    """Return transformers' own loss: all logits, padding masked, labels -100 off the responses."""
    longest = max(len(e.tokens) for e in examples)
    tokens = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, -100)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.from_numpy(example.tokens)
        mask[row, :length] = 1
        labels[row, example.response_start : length] = torch.from_numpy(
            example.tokens[example.response_start :]
        )
    loss: torch.Tensor = model.model(tokens, attention_mask=mask, labels=labels).loss
    return loss


def same(one: Tensors, other: Tensors) -> bool:
    """Return whether two sets of tensors agree in every bit."""
    return set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)


# -- one step --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "clips"), [(1, False), (3, True)])
def test_loss_and_clipped_gradients_are_those_of_the_full_logits_with_masked_padding(
    *,
    make: Make,
    tuned: Callable[..., TunedModel],
    identity: BaseIdentity,
    examples: list[Encoded],
    spread: int,
    clips: bool,
) -> None:
    model, plain = make(36), tuned(36)
    before = {n: spread * t for n, t in random_tensors(identity).items()}
    model.put(before)
    plain.put(before)
    plain.model.double()
    reference = full_loss(plain, examples)
    names = list(plain.trainable())
    gradients = torch.autograd.grad(reference, list(plain.trainable().values()))
    norm = float(torch.cat([g.reshape(-1) for g in gradients]).double().norm())
    assert (norm > 1) == clips
    done = take_steps(model, examples, steps=1, batch_size=5)
    assert done.loss == pytest.approx(float(reference.detach()), abs=1e-5)
    steps_seen = 0
    for name, gradient in zip(names, gradients, strict=True):
        clipped = (gradient / max(1.0, norm)).numpy()
        # After one step the first moment is a tenth of the gradient and the second a thousandth
        # of its square. Gradients in fp32 are off the true ones by 5e-5 of the largest entry, and
        # by up to 7e-3 where the modules are three times as large and swamp the base.
        moment, square = done.first_moments[name], done.second_moments[name]
        off = (1e-2 if clips else 1e-4) * np.abs(clipped).max()
        np.testing.assert_allclose(10 * moment, clipped, atol=off, rtol=0, err_msg=name)
        np.testing.assert_allclose(square, 1e-3 * (10 * moment) ** 2, rtol=1e-3, atol=1e-16)
        # Adam's first step is the rate against the gradient's sign, less where it is near 1e-8.
        step = -0.01 * clipped / (np.abs(clipped) + 1e-8)
        seen = np.abs(clipped) > 1e-4
        steps_seen += int(seen.sum())
        moved = done.tensors[name] - before[name]
        np.testing.assert_allclose(moved[seen], step[seen], atol=2e-6, err_msg=name)
    assert steps_seen > 1000


def test_a_step_counts_rows_and_their_tokens_without_padding(
    make: Make, examples: list[Encoded]
) -> None:
    done = take_steps(make(12), examples, steps=2, batch_size=5)
    tokens = sum(len(e.tokens) for e in examples)
    assert (done.steps, done.rows, done.tokens) == (2, 10, 2 * tokens)


def test_a_client_with_fewer_examples_than_the_batch_takes_them_all(
    make: Make, examples: list[Encoded]
) -> None:
    assert take_steps(make(12), examples[:2], steps=3, batch_size=64).rows == 6


def test_the_loss_is_the_mean_over_the_steps(
    make: Make,
    tuned: Callable[..., TunedModel],
    identity: BaseIdentity,
    examples: list[Encoded],
) -> None:
    model, plain = make(12), tuned(12)
    losses = []
    for steps in (1, 2, 3):
        begin(model, identity, 12)
        losses.append(take_steps(model, examples, steps=steps).loss)
    begin(model, identity, 12)
    begin(plain, identity, 12)
    order = training_order(5, 1, 2, stream(0, "batches", "pi5-01", 1))
    first = full_loss(plain, [examples[i] for i in next(order)])
    assert losses[0] == pytest.approx(float(first.detach()), abs=1e-5)
    assert len({losses[0], losses[1], losses[2]}) == 3
    second = 2 * losses[1] - losses[0]  # the second step's own
    order = training_order(5, 2, 2, stream(0, "batches", "pi5-01", 1))
    plain.put(take_steps(model, examples, steps=1).tensors)
    *_, batch = order
    third = full_loss(plain, [examples[i] for i in batch])
    assert second == pytest.approx(float(third.detach()), abs=2e-5)


# -- padding ---------------------------------------------------------------------------------------


def test_padding_on_the_right_changes_no_logit_that_counts(
    tuned: Callable[..., TunedModel], identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = tuned(36)
    model.put(random_tensors(identity))
    together = make_batch(examples, pad=0)
    other_padding = make_batch(examples, pad=211)
    with torch.no_grad():
        rows = model.logits_at(together.tokens, together.places)
        assert torch.equal(rows, model.logits_at(other_padding.tokens, other_padding.places))
        alone = []
        for example in examples:
            batch = make_batch([example], pad=0)
            alone.append(model.logits_at(batch.tokens, batch.places))
    torch.testing.assert_close(rows, torch.cat(alone), rtol=0, atol=1e-4)


def test_evaluation_is_the_mean_over_every_response_token_of_every_example(
    make: Make,
    tuned: Callable[..., TunedModel],
    identity: BaseIdentity,
    examples: list[Encoded],
) -> None:
    model, plain = make(36), tuned(36)
    tensors = random_tensors(identity)
    model.put(tensors)
    plain.put(tensors)
    rng = np.random.default_rng(0)
    many = [
        Encoded(
            tokens=np.concatenate([[0] * length, rng.integers(0, 512, length)]),
            response_start=length,
        )
        for length in rng.integers(2, 40, 30)
    ]
    held_out = [*examples, *many]  # 35: three batches, the last one smaller
    losses, hits = [], []
    with torch.no_grad():
        for example in held_out:
            tokens = torch.from_numpy(example.tokens)
            chances = plain.model(tokens[None]).logits[0].double().log_softmax(-1)
            for place in range(example.response_start, len(tokens)):
                losses.append(-float(chances[place - 1, tokens[place]]))
                hits.append(int(chances[place - 1].argmax() == tokens[place]))
    result = evaluate(model, held_out)
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.accuracy == pytest.approx(np.mean(hits), abs=1e-12)
    assert same(model.take(), tensors)


def test_the_order_of_the_held_out_examples_does_not_matter_beyond_rounding(
    make: Make, examples: list[Encoded]
) -> None:
    model = make(12)
    one, other = evaluate(model, examples), evaluate(model, examples[::-1])
    assert one.loss == pytest.approx(other.loss, abs=1e-6)


# -- several steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [12, 20, 36])
def test_exactly_the_adapters_and_the_active_lora_modules_of_a_plain_model_train(
    tuned: Callable[..., TunedModel], identity: BaseIdentity, examples: list[Encoded], count: int
) -> None:
    model = tuned(36)
    begin(model, identity, count)
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    # In the first step up-projections and B are zero, so down-projections and A have no gradient.
    take_steps(model, examples, steps=4)
    after = model.model.state_dict()
    changed = {n for n, t in before.items() if not torch.equal(t, after[n])}
    small = {id(p) for p in model.trainable().values()}
    expected = {n for n, p in model.model.named_parameters() if id(p) in small}
    assert changed == expected
    assert len(changed) == 36 * 4 + 2 * count
    assert {n for n in changed if "adapter_" not in n and "lora_" not in n} == set()
    assert all(p.grad is None for n, p in model.model.named_parameters() if n not in expected)


@pytest.mark.parametrize("count", [12, 20, 36])
def test_a_packed_model_trains_every_active_tensor_and_neither_the_others_nor_the_base(
    packed: Callable[..., PackedModel],
    identity: BaseIdentity,
    examples: list[Encoded],
    count: int,
) -> None:
    model = packed(36)
    model.put({n: np.ones_like(t) for n, t in random_tensors(identity).items()})
    begin(model, identity, count)
    before = model.take()
    frozen = [model.base.weights.embedding.dense().clone(), model.base.weights.positions.clone()]
    frozen += [block.mlp_in.matrix.dense().clone() for block in model.base.weights.blocks]
    # In the first step up-projections and B are zero, so down-projections and A have no gradient.
    after = take_steps(model, examples, steps=4).tensors
    assert len(after) == 36 * 4 + 2 * count
    assert not [n for n in before if np.array_equal(before[n], after[n])]
    weights = model.base.weights
    now = [weights.embedding.dense(), weights.positions]
    now += [block.mlp_in.matrix.dense() for block in weights.blocks]
    assert all(torch.equal(one, other) for one, other in zip(frozen, now, strict=True))
    model.activate(36)
    assert all((t == 1).all() for n, t in model.take().items() if n not in after)


def by_hand(
    model: PackedModel, examples: Sequence[Encoded], batches: Sequence[Sequence[int]]
) -> tuple[Tensors, Tensors]:
    """Train with one optimiser over all batches; return tensors and first moments."""
    values = model.parameter()
    adam = torch.optim.AdamW([values], lr=0.01, weight_decay=0.0, fused=True)
    for indices in batches:
        batch = pack([examples[i] for i in indices])
        model.loss_gradient(batch, weight=1 / len(batch.targets))
        torch.nn.utils.clip_grad_norm_([values], 1.0)
        adam.step()
    moments = adam.state[values]["exp_avg"].numpy()
    return model.take(), named(moments, model.trainable())


def test_rounds_with_carried_moments_are_one_training_in_every_bit(
    packed: Callable[..., PackedModel], identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = packed(13)
    begin(model, identity, 13)
    state = NOTHING_YET
    for round_ in (1, 2):
        # between two rounds, other clients' tensors were on the model
        held = model.take()
        model.put({n: np.ones_like(t) for n, t in held.items()})
        model.put(held)
        done = take_steps(model, examples, state, round_=round_)
        state = ClientState(
            round=round_,
            personal={},
            first_moments={n: m.copy() for n, m in done.first_moments.items()},
            second_moments={n: m.copy() for n, m in done.second_moments.items()},
            steps=done.steps,
        )
    batches = [
        batch
        for round_ in (1, 2)
        for batch in training_order(5, 3, 2, stream(0, "batches", "pi5-01", round_))
    ]
    begin(model, identity, 13)
    tensors, moments = by_hand(model, examples, batches)
    assert state.steps == 6
    assert same(done.tensors, tensors)
    assert same(done.first_moments, moments)


def test_two_rounds_of_three_steps_on_one_example_are_one_of_six(
    make: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = make(12)
    begin(model, identity, 12)
    whole = take_steps(model, examples[:1], steps=6)
    begin(model, identity, 12)
    half = take_steps(model, examples[:1], steps=3)
    middle = ClientState(
        round=1,
        personal={},
        first_moments=half.first_moments,
        second_moments=half.second_moments,
        steps=half.steps,
    )
    both = take_steps(model, examples[:1], middle, steps=3, round_=2)
    assert (both.steps, whole.steps) == (6, 6)
    assert same(both.tensors, whole.tensors)
    assert same(both.second_moments, whole.second_moments)
    begin(model, identity, 12)
    model.put(half.tensors)
    forgot = take_steps(model, examples[:1], steps=3, round_=2)
    assert not same(forgot.tensors, whole.tensors)


def test_training_leaves_the_state_it_began_from_as_it_was(
    make: Make, examples: list[Encoded]
) -> None:
    model = make(12)
    done = take_steps(model, examples)
    state = ClientState(
        round=1,
        personal={},
        first_moments=done.first_moments,
        second_moments=done.second_moments,
        steps=3,
    )
    kept = {n: m.copy() for n, m in done.first_moments.items()}
    take_steps(model, examples, state, round_=2)
    assert same(state.first_moments, kept)


def test_training_is_a_function_of_seed_client_and_round(
    make: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    def trained(model: Model, **changes: int) -> Tensors:
        begin(model, identity, 12)
        return take_steps(model, examples, **changes).tensors

    model, other = make(12), make(36)
    first = trained(model)
    torch.manual_seed(123)  # nothing is drawn from the library's own generator
    assert same(trained(model), first)
    assert same(trained(other), first)  # a model with more modules, switched off
    assert not same(trained(model, seed=1), first)
    assert not same(trained(model, round_=2), first)


# -- parts of a batch, and less memory -------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 60, 100])
def test_a_batch_in_parts_trains_as_the_whole_does(
    packed: Callable[..., PackedModel],
    identity: BaseIdentity,
    examples: list[Encoded],
    most: int,
) -> None:
    model = packed(12)
    model.put(random_tensors(identity, 12))
    whole = take_steps(model, examples, steps=1, batch_size=5)
    model.put(random_tensors(identity, 12))
    parts = take_steps(model, examples, steps=1, batch_size=5, accumulate=most)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (parts.rows, parts.tokens) == (whole.rows, whole.tokens)
    for name, moment in whole.first_moments.items():
        # fp32 sums in another order, amplified by this base as in test_packed_model.py
        off = 1e-4 * np.abs(moment).max()
        np.testing.assert_allclose(parts.first_moments[name], moment, rtol=0, atol=off)


def test_a_checkpointed_training_has_the_same_bits_and_computes_each_block_twice(
    packed: Callable[..., PackedModel],
    identity: BaseIdentity,
    examples: list[Encoded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed = []

    def counted(*given: Any, **how: Any) -> Any:
        computed.append(1)
        return block_forward(*given, **how)

    monkeypatch.setattr(packed_model, "block_forward", counted)
    model = packed(12)
    begin(model, identity, 12)
    whole = take_steps(model, examples)
    assert len(computed) == 3 * 12
    begin(model, identity, 12)
    again = take_steps(model, examples, checkpoint=True)
    assert len(computed) == 3 * 12 + 2 * 3 * 12
    assert again.loss == whole.loss
    assert same(again.tensors, whole.tensors)


@pytest.mark.parametrize("how", [{"accumulate": 100}, {"checkpoint": True}])
def test_a_padded_model_refuses_what_only_a_packed_one_does(
    tuned: Callable[..., TunedModel], examples: list[Encoded], how: dict[str, int]
) -> None:
    with pytest.raises(InputError, match="accumulate and checkpoint are of packed training"):
        take_steps(tuned(12), examples, **how)


@pytest.mark.parametrize("count", [12, 36])
def test_both_kinds_of_model_learn_the_same(
    packed: Callable[..., PackedModel],
    tuned: Callable[..., TunedModel],
    identity: BaseIdentity,
    examples: list[Encoded],
    count: int,
) -> None:
    found = []
    for model in (packed(count), tuned(count)):
        begin(model, identity, count)
        found.append((take_steps(model, examples, steps=4), evaluate(model, examples)))
    (one, seen), (other, seen_by_other) = found
    # Adam's first steps follow the gradients' signs, so that rounding moves single weights by as
    # much as the learning rate; what they compute together hardly changes.
    assert one.loss == pytest.approx(other.loss, abs=1e-3)
    assert seen.loss == pytest.approx(seen_by_other.loss, abs=5e-3)
    assert (one.tokens, one.rows, one.steps) == (other.tokens, other.rows, other.steps)
    assert list(one.first_moments) == list(other.first_moments) == list(one.tensors)


def test_a_few_examples_are_learned(
    make: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = make(36)
    begin(model, identity, 36)
    before = evaluate(model, examples[:2])
    take_steps(model, examples[:2], steps=25)
    after = evaluate(model, examples[:2])
    assert after.loss < before.loss - 0.5
    assert after.accuracy > before.accuracy


def test_training_that_diverges_is_stopped_with_a_sentence(
    make: Make, examples: list[Encoded]
) -> None:
    model = make(12)
    with pytest.raises(InputError, match=r"learning_rate = 1e\+30: the loss is .* at step 2"):
        train(
            model,
            NOTHING_YET,
            examples,
            steps=3,
            batch_size=2,
            learning_rate=1e30,
            seed=0,
            words=("pi5-01", 1),
        )
    with pytest.raises(InputError, match="the held-out loss is nan: training diverged"):
        evaluate(model, examples)


def test_dropout_trains_another_way_to_the_same_bits_each_time_and_never_measures(
    make: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = make(12)
    results = []
    for share in (0.0, 0.5, 0.5):
        begin(model, identity, 12)
        restraint = Restraint(lora_dropout=share)
        before = evaluate(model, examples)
        done = take_steps(model, examples, restraint=restraint)  # type: ignore[arg-type]
        begin(model, identity, 12)
        assert evaluate(model, examples) == before
        results.append(done.tensors)
    free, first, again = results
    assert same(first, again)
    assert not same(free, first)
