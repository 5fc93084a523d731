"""What the numbers of a comparison may be said to show: scores with their tests, verdicts, marks and warnings.

What is uncertain comes from two sides, and each has its own test. The *samples*: bootstrap intervals and paired tests
on the samples' scores, all training and decode seeds of a sample taken together, Holm-corrected over every test of a
table (its systems and floors × its metrics). The *trainings*: the standard deviation over training seeds, and Welch's t
test on the seeds' means, uncorrected. A difference counts only where both agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from elmd.evaluation.significance import over_seeds, welch

#: Below these a verdict would be a guess.
LEAST_SAMPLES, LEAST_SEEDS = 100, 3
LEVEL = 0.05

#: What may be said of a difference from the reference.
DIFFERS, NOISE, TOO_FEW = "differs", "within noise", "n too small to say"


@dataclass(frozen=True)
class Score:
    """One metric of one system.

    Attributes:
        mean: over training seeds of the mean over decode seeds. sd: over training seeds (n − 1), None for one; the
            random floor's is over its draws.
        low, high: 95 % bootstrap interval over samples, all seeds of a sample taken together.
        values: one per training seed.
        difference: this mean − the reference's. p: of the paired test over samples. p_holm: corrected over the table.
        p_seeds: Welch's t test over training seeds, None where a side has one seed.
        verdict: `DIFFERS`, `NOISE` or `TOO_FEW`; None for the reference itself and where nothing is tested.
        best: the highest mean of the table's systems, floors left out.
        floor: the best floor, where this system does not beat it.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    values: list[float]
    difference: float | None = None
    p: float | None = None
    p_holm: float | None = None
    p_seeds: float | None = None
    verdict: str | None = None
    best: bool = False
    floor: str | None = None

    def tested(self, reference: Sequence[float], test: Mapping[str, float], *, enough: bool) -> Score:
        """With the difference from the reference, its p-values and the verdict.

        Args:
            reference: its scores, one per training seed.
            test: `p` and `p_holm` of the paired test over samples.
            enough: whether there are samples and seeds enough for a verdict.
        """
        theirs = over_seeds(reference)
        difference, p_seeds = self.mean - theirs.mean, welch(self.values, reference)
        noise = (
            test["p_holm"] >= LEVEL
            or abs(difference) <= max(self.sd or 0.0, theirs.sd or 0.0)
            or (p_seeds is not None and p_seeds >= LEVEL)
        )
        verdict = TOO_FEW if not enough else NOISE if noise else DIFFERS
        p, p_holm = test["p"], test["p_holm"]
        return replace(self, difference=difference, p=p, p_holm=p_holm, p_seeds=p_seeds, verdict=verdict)


@dataclass(frozen=True)
class Row:
    """One system: `kind` is "system", "third party" or "floor".

    Attributes:
        seeds: of training. decodings: per training seed.
        folders: of the jobs, one per training seed; empty for third parties and floors.
        cells: group (a protocol, "emotion", "surface") -> metric -> score.
        paper: our metric key of protocol `paper` -> the paper's number as printed.
    """

    name: str
    kind: str
    seeds: list[int | None]
    decodings: int
    folders: list[str]
    cells: dict[str, dict[str, Score]]
    paper: dict[str, str] = field(default_factory=dict)


def marked(rows: Sequence[Row]) -> list[Row]:
    """With the best of each column, and the floors that are not beaten, noted in the scores."""
    best: dict[tuple[str, str], float] = {}
    floors: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        for group, scores in row.cells.items():
            if group == "surface":  # more is not better there
                continue
            for metric, score in scores.items():
                key = (group, metric)
                if row.kind == "floor":
                    floors[key] = max(floors.get(key, (-np.inf, "")), (score.mean, row.name))
                else:
                    best[key] = max(best.get(key, -np.inf), score.mean)

    def mark(row: Row, key: tuple[str, str], score: Score) -> Score:
        if row.kind == "floor" or key not in best:
            return score
        floor, name = floors.get(key, (-np.inf, ""))
        return replace(score, best=score.mean == best[key], floor=name if score.mean <= floor else None)

    return [
        replace(
            row,
            cells={
                group: {metric: mark(row, (group, metric), score) for metric, score in scores.items()}
                for group, scores in row.cells.items()
            },
        )
        for row in rows
    ]


def warnings_of(rows: Sequence[Row], reference: str, n: int) -> list[str]:
    """What forbids a conclusion: too few samples or seeds, differences within noise, floors that are not beaten."""
    warnings = few_samples(n)
    few = [
        f"{row.name} ({'unknown' if row.kind == 'third party' else len(row.seeds)})"
        for row in rows
        if row.kind != "floor" and len(row.seeds) < LEAST_SEEDS
    ]
    if few:
        warnings.append(f"Too few training seeds to say, a verdict takes {LEAST_SEEDS}: {', '.join(few)}.")
    for row in rows:
        if row.kind == "floor" or row.name == reference:
            continue
        tested = {m: score for scores in row.cells.values() for m, score in scores.items() if score.verdict is not None}
        noise = [metric for metric, score in tested.items() if score.verdict == NOISE]
        if noise:
            which = "every metric" if len(noise) == len(tested) else ", ".join(noise)
            warnings.append(f"Within noise of {reference}: {row.name} in {which}.")
    beaten: dict[str, list[str]] = {}
    for row in rows:
        for scores in row.cells.values():
            for metric, score in scores.items():
                if score.floor:
                    beaten.setdefault(f"{row.name} does not beat {score.floor}", []).append(metric)
    return warnings + [f"{what} in {', '.join(metrics)}." for what, metrics in beaten.items()]


def few_samples(n: int) -> list[str]:
    """The warning that n samples are too few for a verdict, where they are."""
    return [f"{TOO_FEW}: {n} samples, and a verdict takes {LEAST_SAMPLES}."] if n < LEAST_SAMPLES else []
