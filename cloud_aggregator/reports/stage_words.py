"""What reward learning and alignment came to, in sentences: whatever it is, also when it fell."""

from __future__ import annotations

from cloud_aggregator.records import GlobalRound, RoundRecord, RunRecord
from cloud_aggregator.reports import words
from cloud_aggregator.reports.stages import aligned, objectives, pair_accuracy, pair_rows
from cloud_aggregator.reports.words import ARROW, Direction, Headline
from cloud_aggregator.stages import TAKEN_BACK
from cloud_aggregator.summary import weighted_mean


def reward_headline(run: RunRecord) -> Headline:
    """Return what the reward models are worth beside the rule that the longer response wins.

    Args:
        run: Reward learning of a run, alone.
    """
    accuracy, longer = run.summary.reward_accuracy_after, run.summary.longer_wins
    if accuracy is None or longer is None:
        return Headline(text="Reward learning: pair accuracy is not measured.", direction="unknown")
    rows = pair_rows(run)
    clients = list(dict.fromkeys(row.id for row in rows))
    above = sum(_beats(run, client) for client in clients)
    way: Direction = "rose" if accuracy > longer else "fell" if accuracy < longer else "same"
    verdict = {
        "rose": "more often than",
        "fell": "no better than a rule of thumb, less often than",
        "same": "as often as",
    }[way]
    first = pair_accuracy(run).mean[0]
    was = "" if first is None else f" (before: {words.percent(first)})"
    parts = []
    for name in objectives(run):
        own = [row.figures for row in rows if row.objective == name]
        mine = weighted_mean([(f.accuracy, f.pairs) for f in own])
        rule = weighted_mean([(f.longer_wins, f.pairs) for f in own])
        parts.append(f"{name} {words.percent(mine)} against {words.percent(rule)}")
    return Headline(
        text=f"Reward learning: the models tell the better response in {words.percent(accuracy)} "
        f"of held-out pairs{was}, {verdict} 'the longer one wins' ({words.percent(longer)}); above "
        f"it for {above or 'none'} of {words.clients(len(clients))}; {'; '.join(parts)}.",
        direction=way,
    )


def alignment_headline(run: RunRecord) -> Headline:
    """Return whose weighted reward rose, at which KL and length, and what became of stage 1.

    Args:
        run: Alignment of a run, alone.
    """
    before, after = run.summary.weighted_reward_before, run.summary.weighted_reward_after
    rows = aligned(run)
    notes = tuple(taken_back_text(r) for r in run.rounds if r.taken_back)
    if before is None or after is None:
        text = (
            f"Alignment: weighted reward {words.score(before)} before, {words.score(after)} after"
        )
        return Headline(text=f"{text}.", direction="unknown", notes=notes)
    changes = [row.change for row in rows if row.change is not None]
    rose, fell = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    way: Direction = "rose" if after > before else "fell" if after < before else "same"
    lead = {"rose": "rose", "fell": "fell", "same": "did not change"}[way]
    split = f"it rose for {rose or 'none'} and fell for {fell or 'none'}"
    parts = [
        f"Alignment: weighted reward {lead} on average, {words.score(before)} {ARROW} "
        f"{words.score(after)}; {split} of {words.clients(len(changes))}"
    ]
    for name in ("helpfulness", "harmlessness"):
        first, last = (weighted_mean([(side[name], 1) for side in ends]) for ends in _sides(run))
        if first is not None or last is not None:
            parts.append(f"{name} {words.score(first)} {ARROW} {words.score(last)}")
    kl = run.summary.kl_after
    parts.append(
        "KL from stage 1 not measured" if kl is None else f"KL from stage 1 {words.nats(kl)} nats"
    )
    parts += _kept(run)
    return Headline(text="; ".join(parts) + ".", direction=way, notes=notes)


def taken_back_text(record: RoundRecord) -> str:
    """Return why a round was taken back, and what was dropped with it."""
    why = TAKEN_BACK.get(record.taken_back, record.taken_back)
    text = f"Round {record.round} was taken back: {why}. "
    if record.dropped is not None:
        text += f"Dropped: {_figures(record.dropped)}. "
    return f"{text}Every device has again what it had before, and the stage ended."


def _figures(figures: GlobalRound) -> str:
    text = (
        f"weighted reward {words.score(figures.weighted_reward)}, helpfulness "
        f"{words.score(figures.reward_helpfulness)}, harmlessness "
        f"{words.score(figures.reward_harmlessness)}, "
    )
    return text + ("KL not measured" if figures.kl is None else f"KL {words.nats(figures.kl)} nats")


def _beats(run: RunRecord, client: str) -> bool:
    """Say whether a client's models are right in more of its pairs than the longer response."""
    own = [row.figures for row in pair_rows(run) if row.id == client]
    return sum(f.pairs * (f.accuracy - f.longer_wins) for f in own) > 0


def _sides(run: RunRecord) -> tuple[list[dict[str, float | None]], list[dict[str, float | None]]]:
    rows = aligned(run)
    return [row.before for row in rows], [row.after for row in rows]


def _kept(run: RunRecord) -> list[str]:
    """Say what alignment did to the accuracy that instruction tuning had reached."""
    first, last = run.summary.eval_accuracy_before, run.summary.eval_accuracy_after
    if first is None or last is None:
        return []
    was, is_ = words.percents(first, last)
    way = "rose" if last > first else "fell" if last < first else "did not change"
    return [f"held-out accuracy of stage 1 {way}: {was} {ARROW} {is_}"]
