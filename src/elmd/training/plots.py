"""Training curves as a picture in the artifact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def curves(metrics: Path, out: Path, *, title: str) -> None:
    """Draw every column of a `metrics.jsonl` that a reader would look at: loss and the validation metrics."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in metrics.read_text().splitlines():
        entry = json.loads(line)
        for key, value in entry.items():
            if key == "loss" or key.startswith("valid/"):
                steps, values = series.setdefault(key, ([], []))
                steps.append(entry["step"])
                values.append(value)
    figure, axes = pyplot.subplots(
        1, max(1, len(series)), figsize=(3.6 * max(1, len(series)), 2.8), squeeze=False, constrained_layout=True
    )
    for axis, (key, (steps, values)) in zip(axes[0], series.items(), strict=False):
        axis.plot(steps, values, marker="o" if len(steps) < 20 else None, markersize=3)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str], out: Path) -> None:
    """Draw a confusion matrix (rows gold, columns predicted), shaded by row share; further columns are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = len(labels)
    shares = [[row[j] / max(1, sum(row)) for j in range(size)] for row in counts]
    figure, axis = pyplot.subplots(figsize=(4.6, 4.2), constrained_layout=True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(size), labels, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(size), labels, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("gold")
    for i in range(size):
        for j in range(size):
            dark = shares[i][j] > 0.5
            axis.text(j, i, str(counts[i][j]), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
