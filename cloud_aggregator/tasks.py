"""What devices are told: tasks, the end of the run, and the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from cloud_aggregator.course import Course
from messaging.protocol import Manifest, Outcome, Task

Work = Literal["train", "evaluate", "restore"]


def make_tasks(
    course: Course,
    work: Work,
    number: int,
    clients: Iterable[str],
    outcomes: Mapping[str, tuple[Outcome, int]],
) -> dict[str, Task]:
    """Return the same work for each of some clients.

    Args:
        course: Where the run is.
        work: To do.
        number: Of the round.
        clients: Who does it.
        outcomes: What became of each client's last update, and of which round it was.
    """
    settings, plan = course.settings, course.plan
    patience = settings.rules.deadline_seconds if settings.waits_for_channel else 0.0
    aligns = plan.stage == "alignment"
    nothing: tuple[Outcome, int | None] = ("none", None)
    tasks = {}
    for client in clients:
        outcome, outcome_round = outcomes.get(client, nothing)
        tasks[client] = Task(
            run=settings.run,
            client=client,
            work=work,
            stage=plan.stage,
            round=number,
            state=course.shelf.newest,
            reward=course.reward if aligns else None,
            reference=course.reference if aligns else None,
            outcome=outcome,
            outcome_round=outcome_round,
            seed=settings.seed,
            local_steps=plan.local_steps,
            batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            codec=settings.codec,
            upload_within_seconds=patience,
            max_length=settings.max_length,
            margin=plan.margin,
            alignment=plan.alignment,
            private=settings.counting.privacy is not None,
        )
    return tasks


def stop_task(course: Course, client: str, reason: str) -> Task:
    """Return what tells a device that the run is over."""
    return Task(
        run=course.settings.run,
        client=client,
        work="stop",
        stage=course.plan.stage,
        round=len(course.record.rounds),
        state=None,
        seed=course.settings.seed,
        reason=reason,
    )


def make_manifest(
    course: Course, *, session: str, epoch: int, finished: bool, reconnect_seconds: float = 0.0
) -> Manifest:
    """Return what every device may read: the newest state, and what the run is built on."""
    settings = course.settings
    return Manifest(
        run=settings.run,
        session=session,
        epoch=epoch,
        method=settings.method,
        stage=course.plan.stage,
        state=course.shelf.newest,
        binding=settings.binding,
        layout=course.layouts_sha256,
        finished=finished,
        reconnect_seconds=reconnect_seconds,
        taken_back=tuple(r.round for r in course.record.rounds if r.taken_back)[-1000:],
    )
