"""What holds a training back: decay, a proximal pull, early stopping, and examples set apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from device_profiles.errors import InputError
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft.flat_state import joined
from edge_client.peft.packed_model import PackedModel
from edge_client.restraint import Anchor, Restraint, Watch, set_apart
from edge_client.state import ClientState
from edge_client.trainer import Training, evaluate, train
from messaging.layout import Tensors, Vector
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity
from tests.edge_client.conftest import (
    ADAPTER_SIZE,
    EXAMPLES,
    RANK,
    adapter_layout,
    random_tensors,
)

RATE = 0.01
SHARED = 36 * (2 * 16 * ADAPTER_SIZE + ADAPTER_SIZE + 16)  # adapters of 12 blocks of width 16


@pytest.fixture(scope="module")
def base(identity: BaseIdentity) -> FrozenBase:
    return load_frozen(identity)


@pytest.fixture(scope="module")
def examples(base: FrozenBase) -> list[Encoded]:
    return [encode_example(e, base.tokenizer, 128) for e in EXAMPLES]


@pytest.fixture
def fresh(base: FrozenBase, identity: BaseIdentity) -> Callable[[], PackedModel]:
    """Make models with twelve LoRA modules, always the same values on them."""

    def make() -> PackedModel:
        model = PackedModel(
            base, adapter_size=ADAPTER_SIZE, placement="qkv", lora_count=12, lora_rank=RANK
        )
        model.put(random_tensors(identity, 12))
        return model

    return make


def trained(model: PackedModel, examples: list[Encoded], **changes: object) -> Training:
    settings = {
        "steps": 1,
        "batch_size": 2,
        "learning_rate": RATE,
        "seed": 0,
        "words": ("pi5-01", 1),
        **changes,
    }
    return train(model, ClientState(round=0, personal={}), examples, **settings)  # type: ignore[arg-type]


def flat(tensors: Tensors, model: PackedModel) -> Vector:
    return joined(tensors, model.trainable())


def same(one: Tensors, other: Tensors) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)


# -- weight decay and the proximal term ------------------------------------------------------------


def test_decay_takes_its_share_of_every_value_beside_adams_step(
    fresh: Callable[[], PackedModel], examples: list[Encoded]
) -> None:
    start = fresh().take_flat()
    free = flat(trained(fresh(), examples).tensors, fresh())
    held = flat(trained(fresh(), examples, restraint=Restraint(weight_decay=0.5)).tensors, fresh())
    # decoupled: 0.01 * 0.5 of the value, whatever the gradient; fp32 values of size 1 round at 1e-7
    np.testing.assert_allclose(free - held, 0.005 * start, atol=3e-7)


def test_a_proximal_term_adds_its_pull_to_the_gradient_of_what_is_shared_alone(
    fresh: Callable[[], PackedModel], examples: list[Encoded]
) -> None:
    start = fresh().take_flat()
    away = np.random.default_rng(1).normal(0, 1e-3, SHARED).astype(np.float32)
    anchor = Anchor(values=start[:SHARED] - away, pull=0.25)
    free, held = (trained(fresh(), examples, anchor=a) for a in (None, anchor))
    change = flat(held.first_moments, fresh()) - flat(free.first_moments, fresh())
    # the first moment is a tenth of the gradient, whose norm here is below that at which it is cut
    np.testing.assert_allclose(change[:SHARED], 0.1 * 0.25 * away, atol=2e-8)
    assert not change[SHARED:].any()
    assert held.loss == free.loss  # the term is no part of the loss that is told


def test_a_strong_pull_keeps_what_is_shared_near_and_leaves_lora_free(
    fresh: Callable[[], PackedModel], examples: list[Encoded]
) -> None:
    start = fresh().take_flat()
    moved = {}
    for pull in (0.0, 1e3):
        anchor = Anchor(values=start[:SHARED].copy(), pull=pull)
        done = trained(fresh(), examples, steps=6, anchor=anchor)
        moved[pull] = flat(done.tensors, fresh()) - start
    assert np.linalg.norm(moved[1e3][:SHARED]) < 0.5 * np.linalg.norm(moved[0.0][:SHARED])
    assert np.linalg.norm(moved[1e3][SHARED:]) > 0


def test_what_is_shared_is_the_beginning_of_what_trains(
    fresh: Callable[[], PackedModel], identity: BaseIdentity
) -> None:
    layout = adapter_layout(identity)
    assert layout.size == SHARED
    names = [spec.name for spec in layout.specs]
    assert list(fresh().trainable())[: len(names)] == names


# -- early stopping --------------------------------------------------------------------------------


def a_watch(losses: list[float], patience: int, every: int = 2) -> Watch:
    """Return early stopping that will measure these losses one after the other."""
    told: Iterator[float] = iter(losses)
    counter = iter(range(100))
    return Watch(
        patience,
        every,
        loss=lambda: next(told),
        values=lambda: np.full((3, 1), next(counter), np.float32),
        seen=None,
    )


def test_patience_counts_looks_without_a_lower_loss_and_the_best_is_remembered() -> None:
    watch = a_watch([3.0, 2.0, 2.5, 1.5, 1.5, 1.6], patience=2)
    over = [watch.over(step) for step in range(11)]
    assert over.index(True) == 10  # looks at 0, 2, 4, 6, 8 and 10; the best at 6
    assert watch.seen is not None
    assert (watch.seen.best_loss, watch.seen.best_step, watch.seen.looks) == (1.5, 6, 6)
    assert watch.seen.best[0, 0] == 2  # values are kept at 0, 2 and 6


def test_without_patience_nothing_is_looked_at() -> None:
    watch = a_watch([], patience=0)
    assert not any(watch.over(step) for step in range(8))
    assert watch.look(8) is None


def test_a_step_is_looked_at_once() -> None:
    watch = a_watch([3.0], patience=1)
    assert not watch.over(0)
    assert not watch.over(0)
    assert watch.look(0) is not None


def test_what_is_kept_is_the_training_that_ends_at_the_best_step_moments_included(
    fresh: Callable[[], PackedModel], examples: list[Encoded]
) -> None:
    learned, validation = examples[:3], examples[3:]
    how = {"learning_rate": 0.1, "batch_size": 1}
    losses = []
    for steps in range(9):
        model = fresh()
        if steps:
            trained(model, learned, steps=steps, **how)
        losses.append(evaluate(model, validation).loss)
    best = next(s for s in range(7) if min(losses[s + 1 : s + 3]) >= min(losses[: s + 1]))
    assert best > 0  # the case is one in which stopping early matters
    restraint = Restraint(patience=2, every=1)
    model = fresh()
    done = trained(model, learned, steps=20, restraint=restraint, validation=validation, **how)
    short = trained(fresh(), learned, steps=best, **how)
    assert done.kept_steps == best == done.steps
    assert same(done.tensors, short.tensors)
    assert same(done.first_moments, short.first_moments)
    assert same(done.second_moments, short.second_moments)
    assert same(model.take(), short.tensors)
    taken = best + 2
    assert done.rows == taken
    assert done.read_tokens == (taken + 1) * sum(len(e.tokens) for e in validation)


def test_where_every_look_is_lower_nothing_is_taken_back(
    fresh: Callable[[], PackedModel], examples: list[Encoded]
) -> None:
    restraint = Restraint(patience=1, every=3)
    watched = trained(fresh(), examples, steps=7, restraint=restraint, validation=examples)
    free = trained(fresh(), examples, steps=7)
    assert watched.kept_steps == 7
    assert same(watched.tensors, free.tensors)


# -- examples set apart ----------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share", "size"), [(10, 0.2, 2), (3, 0.1, 1), (2, 0.9, 1)])
def test_examples_are_set_apart_alike_in_every_round(count: int, share: float, size: int) -> None:
    rows = list(range(count))
    learned, apart = set_apart(rows, share, seed=7, client="pi5-01")
    assert len(apart) == size
    assert sorted(learned + apart) == rows
    assert set_apart(rows, share, seed=7, client="pi5-01") == (learned, apart)


def test_which_examples_are_set_apart_belongs_to_client_and_seed() -> None:
    rows = list(range(100))
    chosen = [
        set_apart(rows, 0.2, seed=seed, client=client)[1]
        for seed, client in ((7, "pi5-01"), (8, "pi5-01"), (7, "pi5-02"))
    ]
    assert len({tuple(part) for part in chosen}) == 3


def test_one_example_is_too_few_to_set_any_apart() -> None:
    with pytest.raises(InputError, match=r"'pi5-01' has 1 training example.*leave stopping"):
        set_apart([1], 0.2, seed=7, client="pi5-01")
