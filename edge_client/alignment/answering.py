"""A client's responses to prompts, with what its objectives' reward models say of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError
from device_profiles.methods import Objective
from device_profiles.seeds import stream
from edge_client.alignment.rollouts import Rollout, judged
from edge_client.alignment.task_settings import SAMPLES, alignment_settings
from edge_client.data.prompt_files import Prompt
from edge_client.data.prompts import prompt
from edge_client.inference.batched import Response, generate
from edge_client.peft.packed_model import PackedModel
from edge_client.reward.judging import Heads, Judging
from edge_client.stage_work import GlobalStates
from edge_client.stopwatch import timed
from messaging.protocol import Task

Tokens = npt.NDArray[np.int64]


class Answering:
    """How one client's policy answers, and is judged.

    Args:
        client: Its name.
        judging: The trunk and the reference set that reward models are used with.
        objectives: That it is judged by.
    """

    def __init__(self, client: str, judging: Judging, objectives: Sequence[Objective]) -> None:
        self._client = client
        self._judging = judging
        self._objectives = objectives

    @property
    def reads(self) -> int:
        """How often a response goes through the trunk until all reward models have scored it."""
        return self._judging.reads(self._objectives)

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads every response that is scored."""
        return self._judging.encoder is not None

    def heads(self, states: GlobalStates) -> Heads:
        """Return the reward models.

        Raises:
            InputError: If the task came without them.
        """
        tensors = self._judging.unpack(states.reward, self._objectives)
        if tensors is None:
            raise InputError(
                f"'{self._client}' is asked to align without reward models; put the stage reward "
                "before alignment"
            )
        return self._judging.heads(tensors, self._objectives)

    def drawn(
        self,
        model: PackedModel,
        prompts: list[Prompt],
        task: Task,
        states: GlobalStates,
        words: tuple[str | int, ...],
    ) -> list[Rollout]:
        """Return responses, drawn as the task says, to some of the prompts.

        Args:
            model: The policy.
            prompts: The client's own.
            task: Says how many, how long and at which temperature.
            states: With the reward models.
            words: What the draw depends on beside the seed.

        Raises:
            InputError: If there is no prompt, no room for one, or no reward model.
        """
        settings = alignment_settings(task)
        samples = SAMPLES if settings.algorithm == "rloo" else 1
        if not prompts:
            raise InputError(
                f"'{self._client}' has no prompt to answer: each that it learns from is held out "
                "for another objective; give a file of prompts, or more pairs"
            )
        wanted = max(1, settings.rollouts // samples)
        chooser = stream(task.seed, "prompts", *words)
        chosen = chooser.choice(len(prompts), wanted, replace=len(prompts) < wanted)
        asked = _tokens(model, [prompts[i] for i in np.repeat(chosen, samples)], task)
        with timed("generation"):
            answers = generate(
                model,
                asked,
                most_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                end_token=model.base.end_token,
                generator=stream(task.seed, "rollouts", *words),
            )
        return self._judged(model, asked, answers, states)

    def greedy(
        self, model: PackedModel, prompts: Sequence[Prompt], task: Task, states: GlobalStates
    ) -> list[Rollout]:
        """Return the likeliest response to each prompt, token by token.

        Raises:
            InputError: If there is no room for a prompt, or no reward model.
        """
        asked = _tokens(model, prompts, task)
        with timed("generation"):
            answers = generate(
                model,
                asked,
                most_tokens=alignment_settings(task).max_new_tokens,
                temperature=0.0,
                end_token=model.base.end_token,
                generator=None,
            )
        return self._judged(model, asked, answers, states)

    def _judged(
        self,
        model: PackedModel,
        asked: Sequence[Tokens],
        answers: Sequence[Response],
        states: GlobalStates,
    ) -> list[Rollout]:
        heads = self.heads(states)
        return judged(
            asked,
            answers,
            end_token=model.base.end_token,
            token_features=heads.token_features,
            encoded=heads.encoded_features,
            scores={name: heads.score(name) for name in self._objectives},
        )


def _tokens(model: PackedModel, prompts: Sequence[Prompt], task: Task) -> list[Tokens]:
    """Return prompts as tokens: the end of what is too long, as training cuts it."""
    base, longest = model.base, alignment_settings(task).max_new_tokens
    room = min(task.max_length, base.identity.positions) - longest - 1
    if room < 1:
        raise InputError(
            f"max_new_tokens = {longest} leaves no room for a prompt in max_length = "
            f"{task.max_length}; give fewer"
        )
    texts = [prompt(p.instruction, p.input) for p in prompts]
    return [np.array(base.tokenizer(t).input_ids[-room:], np.int64) for t in texts]
