"""What a person sees at the end of a run: a table of every client, and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from cloud_aggregator.counting_words import counting_lines
from cloud_aggregator.progress import human_bytes, nats, percent, stage_words
from cloud_aggregator.records import ClientRound, RunRecord
from cloud_aggregator.stages import TAKEN_BACK
from cloud_aggregator.summary import of_stage, rewards_before, weighted_mean, weighted_reward


def closing_table(record: RunRecord) -> RenderableType:
    """Return the table that ends a run: every client before and after, and what it sent.

    Of a run that learned reward models or was aligned there is a second one, of those stages.
    """
    first = _instruction_table(record)
    later = [stage for stage in ("reward", "alignment") if _has(record, stage)]
    return Group(first, _later_table(record, later)) if later else first


def closing_lines(record: RunRecord) -> list[str]:
    """Return the sentences that end a run, with its figures whatever they say."""
    later = _reward_lines(record) + _alignment_lines(record)
    counted = counting_lines(record)
    s = record.summary
    if not later and (s.eval_accuracy_before is None or s.eval_accuracy_after is None):
        return ["Held-out accuracy was not measured.", *counted, "* modelled"]
    return [
        *_instruction_lines(record),
        *later,
        *counted,
        f"{human_bytes(s.upload_bytes_total)} of updates in {len(record.rounds)} rounds; "
        f"an upload takes {s.mean_uplink_seconds:.2f} s and {s.mean_uplink_joules:.2f} J "
        "on average (modelled)."
        if s.upload_bytes_total
        else "Nothing was uploaded.",
        "* modelled",
    ]


def _has(record: RunRecord, stage: str) -> bool:
    return any(r.stage == stage for r in record.rounds)


def _instruction_table(record: RunRecord) -> Table:
    title = f"{record.run}: {record.status} ({record.stop_reason})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("client", no_wrap=True)
    for name in ("LoRA", "rows", "accuracy, %", "loss, nats", "sent", "uplink*"):
        table.add_column(name, justify="right", no_wrap=True)
    tuned = of_stage(record, "instruction")
    before, after = {c.id: c for c in tuned.before}, _latest(tuned, "eval_accuracy")
    for device in record.clients:
        mine = [c for r in record.rounds for c in r.clients if c.id == device.id]
        first, last = before.get(device.id), after.get(device.id)
        table.add_row(
            device.id,
            str(device.lora_count),
            str(device.examples),
            f"{percent(first.eval_accuracy if first else None, '')} -> "
            f"{percent(last.eval_accuracy if last else None, '')}",
            f"{nats(first.eval_loss if first else None)} -> "
            f"{nats(last.eval_loss if last else None)}",
            human_bytes(sum(c.upload_bytes for c in mine)),
            f"{sum(c.uplink_seconds for c in mine):.1f} s",
        )
    return table


def _later_table(record: RunRecord, stages: Sequence[str]) -> Table:
    """Return reward learning's and alignment's figures of every client."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("client", no_wrap=True)
    reward, aligned = of_stage(record, "reward"), of_stage(record, "alignment")
    heads = {
        "reward": ("pairs, %", "longer, %"),
        "alignment": ("weighted reward", "KL, nats", "accuracy, %"),
    }
    for stage in stages:
        for name in heads[stage]:
            table.add_column(name, justify="right", no_wrap=True)
    pairs, scored = _latest(reward, "reward_accuracy"), _latest(aligned, "response_tokens")
    start, began = {c.id: c for c in aligned.before}, rewards_before(record)
    for device in record.clients:
        cells = []
        if "reward" in stages:
            mine = pairs.get(device.id)
            figures = mine.pairs.values() if mine else ()
            longer = weighted_mean([(f.longer_wins, f.pairs) for f in figures])
            cells += [percent(mine.reward_accuracy if mine else None, ""), percent(longer, "")]
        if "alignment" in stages:
            last, first = scored.get(device.id), start.get(device.id)
            h, s = (last.reward_helpfulness, last.reward_harmlessness) if last else (None, None)
            after = weighted_reward(device.preference, h, s)
            cells += [
                f"{nats(began.get(device.id))} -> {nats(after)}",
                nats(last.kl if last else None),
                f"{percent(first.eval_accuracy if first else None, '')} -> "
                f"{percent(last.eval_accuracy if last else None, '')}",
            ]
        table.add_row(device.id, *cells)
    return table


def _latest(run: RunRecord, figure: str) -> dict[str, ClientRound]:
    """Return each client's last entry that has that figure."""
    return {c.id: c for r in run.rounds for c in r.clients if getattr(c, figure) is not None}


def _instruction_lines(record: RunRecord) -> list[str]:
    s = of_stage(record, "instruction").summary
    if s.eval_accuracy_before is None or s.eval_accuracy_after is None:
        tuned = "instruction" in record.stages
        return ["Held-out accuracy was not measured."] if tuned else []
    return [
        f"Held-out accuracy {_way(s.eval_accuracy_before, s.eval_accuracy_after)} from "
        f"{percent(s.eval_accuracy_before)} to "
        f"{percent(s.eval_accuracy_after)} (loss {nats(s.eval_loss_before)} to "
        f"{nats(s.eval_loss_after)}); it rose for {s.clients_improved} of {len(record.clients)} "
        f"clients; the worst client has {percent(s.worst_client_accuracy)}."
    ]


def _reward_lines(record: RunRecord) -> list[str]:
    s = record.summary
    if s.reward_accuracy_after is None or s.longer_wins is None:
        return []
    verdict = (
        "more than" if s.reward_accuracy_after > s.longer_wins
        else "less than" if s.reward_accuracy_after < s.longer_wins
        else "as many as"
    )  # fmt: skip
    return [
        f"The reward models are right in {percent(s.reward_accuracy_after)} of held-out pairs, "
        f"{verdict} 'the longer one wins' ({percent(s.longer_wins)})."
    ]


def _alignment_lines(record: RunRecord) -> list[str]:
    s, aligned = record.summary, of_stage(record, "alignment")
    lines = []
    if _has(record, "alignment"):
        before, after = s.weighted_reward_before, s.weighted_reward_after
        if before is None or after is None:
            lines.append("Weighted reward was not measured before and after alignment.")
        else:
            kept = aligned.summary
            lines.append(
                f"Weighted reward {_way(before, after)} from {nats(before)} to {nats(after)} "
                f"on average; it rose for {s.clients_rewarded} of {len(record.clients)} clients; "
                f"KL from stage 1 {nats(s.kl_after)} nats; held-out accuracy "
                f"{percent(kept.eval_accuracy_before)} to {percent(kept.eval_accuracy_after)}."
            )
    lines += [
        f"Round {r.round} was taken back: {TAKEN_BACK.get(r.taken_back, r.taken_back)}"
        + (f" (it had: {stage_words('alignment', r.dropped.model_dump())})." if r.dropped else ".")
        for r in aligned.rounds
        if r.taken_back
    ]
    return lines


def _way(before: float, after: float) -> str:
    return "rose" if after > before else "fell" if after < before else "stayed"
