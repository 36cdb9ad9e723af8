"""What a person may set of alignment: meanings, units and ranges.

Defaults come from the published details of RLHF on models of GPT-2's size, but for what adapters
and LoRA want otherwise (learning rates) and what a device's few responses do (horizon).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from device_profiles.config_files import Config
from messaging.protocol import LEARNING_RATES

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Rate = Annotated[float, Field(gt=0, le=1)]
_Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Passes(Config):
    """How a batch goes through the model.

    Attributes:
        most_tokens: That go through at once, with the gradients of the whole; None for all.
        checkpoint: Keep less of the forward pass and compute it twice.
        clip_norm: The gradient's norm at most.
    """

    most_tokens: _Count | None = None
    checkpoint: bool = False
    clip_norm: _Positive = 1.0


class RolloutSettings(Passes):
    """How responses are drawn and what they are paid, for every method that draws its own.

    Attributes:
        rollouts: Responses a step.
        max_new_tokens: Of a response, the end token included.
        temperature: That logits are divided by, here and in every log-probability.
        no_end_penalty: Deviations of the reward model's scores that are added to the score of a
            response that did not end by itself.
        kl_coefficient: Reward that a nat of KL from the reference costs, at the beginning.
        kl_target: Nats a response that the coefficient is adapted to; None keeps it fixed.
        kl_horizon: Responses over which an error of 1 would double it. The published 10,000 is of
            runs of a million responses.
        clip: How far the ratio of probabilities may go before an advantage stops to count.
        most_kl: Nats an action; beyond this mean distance from the policy that drew the responses,
            the step ends.
        learning_rate: Of adapters and LoRA.
    """

    rollouts: _Count = 64
    max_new_tokens: _Count = 48
    temperature: Annotated[float, Field(gt=0, le=100)] = 0.7
    no_end_penalty: Annotated[float, Field(ge=-100, le=100)] = -1.0
    kl_coefficient: Annotated[float, Field(ge=0, le=100)] = 0.15
    kl_target: _Positive | None = 6.0
    kl_horizon: _Count = 1000
    clip: _Rate = 0.2
    most_kl: _Positive = 0.1
    learning_rate: _Rate = LEARNING_RATES["ppo"]


class PpoSettings(RolloutSettings):
    """PPO.

    Attributes:
        epochs: How often a step goes through its responses.
        minibatches: Parts, of whole responses, that it takes them in; an update each.
        value_clip: How far a value may go in a step, in deviations of the scores.
        gamma: Discount an action.
        lam: Of generalised advantage estimation: 1 trusts rewards alone, 0 the critics alone.
        critic_learning_rate: Of the critics' heads.
    """

    epochs: _Count = 4
    minibatches: _Count = 4
    value_clip: _Positive = 0.2
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    critic_learning_rate: _Rate = 1e-3


class RlooSettings(RolloutSettings):
    """REINFORCE with a leave-one-out baseline.

    With one epoch of one minibatch it is REINFORCE to the letter; with more, ratios are clipped as
    in PPO.

    Attributes:
        samples: Responses to a prompt.
        learning_rate: Of adapters and LoRA; one update a step wants larger ones than PPO's many.
        epochs: How often a step goes through its responses.
        minibatches: Parts, of whole responses, that it takes them in; an update each.
    """

    samples: Annotated[int, Field(ge=2, le=1000)] = 4
    learning_rate: _Rate = LEARNING_RATES["rloo"]
    epochs: _Count = 1
    minibatches: _Count = 1


class DpoSettings(Passes):
    """Direct preference optimisation.

    Attributes:
        steps: Updates.
        batch_size: Pairs an update.
        beta: Reward a nat: how strongly the policy is held to the reference.
        temperature: That logits are divided by; 1 is the likelihood itself.
        learning_rate: Of adapters and LoRA.
    """

    steps: _Count = 50
    batch_size: _Count = 8
    beta: _Positive = 0.1
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    learning_rate: _Rate = LEARNING_RATES["dpo"]
