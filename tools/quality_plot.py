#!/usr/bin/env python3
"""Draws docs/quality.csv: the loss increase of every preset over the share of experts kept.

    tools/quality.sh CALIBRATION EVALUATION KEEP "PRESETS" MODEL... >> docs/quality.csv
    python3 tools/quality_plot.py [docs/quality.csv [docs/quality.svg]] [--export stock]

A panel a model, a line a preset; the increase, `nats - reference_nats`, on a logarithmic axis. Of
rows that say the same (model, preset, share) the last counts; repeated headings are skipped. Needs
nothing but Python; the same rows give the same bytes.
"""

import argparse
import csv
import html
import math
import pathlib

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
# Colours that can be told apart on white and on black, also by most who see few colours.
COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d", "#72b7b2", "#eeca3b"]
ORDER = ["reap", "m-smoe", "ream", "hc-smoe", "fast", "balanced", "best"]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 320, 300, 58, 34, 76, 18
LEAST = 1e-3
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#566173}.title{font-weight:600;fill:#1c2430}"
    ".grid{stroke:#808080;stroke-opacity:.3}.axis{stroke:#808080}"
    "@media(prefers-color-scheme:dark){text{fill:#a3adbb}.title{fill:#e6e9ee}}"
)


def read(path, export):
    """model -> preset -> share -> increase, in the order of the file."""
    models = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["export"] != export:  # of the other kind, or a heading again
                continue
            increase = float(row["nats"]) - float(row["reference_nats"])
            presets = models.setdefault(row["model"], {})
            presets.setdefault(row["preset"], {})[float(row["kept"])] = increase
    if not models:
        raise SystemExit(f"{path}: no rows of {export} exports")
    return models


def ticks(low, high):
    steps = [m * 10.0**p for p in range(-4, 3) for m in (1, 2, 5)]
    return [t for t in steps if low <= t <= high]


class Scale:
    """Where shares and increases lie in a panel."""

    def __init__(self, models):
        values = [max(v, LEAST) for p in models.values() for s in p.values() for v in s.values()]
        shares = [share for p in models.values() for s in p.values() for share in s]
        self.low, self.high = 0.8 * min(values), 1.25 * max(values)
        self.first, self.last = max(min(shares) - 0.06, 0), min(max(shares) + 0.06, 1)

    def x(self, share):
        return LEFT + (share - self.first) / (self.last - self.first) * (WIDTH - LEFT - GAP)

    def y(self, increase):
        span = math.log(self.high / self.low)
        part = math.log(max(increase, LEAST) / self.low) / span
        return TOP + (1 - part) * (HEIGHT - TOP - BOTTOM)


def line(x1, y1, x2, y2, kind):
    at = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {at}/>'


def text(x, y, what, anchor="middle", kind=""):
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(what)}</text>'


def panel(name, presets, colours, scale):
    bottom, right = HEIGHT - BOTTOM, WIDTH - GAP
    out = [text((LEFT + right) / 2, 20, name, kind="title")]
    for tick in ticks(scale.low, scale.high):
        out.append(line(LEFT, scale.y(tick), right, scale.y(tick), "grid"))
        out.append(text(LEFT - 6, scale.y(tick) + 4, f"{tick:g}", "end"))
    shares = sorted({share for values in presets.values() for share in values})
    for share in shares:
        out.append(line(scale.x(share), bottom, scale.x(share), bottom + 4, "axis"))
        out.append(text(scale.x(share), bottom + 18, f"{100 * share:g}%"))
    out += [line(LEFT, TOP, LEFT, bottom, "axis"), line(LEFT, bottom, right, bottom, "axis")]
    for preset, values in presets.items():
        points = [(scale.x(s), scale.y(v)) for s, v in sorted(values.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        colour = colours[preset]
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
    return "".join(out)


def draw(models, export):
    found = {preset for presets in models.values() for preset in presets}
    names = [p for p in ORDER if p in found] + sorted(found - set(ORDER))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    scale, width = Scale(models), WIDTH * len(models)
    label = f"loss increase of {export} exports over the share of experts kept"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        f'role="img" aria-label="{label}"><style>{STYLE}</style>'
    ]
    for i, (name, presets) in enumerate(models.items()):
        inner = panel(name, presets, colours, scale)
        out.append(f'<g transform="translate({i * WIDTH} 0)">{inner}</g>')
    about = f"nats per token more than the original ({export}), by the share of expert memory kept"
    out.append(text(LEFT, HEIGHT - 36, about, "start"))
    x = LEFT
    for name in names:
        out.append(f'<rect x="{x}" y="{HEIGHT - 22}" width="12" height="12" rx="2" '
                   f'fill="{colours[name]}"/>')
        out.append(text(x + 18, HEIGHT - 11, name, "start"))
        x += 36 + 8 * len(name)
    return "\n".join(out) + "\n</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="?", default=DOCS / "quality.csv")
    parser.add_argument("picture", nargs="?", default=DOCS / "quality.svg")
    parser.add_argument("--export", default="stock")
    options = parser.parse_args()
    svg = draw(read(options.rows, options.export), options.export)
    pathlib.Path(options.picture).write_text(svg)


if __name__ == "__main__":
    main()
