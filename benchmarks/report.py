"""What was measured, in a form to keep: figures, what they must be, JSON, Markdown, a plot in SVG.

Nothing here measures.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Self

__all__ = ["Claim", "Crowd", "Latency", "Report", "draw"]


@dataclass(frozen=True)
class Latency:
    """Microseconds of single execs."""

    p50: float
    p99: float
    least: float
    count: int

    @classmethod
    def of(cls, nanoseconds: Iterable[int]) -> Self:
        """Nearest-rank percentiles."""
        values = sorted(nanoseconds)
        last = len(values) - 1
        p50, p99 = (
            round(values[min(last, math.ceil(share * len(values)) - 1)] / 1000, 1)
            for share in (0.50, 0.99)
        )
        return cls(p50, p99, round(values[0] / 1000, 1), len(values))


@dataclass(frozen=True)
class Crowd:
    """Many clients at once. `rate`: execs a second. `p50` and `p99`: µs, 0 where not taken.

    `slowest_share`: the execs of the slowest client over those of the median one.
    """

    rate: float
    clients: int
    slowest_share: float
    p50: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, lines: Sequence[str], seconds: int) -> Self:
        """From what floor.c prints of a crowd."""
        counts = sorted(int(line.split()[1]) for line in lines if line.startswith("client"))
        times = [int(line) for line in lines if not line.startswith("client")]
        latency = Latency.of(times) if times else None
        return cls(
            rate=round(sum(counts) / seconds, 1),
            clients=len(counts),
            slowest_share=round(counts[0] / statistics.median(counts), 3),
            p50=latency.p50 if latency else 0.0,
            p99=latency.p99 if latency else 0.0,
        )

    @classmethod
    def middle(cls, crowds: Sequence[Self]) -> Self:
        """The one with the median rate."""
        return sorted(crowds, key=lambda one: one.rate)[len(crowds) // 2]


@dataclass(frozen=True)
class Claim:
    """A figure and the limit that it must keep. `at_least` False: it must not be above it."""

    what: str
    measured: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def line(self) -> str:
        """PASS or MISS, and why."""
        verdict = "PASS" if self.holds else "MISS"
        bound = "at least" if self.at_least else "at most"
        return f"{verdict}  {self.what}: {self.measured:g} {self.unit}, {bound} {self.limit:g}"


@dataclass
class Report:
    """All of one run. `unavailable`: what could not be measured here, and why."""

    host: dict[str, str] = field(default_factory=dict)
    latency: dict[str, Latency] = field(default_factory=dict)
    crowd: dict[str, Crowd] = field(default_factory=dict)
    output: dict[str, float] = field(default_factory=dict)  # GB/s
    memory: dict[str, int] = field(default_factory=dict)  # KiB
    qemu_latency: dict[str, Latency] = field(default_factory=dict)
    qemu_output: dict[str, float] = field(default_factory=dict)  # GB/s
    unavailable: dict[str, str] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def write_json(self, path: Path) -> None:
        """Every figure, and each claim with its verdict."""
        values = asdict(self)
        for claim, entry in zip(self.claims, values["claims"], strict=True):
            entry["holds"] = claim.holds
        path.write_text(json.dumps(values, indent=1) + "\n")

    def print(self) -> None:
        """Markdown tables, ready for docs/design/performance.md, then the verdicts."""
        print_latency("warm exec of a static program that does nothing", self.latency)
        print_crowd(self.crowd)
        print_numbers("output of one process", "GB/s", self.output)
        print_numbers("the agent's resident memory", "KiB", self.memory)
        print_latency("the same exec in QEMU, over vsock", self.qemu_latency)
        print_numbers("output of one process in QEMU, over vsock", "GB/s", self.qemu_output)
        if self.unavailable:
            print("\n| not measured here | why |\n|---|---|")
            for name, reason in self.unavailable.items():
                print(f"| {name} | {reason} |")
        print()
        for claim in self.claims:
            print(claim.line())


def print_latency(title: str, rows: Mapping[str, Latency]) -> None:
    if not rows:
        return
    floor = math.nan
    columns = ("p50 µs", "p99 µs", "min µs", "p50 / floor", "µs over it", "p99 / p50", "execs")
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        if name.startswith("C floor"):
            floor = row.p50  # of those below it
        cells = [f"{row.p50:,.0f}", f"{row.p99:,.0f}", f"{row.least:,.0f}"]
        cells += [f"{row.p50 / floor:.2f}", f"{row.p50 - floor:,.0f}", f"{row.p99 / row.p50:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {row.count} |")


def print_crowd(rows: Mapping[str, Crowd]) -> None:
    if not rows:
        return
    print("\n| many at once | clients | execs/s | slowest client / median | p50 µs | p99 µs |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        times = f"{row.p50:,.0f} | {row.p99:,.0f}" if row.p50 else "- | -"
        print(f"| {name} | {row.clients} | {row.rate:,.0f} | {row.slowest_share:.2f} | {times} |")


def print_numbers(title: str, unit: str, rows: Mapping[str, float]) -> None:
    if not rows:
        return
    print(f"\n| {title} | {unit} |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:,.2f} |" if unit == "GB/s" else f"| {name} | {value:,} |")


# ── the plot ─────────────────────────────────────────────────────────────────────────────────────

LABELS = 300  # pixels for the names
PLOT = 520  # pixels for the bars
ROW = 34
TOP = 64
OTHER_COLOUR = "#8a94a6"


def draw(rows: Mapping[str, Latency], title: str, colours: Mapping[str, str]) -> str:
    """An SVG: one bar to the p50 and a line on to the p99, on a logarithmic axis of microseconds.

    `colours`: of the rows whose name begins so; the others are grey.
    """
    low = math.floor(math.log10(min(row.least for row in rows.values())))
    high = math.ceil(math.log10(max(row.p99 for row in rows.values())))

    def x(microseconds: float) -> float:
        share = (math.log10(microseconds) - low) / (high - low)
        return round(LABELS + PLOT * max(0.0, share), 1)

    bottom = TOP + ROW * len(rows)
    width, height = LABELS + PLOT + 120, bottom + 44
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
        f'<rect {size} fill="white"/>',
        f'<text x="16" y="26" font-size="16" font-weight="bold">{escape(title)}</text>',
        '<text x="16" y="46" fill="#555">bar: p50; line: p99; logarithmic</text>',
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        label = f"{10**power:,} µs" if power < 3 else f"{10 ** (power - 3):,} ms"
        parts.append(f'<path d="M{at} {TOP - 6}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{at}" y="{bottom + 20}" text-anchor="middle">{label}</text>')
    for index, (name, row) in enumerate(rows.items()):
        y = TOP + ROW * index
        colour = next((c for start, c in colours.items() if name.startswith(start)), OTHER_COLOUR)
        middle, left = y + ROW / 2 - 4, x(10.0**low)
        parts.append(f'<text x="{LABELS - 8}" y="{middle + 5}" text-anchor="end">')
        parts.append(f"{escape(name)}</text>")
        bar = f'x="{left}" y="{y}" width="{x(row.p50) - left:.1f}" height="{ROW - 8}"'
        parts.append(f'<rect {bar} fill="{colour}"/>')
        parts.append(f'<path d="M{x(row.p50)} {middle}H{x(row.p99)}" stroke="{colour}"/>')
        parts.append(f'<path d="M{x(row.p99)} {middle - 6}v12" stroke="{colour}"/>')
        figure = f"{row.p50 / 1000:,.2f} ms"
        parts.append(f'<text x="{x(row.p99) + 8}" y="{middle + 5}">{figure}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
