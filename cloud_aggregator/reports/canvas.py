"""Drawing: the palette, quiet axes, and a figure as text to put into a page.

A figure is drawn in the light palette. As SVG its colours become CSS variables, so that it follows
the page's light or dark theme; a large one becomes a PNG, keeps them and stands on a white card.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Mark = Literal["line", "thin", "dash", "dots", "square", "ring", "dot", "cross"]
MAX_SVG_BYTES = 300_000
HALF, THIRD = 400, 300  # widths of a figure, in CSS pixels at scale 1

# Each colour by name: the light page's, then the dark page's.
PALETTE: dict[str, tuple[str, str]] = {
    "card": ("#ffffff", "#1b2027"),
    "ink": ("#1d2530", "#e6e9ee"),
    "muted": ("#5c6775", "#9aa5b3"),
    "grid": ("#e3e7ec", "#303843"),
    "client": ("#9fabb9", "#64707f"),
    "mean": ("#14508f", "#86b9f4"),
    "worst": ("#bf3f14", "#ff9a70"),
    "c1": ("#3b6fb6", "#6c9ee2"),
    "c2": ("#e08a2e", "#efa654"),
    "c3": ("#3a9a78", "#58bd98"),
    "c4": ("#b5477d", "#da7cab"),
    "c5": ("#86bce8", "#b4d8f6"),
    "c6": ("#c7b233", "#dccb63"),
    "c7": ("#7a5ab8", "#a78ce4"),
    "c8": ("#8b5e3c", "#bd8c66"),
    "other": ("#b3bac3", "#56606d"),
}
SERIES = tuple(f"c{n}" for n in range(1, 9))
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "pwff",  # the same record gives the same page
    "text.parse_math": False,  # a '$' in a name is a dollar
    "axes.unicode_minus": True,
}
_COLOUR = {light: name for name, (light, _) in PALETTE.items()}
_PAINT = re.compile(r"((?:fill|stroke): )(#[0-9a-f]{6})")
_ID = re.compile(r' id="([^"]+)"')
_REFERENCE = re.compile(r'(url\(#|href="#)([^)"]+)')
_FONT = re.compile(r"font-family: [^;\"]+; ?")
_ROOT = re.compile(r"^.*?<svg[^>]*?viewBox=\"([^\"]+)\"[^>]*>", re.DOTALL)
_META = re.compile(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a legend, set in HTML so that it wraps.

    Attributes:
        colour: A name of the palette.
        label: What it stands for.
        mark: How it looks in the figure.
    """

    colour: str
    label: str
    mark: Mark = "line"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with its words; ``image`` is empty where there is nothing to draw."""

    title: str
    caption: str
    image: str = ""
    keys: tuple[Key, ...] = ()


def colour(name: str) -> str:
    """Return the light colour of that name; the page turns it into its variable."""
    return PALETTE[name][0]


def draw(
    paint: Callable[[Axes], None], *, name: str, label: str, width: int = HALF, height: int = 260
) -> str:
    """Return what ``paint`` draws as inline SVG, or as a PNG if that is smaller.

    Args:
        paint: Draws on the axes it is given.
        name: Unique on the page: prefixes the identifiers inside the SVG.
        label: The text alternative.
        width: CSS pixels at scale 1.
        height: Likewise.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.subplots()
        _quieten(axes)
        paint(axes)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = _inline(text.getvalue(), name, label)
        if len(svg) <= MAX_SVG_BYTES:
            return svg
        pixels = BytesIO()
        figure.savefig(pixels, format="png", dpi=144, facecolor=colour("card"))
    data = base64.b64encode(pixels.getvalue()).decode()
    return f'<img class="plate" alt="{html.escape(label)}" src="data:image/png;base64,{data}">'


def _quieten(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", color=colour("grid"), linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=colour("client"), linewidth=0.8)
    axes.tick_params(length=0, pad=5, colors=colour("muted"), labelsize=10)
    axes.xaxis.label.set_color(colour("muted"))
    axes.yaxis.label.set_color(colour("muted"))


def _inline(svg: str, name: str, label: str) -> str:
    """Return the SVG without prolog and namespaces, its colours as variables, its ids unique."""
    body = _META.sub("", svg)
    root = f'<svg viewBox="\\1" role="img" aria-label="{_literal(html.escape(label))}">'
    body = _ROOT.sub(root, body, count=1)
    used = {match[2] for match in _REFERENCE.finditer(body)}
    body = _ID.sub(lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = _REFERENCE.sub(rf"\g<1>{name}-\g<2>", body)
    body = _FONT.sub("", body)
    body = _PAINT.sub(_as_variable, body)
    return re.sub(r"\n\s*", "\n", body).strip()


def _as_variable(match: re.Match[str]) -> str:
    name = _COLOUR.get(match[2])
    return f"{match[1]}var(--{name})" if name else match[0]


def _literal(text: str) -> str:
    """Return text so that a replacement pattern takes it as it is."""
    return text.replace("\\", r"\\")
