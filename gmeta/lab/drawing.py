"""Lanes and lines over one axis of seconds, as one SVG. What is drawn is added from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

BUSY, WAITING, INPUT, SLOW, IDEAL = "#2563eb", "#dbe2ea", "#f59e0b", "#dc2626", "#16a34a"
_MARKS = {"fault": "#dc2626", "action": "#7c3aed"}
_INK, _MUTED, _GRID = "#1e293b", "#64748b", "#e2e8f0"
_RANKS = ("#2563eb", "#db2777", "#0f766e", "#ea580c", "#7c3aed", "#65a30d", "#0891b2", "#a16207")
_LEFT, _RIGHT = 112.0, 14.0
_LETTER = 6.1  # width of one, at 10.5 px


def rank_colour(rank: int) -> str:
    """Return the colour of a rank; colours repeat after eight."""
    return _RANKS[rank % len(_RANKS)]


class Picture:
    """A picture from second `begin` to second `end`. The next thing is drawn at `y`."""

    def __init__(self, begin: float, end: float, width: float = 1040.0) -> None:
        self.begin, self.end, self.width = begin, max(end, begin + 1e-3), width
        self.y = 8.0
        self._parts: list[str] = []

    def x(self, at: float) -> float:
        """Return the position of a time, kept within the axis."""
        fraction = (at - self.begin) / (self.end - self.begin)
        return _LEFT + self.width * min(1.0, max(0.0, fraction))

    def text(
        self, x: float, y: float, text: str, colour: str = _MUTED, anchor: str = "start", size: float = 10.5
    ) -> None:
        """Write words, with their baseline at `y`."""
        attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
        self._parts.append(f'<text {attributes} fill="{colour}">{escape(text)}</text>')

    def box(
        self,
        begin: float,
        end: float,
        y: float,
        height: float,
        colour: str,
        about: str,
        inside: str = "",
        rim: bool = False,
    ) -> None:
        """Draw a stretch of time. `about` is shown on pointing at it, `inside` is written in it where there is room."""
        if end <= self.begin or begin >= self.end or end <= begin:
            return
        x, width = self.x(begin), max(0.5, self.x(end) - self.x(begin))
        stroke = ' stroke="#fff" stroke-width="0.8"' if rim else ""
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"{stroke}'
        self._parts.append(f"<rect {shape}><title>{escape(about)}</title></rect>")
        if inside and width > 4 + _LETTER * len(inside):
            self.text(x + width / 2, y + height / 2 + 3.7, inside, "#fff", "middle")

    def path(self, data: str, colour: str) -> None:
        """Draw a filled shape."""
        if data:
            self._parts.append(f'<path d="{data}" fill="{colour}"/>')

    def lane(self, height: float, label: str) -> float:
        """Make room for a worker, and return its top."""
        top = self.y + 4
        if label:
            self.text(_LEFT - 8, top + height / 2 + 3.7, label, _INK, "end")
        self.y = top + height
        return top

    def marks(self, label: str, marks: Sequence[tuple[float, str, str]], kind: str) -> None:
        """Draw a row of marks (time, name, about). Names are written where they do not run into the next mark."""
        y, colour = self.y + 12, _MARKS[kind]
        self.text(_LEFT - 8, y, label, _MUTED, "end")
        groups: list[tuple[float, list[str]]] = []
        for at, name, about in marks:
            x = self.x(at)
            shape = f"M{x:.1f} {y + 2:.1f}l-4 -8h8z"
            self._parts.append(f'<path d="{shape}" fill="{colour}"><title>{escape(about)}</title></path>')
            if groups and x - groups[-1][0] < 9:
                groups[-1][1].append(name)
            else:
                groups.append((x, [name]))
        edge = _LEFT + self.width
        for (x, names), after in zip(groups, [*groups[1:], None], strict=True):
            text = " + ".join(dict.fromkeys(names))
            room = (after[0] - 6 if after else edge) - x
            if 8 + _LETTER * len(text) <= room:
                self.text(x + 6, y, text, colour)
        self.y += 18

    def chart(self, height: float, label: str, top: float) -> float:
        """Make room for lines from 0 to `top`, and return its top."""
        y = self.y + 22
        self.text(_LEFT, y - 6, label, _MUTED)
        for fraction in (0.0, 0.5, 1.0):
            line = y + height * (1 - fraction)
            self._parts.append(f'<path d="M{_LEFT} {line:.1f}h{self.width}" stroke="{_GRID}" stroke-width="0.8"/>')
            self.text(_LEFT - 8, line + 3.5, f"{top * fraction:.2g}", _MUTED, "end", 9.5)
        self.y = y + height + 4
        return y

    def line(
        self, points: Sequence[tuple[float, float]], y: float, height: float, top: float, colour: str, about: str
    ) -> None:
        """Join points (seconds, value) in a chart."""
        data = "L".join(f"{self.x(at):.1f} {y + height * (1 - value / top):.1f}" for at, value in points)
        shape = f'd="M{data}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-linejoin="round"'
        self._parts.append(f"<path {shape}><title>{escape(about)}</title></path>")

    def key(self, names: Sequence[tuple[str, str]], y: float) -> None:
        """Write the names of a chart's lines above it, at its right."""
        x = _LEFT + self.width
        for name, colour in reversed(names):
            self.text(x, y - 6, name, colour, "end")
            x -= 14 + _LETTER * len(name)

    def rules(self, times: Sequence[float], top: float) -> None:
        """Draw thin lines from `top` to here, where something was decided."""
        for at in times:
            line = f"M{self.x(at):.1f} {top:.1f}V{self.y:.1f}"
            colour = f'stroke="{_MARKS["action"]}" stroke-width="0.7" stroke-opacity="0.45"'
            self._parts.append(f'<path d="{line}" {colour}/>')

    def axis(self) -> None:
        """Draw the axis of seconds."""
        self.y += 6
        self._parts.append(f'<path d="M{_LEFT} {self.y:.1f}h{self.width}" stroke="{_MUTED}" stroke-width="0.8"/>')
        step = _round_step((self.end - self.begin) / 10)
        tick = -(-self.begin // step) * step
        while tick <= self.end:
            x = self.x(tick)
            self._parts.append(f'<path d="M{x:.1f} {self.y:.1f}v4" stroke="{_MUTED}" stroke-width="0.8"/>')
            self.text(x, self.y + 15, f"{tick:g} s", _MUTED, "middle")
            tick = round(tick + step, 9)
        self.y += 22

    def svg(self, label: str) -> str:
        """Return the full picture. It is as wide as the page, yet never too small to read."""
        width = _LEFT + self.width + _RIGHT
        return (
            f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {self.y:.0f}" '
            'style="width:100%;min-width:820px;display:block" font-family="system-ui, sans-serif">'
            f"{''.join(self._parts)}</svg>"
        )


def fraction_path(picture: Picture, fractions: Sequence[float], size: float, y: float, height: float) -> str:
    """Return the outline of bars that fill `fractions` of a lane's height from its bottom, each `size` seconds wide."""
    bottom, data, before = y + height, [f"M{picture.x(picture.begin):.1f} {y + height:.1f}"], 0.0
    for i, fraction in enumerate(fractions):
        if abs(fraction - before) > 5e-3:
            data.append(f"H{picture.x(picture.begin + i * size):.1f}V{bottom - height * fraction:.1f}")
            before = fraction
    return "".join([*data, f"H{picture.x(picture.begin + len(fractions) * size):.1f}V{bottom:.1f}Z"])


def _round_step(about: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least `about`."""
    power: float = 10.0 ** (len(f"{about:.0f}") - 1 if about >= 1 else -1 if about >= 0.1 else -2)
    return next(power * k for k in (1, 2, 5, 10, 100) if power * k >= about)
