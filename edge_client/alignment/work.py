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
import numpy.typing as npt

from device_profiles.errors import InputError
from device_profiles.methods import Objective
from device_profiles.seeds import stream
from edge_client.alignment.critic import Critic
from edge_client.alignment.descent import policy_descent
from edge_client.alignment.dpo import Compared, dpo_steps
from edge_client.alignment.figures import StepFigures, measure
from edge_client.alignment.kl import summed
from edge_client.alignment.ppo import ppo_step
from edge_client.alignment.rloo import rloo_step
from edge_client.alignment.rollouts import Rollout, judged, mean_scores
from edge_client.alignment.settings import DpoSettings, PpoSettings, RlooSettings
from edge_client.data.instructions import Example
from edge_client.data.preferences import Pair
from edge_client.data.prompt_files import Prompt
from edge_client.data.prompts import Encoded, encode_example, prompt
from edge_client.descent import Moments
from edge_client.inference.batched import Response, generate
from edge_client.instruction_work import InstructionWork
from edge_client.peft.packed_model import PackedModel
from edge_client.policy import Policy
from edge_client.progress import Interruption
from edge_client.reward.judging import Judging
from edge_client.stage_work import GlobalStates, Measured, Trained
from edge_client.state import ClientState, StateStore
from edge_client.stopwatch import timed
from messaging.layout import Tensors, Vector
from messaging.protocol import AlignmentSettings, Preference, ResponseFigures, Task

_CRITIC = "critic/"
_SAMPLES = 4  # of a prompt, in RLOO

