"""How evenly a run serves its clients, and how personal their models are, in sentences.

The gap is the accuracy of the personal models on their own clients' held-out data less that on
other clients': a model that only fits its own people has a wide one, and a global model none.
What the data themselves differ by is in the gap before the first round.
"""

from __future__ import annotations

from cloud_aggregator.progress import percent
from cloud_aggregator.records import Summary


def gap(own: float | None, others: float | None) -> float | None:
    """Return the accuracy on own data less that on others'; none where one is not measured."""
    return None if own is None or others is None else own - others


def fairness_lines(summary: Summary) -> list[str]:
    """Return what a run of instruction tuning says of its clients; empty if it was not measured."""
    lines = []
    lowest, jain = summary.worst_decile_accuracy, summary.accuracy_fairness
    if lowest is not None and jain is not None:
        lines.append(
            f"The lowest tenth of the clients has {percent(lowest)} on average; Jain's index of "
            f"their accuracies is {jain:.3f} (1: all alike)."
        )
    others = summary.others_accuracy_after
    after = gap(summary.eval_accuracy_after, others)
    if after is not None:
        before = gap(summary.eval_accuracy_before, summary.others_accuracy_before)
        was = "" if before is None else f" (before the first round: {_points(before)})"
        lines.append(
            f"On held-out data of other clients the personal models have {percent(others)}: the "
            f"gap to their own is {_points(after)} points{was}."
        )
    return lines


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"
