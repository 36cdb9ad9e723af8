"""Alignment on one client: responses to its own prompts, judged by its own weights of rewards.

The reward models are frozen; a critic for each of them, starting as its copy, learns on the device
and stays there, as the LoRA modules do. The policy of stage 1, from which divergence is measured,
is kept on the device's disk as one vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from device_profiles.errors import InputError
from device_profiles.methods import Objective
from edge_client.alignment.answering import Answering
from edge_client.alignment.critic import Critic
from edge_client.alignment.descent import policy_descent
from edge_client.alignment.dpo import Compared, dpo_steps
from edge_client.alignment.figures import StepFigures, measure
from edge_client.alignment.kept import (
    critic_moments,
    critic_steps,
    critic_tensors,
    critics_as_tensors,
    policy_moments,
)
from edge_client.alignment.kl import summed
from edge_client.alignment.ppo import ppo_step
from edge_client.alignment.rloo import rloo_step
from edge_client.alignment.rollouts import Rollout, mean_scores
from edge_client.alignment.settings import DpoSettings
from edge_client.alignment.task_settings import (
    PPO,
    alignment_settings,
    ppo_settings,
    rloo_settings,
    weights,
)
from edge_client.data.instructions import Example
from edge_client.data.preferences import Pair
from edge_client.data.prompt_files import Prompt
from edge_client.data.prompts import Encoded, encode_example
from edge_client.instruction_work import InstructionWork
from edge_client.peft.packed_model import PackedModel
from edge_client.policy import Policy
from edge_client.progress import Interruption
from edge_client.reward.judging import Heads, Judging
from edge_client.stage_work import GlobalStates, Measured, Trained
from edge_client.state import ClientState, StateStore
from messaging.layout import Vector
from messaging.protocol import Preference, ResponseFigures, Task


@dataclass(frozen=True, kw_only=True)
class AlignmentData:
    """What a client answers and is measured on; its pairs, by objective, serve DPO alone."""

    prompts: list[Prompt]
    held_out_prompts: list[Prompt]
    pairs: Mapping[Objective, list[Pair]]


class AlignmentWork:
    """One client's part of alignment.

    Args:
        policy: Its modules.
        instructions: Its part of stage 1, measured again after each round: does it forget?
        judging: The trunk and the reference set that reward models are used with.
        objectives: That it is aligned by.
        preference: The user's own.
        data: What it answers.
        store: Where the stage-1 policy is kept.
        interruption: Looked at before every step: a round that is broken off is trained again, to
            the same bits.
    """

    def __init__(
        self,
        policy: Policy,
        instructions: InstructionWork,
        judging: Judging,
        *,
        objectives: Sequence[Objective],
        preference: Preference,
        data: AlignmentData,
        store: StateStore,
        interruption: Interruption | None = None,
    ) -> None:
        self._policy = policy
        self._instructions = instructions
        self._objectives = list(objectives)
        self._answering = Answering(policy.device.id, judging, self._objectives)
        self._weights = weights(objectives, preference)
        self._data = data
        self._store = store
        self._interruption = interruption or Interruption()

    def begin(self, seed: int) -> ClientState:
        """Return the state of a client that has not trained yet."""
        return self._instructions.begin(seed)

    @property
    def _model(self) -> PackedModel:
        model = self._policy.model
        if not isinstance(model, PackedModel):
            raise InputError(
                f"alignment needs the packed step of a GPT-2, and {model.base.identity.name} is "
                "none; leave 'alignment' out of stages"
            )
        return model

    def train(self, task: Task, state: ClientState, states: GlobalStates) -> Trained:
        """Take the task's steps, each on a batch of responses; fewer where divergence is too large.

        Raises:
            InputError: If the state does not fit the modules, the reward models are not there, or
                training diverges.
        """
        settings = alignment_settings(task)
        reference = self._reference(state, states)
        self._policy.install(state, states.shared)
        if settings.algorithm == "dpo":
            return self._train_on_pairs(task, state, states, reference)
        return self._train_on_rollouts(task, state, states, reference)

    def evaluate(self, task: Task, state: ClientState, states: GlobalStates) -> Measured:
        """Return the scores of greedy responses to held-out prompts, and stage 1's results.

        Raises:
            InputError: If the state does not fit the modules, or the reward models are not there.
        """
        settings = alignment_settings(task)
        reference = self._reference(state, states)  # a device that begins keeps it now
        measured = self._instructions.evaluate(task, state, states)
        model = self._model
        asked = self._data.held_out_prompts[: settings.held_out_prompts]
        rollouts = self._answering.greedy(model, asked, task, states)
        found = measure(model, rollouts, reference, ppo_settings(task, len(rollouts)))
        figures = ResponseFigures(
            responses=len(rollouts),
            scores={name: mean_scores(rollouts)[name] for name in self._objectives},
            tokens=float(np.mean([r.tokens for r in rollouts])),
            ended=float(np.mean([r.ended for r in rollouts])),
            kl=state.numbers.get("kl"),
            drift=float(summed(found.acting, found.reference, found.lengths).mean()),
        )
        return replace(measured, responses=figures)

    # -- training --------------------------------------------------------------------------------

    def _train_on_rollouts(
        self, task: Task, state: ClientState, states: GlobalStates, reference: Vector
    ) -> Trained:
        settings = alignment_settings(task)
        model = self._model
        heads = self._answering.heads(states)
        critics: dict[str, Critic] = {
            name: _critic(heads, name, state) for name in self._objectives
        }
        descent = policy_descent(
            model,
            learning_rate=task.learning_rate,
            clip_norm=PPO.clip_norm,
            moments=policy_moments(state),
        )
        coefficient = state.numbers.get("kl_coefficient", settings.kl_coefficient)
        done: list[StepFigures] = []
        drawn: list[Rollout] = []
        minibatches = 1
        for number in range(task.local_steps):
            self._interruption.check()
            words = (self._policy.device.id, task.round, number)
            rollouts = self._answering.drawn(model, self._data.prompts, task, states, words)
            arguments: dict[str, Any] = {
                "reference": reference,
                "weights": self._weights,
                "kl_coefficient": coefficient,
                "seed": task.seed,
                "words": words,
            }
            if settings.algorithm == "rloo":
                how = rloo_settings(task)
                minibatches = how.minibatches
                done.append(rloo_step(model, descent, rollouts, settings=how, **arguments))
            else:
                ppo = ppo_settings(task, len(rollouts))
                minibatches = ppo.minibatches
                done.append(ppo_step(model, descent, critics, rollouts, settings=ppo, **arguments))
            coefficient = done[-1].next_kl_coefficient
            drawn += rollouts
            if done[-1].kl > settings.kl_limit:
                break
        tensors = model.take()
        moments = descent.moments()
        return Trained(
            state=replace(
                state,
                personal=self._policy.personal(tensors),
                first_moments=moments.first,
                second_moments=moments.second,
                steps=moments.steps,
                extra=critics_as_tensors(critics) if settings.algorithm == "ppo" else {},
                numbers={
                    "kl": float(np.mean([step.kl for step in done])),
                    "kl_coefficient": coefficient,
                    **critic_steps(critics),
                },
            ),
            after=None if states.shared is None else self._policy.shared(tensors),
            loss=_value_loss(done),
            weight=self._policy.device.examples,
            **_counted(drawn, done, minibatches, self._answering),
        )

    def _train_on_pairs(
        self, task: Task, state: ClientState, states: GlobalStates, reference: Vector
    ) -> Trained:
        model = self._model
        descent = policy_descent(
            model,
            learning_rate=task.learning_rate,
            clip_norm=PPO.clip_norm,
            moments=policy_moments(state),
        )
        pairs = [
            self._compared(name, pair, task)
            for name, own in self._data.pairs.items()
            for pair in own
        ]
        how = DpoSettings(
            steps=task.local_steps, batch_size=task.batch_size, learning_rate=task.learning_rate
        )
        done = dpo_steps(
            model,
            descent,
            pairs,
            reference=reference,
            weights=self._weights,
            settings=how,
            seed=task.seed,
            words=(self._policy.device.id, task.round),
        )
        tensors, moments = model.take(), descent.moments()
        rows = 2 * min(how.batch_size, len(pairs)) * done.steps
        length = float(np.mean([len(p.chosen.tokens) + len(p.rejected.tokens) for p in pairs])) / 2
        return Trained(
            state=replace(
                state,
                personal=self._policy.personal(tensors),
                first_moments=moments.first,
                second_moments=moments.second,
                steps=moments.steps,
            ),
            after=None if states.shared is None else self._policy.shared(tensors),
            loss=done.loss,
            weight=self._policy.device.examples,
            tokens=round(rows * length),
            rows=rows,
            read_tokens=round(2 * done.pairs * length),
        )

    def _compared(self, objective: Objective, pair: Pair, task: Task) -> Compared:
        chosen, rejected = (
            self._encoded(pair, side, task) for side in (pair.chosen, pair.rejected)
        )
        return Compared(objective=objective, chosen=chosen, rejected=rejected)

    def _encoded(self, pair: Pair, response: str, task: Task) -> Encoded:
        base = self._model.base
        example = Example(instruction=pair.instruction, input=pair.input, output=response)
        return encode_example(
            example, base.tokenizer, min(task.max_length, base.identity.positions)
        )

    # -- what it is held to ----------------------------------------------------------------------

    def _reference(self, state: ClientState, states: GlobalStates) -> Vector:
        """Return the policy of stage 1, all of it; the first time, keep it.

        Raises:
            InputError: If it was kept once and is gone.
        """
        kept = self._store.reference()
        if kept is not None:
            return kept
        if state.steps or state.numbers:
            raise InputError(
                f"the policy of stage 1 of '{self._policy.device.id}' is gone from "
                f"{self._store.folder}, and alignment has begun; start a new run"
            )
        self._policy.install(state, states.reference)
        vector = self._model.take_flat()
        self._store.keep_reference(vector)
        return vector


def _critic(heads: Heads, objective: Objective, state: ClientState) -> Critic:
    """Return an objective's critic as the state has it, or as it begins."""
    tensors, mean, deviation = heads.critic(objective)
    return Critic(
        heads.build,
        critic_tensors(state, objective) or tensors,
        mean=mean,
        deviation=deviation,
        learning_rate=PPO.critic_learning_rate,
        moments=critic_moments(state, objective),
    )


def _value_loss(done: Sequence[StepFigures]) -> float | None:
    """Return the critics' mean loss; the policy's own says nothing of how well it does."""
    losses = [loss for step in done for loss in step.value_losses.values()]
    return float(np.mean(losses)) if losses else None


def _counted(
    drawn: Sequence[Rollout], done: Sequence[StepFigures], minibatches: int, answering: Answering
) -> dict[str, int]:
    """Return what went through the model, for the costs.

    A response is drawn, read by the trunk (with adapters on it, once for each reward model), by an
    encoder where there is one, and looked at under the old and the reference policy; then it is
    trained on in each epoch that was gone through. ``minibatches`` make an epoch.
    """
    tokens = sum(len(r.example.tokens) for r in drawn)
    passes = float(np.mean([step.improvement.updates for step in done])) / minibatches
    return {
        "tokens": round(tokens * passes),
        "rows": max(1, round(len(drawn) * passes)),
        "read_tokens": (3 + answering.reads) * tokens,
        "encoder_tokens": tokens if answering.encodes else 0,
    }
