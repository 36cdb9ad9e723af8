"""Log-probabilities and policy gradients, against the library's model and autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.alignment.policy import (
    all_log_probabilities,
    log_probabilities,
    policy_gradient,
    sequence_gradient,
    values_of,
)
from edge_client.data.batches import make_batch
from edge_client.data.packing import Packed, pack
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft import functions
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from messaging.layout import Tensors
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity
from tests.conftest import VOCABULARY
from tests.edge_client.conftest import EXAMPLES
from tests.edge_client.peft.test_packed_model import doubled, filled, furthest, make

COUNT = 13
TEMPERATURES = [1.0, 0.7]


@pytest.fixture(scope="module")
def tiny(identity: BaseIdentity) -> FrozenBase:
    return load_frozen(identity)


@pytest.fixture(scope="module")
def examples(tiny: FrozenBase) -> list[Encoded]:
    """Return responses of different lengths, one of which was cut off: no end token."""
    encoded = [encode_example(e, tiny.tokenizer, 128) for e in EXAMPLES]
    cut = Encoded(tokens=encoded[3].tokens[:-1], response_start=encoded[3].response_start)
    return [*encoded[:3], cut, encoded[4]]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no more than four rows of logits be computed at once."""
    monkeypatch.setattr(functions, "_CHUNK_ENTRIES", 4 * VOCABULARY)


def reference(tuned: Callable[..., TunedModel], tensors: Tensors) -> TunedModel:
    """Return the library's model with the same tensors, in double precision."""
    plain = tuned(COUNT)
    plain.put(tensors)
    plain.model.double()
    return plain


