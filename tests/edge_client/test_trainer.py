"""Local training and evaluation, against transformers' own loss and loops written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from device_profiles.errors import InputError
from device_profiles.modules import initial_adapters, initial_lora, lora_sites
from device_profiles.seeds import stream
from edge_client.data.batches import make_batch, training_order
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft.tuned_model import TunedModel
from edge_client.state import ClientState
from edge_client.trainer import Training, evaluate, train
from messaging.layout import Tensors
from quantization.base_model import Base
from quantization.identity import BaseIdentity
from tests.edge_client.conftest import ADAPTER_SIZE, EXAMPLES, RANK, random_tensors

Make = Callable[..., TunedModel]

NOTHING_YET = ClientState(round=0, personal={})


@pytest.fixture
def examples(base: Base) -> list[Encoded]:
    """Return five examples of different lengths."""
    encoded = [encode_example(e, base.tokenizer, 128) for e in EXAMPLES]
    assert len({len(e.tokens) for e in encoded}) > 2
    return encoded


def begin(model: TunedModel, identity: BaseIdentity, count: int) -> None:
    """Put what a client of a run begins with on the model."""
    model.activate(count)
    model.put(initial_adapters(identity.shape, ADAPTER_SIZE, seed=0))
    model.put(initial_lora(lora_sites(identity.shape, "qkv")[:count], RANK, seed=0))


def take_steps(
    model: TunedModel, examples: Sequence[Encoded], state: ClientState = NOTHING_YET, **changes: int
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
    tuned: Make, identity: BaseIdentity, examples: list[Encoded], spread: int, clips: bool
) -> None:
    model = tuned(36)
    before = {n: spread * t for n, t in random_tensors(identity).items()}
    model.put(before)
    reference = full_loss(model, examples)
    names = list(model.trainable())
    gradients = torch.autograd.grad(reference, list(model.trainable().values()))
    norm = float(torch.cat([g.reshape(-1) for g in gradients]).double().norm())
    assert (norm > 1) == clips
    done = take_steps(model, examples, steps=1, batch_size=5)
    assert done.loss == pytest.approx(float(reference.detach()), abs=1e-5)
    steps_seen = 0
    for name, gradient in zip(names, gradients, strict=True):
        clipped = (gradient / max(1.0, norm)).numpy()
        # After one step the first moment is a tenth of the gradient and the second a thousandth
        # of its square; the products ran in another order and shape.
        moment, square = done.first_moments[name], done.second_moments[name]
        np.testing.assert_allclose(10 * moment, clipped, atol=2e-6, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(square, 1e-3 * (10 * moment) ** 2, rtol=1e-3, atol=1e-16)
        # Adam's first step is the rate against the gradient's sign, less where it is near 1e-8.
        step = -0.01 * clipped / (np.abs(clipped) + 1e-8)
        seen = np.abs(clipped) > 1e-4
        steps_seen += int(seen.sum())
        moved = done.tensors[name] - before[name]
        np.testing.assert_allclose(moved[seen], step[seen], atol=1e-6, err_msg=name)
    assert steps_seen > 1000


def test_a_step_counts_rows_and_tokens_with_their_padding(
    tuned: Make, examples: list[Encoded]
) -> None:
    done = take_steps(tuned(12), examples, steps=2, batch_size=5)
    longest = max(len(e.tokens) for e in examples)
    assert (done.steps, done.rows, done.tokens) == (2, 10, 10 * longest)


def test_a_client_with_fewer_examples_than_the_batch_takes_them_all(
    tuned: Make, examples: list[Encoded]
) -> None:
    assert take_steps(tuned(12), examples[:2], steps=3, batch_size=64).rows == 6


def test_the_loss_is_the_mean_over_the_steps(
    tuned: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = tuned(12)
    losses = []
    for steps in (1, 2, 3):
        begin(model, identity, 12)
        losses.append(take_steps(model, examples, steps=steps).loss)
    begin(model, identity, 12)
    order = training_order(5, 1, 2, stream(0, "batches", "pi5-01", 1))
    first = full_loss(model, [examples[i] for i in next(order)])
    assert losses[0] == pytest.approx(float(first.detach()), abs=1e-5)
    assert len({losses[0], losses[1], losses[2]}) == 3
    second = 2 * losses[1] - losses[0]  # the second step's own
    order = training_order(5, 2, 2, stream(0, "batches", "pi5-01", 1))
    take_steps(model, examples, steps=1)
    *_, batch = order
    third = full_loss(model, [examples[i] for i in batch])
    assert second == pytest.approx(float(third.detach()), abs=2e-5)


# -- padding ---------------------------------------------------------------------------------------


def test_padding_on_the_right_changes_no_logit_that_counts(
    tuned: Make, identity: BaseIdentity, examples: list[Encoded]
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
    tuned: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = tuned(36)
    tensors = random_tensors(identity)
    model.put(tensors)
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
            chances = model.model(tokens[None]).logits[0].double().log_softmax(-1)
            for place in range(example.response_start, len(tokens)):
                losses.append(-float(chances[place - 1, tokens[place]]))
                hits.append(int(chances[place - 1].argmax() == tokens[place]))
    result = evaluate(model, held_out)
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.accuracy == pytest.approx(np.mean(hits), abs=1e-12)
    assert same(model.take(), tensors)
    assert all(p.grad is None for p in model.model.parameters())


def test_the_order_of_the_held_out_examples_does_not_matter_beyond_rounding(
    tuned: Make, examples: list[Encoded]
) -> None:
    model = tuned(12)
    one, other = evaluate(model, examples), evaluate(model, examples[::-1])
    assert one.loss == pytest.approx(other.loss, abs=1e-6)


# -- several steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [12, 20, 36])
def test_exactly_the_adapters_and_the_active_lora_modules_train(
    tuned: Make, identity: BaseIdentity, examples: list[Encoded], count: int
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


def by_hand(
    model: TunedModel, examples: Sequence[Encoded], batches: Sequence[Sequence[int]]
) -> tuple[Tensors, Tensors]:
    """Train with one optimiser over all batches; return tensors and first moments."""
    parameters = model.trainable()
    adam = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.0, fused=True)
    for indices in batches:
        batch = make_batch([examples[i] for i in indices], model.base.end_token)
        logits = model.logits_at(batch.tokens, batch.places)
        adam.zero_grad()
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        adam.step()
    moments = {n: adam.state[p]["exp_avg"].numpy() for n, p in parameters.items()}
    return model.take(), moments


def test_rounds_with_carried_moments_are_one_training_in_every_bit(
    tuned: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = tuned(13)
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
    tuned: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = tuned(12)
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
    tuned: Make, examples: list[Encoded]
) -> None:
    model = tuned(12)
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
    tuned: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    def trained(model: TunedModel, **changes: int) -> Tensors:
        begin(model, identity, 12)
        return take_steps(model, examples, **changes).tensors

    model, other = tuned(12), tuned(36)
    first = trained(model)
    torch.manual_seed(123)  # nothing is drawn from the library's own generator
    assert same(trained(model), first)
    assert same(trained(other), first)  # a model with more modules, switched off
    assert not same(trained(model, seed=1), first)
    assert not same(trained(model, round_=2), first)


def test_a_few_examples_are_learned(
    tuned: Make, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = tuned(36)
    begin(model, identity, 36)
    before = evaluate(model, examples[:2])
    take_steps(model, examples[:2], steps=25)
    after = evaluate(model, examples[:2])
    assert after.loss < before.loss - 0.5
    assert after.accuracy > before.accuracy


def test_training_that_diverges_is_stopped_with_a_sentence(
    tuned: Make, examples: list[Encoded]
) -> None:
    model = tuned(12)
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
