"""A run in a few figures, and a round's figures over its clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cloud_aggregator.records import ClientBefore, ClientRound, GlobalRound, RunRecord, Summary
from device_profiles.selection import jain_index
from messaging.protocol import DeviceRecord, Preference, Report, Stage


def weighted_mean(pairs: Sequence[tuple[float | None, int]]) -> float | None:
    """Return the mean of the values that are there, weighted by their example counts.

    The sum is exact, so the mean does not depend on the order of the pairs.
    """
    there = [(value, weight) for value, weight in pairs if value is not None and weight > 0]
    total = sum(weight for _, weight in there)
    return math.fsum(value * weight for value, weight in there) / total if total else None


def weighted_reward(
    preference: Preference, helpfulness: float | None, harmlessness: float | None
) -> float | None:
    """Return the reward by a user's own preference; of one objective, where one alone is scored."""
    if helpfulness is None or harmlessness is None:
        return harmlessness if helpfulness is None else helpfulness
    return preference.helpfulness * helpfulness + preference.harmlessness * harmlessness


def global_figures(
    devices: Mapping[str, DeviceRecord], reports: Mapping[str, Report]
) -> GlobalRound:
    """Return the means over the clients that reported."""
    there = reports.values()
    pairs = [figures for r in there for figures in r.pairs.values()]
    answers = [(devices[r.client].preference, r.responses) for r in there if r.responses]
    scored = [(who, a.responses, a.scores) for who, a in answers]
    return GlobalRound(
        eval_loss=weighted_mean([(r.eval_loss, r.examples) for r in there]),
        eval_accuracy=weighted_mean([(r.eval_accuracy, r.examples) for r in there]),
        others_loss=weighted_mean([(r.others_loss, r.examples) for r in there]),
        others_accuracy=weighted_mean([(r.others_accuracy, r.examples) for r in there]),
        reward_loss=weighted_mean([(f.loss, f.pairs) for f in pairs]),
        reward_accuracy=weighted_mean([(f.accuracy, f.pairs) for f in pairs]),
        reward_helpfulness=weighted_mean([(s.get("helpfulness"), n) for _, n, s in scored]),
        reward_harmlessness=weighted_mean([(s.get("harmlessness"), n) for _, n, s in scored]),
        weighted_reward=weighted_mean(
            [
                (weighted_reward(who, s.get("helpfulness"), s.get("harmlessness")), n)
                for who, n, s in scored
            ]
        ),
        kl=weighted_mean([(a.kl, a.responses) for _, a in answers]),
        drift=weighted_mean([(a.drift, a.responses) for _, a in answers]),
    )


def client_before(stage: Stage, report: Report) -> ClientBefore:
    """Return a client's results before the first round of a stage."""
    figures, responses = report.pairs.values(), report.responses
    return ClientBefore(
        id=report.client,
        stage=stage,
        eval_loss=report.eval_loss,
        eval_accuracy=report.eval_accuracy,
        others_loss=report.others_loss,
        others_accuracy=report.others_accuracy,
        reward_helpfulness=responses.scores.get("helpfulness") if responses else None,
        reward_harmlessness=responses.scores.get("harmlessness") if responses else None,
        reward_accuracy=weighted_mean([(f.accuracy, f.pairs) for f in figures]),
    )


def of_stage(run: RunRecord, stage: Stage) -> RunRecord:
    """Return a run as if it had been that stage alone; its figures are those of that stage."""
    if {record.stage for record in run.rounds} | {c.stage for c in run.before} <= {stage}:
        return run
    alone = run.model_copy(
        update={
            "stages": [name for name in run.stages if name == stage],
            "before": [client for client in run.before if client.stage == stage],
            "rounds": [record for record in run.rounds if record.stage == stage],
        }
    )
    alone.summary = summarise(alone)
    return alone


def rewards_before(run: RunRecord) -> dict[str, float | None]:
    """Return each client's weighted reward when alignment began."""
    who = {c.id: c.preference for c in run.clients}
    return {
        c.id: weighted_reward(who[c.id], c.reward_helpfulness, c.reward_harmlessness)
        for c in run.before
        if c.stage == "alignment" and c.id in who
    }


def reward_before(run: RunRecord) -> float | None:
    """Return their mean over the clients."""
    return weighted_mean([(reward, 1) for reward in rewards_before(run).values()])


def reward_change(run: RunRecord, reports: Mapping[str, Report]) -> float | None:
    """Return the mean change of the clients' weighted rewards since alignment began.

    Each client that was measured then and now counts once: a change of who is there, or of how many
    prompts each was measured on, is no change of the reward.
    """
    who = {c.id: c.preference for c in run.clients}
    changes: list[float] = []
    for client, began in rewards_before(run).items():
        report = reports.get(client)
        if began is None or report is None or report.responses is None:
            continue
        scores = report.responses.scores
        now = weighted_reward(who[client], scores.get("helpfulness"), scores.get("harmlessness"))
        if now is not None:
            changes.append(now - began)
    return _mean(changes) if changes else None


