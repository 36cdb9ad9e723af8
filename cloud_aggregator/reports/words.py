"""Figures as text, and the sentence that a report begins with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports.series import Track, worst
from messaging.protocol import Preference

NOT_MEASURED = "not measured"
ARROW = "\u2192"
_SPACE = "\u00a0"  # a figure and its unit stay on one line
_MINUS = "\u2212"

Direction = Literal["rose", "fell", "same", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What a run came to: the sentence, which way it went, and what limits it."""

    text: str
    direction: Direction
    notes: tuple[str, ...] = ()


def percent(share: float | None, digits: int = 1) -> str:
    """Return ``31.2 %`` for a share in [0, 1]."""
    if share is None or not math.isfinite(share):
        return NOT_MEASURED
    return f"{100 * share:.{digits}f}{_SPACE}%"


def percents(*shares: float | None) -> list[str]:
    """Return them with as many digits, one to four, as show that unequal ones are unequal."""
    for digits in (1, 2, 3):
        texts = [percent(share, digits) for share in shares]
        if len(set(texts)) == len(set(shares)):
            return texts
    return [percent(share, 4) for share in shares]


def points(difference: float | None, digits: int = 1) -> str:
    """Return a difference of shares in percentage points, signed."""
    if difference is None:
        return NOT_MEASURED
    text = f"{100 * difference:+.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", _MINUS)


def nats(loss: float | None) -> str:
    """Return a loss; the unit stands in the heading or after the last of a pair."""
    return NOT_MEASURED if loss is None else f"{loss:.3f}"


def score(reward: float | None) -> str:
    """Return a reward: deviations of the reference set's scores."""
    return NOT_MEASURED if reward is None else f"{reward:.3f}".replace("-", _MINUS)


def gain(rewards: float | None) -> str:
    """Return a difference of rewards, signed."""
    return NOT_MEASURED if rewards is None else f"{rewards:+.3f}".replace("-", _MINUS)


def weights(preference: Preference) -> str:
    """Return what a user cares for, helpfulness and then harmlessness: ``0.67 : 0.33``."""
    return f"{preference.helpfulness:.2f} : {preference.harmlessness:.2f}"


def size(n_bytes: float) -> str:
    """Return bytes in decimal units: ``2.32 MB``."""
    return _scaled(n_bytes, "B", ("", "k", "M", "G", "T"))


def energy(joules: float) -> str:
    """Return joules: ``10.8 J``; what is below 0 has a minus."""
    if joules < 0:
        return f"{_MINUS}{energy(-joules)}"
    return _scaled(joules, "J", ("", "k", "M", "G"))


def duration(seconds: float) -> str:
    """Return seconds: ``10.8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 120:
        return f"{_figure(seconds)}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min" + (f" {rest}{_SPACE}s" if rest else "")
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}{_SPACE}h" + (f" {minutes}{_SPACE}min" if minutes else "")


def tokens(count: float | None) -> str:
    """Return a mean number of tokens: ``32.4``."""
    return NOT_MEASURED if count is None else f"{count:.1f}"


def number(value: float) -> str:
    """Return a number with as many digits as it deserves: ``0.5``, ``1,000``, ``0.001``."""
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def index(value: float | None) -> str:
    """Return Jain's index of participation: ``0.917``."""
    return "no update counted" if value is None else f"{value:.3f}"


def evenness(value: float | None) -> str:
    """Return Jain's index of accuracies: ``0.991``."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def priced(run: RunRecord) -> str:
    """Return at which shape costs are computed, if it is not the model's own; else nothing."""
    shape = run.model.priced
    if shape is None:
        return ""
    return (
        f"{shape.name}: {shape.parameters:,} parameters, {shape.layers} layers, "
        f"width {shape.width}, LoRA rank {shape.lora_rank}"
    )


def clients(count: int) -> str:
    """Return ``1 client`` or ``8 clients``."""
    return f"{count:,} client{'' if count == 1 else 's'}"


