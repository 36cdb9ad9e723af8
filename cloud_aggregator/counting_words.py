"""How a run's updates counted, in sentences: its rule, late ones, privacy. Nothing where plain."""

from __future__ import annotations

from cloud_aggregator.records import RunRecord


def counting_lines(record: RunRecord) -> list[str]:
    """Return what a reader must know of how updates counted, where it is not a plain mean."""
    lines = [] if record.aggregation == "mean" else [f"Updates counted by {record.aggregation}."]
    return [*lines, *_late(record), *_unchanged(record), *_private(record)]


def _late(record: RunRecord) -> list[str]:
    folded = [stale for r in record.rounds for stale in r.stale]
    dropped = sum(r.stale_dropped for r in record.rounds)
    lines = []
    if folded:
        share = sum(stale.share for stale in folded) / len(folded)
        lines.append(
            f"{len(folded)} late update{_s(len(folded))} counted in a later round, by {share:.2f} "
            f"of {'their' if len(folded) > 1 else 'its'} weight{' on average' * (len(folded) > 1)}."
        )
    if dropped:
        lines.append(f"{dropped} late update{_s(dropped)} had become too old and did not count.")
    return lines


def _unchanged(record: RunRecord) -> list[str]:
    return [
        f"Round {r.round} changed nothing: {r.unchanged}." for r in record.rounds if r.unchanged
    ]


def _private(record: RunRecord) -> list[str]:
    spent = record.privacy
    if spent is None:
        return []
    lines = [
        f"Client-level differential privacy: epsilon {spent.epsilon:.2f} at delta "
        f"{spent.delta:g} after {spent.rounds} round{_s(spent.rounds)} (clip norm "
        f"{spent.clip_norm:g}, noise multiplier {spent.noise_multiplier:g}, sums over "
        f"{spent.expected_clients}), towards whoever sees the global states."
    ]
    if spent.repeatable_noise:
        lines.append(
            "The noise follows from the seed, as everything in emulation: it hides nothing from "
            "who knows the seed."
        )
    return lines


def _s(count: int) -> str:
    return "" if count == 1 else "s"
