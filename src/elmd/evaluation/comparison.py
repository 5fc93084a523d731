"""Systems side by side over training seeds: means with spread and intervals, paired tests, verdicts, and floors.

What is uncertain comes from two sides, and each has its own test. The *samples*: bootstrap intervals and paired tests
on the samples' scores, all training and decode seeds of a sample taken together, Holm-corrected over every test of a
table (its systems and floors × its metrics). The *trainings*: the standard deviation over training seeds, and Welch's t
test on the seeds' means, uncorrected. A difference counts only where both agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from elmd.errors import DataError
from elmd.evaluation.paired import compare_metrics, emotion_metrics
from elmd.evaluation.paper import PaperTable, paper_table
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.score import (
    ALL_PROTOCOLS,
    Prediction,
    by_seed_of,
    common_floor,
    measure,
    pool,
    random_floor,
    references_of,
    retrieval_floor,
)
from elmd.evaluation.significance import bootstrap_interval, over_seeds, welch
from elmd.evaluation.systems import ABLATIONS, FULL, SYMBOLS
from elmd.labels import Emotion
from elmd.metrics.text import Metric, signatures, surface, versions

#: Below these a verdict would be a guess.
LEAST_SAMPLES, LEAST_SEEDS = 100, 3
LEVEL = 0.05

#: What a cell may say of its difference from the reference.
DIFFERS, NOISE, TOO_FEW = "differs", "within noise", "n too small to say"

#: The setting of a sweep that is the paper's own (§4.3), or the default where the paper gives none (m).
USUAL = {"erm.slots": 4, "vision.frames": 8}


@dataclass(frozen=True)
class Cell:
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


@dataclass(frozen=True)
class Row:
    """One system: `kind` is "system", "third party" or "floor".

    Attributes:
        seeds: of training. decodings: per training seed.
        folders: of the jobs, one per training seed; empty for third parties and floors.
        cells: group (a protocol, "emotion", "surface") -> metric -> cell.
        paper: our metric key of protocol `paper` -> the paper's number as printed.
    """

    name: str
    kind: str
    seeds: list[int | None]
    decodings: int
    folders: list[str]
    cells: dict[str, dict[str, Cell]]
    paper: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All systems of an experiment beside each other; `asdict` of it is JSON.

    Attributes:
        reference: the system that the others are tested against.
        data, split: what was scored. n: samples.
        rows: systems in the experiment's order, then floors.
        tests: how many tests Holm's correction ran over, by group.
        missing: jobs that are not in the rows: `system`, `seed`, `why`, `log`.
        paper: names of the paper's tables whose numbers stand in the rows, such as "Table 2, M3ED".
        warnings: what forbids a conclusion. notes: what a reader has to know.
    """

    name: str
    reference: str
    data: str
    split: str
    n: int
    rows: list[Row]
    tests: dict[str, int]
    missing: list[dict[str, Any]]
    paper: list[str]
    warnings: list[str]
    notes: list[str]
    signatures: dict[str, str]
    versions: dict[str, str]

    def row(self, name: str) -> Row:
        """The row of a system or floor.

        Raises:
            DataError: there is none of that name; the known ones are listed.
        """
        known = {row.name: row for row in self.rows}
        if name not in known:
            raise DataError(f"there is no system {name!r} here", fix=f"choose from {', '.join(known)}")
        return known[name]


def reference_of(experiment: Experiment) -> str:
    """The system that the others are tested against: the full model; in a sweep of s or m, the usual setting's."""
    names = list(experiment.systems)
    usual = [f"{FULL}, {SYMBOLS[key]} = {value}" for key, value in USUAL.items()]
    own = [name for name in names if name.startswith(FULL)]
    return next((name for name in (FULL, *usual, *own) if name in names), names[0])


