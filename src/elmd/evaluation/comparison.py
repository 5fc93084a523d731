"""Systems side by side over training seeds: means with spread and intervals, paired tests, verdicts, and floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elmd.errors import DataError
from elmd.evaluation.measured import Measured, Pairs, tests_against
from elmd.evaluation.paper import PaperTable, paper_table
from elmd.evaluation.predictions import Prediction, by_seed_of, references_of
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.score import ALL_PROTOCOLS, common_floor, random_floor, retrieval_floor
from elmd.evaluation.systems import ABLATIONS, FULL, SYMBOLS
from elmd.evaluation.verdicts import LEAST_SAMPLES, LEAST_SEEDS, Row, marked, warnings_of
from elmd.labels import Emotion
from elmd.metrics.text import signatures, versions

#: The setting of a sweep that is the paper's own (§4.3), or the default where the paper gives none (m).
USUAL = {"erm.slots": 4, "vision.frames": 8}


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
            DataError: there is none of that name; those there are are listed.
        """
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise DataError(f"there is no system {name!r} here", fix=f"choose from {', '.join(rows)}")
        return rows[name]


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
    pairs = Pairs([p for runs in trainings.values() for predictions in runs for p in predictions], protocols)
    measured = {name: Measured.of(runs, ids, gold, pairs) for name, runs in trainings.items()}
    tests = tests_against(measured, reference, seed)
    tables = _paper_tables(experiment)

    def enough(name: str) -> bool:
        """Whether there are samples, and training seeds of this system and the reference, for a verdict."""
        return len(ids) >= LEAST_SAMPLES and all(
            system in floors or len(measured[system].values) >= LEAST_SEEDS for system in (name, reference)
        )

    rows = []
    for name, system in measured.items():
        cells = {
            group: {metric: system.score(group, metric) for metric in metrics}
            for group, metrics in system.values[0].items()
        }
        for group in cells:
            for metric, test in tests.get(group, {}).get(name, {}).items():
                theirs = measured[reference].seeds(group, metric)
                cells[group][metric] = cells[group][metric].tested(theirs, test, enough=enough(name))
        paper = {
            metric: text for table in tables for metric in table.metrics.values() if (text := table.cell(name, metric))
        }
        runs = systems.get(name, [])
        kind = "floor" if name in floors else "system" if runs[0].config else "third party"
        folders = [str(run.folder) for run in runs if run.folder]
        rows.append(Row(name, kind, [run.seed for run in runs], system.decodings, folders, cells, paper))
    rows = marked(rows)
    first = experiment.runs[0].config
    return Comparison(
        name=experiment.name,
        reference=reference,
        data=first["data"]["name"] if first else "unknown",
        split=first["generate"]["split"] if first else "unknown",
        n=len(ids),
        rows=rows,
        tests={group: sum(map(len, systems.values())) for group, systems in tests.items() if systems},
        missing=[{**asdict(job), "log": str(job.log) if job.log else None} for job in experiment.missing],
        paper=[f"{table.table}, {table.dataset}" for table in tables],
        warnings=warnings_of(rows, reference, len(ids)),
        notes=[*experiment.notes, *_notes(rows, gold, first, tables)],
        signatures=signatures() if "strict" in protocols else {},
        versions=versions(),
    )


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
        if all(any(p.demonstration is not None for p in run.predictions) for run in runs):
            floors["floor: retrieval only"] = [retrieval_floor(run.predictions) for run in runs]
            break
    return floors


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


def _notes(
    rows: Sequence[Row], gold: Mapping[str, Emotion | None], config: Mapping[str, Any], tables: Sequence[PaperTable]
) -> list[str]:
    emotions = [emotion for emotion in gold.values() if emotion is not None]
    notes = []
    if emotions and any("emotion" in row.cells for row in rows):
        share = max(emotions.count(emotion) for emotion in set(emotions)) / len(emotions)
        notes.append(f"Always naming the most frequent gold emotion has accuracy {share:.4f}.")
    if not tables or not any(row.paper for row in rows):
        return notes
    data, llm = config["data"]["name"], config["llm"]["name"]
    differ = [] if config["paper_dataset"] == "MMED" or data == "m3ed" else [f"data={data}"]
    differ += [f"data.split={config['data']['split']}"] if config["data"]["split"] != "paper" else []
    differ += [f"llm={llm}"] if llm != "chatglm2_6b" else []
    names = " and ".join(f"{table.table} on {table.dataset}" for table in tables)
    here = f"; here other: {', '.join(differ)}, so they are no yardstick for these runs" if differ else ""
    notes.append(
        f"Columns `paper` are the paper's {names}, whose tokens it does not give (inferred: characters){here}."
    )
    return notes