def at_actions(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities of targets. Shapes (P, V), (P,) -> (P,)."""
    return torch.log_softmax(logits / temperature, -1)[torch.arange(len(targets)), targets]


def padded_log_probabilities(
    plain: TunedModel, examples: Sequence[Encoded], temperature: float, side: str
) -> Tensor:
    """Return the same of a forward pass of all logits, with a mask and positions of its own."""
    longest = max(len(e.tokens) for e in examples)
    tokens = torch.full((len(examples), longest), 77)
    mask, begins = torch.zeros_like(tokens), []
    for row, example in enumerate(examples):
        begin = longest - len(example.tokens) if side == "left" else 0
        begins.append(begin)
        tokens[row, begin : begin + len(example.tokens)] = torch.from_numpy(example.tokens)
        mask[row, begin : begin + len(example.tokens)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = plain.model(tokens, attention_mask=mask, position_ids=positions).logits
    parts = []
    for row, (example, begin) in enumerate(zip(examples, begins, strict=True)):
        places = slice(begin + example.response_start - 1, begin + len(example.tokens) - 1)
        targets = torch.from_numpy(example.tokens[example.response_start :])
        parts.append(at_actions(logits[row, places], targets, temperature))
    return torch.cat(parts)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.usefixtures("few_rows")
def test_log_probabilities_are_those_of_a_full_pass_padded_on_either_side(
    tiny: FrozenBase,
    tuned: Callable[..., TunedModel],
    examples: list[Encoded],
    temperature: float,
    side: str,
) -> None:
    model = make(doubled(tiny), COUNT)
    plain = reference(tuned, filled(model))
    found = log_probabilities(model, pack(examples), temperature)
    expected = padded_log_probabilities(plain, examples, temperature, side)
    assert len(found) == sum(len(e.tokens) - e.response_start for e in examples)
    # double precision; the library's mask adds the most negative fp32 number, whose weight is 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("few_rows")
def test_log_probabilities_of_parts_are_those_of_the_whole(
    tiny: FrozenBase, examples: list[Encoded]
) -> None:
    model = make(doubled(tiny), COUNT)
    filled(model)
    whole = log_probabilities(model, pack(examples), 0.7)
    for most in (1, 60, 100_000):
        torch.testing.assert_close(
            all_log_probabilities(model, examples, 0.7, most), whole, rtol=1e-11, atol=1e-11
        )


def by_autograd(
    plain: TunedModel,
    examples: Sequence[Encoded],
    temperature: float,
    loss: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    padded = make_batch(examples, 7)
    logits = plain.logits_at(padded.tokens, padded.places)
    parameters = plain.trainable()
    found = loss(at_actions(logits, padded.targets, temperature))
    gradients = torch.autograd.grad(found, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def quadratic(batch: Packed) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a loss of log-probabilities whose slope differs from action to action."""
    scale = torch.linspace(-1, 2, len(batch.targets), dtype=torch.float64)
    return lambda logp: (scale * logp.square()).sum(), scale


# In double nothing but rounding is left between the two, amplified by 12 blocks of large weights.
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.usefixtures("few_rows")
def test_the_policy_gradient_is_autograds(
    *,
    tiny: FrozenBase,
    tuned: Callable[..., TunedModel],
    examples: list[Encoded],
    temperature: float,
    checkpoint: bool,
) -> None:
    model = make(doubled(tiny), COUNT)
    plain = reference(tuned, filled(model))
    batch = pack(examples)
    loss, scale = quadratic(batch)
    policy_gradient(
        model,
        batch,
        lambda logp, rows: 2 * scale[rows] * logp,
        temperature,
        checkpoint=checkpoint,
    )
    assert furthest(model.gradients(), by_autograd(plain, examples, temperature, loss)) < 1e-10


@pytest.mark.usefixtures("few_rows")
def test_gradients_of_parts_add_up(tiny: FrozenBase, examples: list[Encoded]) -> None:
    model = make(doubled(tiny), COUNT)
    filled(model)
    policy_gradient(model, pack(examples), lambda logp, _: logp, 0.7)
    whole = {name: g.clone() for name, g in model.gradients().items()}
    for i, part in enumerate((examples[:2], examples[2:])):
        policy_gradient(model, pack(part), lambda logp, _: logp, 0.7, add=i > 0)
    assert furthest(model.gradients(), whole) < 1e-10


@pytest.mark.usefixtures("few_rows")
def test_the_gradient_of_a_loss_of_whole_responses_is_autograds(
    tiny: FrozenBase, tuned: Callable[..., TunedModel], examples: list[Encoded]
) -> None:
    # the square of the sum: every slope depends on all log-probabilities
    model = make(doubled(tiny), COUNT)
    plain = reference(tuned, filled(model))
    sequence_gradient(model, pack(examples), lambda logp: (2 * logp.sum()).expand(len(logp)), 0.7)
    expected = by_autograd(plain, examples, 0.7, lambda logp: logp.sum().square())
    assert furthest(model.gradients(), expected) < 1e-10


# -- the reference ---------------------------------------------------------------------------------


def test_the_reference_is_there_for_a_while_and_the_own_values_come_back(
    tiny: FrozenBase, examples: list[Encoded]
) -> None:
    batch = pack(examples)
    other = make(tiny, COUNT)
    filled(other, seed=1)
    model = make(tiny, COUNT)
    filled(model, seed=2)
    own, mine = model.take_flat(), log_probabilities(model, batch, 0.7)
    with values_of(model, other.take_flat()):
        theirs = log_probabilities(model, batch, 0.7)
    assert torch.equal(theirs, log_probabilities(other, batch, 0.7))
    assert not torch.equal(theirs, mine)
    assert np.array_equal(model.take_flat(), own)
    assert torch.equal(log_probabilities(model, batch, 0.7), mine)


def test_the_own_values_come_back_after_an_exception(tiny: FrozenBase) -> None:
    model = make(tiny, COUNT)
    filled(model)
    own = model.take_flat()
    with pytest.raises(KeyboardInterrupt), values_of(model, 2 * own):  # noqa: PT012
        assert np.array_equal(model.take_flat(), 2 * own)
        raise KeyboardInterrupt
    assert np.array_equal(model.take_flat(), own)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_reference_of_other_modules_is_refused(tiny: FrozenBase, extra: int) -> None:
    model: PackedModel = make(tiny, COUNT)
    filled(model)
    own = model.take_flat()
    other = np.zeros(len(own) + extra, np.float32)
    with (
        pytest.raises(InputError, match=r"a reference of \d+ entries .*the same modules"),
        values_of(model, other),
    ):
        pass
    assert np.array_equal(model.take_flat(), own)