def compare_systems(
    experiment: Experiment, reference: str, protocols: Sequence[str] = ALL_PROTOCOLS, *, seed: int = 0
) -> Comparison:
    """Every system of an experiment over its training seeds, tested against `reference`, with the floors below.

    Every different pair of hypothesis and reference is scored once: with all protocols about a millisecond each.

    Args:
        seed: of resampling, and of the random floor.

    Raises:
        DataError: the experiment has no system `reference`; an unknown protocol; emotions that contradict each other.
    """
    systems = experiment.systems
    if reference not in systems:
        raise DataError(
            f"there is no system {reference!r} in {experiment.name}", fix=f"choose from {', '.join(systems)}"
        )
    gold = _gold(experiment.runs)
    ids = list(references_of(experiment.runs[0].predictions))
    floors = _floors(systems, reference, seed)
    trainings = {name: [run.predictions for run in runs] for name, runs in systems.items()} | floors
    pairs = _Pairs([p for several in trainings.values() for one in several for p in one], protocols)
    measured = {name: _System.of(several, ids, gold, pairs) for name, several in trainings.items()}
    kinds = {name: "system" if runs[0].config else "third party" for name, runs in systems.items()}
    kinds |= dict.fromkeys(floors, "floor")

    tables = _paper_tables(experiment)
    tests = _tests(measured, reference, seed)
    few = len(ids) < LEAST_SAMPLES
    rows = []
    for name, one in measured.items():
        runs = systems.get(name, [])
        enough = not few and all(
            kinds[each] == "floor" or len(measured[each].values) >= LEAST_SEEDS for each in (name, reference)
        )
        cells = {
            group: {
                metric: _cell(one, measured[reference], group, metric, tests.get((name, group), {}).get(metric), enough)
                for metric in metrics
            }
            for group, metrics in one.values[0].items()
        }
        paper = {
            metric: text for table in tables for metric in table.metrics.values() if (text := table.cell(name, metric))
        }
        folders = [str(run.folder) for run in runs if run.folder]
        seeds = [run.seed for run in runs]
        rows.append(Row(name, kinds[name], seeds, one.decodings, folders, cells, paper))
    family = {group: sum(len(found) for (_, g), found in tests.items() if g == group) for _, group in tests}
    first = experiment.runs[0].config
    rows = _marked(rows)
    return Comparison(
        name=experiment.name,
        reference=reference,
        data=first["data"]["name"] if first else "unknown",
        split=first["generate"]["split"] if first else "unknown",
        n=len(ids),
        rows=rows,
        tests=family,
        missing=[{**asdict(one), "log": str(one.log) if one.log else None} for one in experiment.missing],
        paper=[f"{table.table}, {table.dataset}" for table in tables],
        warnings=_warnings(rows, reference, len(ids)),
        notes=[*experiment.notes, *_notes(rows, gold, first, tables)],
        signatures=signatures() if "strict" in protocols else {},
        versions=versions(),
    )


@dataclass(frozen=True)
class _System:
    """Scores of one system, measured once.

    Attributes:
        values: per training seed: group -> metric -> score, the mean over decode seeds.
        pooled: group -> metric with the statistics of all training and decode seeds.
    """

    values: list[dict[str, dict[str, float]]]
    pooled: dict[str, dict[str, Metric]]
    decodings: int

    @classmethod
    def of(
        cls,
        trainings: Sequence[Sequence[Prediction]],
        ids: Sequence[str],
        gold: Mapping[str, Emotion | None],
        pairs: _Pairs,
    ) -> _System:
        values, metrics = [], []
        for predictions in trainings:
            by_seed = [{p.id: p for p in one} for one in by_seed_of(predictions, "predictions").values()]
            decoded = [_measured([one[id_] for id_ in ids], gold, pairs) for one in by_seed]
            looks = [surface([one[i].hypothesis for i in ids], [one[i].demonstration for i in ids]) for one in by_seed]
            scores = {
                group: {metric: float(np.mean([one[group][metric].score for one in decoded])) for metric in found}
                for group, found in decoded[0].items()
                if all(found.keys() == one.get(group, {}).keys() for one in decoded)
            }
            scores["surface"] = {
                name: float(np.mean([look[name] for look in looks]))  # type: ignore[arg-type]
                for name, value in looks[0].items()
                if value is not None
            }
            values.append(scores)
            metrics += decoded
        groups = [group for group in metrics[0] if all(group in one for one in metrics)]
        pooled = {group: pool([one[group] for one in metrics]) for group in groups}
        kept = [
            {group: found for group, found in one.items() if group in groups or group == "surface"} for one in values
        ]
        return cls(kept, pooled, len(by_seed))


