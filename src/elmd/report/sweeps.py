"""Numbers that an experiment varies: Fig. 6 and its like, and what the self-separation coefficient costs."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from elmd.evaluation.comparison import Comparison
from elmd.evaluation.runs import Experiment
from elmd.evaluation.systems import FULL, SYMBOLS
from elmd.evaluation.tables import Table
from elmd.report import svg
from elmd.report.blocks import Plots
from elmd.report.links import Links
from elmd.report.results import OPEN, PRINTED

#: The metrics of Fig. 6, with what it divides them by.
DRAWN = {"bleu4_char": 1, "meteor_char": 10, "rougeL_char": 10}

#: What a sweep's picture is called, by the key that it varies.
SWEPT = {"erm.slots": "Fig. 6: the self-separation coefficient s", "vision.frames": "The number of frames m"}


def sweep(comparison: Comparison, experiment: Experiment, key: str) -> list[Any]:
    """Scores against a number that the full model's runs vary, such as Fig. 6's s; nothing where none does.

    Args:
        key: dotted key of the configuration, one of `SYMBOLS`.
    """
    group, _, name = key.partition(".")
    symbol = SYMBOLS[key]
    values = {
        system: float(runs[0].config[group][name])
        for system, runs in experiment.systems.items()
        if system.startswith(FULL) and f" {symbol} = " in system
    }
    if len(values) < 2:
        return []
    systems = sorted(values, key=lambda system: values[system])
    xs = [values[system] for system in systems]
    together, alone = [], []
    for style, (metric, divisor) in enumerate(DRAWN.items()):
        scores = [comparison.row(system).cells[OPEN][metric] for system in systems]
        line = svg.Line(PRINTED[metric], xs, [score.mean for score in scores], style, [score.sd for score in scores])
        alone.append(line)
        label = PRINTED[metric] + (f" / {divisor}" if divisor > 1 else "")
        errors = [None if sd is None else sd / divisor for sd in line.errors or ()]
        together.append(replace(line, label=label, ys=[y / divisor for y in line.ys], errors=errors))
    pictures = [svg.lines(f"Scores against {symbol}", together, xlabel=symbol, ticks=xs, log=True, markers=True)]
    pictures += [svg.lines(line.label, [line], xlabel=symbol, ticks=xs, log=True, markers=True) for line in alone]
    seeds = any(len(experiment.systems[system]) > 1 for system in systems)
    note = (
        f"Protocol {OPEN}. "
        + ("Bars: ± sd over training seeds. " if seeds else "One training seed each: what is noise is not known. ")
        + "In the first picture METEOR and ROUGE-L are divided by 10"
        + (", as in the paper's figure, whose values are not printed." if key == "erm.slots" else ".")
    )
    return [Plots(pictures, [(line.style, line.label) for line in together], SWEPT[key], note, glyphs=True)]


def cost(comparison: Comparison, experiment: Experiment, links: Links) -> list[Any]:
    """What a larger s costs (§5.4): the size of the index and the time of a search; nothing where s does not vary.

    Raises:
        ArtifactError: an index is gone or broken.
    """
    from elmd.evaluation.cost import coefficient_points

    points = coefficient_points(experiment, comparison)
    if len(points) < 2:
        return []
    xs = [float(point.slots) for point in points]
    sizes = [statistics.mean(cost.key_bytes / 1e6 for cost in point.costs.values()) for point in points]
    times = [[cost.microseconds for cost in point.costs.values()] for point in points]
    means = [statistics.mean(seeds) for seeds in times]
    spreads = [statistics.stdev(seeds) if len(seeds) > 1 else None for seeds in times]
    pictures = [
        svg.lines(title, [line], xlabel="s", ticks=xs, log=True, markers=True, zero=True)
        for title, line in (
            ("Size of the searched key, MB", svg.Line("size", xs, sizes, 3)),
            ("Search, µs per query", svg.Line("time", xs, means, 4, spreads)),
        )
    ]
    rows = []
    for point, size, mean in zip(points, sizes, means, strict=True):
        runs, first = experiment.systems[point.system], next(iter(point.costs.values()))
        indices = list(dict.fromkeys(run.need("demonstrations") for run in runs))
        trainings = list(dict.fromkeys(run.need("retriever") for run in runs))
        rows.append([
            str(point.slots),
            f"{first.width:,}",
            links.cell(f"{first.candidates:,}", point.system, indices),
            links.cell(f"{size:.2f}", point.system, indices),
            links.cell(f"{mean:.1f}", point.system, indices),
            links.cell(f"{statistics.mean(point.train_seconds.values()):.0f}", point.system, trainings),
        ])  # fmt: skip
    columns = ["s", "width of the key", "candidates", "size, MB", "µs per query", "training of ERM, s"]
    queries = next(iter(points[0].costs.values())).queries
    note = (
        f"Exact search for {queries:,} queries at once on one thread, timed now on the machine that made this page; "
        "mean over training seeds."
    )
    return [Plots(pictures, title="The cost of s (§5.4)"), Table(columns, rows, notes=[note])]
