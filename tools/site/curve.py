"""Accuracy over a share as an SVG of a few hundred bytes that follows the page's light or dark colours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tools.site.evidence import Curve

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 470, 16, 256
COLOURS = ("#d97706", "#888888", "#4b83c9", "#5a9e6f", "#a15fb5")


def curve_svg(curve: Curve) -> str:
    """The picture, to stand in Markdown as it is. Shares lie evenly apart, as a table's columns."""
    shares = sorted({x for line in curve.lines.values() for x, _ in line})
    floor = min(0.5, min(y for line in curve.lines.values() for _, y in line))
    low = int(floor * 10) / 10
    right = RIGHT - LEFT - 40

    def x_of(share: float) -> float:
        return LEFT + 20 + right * (shares.index(share) / max(1, len(shares) - 1))

    def y_of(accuracy: float) -> float:
        return BOTTOM - (accuracy - low) / (1 - low) * (BOTTOM - TOP)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" style="max-width:{WIDTH}px" font-size="12" '
        f'fill="currentColor" aria-label="accuracy over {curve.over}">'
    ]
    for tick in range(round(low * 10), 11, 1 if low >= 0.5 else 2):
        y = y_of(tick / 10)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick * 10} %</text>')
    parts += [
        f'<text x="{x_of(s):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{s:.0%}</text>' for s in _apart(shares, x_of)
    ]
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">{curve.over}</text>')
    full = y_of(curve.full)
    parts.append(f'<path d="M{LEFT} {full:.1f}H{RIGHT}" stroke="currentColor" stroke-dasharray="5 4"/>')
    ends = [("all tokens", full, "currentColor")]
    for (name, line), colour in zip(curve.lines.items(), COLOURS, strict=False):
        points = [(x_of(x), y_of(y)) for x, y in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
            f"<title>{name}: {a:.1%} at {s:.1%}</title></circle>"
            for (x, y), (s, a) in zip(points, line, strict=True)
        ]
        ends.append((name, points[-1][1], colour))
    for name, y, colour in _spread(ends):
        parts.append(f'<text x="{RIGHT + 8}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return "".join([*parts, "</svg>"])


def _apart(shares: list[float], x_of: Callable[[float], float]) -> Iterator[float]:
    """Shares whose labels do not touch."""
    last = -100.0
    for share in shares:
        x = x_of(share)
        if x - last >= 34:
            yield share
            last = x


def _spread(ends: list[tuple[str, float, str]]) -> list[tuple[str, float, str]]:
    """Names at the lines' ends, moved down until none covers another."""
    out: list[tuple[str, float, str]] = []
    for name, y, colour in sorted(ends, key=lambda end: end[1]):
        out.append((name, max(y, out[-1][1] + 15) if out else y, colour))
    return out