class _Pairs:
    """Scores of every different pair of hypothesis and reference, each counted once.

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
            protocol: {name: replace(metric, statistics=metric.statistics[rows]) for name, metric in found.items()}
            for protocol, found in self.metrics.items()
        }


def _measured(
    predictions: Sequence[Prediction], gold: Mapping[str, Emotion | None], pairs: _Pairs
) -> dict[str, dict[str, Metric]]:
    found = pairs.of(predictions)
    emotion = emotion_metrics([gold[p.id] for p in predictions], [p.predicted_emotion for p in predictions])
    return found | ({"emotion": emotion} if emotion else {})


def _gold(runs: Sequence[Run]) -> dict[str, Emotion | None]:
    """The gold emotion of each sample, as the first run has it; a third party need not repeat it."""
    gold = {p.id: p.gold_emotion for p in runs[0].predictions}
    for run in runs[1:]:
        odd = next((p for p in run.predictions if p.gold_emotion not in (None, gold[p.id])), None)
        if odd is not None:
            what = f"id {odd.id!r} has the gold emotion {odd.gold_emotion}, and {gold[odd.id]} in {runs[0].path}"
            raise DataError(what, where=run.path, fix="score runs on the same data")
    return gold


def _floors(systems: Mapping[str, Sequence[Run]], reference: str, seed: int) -> dict[str, list[Sequence[Prediction]]]:
    """Floors as systems: draws of the random one, and the demonstrations of each training, count as its seeds."""
    run = systems[reference][0]
    floors: dict[str, list[Sequence[Prediction]]] = {}
    if run.artifact("samples"):
        responses = [sample.response.text for sample in run.samples() if sample.split == "train"]
        draws = by_seed_of(random_floor(run.predictions, responses, seed), "floor")
        floors["floor: random response"] = list(draws.values())
        floors["floor: most common reply"] = [common_floor(run.predictions, responses)]
    for runs in (systems[reference], *systems.values()):
        if all(any(p.demonstration is not None for p in one.predictions) for one in runs):
            floors["floor: retrieval only"] = [retrieval_floor(one.predictions) for one in runs]
            break
    return floors


def _tests(
    measured: Mapping[str, _System], reference: str, seed: int
) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """(system, group) -> metric -> test against the reference; Holm's correction runs over each group."""
    found = {}
    for group, ours in measured[reference].pooled.items():
        others = {
            name: one.pooled[group] for name, one in measured.items() if name != reference and group in one.pooled
        }
        for name, rows in compare_metrics(ours, others, seed=seed).items():
            found[name, group] = rows
    return found


def _cell(
    one: _System, reference: _System, group: str, metric: str, test: Mapping[str, float] | None, enough: bool
) -> Cell:
    values = [scores[group][metric] for scores in one.values if metric in scores[group]]
    spread = over_seeds(values)
    low = high = None
    if group in one.pooled:
        low, high = bootstrap_interval(one.pooled[group][metric].statistics, one.pooled[group][metric].reduce)
    cell = Cell(spread.mean, spread.sd, low, high, values)
    if test is None:
        return cell
    theirs = over_seeds([scores[group][metric] for scores in reference.values])
    difference = spread.mean - theirs.mean
    p_seeds = welch(values, [scores[group][metric] for scores in reference.values])
    noise = (
        test["p_holm"] >= LEVEL
        or abs(difference) <= max(spread.sd or 0.0, theirs.sd or 0.0)
        or (p_seeds is not None and p_seeds >= LEVEL)
    )
    verdict = TOO_FEW if not enough else NOISE if noise else DIFFERS
    return replace(cell, difference=difference, p=test["p"], p_holm=test["p_holm"], p_seeds=p_seeds, verdict=verdict)


