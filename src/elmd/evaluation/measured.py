"""Scores of systems over training and decode seeds, each different pair of hypothesis and reference measured once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elmd.evaluation.paired import compare_metrics, emotion_metrics
from elmd.evaluation.predictions import Prediction, by_seed_of
from elmd.evaluation.score import measure, pool
from elmd.evaluation.significance import bootstrap_interval, over_seeds
from elmd.evaluation.verdicts import Score
from elmd.labels import Emotion
from elmd.metrics.text import Metric, surface


@dataclass(frozen=True)
class Measured:
    """Scores of one system.

    Attributes:
        values: per training seed: group -> metric -> score, the mean over decode seeds.
        pooled: group -> metric with the statistics of all training and decode seeds.
        decodings: per training seed.
    """

    values: list[dict[str, dict[str, float]]]
    pooled: dict[str, dict[str, Metric]]
    decodings: int

    @classmethod
    def of(
        cls, trainings: Sequence[Sequence[Prediction]], ids: Sequence[str], gold: Mapping[str, Emotion | None],
        pairs: Pairs,
    ) -> Measured:  # fmt: skip
        """
        Args:
            trainings: predictions of each training seed. ids: the samples, in the order of all systems.
        """
        values, decodings = [], []
        for predictions in trainings:
            by_seed = [{p.id: p for p in seed} for seed in by_seed_of(predictions, "predictions").values()]
            runs = [[seed[id_] for id_ in ids] for seed in by_seed]
            metrics = [pairs.of(run) | _emotion(run, gold) for run in runs]
            looks = [surface([p.hypothesis for p in run], [p.demonstration for p in run]) for run in runs]
            scores = {
                group: {name: float(np.mean([decoded[group][name].score for decoded in metrics])) for name in first}
                for group, first in metrics[0].items()
                if all(first.keys() == decoded.get(group, {}).keys() for decoded in metrics)
            }
            scores["surface"] = {
                name: float(np.mean([look[name] for look in looks]))  # type: ignore[arg-type]
                for name, value in looks[0].items()
                if value is not None
            }
            values.append(scores)
            decodings += metrics
        groups = [group for group in decodings[0] if all(group in metrics for metrics in decodings)]
        pooled = {group: pool([metrics[group] for metrics in decodings]) for group in groups}
        kept = [{group: scores[group] for group in scores if group in (*groups, "surface")} for scores in values]
        return cls(kept, pooled, len(by_seed))

    def seeds(self, group: str, metric: str) -> list[float]:
        """One score per training seed that has it."""
        return [scores[group][metric] for scores in self.values if metric in scores[group]]

    def score(self, group: str, metric: str) -> Score:
        """Mean, spread over training seeds and bootstrap interval over samples of one metric, not tested yet."""
        values, low, high = self.seeds(group, metric), None, None
        spread = over_seeds(values)
        if group in self.pooled:
            low, high = bootstrap_interval(self.pooled[group][metric].statistics, self.pooled[group][metric].reduce)
        return Score(spread.mean, spread.sd, low, high, values)


class Pairs:
    """Metrics of every different pair of hypothesis and reference, each measured once.

    Small models repeat themselves over seeds; and a metric's statistics are sums over pairs, whichever the corpus.
    """

    def __init__(self, predictions: Sequence[Prediction], protocols: Sequence[str]):
        different = {(p.hypothesis, p.reference): p for p in predictions}
        self.rows = {pair: row for row, pair in enumerate(different)}
        self.metrics = {protocol: measure(list(different.values()), protocol) for protocol in protocols}

    def of(self, predictions: Sequence[Prediction]) -> dict[str, dict[str, Metric]]:
        """protocol -> metric on these predictions, in their order."""
        rows = [self.rows[p.hypothesis, p.reference] for p in predictions]
        return {
            protocol: {name: replace(metric, statistics=metric.statistics[rows]) for name, metric in metrics.items()}
            for protocol, metrics in self.metrics.items()
        }


def tests_against(
    measured: Mapping[str, Measured], reference: str, seed: int
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """group -> system -> metric -> paired test against the reference; Holm's correction runs over each group."""
    tests = {}
    for group, metrics in measured[reference].pooled.items():
        others = {name: system.pooled[group] for name, system in measured.items() if group in system.pooled}
        del others[reference]
        tests[group] = compare_metrics(metrics, others, seed=seed)
    return tests


def _emotion(predictions: Sequence[Prediction], gold: Mapping[str, Emotion | None]) -> dict[str, dict[str, Metric]]:
    metrics = emotion_metrics([gold[p.id] for p in predictions], [p.predicted_emotion for p in predictions])
    return {"emotion": metrics} if metrics else {}
