"""The charts of what a run cost, and on which devices; and of several runs over one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cloud_aggregator.records import ClientRound, RunRecord, modelled_seconds
from cloud_aggregator.reports import words
from cloud_aggregator.reports.axes import bar_end, cut, line, name_rows, rounds_axis, row_height
from cloud_aggregator.reports.canvas import SERIES, THIRD, Chart, Key, Mark, colour, draw
from cloud_aggregator.reports.energy import MODELLED
from cloud_aggregator.reports.round_lines import Lines
from cloud_aggregator.reports.series import RoundRow, Track, Values, last_of
from messaging.protocol import DeviceRecord

_BYTE_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
_DASHES: tuple[tuple[str, Mark], ...] = (("-", "line"), ("--", "dash"), (":", "dots"))


def devices(clients: Sequence[Track], source: str) -> list[Chart]:
    """Return what the devices are unlike in: LoRA modules, compute and uplink time per round."""
    known = [(t, t.device) for t in clients if t.device]
    ranked = sorted(known, key=lambda pair: (-pair[1].lora_count, pair[1].profile, pair[0].id))
    profiles = list(dict.fromkeys(device.profile for _, device in ranked))
    shades = {name: SERIES[n] if n < len(SERIES) else "other" for n, name in enumerate(profiles)}
    keys = tuple(Key(colour=shades[name], label=name, mark="square") for name in profiles)
    rows = [(track, shades[device.profile]) for track, device in ranked]
    counts = {track.id: [float(device.lora_count)] for track, device in ranked}
    compute = {t.id: _positive(t.rounds, lambda part: part.compute_seconds) for t, _ in ranked}
    uplink = {t.id: _positive(t.rounds, lambda part: part.uplink_seconds) for t, _ in ranked}
    spread = "Bar: mean over its rounds; whisker: least to most."
    lora = _ranks([device for _, device in ranked])
    charts = (
        (counts, "LoRA modules", "modules", lora),
        (compute, f"Compute per round ({source})", "seconds", spread),
        (uplink, f"Uplink per round ({MODELLED})", "seconds", spread),
    )
    return [
        _bars(rows, values, title=title, unit=unit, caption=caption, keys=keys)
        for values, title, unit, caption in charts
    ]


def bytes_per_round(run: RunRecord, rows: Sequence[RoundRow]) -> Chart:
    """Return the bytes that went up and down in each round."""
    title = "Bytes per round"
    up, down = [row.upload_bytes for row in rows], [row.download_bytes for row in rows]
    caption = f"Total: {words.size(sum(up))} up, {words.size(sum(down))} down, over all clients."
    if not any(up) and not any(down):
        return Chart(title=title, caption=f"{caption} Nothing was sent.")

    unit, scale = next(pair for pair in _BYTE_UNITS if max(*up, *down) >= pair[1])

    def paint(axes: Axes) -> None:
        places = np.arange(1, len(rows) + 1)
        axes.bar(places - 0.2, np.array(up) / scale, 0.38, color=colour("c1"))
        axes.bar(places + 0.2, np.array(down) / scale, 0.38, color=colour("c5"))
        rounds_axis(axes, run, first=1)
        axes.set_ylabel(f"{unit}, all clients")

    keys = (
        Key(colour="c1", label="up, from the clients", mark="square"),
        Key(colour="c5", label="down, to the clients", mark="square"),
    )
    image = draw(paint, name="bytes", label=f"{title}. {caption}", height=230)
    return Chart(title=title, caption=caption, image=image, keys=keys)


def seconds_per_round(run: RunRecord, source: str) -> Chart:
    """Return the virtual duration of each round: what a fleet would have taken."""
    title = f"Virtual time per round ({source})"
    seconds = [record.virtual_seconds for record in run.rounds]
    total = words.duration(modelled_seconds(run.rounds))
    waited = sum(record.waited_seconds for record in run.rounds)
    among = f", {words.duration(waited)} of it waiting for devices" if waited else ""
    caption = f"From the task to the new state on the slowest device. Total: {total}{among}."
    if not any(seconds):
        return Chart(title=title, caption="Virtual time: no round is finished.")

    def paint(axes: Axes) -> None:
        axes.bar(range(1, len(seconds) + 1), seconds, 0.6, color=colour("c3"))
        rounds_axis(axes, run, first=1)
        axes.set_ylabel(f"seconds, {source}" if len(source) < 12 else "seconds")

    image = draw(paint, name="seconds", label=f"{title}. {caption}", height=230)
    return Chart(title=title, caption=caption, image=image)


def overlay(
    runs: Sequence[tuple[str, Values]],
    *,
    places: Sequence[Sequence[float]],
    axis: str,
    shown: Lines,
) -> Chart:
    """Return the mean figure of several runs over rounds, or over what they cost.

    Args:
        runs: Name and figures of each, before the first round and after each.
        places: Where each of a run's values stands along the bottom.
        axis: What stands along the bottom, with its unit.
        shown: Which figure it is.
    """
    title = f"{shown.what} over {axis}"
    drawn = [n for n, (_, values) in enumerate(runs) if any(v is not None for v in values)]
    if not drawn:
        return Chart(title=title, caption=f"{shown.what}: not measured in any run.")
    looks = {n: (SERIES[n % len(SERIES)], *_DASHES[n // len(SERIES) % 3]) for n in drawn}

    def paint(axes: Axes) -> None:
        for n in drawn:
            shade, dashes, _ = looks[n]
            line(axes, runs[n][1], shown.scale, colour(shade), 2.2, places=places[n],
                 linestyle=dashes)  # fmt: skip
        axes.xaxis.set_major_locator(
            MaxNLocator(integer=True, nbins=7, min_n_ticks=1, steps=[1, 2, 5, 10])
        )
        axes.margins(x=0.04)
        axes.set_xlabel(axis)
        axes.set_ylabel(shown.axis)

    keys = tuple(
        Key(colour=looks[n][0], label=f"{runs[n][0]} ({shown.text(last_of(runs[n][1]))})",
            mark=looks[n][2])
        for n in drawn
    )  # fmt: skip
    how = f"mean over the clients, weighted by {shown.weighted}" if shown.weighted else "plain mean"
    caption = f"{how[0].upper()}{how[1:]}; in brackets after the last round."
    image = draw(paint, name=shown.name, label=f"{title}. {caption}", width=shown.width,
                 height=max(shown.height, 280 if shown.width > THIRD else 0))  # fmt: skip
    return Chart(title=title, caption=caption, image=image, keys=keys)


def _bars(
    rows: Sequence[tuple[Track, str]],
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    unit: str,
    caption: str,
    keys: tuple[Key, ...],
) -> Chart:
    """Return one bar a client: the mean of its values, with a whisker where they differ."""
    shown, left_out = cut(rows)
    if not any(any(values[track.id]) for track, _ in shown):
        return Chart(title=title, caption=f"{title}: none recorded.")

    def paint(axes: Axes) -> None:
        for row, (track, shade) in enumerate(shown):
            mine = values[track.id]
            if not mine:
                bar_end(axes, words.NOT_MEASURED, 0.0, row)
                continue
            mean = sum(mine) / len(mine)
            axes.barh(row, mean, height=0.66, color=colour(shade))
            if min(mine) < max(mine):
                axes.plot([min(mine), max(mine)], [row, row], color=colour("ink"), linewidth=1)
            bar_end(axes, words.number(float(f"{mean:.3g}")), max(mine), row)
        name_rows(axes, [track.id for track, _ in shown])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
        axes.set_xlabel(unit)

    name, label = title.split(maxsplit=1)[0].lower(), f"{title}. {caption}{left_out}"
    image = draw(paint, name=name, label=label, width=THIRD, height=row_height(len(shown)))
    return Chart(title=title, caption=f"{caption}{left_out}", image=image, keys=keys)


def _positive(rounds: Sequence[ClientRound], of: Callable[[ClientRound], float]) -> list[float]:
    return [value for part in rounds if (value := of(part)) > 0]


def _ranks(known: Sequence[DeviceRecord]) -> str:
    """Return the LoRA ranks and how they were found, in words."""
    ranks = sorted({device.lora_rank for device in known if device.lora_count})
    rules = sorted({device.lora_rank_rule for device in known if device.lora_count})
    if not ranks:
        return "No device trains LoRA modules."
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"How many a device trains, at {span} (rank rule: {', '.join(rules)})."
