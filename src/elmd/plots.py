"""Training curves as a picture in the artifact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

#: By name: steps and values.
Series = dict[str, tuple[list[int], list[float]]]


def series(metrics: Path) -> Series:
    """What a reader would look at in a `metrics.jsonl`: the loss and the validation metrics."""
    lines: Series = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for key, value in entry.items():
            if key == "loss" or key.startswith("valid/"):
                steps, values = lines.setdefault(key, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return lines


def curves(metrics: Path, out: Path, *, title: str) -> None:
    """Draw the series of a `metrics.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = series(metrics)
    columns = min(4, max(1, len(lines)))
    rows = -(-max(1, len(lines)) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat[len(lines) :]:
        axis.set_visible(False)
    for axis, (key, (steps, values)) in zip(axes.flat, lines.items(), strict=False):
        few = len(steps) < 40
        axis.plot(steps, values, marker="o" if few else None, markersize=3, alpha=1 if few else 0.3)
        if not few:  # the loss of single batches is noise; its running mean is what people look for
            window = max(2, len(values) // 20)
            means = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
            axis.plot(steps, means)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str], out: Path, *, title: str) -> None:
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
    axis.set_title(f"{title}\ncounts; shade: share of the row", fontsize=9)
    for i in range(size):
        for j in range(size):
            dark = shares[i][j] > 0.5
            axis.text(j, i, str(counts[i][j]), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