def _marked(rows: Sequence[Row]) -> list[Row]:
    """With the best of each column, and the floors that are not beaten, noted in the cells."""
    best: dict[tuple[str, str], float] = {}
    floors: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        for group, cells in row.cells.items():
            for metric, cell in cells.items():
                key = (group, metric)
                if group == "surface":  # more is not better there
                    continue
                if row.kind == "floor":
                    floors[key] = max(floors.get(key, (-np.inf, "")), (cell.mean, row.name))
                else:
                    best[key] = max(best.get(key, -np.inf), cell.mean)

    def mark(row: Row, key: tuple[str, str], cell: Cell) -> Cell:
        if row.kind == "floor" or key not in best:
            return cell
        floor, name = floors.get(key, (-np.inf, ""))
        return replace(cell, best=cell.mean == best[key], floor=name if cell.mean <= floor else None)

    return [
        replace(
            row,
            cells={
                group: {metric: mark(row, (group, metric), cell) for metric, cell in cells.items()}
                for group, cells in row.cells.items()
            },
        )
        for row in rows
    ]


def _paper_tables(experiment: Experiment) -> list[PaperTable]:
    """The paper's tables that have these systems: Table 3 with ablations, Table 2 with baselines or the model alone."""
    if not experiment.runs[0].config:  # files alone: what data they are of is not known
        return []
    names = set(experiment.systems)
    dataset = experiment.runs[0].config["paper_dataset"]
    two, three = paper_table("Table 2", dataset), paper_table("Table 3", "M3ED")
    ablations = names & set(ABLATIONS.values())
    tables = [two] if names & (set(two.printed) - {FULL}) or (FULL in names and not ablations) else []
    return tables + ([three] if ablations and dataset == "M3ED" else [])


def _warnings(rows: Sequence[Row], reference: str, n: int) -> list[str]:
    found = []
    if n < LEAST_SAMPLES:
        found.append(f"n too small to say: {n} samples, and a verdict takes {LEAST_SAMPLES}.")
    few = [
        f"{row.name} ({'unknown' if row.kind == 'third party' else len(row.seeds)})"
        for row in rows
        if row.kind != "floor" and len(row.seeds) < LEAST_SEEDS
    ]
    if few:
        found.append(f"Too few training seeds to say, a verdict takes {LEAST_SEEDS}: {', '.join(few)}.")
    for row in rows:
        if row.kind == "floor" or row.name == reference:
            continue
        tested = {m: cell for cells in row.cells.values() for m, cell in cells.items() if cell.verdict is not None}
        noise = [metric for metric, cell in tested.items() if cell.verdict == NOISE]
        if noise:
            which = "every metric" if len(noise) == len(tested) else ", ".join(noise)
            found.append(f"Within noise of {reference}: {row.name} in {which}.")
    beaten: dict[str, list[str]] = {}
    for row in rows:
        for cells in row.cells.values():
            for metric, cell in cells.items():
                if cell.floor:
                    beaten.setdefault(f"{row.name} does not beat {cell.floor}", []).append(metric)
    return found + [f"{what} in {', '.join(metrics)}." for what, metrics in beaten.items()]


def _notes(
    rows: Sequence[Row], gold: Mapping[str, Emotion | None], config: Mapping[str, Any], tables: Sequence[PaperTable]
) -> list[str]:
    known = [emotion for emotion in gold.values() if emotion is not None]
    found = []
    if known and any("emotion" in row.cells for row in rows):
        share = max(known.count(emotion) for emotion in set(known)) / len(known)
        found.append(f"Always naming the most frequent gold emotion has accuracy {share:.4f}.")
    if not tables or not any(row.paper for row in rows):
        return found
    data, llm = config["data"]["name"], config["llm"]["name"]
    differ = [] if config["paper_dataset"] == "MMED" or data == "m3ed" else [f"data={data}"]
    differ += [f"data.split={config['data']['split']}"] if config["data"]["split"] != "paper" else []
    differ += [f"llm={llm}"] if llm != "chatglm2_6b" else []
    names = " and ".join(f"{table.table} on {table.dataset}" for table in tables)
    here = f"; here other: {', '.join(differ)}, so they are no yardstick for these runs" if differ else ""
    found.append(
        f"Columns `paper` are the paper's {names}, whose tokens it does not give (inferred: characters){here}."
    )
    return found
