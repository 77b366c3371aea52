"""A machine's boot as a picture: one bar per step against time, as SVG 1.1.

Pure: from the timeline of a machine's state to text. Names in it come from the guest and are taken
for hostile: everything is escaped, and no more than ROWS_MAX rows are drawn.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

from microguest.guest.report import Step

__all__ = ["boot_chart"]

ROWS_MAX: Final = 80
WIDTH: Final = 860  # of the time axis, in pixels
LEFT: Final = 24
TOP: Final = 96
ROW: Final = 22
BAR: Final = 14
LABEL_SPACE: Final = 220  # right of the axis, for labels of bars that end late
TICKS: Final = 10  # at most about so many on the axis
THINNEST: Final = 1.5  # pixels of a bar that would hardly be seen

# Colours that also people with red-green blindness tell apart (Okabe and Ito's set).
COLOURS: Final = {
    "host": "#999999",
    "kernel": "#56b4e9",
    "PID 1": "#0072b2",
    "agent": "#e69f00",
    "workload": "#009e73",
    "event": "#d55e00",
}
HOST_STEPS: Final = frozenset({"launch"})
EVENTS: Final = frozenset({"workload-runs", "ready", "first-exec", "first-result", "handed-off"})


@dataclass(frozen=True, slots=True)
class Bar:
    """One row. Milliseconds since the launch; an event has no length."""

    name: str
    group: str
    start: float
    end: float


def boot_chart(timeline: Iterable[Step], *, title: str, subtitle: str = "") -> str:
    """The picture of one boot. Times are milliseconds since the launch; ValueError without any."""
    bars = sorted(bars_of(list(timeline)[:ROWS_MAX]), key=lambda bar: (bar.start, bar.end))
    if not bars:
        raise ValueError("there are no steps to draw")
    end = max(bar.end for bar in bars)
    tick = tick_of(end)
    last = max(tick, math.ceil(end / tick) * tick)
    scale = WIDTH / last
    height = TOP + ROW * len(bars) + 44
    width = LEFT + WIDTH + LABEL_SPACE
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f"<title>{shown(title)}</title>",
        f'<rect {size} fill="#ffffff"/>',
        f'<text x="{LEFT}" y="28" font-size="18" fill="#222222">{shown(title)}</text>',
        f'<text x="{LEFT}" y="48" fill="#555555">{shown(subtitle)}</text>',
        *legend(bars),
        *axis(last, tick, scale, height),
        *(part for row, bar in enumerate(bars) for part in drawn(bar, row, scale)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def bars_of(timeline: list[Step]) -> Iterator[Bar]:
    """A bar for each step, and one for the agent, which starts up beside PID 1's other steps."""
    ends = {step.name: step.end_ms for step in timeline}
    for step in timeline:
        yield Bar(step.name, group_of(step.name), step.start_ms, max(step.start_ms, step.end_ms))
    for step in timeline:
        if step.name == "kernel" and "launch" in ends:
            yield Bar("VMM and firmware", "host", ends["launch"], step.start_ms)
    if "agent-start" in ends and ends.get("agent-ready", 0.0) > ends["agent-start"]:
        yield Bar("agent starts up", "agent", ends["agent-start"], ends["agent-ready"])


def shown(text: str) -> str:
    """As XML can hold it, and people can read it."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def group_of(name: str) -> str:
    """Whose step it is."""
    if name in HOST_STEPS:
        return "host"
    if name in EVENTS:
        return "event"
    return name if name in ("kernel", "workload") else "PID 1"


def tick_of(end: float) -> float:
    """1, 2 or 5 times a power of ten milliseconds, so that there are about TICKS of them."""
    power = 10.0 ** math.floor(math.log10(max(end, 1.0) / TICKS))
    return next(n * power for n in (1, 2, 5, 10) if max(end, 1.0) / (n * power) <= TICKS)


def axis(last: float, tick: float, scale: float, height: int) -> Iterator[str]:
    """A line and a number for each tick."""
    digits = 0 if tick >= 1 else 1
    for number in range(round(last / tick) + 1):
        at = LEFT + number * tick * scale
        yield (
            f'<line x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{height - 32}" '
            'stroke="#dddddd"/>'
        )
        for y in (TOP - 10, height - 16):
            yield (
                f'<text x="{at:.1f}" y="{y}" text-anchor="middle" fill="#777777">'
                f"{number * tick:.{digits}f}{' ms' if number == 0 else ''}</text>"
            )


def legend(bars: list[Bar]) -> Iterator[str]:
    """What the colours mean, of those that are there."""
    at = LEFT
    used = {bar.group for bar in bars}
    for group, colour in COLOURS.items():
        if group in used:
            yield f'<rect x="{at}" y="58" width="12" height="12" fill="{colour}"/>'
            yield f'<text x="{at + 17}" y="68" fill="#333333">{group}</text>'
            at += 90


def drawn(bar: Bar, row: int, scale: float) -> Iterator[str]:
    """The bar and its label, which stands inside the axis also where the bar ends late."""
    y = TOP + row * ROW
    start, length = LEFT + bar.start * scale, (bar.end - bar.start) * scale
    colour = COLOURS[bar.group]
    if bar.group == "event":
        yield (
            f'<path d="M {start:.1f} {y + 1} l 6 6 l -6 6 l -6 -6 z" fill="{colour}"/>'
            f'<text x="{start + 12:.1f}" y="{y + 11}" fill="#222222">'
            f"{shown(bar.name)} at {bar.start:.1f} ms</text>"
        )
        return
    yield (
        f'<rect x="{start:.1f}" y="{y}" width="{max(length, THINNEST):.1f}" height="{BAR}" '
        f'fill="{colour}"><title>{shown(bar.name)}: {bar.start:.3f} to {bar.end:.3f} ms</title>'
        "</rect>"
    )
    yield (
        f'<text x="{start + max(length, THINNEST) + 5:.1f}" y="{y + 11}" fill="#222222">'
        f"{shown(bar.name)} ({bar.end - bar.start:.1f} ms)</text>"
    )