def list_clients(run: RunRecord, devices: Mapping[str, DeviceRecord]) -> None:
    """Take newly seen devices into the record; in deployment the data is the clients' own."""
    known = {c.id: c for c in run.clients} | dict(devices)
    run.clients = [known[i] for i in sorted(known)]
    if run.data.sha256 is None:
        run.data.examples = sum(c.examples for c in run.clients)
        run.data.held_out_examples = sum(c.held_out_examples for c in run.clients)


def summarise(run: RunRecord) -> Summary:
    """Return the summary of a run from its rounds.

    A client's last held-out results count, whichever round they are from;
    ``worst_client_accuracy`` is the lowest of them, and ``clients_improved`` counts the clients
    whose accuracy is above theirs before the first round. A client that joined later has none.
    ``participation_fairness`` is Jain's index of how often each client's update counted.
    """
    weights = {c.id: c.held_out_examples for c in run.clients}
    first: dict[str, ClientBefore] = {}
    for entry in run.before:
        if entry.eval_accuracy is not None:
            first.setdefault(entry.id, entry)
    before = {i: c.eval_accuracy for i, c in first.items() if c.eval_accuracy is not None}
    last: dict[str, ClientRound] = {}
    for record in run.rounds:
        last.update({c.id: c for c in record.clients if c.eval_accuracy is not None})
    uploads = [c for r in run.rounds for c in r.clients if c.upload_bytes]
    after = {i: c.eval_accuracy for i, c in last.items() if c.eval_accuracy is not None}
    improved = [i for i, a in after.items() if i in before and a > before[i]]
    summary = Summary(
        eval_loss_before=weighted_mean([(c.eval_loss, weights[i]) for i, c in first.items()]),
        eval_loss_after=weighted_mean([(c.eval_loss, weights[i]) for i, c in last.items()]),
        eval_accuracy_before=weighted_mean([(a, weights[i]) for i, a in before.items()]),
        eval_accuracy_after=weighted_mean([(a, weights[i]) for i, a in after.items()]),
        worst_client_accuracy=min(after.values(), default=None),
        worst_decile_accuracy=worst_decile(list(after.values())),
        accuracy_fairness=jain_index(list(after.values())) if any(after.values()) else None,
        others_loss_before=weighted_mean([(c.others_loss, weights[i]) for i, c in first.items()]),
        others_loss_after=weighted_mean([(c.others_loss, weights[i]) for i, c in last.items()]),
        others_accuracy_before=weighted_mean(
            [(c.others_accuracy, weights[i]) for i, c in first.items()]
        ),
        others_accuracy_after=weighted_mean(
            [(c.others_accuracy, weights[i]) for i, c in last.items()]
        ),
        clients_improved=len(improved) if after else None,
        mean_uplink_seconds=_mean([c.uplink_seconds for c in uploads]),
        mean_uplink_joules=_mean([c.uplink_joules for c in uploads]),
        participation_fairness=_fairness(run),
        upload_bytes_total=sum(c.upload_bytes for c in uploads),
    )
    _add_rewards(summary, run)
    return summary


def worst_decile(accuracies: Sequence[float]) -> float | None:
    """Return the mean of the lowest tenth, rounded up to whole clients; none of none."""
    lowest = sorted(accuracies)[: -(-len(accuracies) // 10)]
    return _mean(lowest) if lowest else None


def _add_rewards(summary: Summary, run: RunRecord) -> None:
    """Add what reward learning and alignment came to, where they were run."""
    learned: dict[str, ClientRound] = {}
    aligned: dict[str, ClientRound] = {}
    for record in run.rounds:
        chosen = {"reward": learned, "alignment": aligned}.get(record.stage)
        if chosen is not None:
            there = [c for c in record.clients if c.pairs or c.response_tokens is not None]
            chosen.update({c.id: c for c in there})
    pairs = [figures for c in learned.values() for figures in c.pairs.values()]
    summary.reward_accuracy_after = weighted_mean([(f.accuracy, f.pairs) for f in pairs])
    summary.longer_wins = weighted_mean([(f.longer_wins, f.pairs) for f in pairs])
    who = {c.id: c.preference for c in run.clients}
    before = rewards_before(run)
    after = {
        i: weighted_reward(who[i], c.reward_helpfulness, c.reward_harmlessness)
        for i, c in aligned.items()
    }
    summary.weighted_reward_before = reward_before(run)
    summary.weighted_reward_after = weighted_mean([(r, 1) for r in after.values()])
    summary.kl_after = weighted_mean([(c.kl, 1) for c in aligned.values()])
    if after:
        rose = [i for i, r in after.items() if r is not None and _above(r, before.get(i))]
        summary.clients_rewarded = len(rose)


def _above(after: float, before: float | None) -> bool:
    return before is not None and after > before


def _fairness(run: RunRecord) -> float | None:
    """Return Jain's index of how often each client's update counted; none before any did."""
    counts = dict.fromkeys((c.id for c in run.clients), 0)
    for record in run.rounds:
        for client in record.accepted:
            counts[client] = counts.get(client, 0) + 1
    return jain_index(list(counts.values())) if any(counts.values()) else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
