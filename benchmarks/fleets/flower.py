"""Flower's side: a client app after its own quickstart, and a server app that notes the time.

The app is imported by name in Ray's workers, so that ``keeps_model`` can hold a model there between
calls. Flower's recommended pattern makes the model in each call, and so does the padded step here;
with this project's step the model is kept, which is the kindest reading of it.
"""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fleets.job import Job
from fleets.work import STEPS, Own, Turn, prepared
from messaging.layout import Tensors

VARIABLE = "PWFF_FLEET_JOB"  # Ray's workers inherit it
app = ClientApp()


def _job() -> tuple[str, Job]:
    given = json.loads(os.environ[VARIABLE])
    return given.pop("kind"), Job(**given)


@lru_cache(maxsize=1)
def keeps_model(kind: str, job: Job) -> Any:
    """Return a model that stays in this worker."""
    return STEPS[kind][0](prepared(job))


def _record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({n: torch.from_numpy(t) for n, t in tensors.items()})


def _tensors(record: Any) -> Tensors:
    return {n: t.numpy() for n, t in record.to_torch_state_dict().items()}


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take a client's steps of a round; what is its own stays in its context."""
    torch.set_num_threads(1)
    kind, job = _job()
    work, state = prepared(job), context.state
    make, steps, _ = STEPS[kind]
    model = keeps_model(kind, job) if kind == "own" else make(work)
    client = int(context.node_config["partition-id"])
    own = work.own()
    number = 1
    if "lora" in state:
        said: Any = state["said"]
        kept = (_tensors(state[name]) for name in ("lora", "first", "second"))
        own = Own(*kept, steps=int(said["steps"]))
        number = int(said["round"]) + 1
    adapters = steps(work, model, Turn(client, number, _tensors(message.content["arrays"]), own))
    state["lora"], state["first"] = _record(own.lora), _record(own.first)
    state["second"] = _record(own.second)
    state["said"] = ConfigRecord({"steps": own.steps, "round": number})
    weight = MetricRecord({"num-examples": len(work.examples(client))})
    answer = RecordDict({"arrays": _record(adapters), "metrics": weight})
    return Message(content=answer, reply_to=message)


@app.evaluate()
def measure(message: Message, context: Context) -> Message:
    """Measure a round's average with what is the client's own, on its held-out examples."""
    torch.set_num_threads(1)
    kind, job = _job()
    work = prepared(job)
    make, _, measured = STEPS[kind]
    model = keeps_model(kind, job) if kind == "own" else make(work)
    client = int(context.node_config["partition-id"])
    own = Own(_tensors(context.state["lora"]))
    adapters = _tensors(message.content["arrays"])
    loss = measured(work, model, Turn(client, 0, adapters, own))
    return Message(
        content=RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": 1})}),
        reply_to=message,
    )


class Noting(FedAvg):
    """FedAvg that notes when each round was measured, and keeps the first round's average."""

    times: list[float]
    first: Tensors | None = None
    loss = 0.0

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Average, and keep the first."""
        found = super().aggregate_train(server_round, replies)
        if found[0] is None:
            raise SystemExit(f"no client answered in round {server_round}")
        if self.first is None:
            self.first = _tensors(found[0])
        return found

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        """Take the mean of the losses, and note the time."""
        found: Any = super().aggregate_evaluate(server_round, replies)
        if not self.times:
            self.loss = float(found["loss"])
        self.times.append(time.time())
        return found


def run(kind: str, job: Job) -> tuple[list[float], Tensors, float]:
    """Return when each round ended, and adapters and mean loss after the first."""
    os.environ[VARIABLE] = json.dumps({"kind": kind, **job.__dict__})
    strategy = Noting(
        fraction_train=1.0,
        fraction_evaluate=1.0,
        min_evaluate_nodes=job.clients,
        min_train_nodes=job.clients,
        min_available_nodes=job.clients,
    )
    strategy.times = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, _context: Context) -> None:
        arrays = _record(prepared(job).adapters())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=job.rounds)

    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=job.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    assert strategy.first is not None
    return strategy.times, strategy.first, strategy.loss