def rounds(count: int) -> str:
    """Return ``1 round`` or ``8 rounds``."""
    return f"{count:,} round{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return ``a, b and c``, or ``a, b, c and 5 more``."""
    shown = [*names] if len(names) <= most else [*names[:most], f"{len(names) - most} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def headline(run: RunRecord, found: Sequence[Track]) -> Headline:
    """Return the sentence with the record's figures; a fall is said as plainly as a rise."""
    before, after = run.summary.eval_accuracy_before, run.summary.eval_accuracy_after
    direction: Direction = "unknown"
    if before is not None and after is not None:
        direction = "rose" if after > before else "fell" if after < before else "same"
    accuracy = _accuracy(run, found, direction)
    parts = [accuracy, _loss(run), _worst(run, found)]
    return Headline(text="; ".join(parts) + ".", direction=direction, notes=_notes(run, found))


def _accuracy(run: RunRecord, found: Sequence[Track], direction: Direction) -> str:
    before, after = run.summary.eval_accuracy_before, run.summary.eval_accuracy_after
    done = rounds(len(run.rounds))
    if before is None and after is None:
        return f"Held-out accuracy is not measured ({done} finished)"
    if before is None:
        text = f"{percent(after)} (example-weighted) after {done}"
        return f"Held-out accuracy is {text}; before the first round it was not measured"
    if after is None:
        why = "it is not measured after any round" if run.rounds else "no round is finished"
        return f"Held-out accuracy before the first round is {percent(before)} " + (
            f"(example-weighted); {why}"
        )
    first, last = percents(before, after)
    gain = f"{points(after - before)}{_SPACE}points, " if direction != "same" else ""
    figures = f"{first} {ARROW} {last} ({gain}example-weighted)"
    return f"{_who(found, direction)}: {figures}"


def _who(found: Sequence[Track], direction: Direction) -> str:
    """Return for how many clients accuracy went which way."""
    changes = [track.change for track in found if track.change is not None]
    rose, fell = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    total, same = len(changes), len(changes) - rose - fell
    others = {"rose": rose, "fell": fell, "did not change": same}
    lead: str = "did not change" if direction == "same" else direction
    count = others.pop(lead)
    if total == 0:
        return f"Held-out accuracy {lead} on average (no client was measured before and after)"
    if direction == "same" and count < total:
        rest = f" on average: it rose for {rose} and fell for {fell} of {clients(total)}"
        return f"Held-out accuracy did not change{rest}"
    start = "No client improved: held-out accuracy" if rose == 0 else "Held-out accuracy"
    if count == 0:
        lead += " on average, yet"
    said = [f"{lead} for {count if count else 'none'} of {clients(total)}"]
    said += [f"{way} for {many}" for way, many in others.items() if many]
    return f"{start} {' and '.join(said) if len(said) < 3 else ', '.join(said)}"


def _loss(run: RunRecord) -> str:
    before, after = run.summary.eval_loss_before, run.summary.eval_loss_after
    if before is None and after is None:
        return "loss not measured"
    if before is None or after is None:
        return f"loss {nats(before)} before, {nats(after)} after, in nats"
    way = "rose" if after > before else "fell" if after < before else "did not change"
    return f"loss {way}: {nats(before)} {ARROW} {nats(after)}{_SPACE}nats"


def _worst(run: RunRecord, found: Sequence[Track]) -> str:
    lowest = worst(found)
    if run.summary.worst_client_accuracy is None or not lowest:
        return "worst client not measured"
    now = run.summary.worst_client_accuracy
    if len(lowest) > 1:
        return f"worst clients, equal, {listed([t.id for t in lowest])}: {percent(now)}"
    was, is_ = percents(lowest[0].before, now)
    return f"worst client {lowest[0].id}: {is_} (before: {was})"


def _notes(run: RunRecord, found: Sequence[Track]) -> tuple[str, ...]:
    notes = []
    stale = [t for t in found if t.after is not None and t.accuracy[-1] is None]
    if stale:
        notes.append(
            f"{clients(len(stale))} not evaluated after the last round: "
            "the latest evaluation counts."
        )
    lacking = [t for t in found if (t.before is None) != (t.after is None)]
    if lacking and run.summary.eval_accuracy_after is not None:
        notes.append(
            f"{clients(len(lacking))} measured only before or only after: "
            "the two means are not over the same clients."
        )
    return tuple(notes)


def _scaled(value: float, unit: str, prefixes: Sequence[str]) -> str:
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:  # 999.6 would be shown as 1,000
        value, power = value / 1000, power + 1
    text = f"{value:.0f}" if power == 0 and value == int(value) else _figure(value)
    return f"{text}{_SPACE}{prefixes[power]}{unit}"


def _figure(value: float) -> str:
    """Return three significant digits without an exponent."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"
