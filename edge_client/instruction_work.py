"""Instruction tuning on one client: its own examples, adapters and LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_client.data.instructions import Example
from edge_client.data.prompts import Encoded, encode_example
from edge_client.policy import Policy
from edge_client.progress import Progress
from edge_client.stage_work import GlobalStates, Measured, Trained
from edge_client.state import ClientState
from edge_client.trainer import evaluate, train
from messaging.protocol import Task


class InstructionWork:
    """One client's part of instruction tuning.

    Args:
        policy: Its modules.
        train_examples: Its own data, to learn from.
        held_out: Its own data, to measure on.
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
        lora_rank: int,
        adapter_size: int,
        progress: Progress | None = None,
    ) -> None:
        self._policy = policy
        self._parts = {"train": train_examples, "held_out": held_out}
        self._modules = lora_rank, adapter_size
        self._progress = progress
        self._encoded: dict[tuple[str, int], list[Encoded]] = {}

    def begin(self, seed: int) -> ClientState:
        """Return the state of a client that has not trained yet."""
        return self._policy.initial(*self._modules, seed)

    def train(self, task: Task, state: ClientState, states: GlobalStates) -> Trained:
        """Take the task's steps on the client's own examples.

        Raises:
            InputError: If the state does not fit the modules, or training diverges.
        """
        policy = self._policy
        policy.install(state, states.shared)
        examples = self._examples("train", task.max_length)
        done = train(
            policy.model,
            state,
            examples,
            steps=task.local_steps,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            seed=task.seed,
            words=(policy.device.id, task.round),
            progress=self._progress,
        )
        return Trained(
            state=replace(
                state,
                personal=policy.personal(done.tensors),
                first_moments=done.first_moments,
                second_moments=done.second_moments,
                steps=done.steps,
            ),
            after=None if states.shared is None else policy.shared(done.tensors),
            loss=done.loss,
            weight=len(examples),
            tokens=done.tokens,
            rows=done.rows,
        )

    def evaluate(self, task: Task, state: ClientState, states: GlobalStates) -> Measured:
        """Return loss and accuracy on the client's held-out examples.

        Raises:
            InputError: If the state does not fit the modules, or training has diverged.
        """
        self._policy.install(state, states.shared)
        held_out = self._examples("held_out", task.max_length)
        interruption = None if self._progress is None else self._progress.interruption
        result = evaluate(self._policy.model, held_out, interruption)
        return Measured(
            examples=len(held_out), eval_loss=result.loss, eval_accuracy=result.accuracy
        )

    def _examples(self, part: str, max_length: int) -> list[Encoded]:
        base = self._policy.model.base
        key = part, min(max_length, base.identity.positions)
        if key not in self._encoded:
            tokenizer: Any = base.tokenizer
            self._encoded[key] = [encode_example(e, tokenizer, key[1]) for e in self._parts[part]]
        return self._encoded[key]
