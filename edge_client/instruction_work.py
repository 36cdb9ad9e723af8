"""Instruction tuning on one client: its own examples, adapters and LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_client.data.instructions import Example
from edge_client.data.prompts import Encoded, encode_example
from edge_client.personal_copy import anchor, install_copy, with_copy
from edge_client.policy import Policy
from edge_client.progress import Progress
from edge_client.restraint import Anchor, Restraint, set_apart
from edge_client.stage_work import GlobalStates, Measured, Trained
from edge_client.state import ClientState, personal_copy
from edge_client.trainer import Training, evaluate, train
from messaging.layout import Vector
from messaging.protocol import Task

_KEPT_STEPS = "kept_steps"


class InstructionWork:
    """One client's part of instruction tuning.

    Args:
        policy: Its modules.
        train_examples: Its own data, to learn from.
        held_out: Its own data, to measure on.
        others: Held-out examples of other clients, to measure on; often none.
        lora_rank: Of its LoRA modules.
        adapter_size: Of its adapters.
        progress: Where it is written down how far a training is; none begins it anew.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        train_examples: list[Example],
        held_out: list[Example],
        others: list[Example] | None = None,
        lora_rank: int,
        adapter_size: int,
        progress: Progress | None = None,
    ) -> None:
        self._policy = policy
        self._parts = {"train": train_examples, "held_out": held_out, "others": others or []}
        self._modules = lora_rank, adapter_size
        self._progress = progress
        self._encoded: dict[tuple[str, int], list[Encoded]] = {}

    def begin(self, seed: int) -> ClientState:
        """Return the state of a client that has not trained yet."""
        return self._policy.initial(*self._modules, seed)

    def train(self, task: Task, state: ClientState, states: GlobalStates) -> Trained:
        """Take the task's steps on the client's own examples; with a proximal term, twice.

        Raises:
            InputError: If the state does not fit the modules, training diverges, or there are too
                few examples to set some apart.
        """
        policy, shared = self._policy, states.shared
        owner = task.proximal > 0 and shared is not None
        policy.install(state, shared)
        done = self._descend(task, state, followed=owner)
        new = replace(
            state,
            personal=policy.personal(done.tensors),
            first_moments=done.first_moments,
            second_moments=done.second_moments,
            steps=done.steps,
        )
        own: Training | None = None
        if owner and shared is not None:
            own = self._descend_near(task, state, shared)
            new = with_copy(new, own)
        if task.stopping_patience:
            kept = (own or done).kept_steps
            new = replace(new, numbers={**new.numbers, _KEPT_STEPS: float(kept)})
        trainings = [done, own] if own else [done]
        return Trained(
            state=new,
            after=None if shared is None else policy.shared(done.tensors),
            loss=done.loss,
            weight=len(self._parts["train"]),
            tokens=sum(each.tokens for each in trainings),
            rows=sum(each.rows for each in trainings),
            read_tokens=sum(each.read_tokens for each in trainings),
        )

    def _descend_near(self, task: Task, state: ClientState, shared: Vector) -> Training:
        """Train the device's personal model, held near the global state."""
        begun = install_copy(self._policy, state, shared)
        held = anchor(self._policy, shared, task.proximal)
        return self._descend(task, begun, "personal", anchor=held)

    def _descend(
        self,
        task: Task,
        state: ClientState,
        *words: str,
        anchor: Anchor | None = None,
        followed: bool = False,
    ) -> Training:
        device, progress = self._policy.device, self._progress
        examples = self._examples("train", task.max_length)
        validation: list[Encoded] = []
        if task.stopping_patience:
            examples, validation = set_apart(examples, task.validation_share, task.seed, device.id)
        if progress is not None and words:
            progress = progress.beside(words[0])
        return train(
            self._policy.model,
            state,
            examples,
            steps=task.local_steps,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            seed=task.seed,
            words=(device.id, task.round, *words),
            restraint=Restraint.of(task),
            validation=validation,
            anchor=anchor,
            progress=progress,
            followed=followed,
        )

    def evaluate(self, task: Task, state: ClientState, states: GlobalStates) -> Measured:
        """Return loss and accuracy on the client's held-out examples, and on those of others.

        Raises:
            InputError: If the state does not fit the modules, or training has diverged.
        """
        if personal_copy(state):
            install_copy(self._policy, state, states.shared)
        else:
            self._policy.install(state, states.shared)
        held_out = self._examples("held_out", task.max_length)
        others = self._examples("others", task.max_length)
        interruption = None if self._progress is None else self._progress.interruption
        result = evaluate(self._policy.model, held_out, interruption)
        beyond = evaluate(self._policy.model, others, interruption) if others else None
        kept = state.numbers.get(_KEPT_STEPS) if state.round == task.round else None
        return Measured(
            examples=len(held_out),
            eval_loss=result.loss,
            eval_accuracy=result.accuracy,
            others_loss=beyond.loss if beyond else None,
            others_accuracy=beyond.accuracy if beyond else None,
            kept_steps=None if kept is None else int(kept),
        )

    def _examples(self, part: str, max_length: int) -> list[Encoded]:
        base = self._policy.model.base
        key = part, min(max_length, base.identity.positions)
        if key not in self._encoded:
            tokenizer: Any = base.tokenizer
            self._encoded[key] = [encode_example(e, tokenizer, key[1]) for e in self._parts[part]]
        return self._encoded[key]