Tokens = npt.NDArray[np.int64]


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
        self._judging = judging
        self._objectives = list(objectives)
        self._weights = _weights(objectives, preference)
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
        settings = _settings(task)
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
        settings = _settings(task)
        reference = self._reference(state, states)  # a device that begins keeps it now
        measured = self._instructions.evaluate(task, state, states)
        asked = self._prompts(self._data.held_out_prompts[: settings.held_out_prompts], task)
        model = self._model
        with timed("generation"):
            answers = generate(
                model,
                asked,
                most_tokens=settings.max_new_tokens,
                temperature=0.0,
                end_token=model.base.end_token,
                generator=None,
            )
        rollouts = self._judged(asked, answers, states)
        found = measure(model, rollouts, reference, _ppo_settings(settings, task, len(rollouts)))
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
        settings = _settings(task)
        model = self._model
        heads = self._judging.heads(self._reward_tensors(states), self._objectives)
        critics: dict[str, Critic] = {
            name: Critic(
                heads.build,
                _critic_tensors(state, name) or heads.tensors(name),
                mean=heads.scales[name].mean,
                deviation=heads.scales[name].deviation,
                learning_rate=_PPO.critic_learning_rate,
                moments=_critic_moments(state, name),
            )
            for name in self._objectives
        }
        descent = policy_descent(
            model,
            learning_rate=task.learning_rate,
            clip_norm=_PPO.clip_norm,
            moments=_moments(state),
        )
        coefficient = state.numbers.get("kl_coefficient", settings.kl_coefficient)
        done: list[StepFigures] = []
        drawn: list[Rollout] = []
        minibatches = 1
        for number in range(task.local_steps):
            self._interruption.check()
            words = (self._policy.device.id, task.round, number)
            rollouts = self._draw(task, states, words)
            arguments: dict[str, Any] = {
                "reference": reference,
                "weights": self._weights,
                "kl_coefficient": coefficient,
                "seed": task.seed,
                "words": words,
            }
            if settings.algorithm == "rloo":
                how = _rloo_settings(settings, task)
                minibatches = how.minibatches
                done.append(rloo_step(model, descent, rollouts, settings=how, **arguments))
            else:
                ppo = _ppo_settings(settings, task, len(rollouts))
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
                extra=_kept_critics(critics) if settings.algorithm == "ppo" else {},
                numbers={
                    "kl": float(np.mean([step.kl for step in done])),
                    "kl_coefficient": coefficient,
                    **{
                        f"critic_steps_{name}": float(critic.moments().steps)
                        for name, critic in critics.items()
                    },
                },
            ),
            after=None if states.shared is None else self._policy.shared(tensors),
            loss=_value_loss(done),
            weight=self._policy.device.examples,
            **_counted(drawn, done, minibatches),
        )

    def _train_on_pairs(
        self, task: Task, state: ClientState, states: GlobalStates, reference: Vector
    ) -> Trained:
        model = self._model
        descent = policy_descent(
            model,
            learning_rate=task.learning_rate,
            clip_norm=_PPO.clip_norm,
            moments=_moments(state),
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
            read_tokens=round(2 * len(pairs) * length),
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

    # -- responses -------------------------------------------------------------------------------

    def _draw(
        self, task: Task, states: GlobalStates, words: tuple[str | int, ...]
    ) -> list[Rollout]:
        """Return responses of the policy to some of the client's prompts, with their scores.

        Raises:
            InputError: If it has none.
        """
        settings = _settings(task)
        samples = _SAMPLES if settings.algorithm == "rloo" else 1
        prompts = self._data.prompts
        if not prompts:
            raise InputError(
                f"'{self._policy.device.id}' has no prompt to answer: each that it learns from is "
                "held out for another objective; give a file of prompts, or more pairs"
            )
        wanted = max(1, settings.rollouts // samples)
        chooser = stream(task.seed, "prompts", *words)
        chosen = chooser.choice(len(prompts), wanted, replace=len(prompts) < wanted)
        asked = self._prompts([prompts[i] for i in np.repeat(chosen, samples)], task)
        model = self._model
        with timed("generation"):
            answers = generate(
                model,
                asked,
                most_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                end_token=model.base.end_token,
                generator=stream(task.seed, "rollouts", *words),
            )
        return self._judged(asked, answers, states)

    def _judged(
        self,
        asked: Sequence[Tokens],
        answers: Sequence[Response],
        states: GlobalStates,
    ) -> list[Rollout]:
        heads = self._judging.heads(self._reward_tensors(states), self._objectives)
        return judged(
            asked,
            answers,
            end_token=self._model.base.end_token,
            token_features=self._judging.trunk.token_features,
            scores={name: heads.score(name) for name in self._objectives},
        )

    def _prompts(self, prompts: Sequence[Prompt], task: Task) -> list[Tokens]:
        """Return prompts as tokens: the end of what is too long, as training cuts it."""
        base = self._model.base
        room = min(task.max_length, base.identity.positions) - _settings(task).max_new_tokens - 1
        if room < 1:
            raise InputError(
                f"max_new_tokens = {_settings(task).max_new_tokens} leaves no room for a prompt in "
                f"max_length = {task.max_length}; give fewer"
            )
        texts = [prompt(p.instruction, p.input) for p in prompts]
        return [np.array(base.tokenizer(t).input_ids[-room:], np.int64) for t in texts]

    # -- what it is held to, and judged by -------------------------------------------------------

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

    def _reward_tensors(self, states: GlobalStates) -> Tensors:
        tensors = self._judging.unpack(states.reward, self._objectives)
        if tensors is None:
            raise InputError(
                f"'{self._policy.device.id}' is asked to align without reward models; put the "
                "stage reward before alignment"
            )
        return tensors


_PPO = PpoSettings()


def _weights(objectives: Sequence[Objective], preference: Preference) -> dict[str, float]:
    """Return the weight of each objective; one alone has all of it."""
    if len(objectives) == 1:
        return {objectives[0]: 1.0}
    return {name: float(getattr(preference, name)) for name in objectives}


def _settings(task: Task) -> AlignmentSettings:
    return task.alignment or AlignmentSettings()


def _ppo_settings(settings: AlignmentSettings, task: Task, responses: int) -> PpoSettings:
    return PpoSettings(
        rollouts=settings.rollouts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        kl_coefficient=settings.kl_coefficient,
        kl_target=settings.kl_target or None,
        learning_rate=task.learning_rate,
        minibatches=min(_PPO.minibatches, responses),
    )


def _rloo_settings(settings: AlignmentSettings, task: Task) -> RlooSettings:
    return RlooSettings(
        rollouts=settings.rollouts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        kl_coefficient=settings.kl_coefficient,
        kl_target=settings.kl_target or None,
        learning_rate=task.learning_rate,
        samples=_SAMPLES,
    )


def _moments(state: ClientState) -> Moments:
    return Moments(first=state.first_moments, second=state.second_moments, steps=state.steps)


def _critic_tensors(state: ClientState, name: str) -> Tensors:
    return _under(state.extra, f"{_CRITIC}{name}/value/")


def _critic_moments(state: ClientState, name: str) -> Moments:
    return Moments(
        first=_under(state.extra, f"{_CRITIC}{name}/m/"),
        second=_under(state.extra, f"{_CRITIC}{name}/v/"),
        steps=int(state.numbers.get(f"critic_steps_{name}", 0)),
    )


def _kept_critics(critics: Mapping[str, Critic]) -> Tensors:
    kept: Tensors = {}
    for name, critic in critics.items():
        moments = critic.moments()
        parts = {"value": critic.tensors(), "m": moments.first, "v": moments.second}
        for part, tensors in parts.items():
            kept |= {f"{_CRITIC}{name}/{part}/{n}": t for n, t in tensors.items()}
    return kept


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _value_loss(done: Sequence[StepFigures]) -> float | None:
    """Return the critics' mean loss; the policy's own says nothing of how well it does."""
    losses = [loss for step in done for loss in step.value_losses.values()]
    return float(np.mean(losses)) if losses else None


def _counted(
    drawn: Sequence[Rollout], done: Sequence[StepFigures], minibatches: int
) -> dict[str, int]:
    """Return what went through the model, for the costs.

    A response is drawn, read by the trunk, and looked at under the old and the reference policy:
    four times forward; then it is trained on in each epoch that was gone through. ``minibatches``
    make an epoch.
    """
    tokens = sum(len(r.example.tokens) for r in drawn)
    passes = float(np.mean([step.improvement.updates for step in done])) / minibatches
    return {
        "tokens": round(tokens * passes),
        "rows": max(1, round(len(drawn) * passes)),
        "read_tokens": 4 * tokens,
    }
