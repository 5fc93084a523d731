"""Fig. 6: quality against the self-separation coefficient s, and what a larger s costs in retrieval (§5.4).

The paper says that a large s "impedes retrieval efficiency". E_s is s vectors of the encoder's width d, so the index
and the search should grow with s; measured here, not assumed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elmd.errors import DataError
from elmd.evaluation.comparison import Comparison
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.significance import Spread, over_seeds
from elmd.retrieval.index import VECTORS, Index, Queries
from elmd.retrieval.strategy import Settings, semantic
from elmd.types import Sample

#: What Fig. 6 plots, by our keys of the protocol `paper`.
FIGURE = {"BLEU-4": "bleu4_char", "METEOR": "meteor_char", "ROUGE-L": "rougeL_char"}
REPEATS = 15


@dataclass(frozen=True)
class SearchCost:
    """What one index costs.

    Attributes:
        width: of the key that is searched, s·d for E_s. candidates: N. queries: Q.
        file_bytes: of the index's vectors on disk, both keys. key_bytes: of the searched key's alone.
        microseconds: per query, median of the repeats. low, high: their quartiles.
    """

    width: int
    candidates: int
    queries: int
    file_bytes: int
    key_bytes: int
    microseconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One value of s: scores of its system (as in the tables), and cost, one per training seed.

    Attributes:
        scores: the paper's metric name -> its cell's mean and spread over training seeds.
        train_seconds: of stage erm, by seed; how long the training of the retriever took.
    """

    slots: int
    system: str
    scores: dict[str, Spread]
    costs: dict[int, SearchCost]
    train_seconds: dict[int, float]


def coefficient_points(experiment: Experiment, comparison: Comparison, *, repeats: int = REPEATS) -> list[Point]:
    """One point per value of s in the experiment, rising; the searches are timed now, on one thread.

    Empty where the experiment does not vary s (or erm.slots differs only between systems of other kinds).

    Raises:
        ArtifactError: an index is gone or broken.
    """
    system_of: dict[int, str] = {}
    for name, runs in experiment.systems.items():
        if " s = " in name and runs[0].config:
            system_of[int(runs[0].config["erm"]["slots"])] = name
    if not system_of:
        return []
    samples = experiment.samples()
    points = []
    for slots in sorted(system_of):
        row, runs = comparison.row(system_of[slots]), experiment.systems[system_of[slots]]
        scores = {label: over_seeds(row.cells["paper"][metric].values) for label, metric in FIGURE.items()}
        costs = {run.seed: search_cost(run, samples, repeats=repeats) for run in runs if run.seed is not None}
        seconds = {run.seed: run.manifest("retriever")["wall_seconds"] for run in runs if run.seed is not None}
        points.append(Point(slots, system_of[slots], scores, costs, seconds))
    return points


def search_cost(run: Run, samples: Sequence[Sample], *, repeats: int = REPEATS) -> SearchCost:
    """The size of a run's index and the time of its exact search for the split's samples, as generation needs it.

    Query vectors are drawn at random: the search compares every query with every candidate, so its time does not
    depend on what they are, and no encoder has to be loaded.

    Raises:
        ArtifactError: the run has no index, or a broken one.
        DataError: the split has no sample.
    """
    folder, key, k = run.need("demonstrations"), run.config["retriever"]["key"], run.config["retriever"]["k"]
    index = Index.load(folder)
    some = [sample for sample in samples if sample.split == run.config["generate"]["split"]]
    if not some:
        raise DataError("has no sample to search for", where=run.folder, fix="evaluate a split that has samples")
    vectors = index.vectors[key]
    drawn = torch.randn(len(some), vectors.shape[1], generator=torch.Generator().manual_seed(0))
    queries = Queries.of(drawn, some)
    seconds = timed(index, key, queries, k, repeats)
    low, middle, high = statistics.quantiles(seconds, n=4)
    per_query = 1e6 / len(some)
    return SearchCost(
        width=vectors.shape[1],
        candidates=len(vectors),
        queries=len(some),
        file_bytes=(folder / VECTORS).stat().st_size,
        key_bytes=vectors.numel() * vectors.element_size(),
        microseconds=middle * per_query,
        low=low * per_query,
        high=high * per_query,
    )


def timed(index: Index, key: str, queries: Queries, k: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` searches on one thread, the first one (which warms up) left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            semantic(index, queries, Settings(key, k))
            seconds.append(time.perf_counter() - start)
        return seconds[1:]
    finally:
        torch.set_num_threads(threads)
