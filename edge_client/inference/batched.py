"""Responses to many prompts at once, from the model that is being trained.

Tokens are drawn from the whole softmax, so that the probability a token was drawn with is the one
that the model gives it. ``generation`` answers one prompt for a person, on any runtime.
Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.peft.decoding import Decoder
from edge_client.peft.packed_model import PackedModel

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Response:
    """What a model said after a prompt.

    Attributes:
        tokens: Without the end token. Shape (T,), int64; T may be 0.
        ended: Whether the end token followed; otherwise the response was cut off.
    """

    tokens: IntArray
    ended: bool


@torch.inference_mode()
def generate(
    model: PackedModel,
    prompts: Sequence[IntArray],
    *,
    most_tokens: int,
    temperature: float,
    end_token: int,
    generator: np.random.Generator | None,
    rows_at_once: int | None = None,
) -> list[Response]:
    """Return a response to each prompt, in their order.

    Prompt i takes numbers i * most_tokens to (i + 1) * most_tokens - 1 of those that the generator
    gives, one a token: a response depends on its prompt and its place alone, but for rounding.

    Args:
        model: With the modules that are active now.
        prompts: Up to where the response begins; each a sequence of at least 1 token.
        most_tokens: Drawn for a prompt at most, the end token counted. A prompt and its response
            without the end token never take more than the model's positions.
        temperature: Logits are divided by it; 0 takes the likeliest token every time.
        end_token: Ends a response.
        generator: Not used at temperature 0.
        rows_at_once: Prompts in memory together, those of about the same length; None for all.

    Raises:
        InputError: If an argument is out of its range, a prompt leaves no room for a response, or
            a logit is not a finite number.
    """
    positions = len(model.base.weights.positions)
    _check(prompts, positions, most_tokens, temperature, rows_at_once)
    uniforms = None
    if temperature > 0:
        if generator is None:
            raise InputError(f"temperature {temperature:g} without a generator; give one")
        uniforms = generator.random((len(prompts), most_tokens))
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    limits = np.minimum(most_tokens, positions - lengths)
    order = np.argsort(lengths, kind="stable")
    responses: dict[int, Response] = {}
    together = rows_at_once or max(1, len(order))
    for start in range(0, len(order), together):
        rows = order[start : start + together]
        written = _write(
            model,
            [np.asarray(prompts[row], np.int64) for row in rows],
            limits[rows],
            end_token=end_token,
            temperature=temperature,
            uniforms=None if uniforms is None else uniforms[rows],
        )
        responses.update(zip(rows.tolist(), written, strict=True))
    return [responses[row] for row in range(len(prompts))]


def choose(logits: Tensor, temperature: float, uniforms: npt.NDArray[np.float64] | None) -> Tensor:
    """Return a token for each row: the likeliest, or the one at which the CDF passes a number.

    Args:
        logits: Shape (R, V); overwritten.
        temperature: As above; 0 where there are no ``uniforms``.
        uniforms: From [0, 1), shape (R,); None for the likeliest.

    Raises:
        InputError: If a logit is not a finite number.
    """
    best, likeliest = logits.max(1)
    if not best.isfinite().all():
        raise InputError(
            "the model gives a logit that is not a finite number: it is damaged, or its training "
            "diverged; go back to an earlier state or lower the learning rate"
        )
    if uniforms is None:
        return likeliest
    weights = logits.sub_(best[:, None]).div_(temperature).exp_()
    ends = weights.cumsum(1, dtype=torch.float64)  # of fp32, a vocabulary's sum is off by 1e-4
    wanted = torch.from_numpy(uniforms).to(ends.device)[:, None] * ends[:, -1:]
    place = torch.searchsorted(ends, wanted, right=True)[:, 0]
    return place.clamp_(max=logits.shape[1] - 1)


def _write(
    model: PackedModel,
    prompts: Sequence[IntArray],
    limits: IntArray,
    *,
    end_token: int,
    temperature: float,
    uniforms: npt.NDArray[np.float64] | None,
) -> list[Response]:
    """Return a response to each prompt, of at most ``limits`` >= 1 tokens, (R,)."""
    most = int(limits.max())
    tokens = np.zeros((len(prompts), most), np.int64)
    ended = np.zeros(len(prompts), np.bool_)
    lengths = np.zeros(len(prompts), np.int64)
    rows = np.arange(len(prompts))  # which of them lies at each place of the decoder
    decoder = Decoder(model, prompts, most - 1)
    logits = decoder.logits
    for step in range(most):
        drawn = choose(logits, temperature, None if uniforms is None else uniforms[rows, step])
        found = drawn.cpu().numpy()
        tokens[rows, step] = found
        ended[rows] = found == end_token
        lengths[rows] = step + (found != end_token)
        on = (found != end_token) & (step + 1 < limits[rows])
        if not on.any():
            break
        if not on.all():
            places = decoder.keep(on)
            rows, drawn = rows[places], drawn[torch.from_numpy(places).to(drawn.device)]
        logits = decoder.step(drawn)
    return [
        Response(tokens=row[:length].copy(), ended=bool(end))
        for row, length, end in zip(tokens, lengths, ended, strict=True)
    ]


def _check(
    prompts: Sequence[IntArray],
    positions: int,
    most_tokens: int,
    temperature: float,
    rows_at_once: int | None,
) -> None:
    if most_tokens < 1:
        raise InputError(f"most_tokens is {most_tokens}; choose at least 1")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; choose a finite number of at least 0")
    if rows_at_once is not None and rows_at_once < 1:
        raise InputError(f"rows_at_once is {rows_at_once}; choose at least 1, or None for all")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i} has no token; give at least 1")
        if len(prompt) >= positions:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens and the model reads {positions}, which "
                f"leaves no room for a response; shorten it by at least "
                f"{len(prompt) - positions + 1}"
            )
