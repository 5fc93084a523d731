"""What trainings and responses looked like: curves, REP's confusion, vectors before and after ERM, distributions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elmd.engine.files import read_json
from elmd.errors import ElmdError
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.significance import over_seeds
from elmd.evaluation.systems import ABLATIONS, BASELINES, FULL
from elmd.evaluation.tables import Cell, Table
from elmd.labels import EMOTIONS
from elmd.log import logger
from elmd.metrics.text import characters
from elmd.plots import series
from elmd.report import svg
from elmd.report.blocks import Fold, Plots
from elmd.report.links import Links

#: What the page calls a stage that trains; these first, in this order, then any other by its own name.
TRAININGS = {
    "erm": "ERM (emotional retrieval module, §3.3)",
    "rep": "REP (response emotion prediction, §3.4)",
    "eerg": "EERG (emotion-enhanced response generation, §3.5)",
    "baseline": "Baselines (§4.2)",
}

#: Points of a drawn curve; single batches are noise, their running mean is what people look for.
POINTS = 40


def owners(runs: Iterable[Run], artifact: Callable[[Run], Path | None]) -> dict[tuple[str, ...], list[Path]]:
    """Artifacts of one kind by the systems that use them: a sweep's jobs share what they can; several seeds each.

    Args:
        artifact: a run's artifact of that kind, None where it has none.
    """
    users: dict[Path, list[str]] = {}
    for run in runs:
        if folder := artifact(run):
            users.setdefault(folder, []).append(run.system)
    owned: dict[tuple[str, ...], list[Path]] = {}
    for folder, systems in users.items():
        owned.setdefault(tuple(dict.fromkeys(systems)), []).append(folder)
    return owned


def smooth(steps: Sequence[int], values: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Means of equal runs of steps, at most `points` of them."""
    size = -(-len(values) // points)
    parts = range(0, len(values), size)
    return (
        [sum(part) / len(part) for part in (steps[i : i + size] for i in parts)],
        [sum(part) / len(part) for part in (values[i : i + size] for i in parts)],
    )


def styles(systems: Iterable[str], main: str) -> dict[str, int]:
    """The style of each system's lines, the same in every report: the full model's first, then those of the known
    baselines and ablations, then the others in table order.

    Args:
        main: the system that the report is about; the full model may have a setting in its name ("ELMD, s = 4").
    """
    full = main if main.startswith(FULL) else FULL
    fixed = {name: i for i, name in enumerate((full, *BASELINES.values(), *ABLATIONS.values()))}
    others = (name for name in systems if name not in fixed)
    return fixed | {name: i for i, name in enumerate(others, len(fixed))}


def curves(experiment: Experiment, main: str) -> list[Any]:
    """Loss and validation metrics of every training, a line per seed."""
    looks = styles(experiment.systems, main)
    blocks: list[Any] = []
    stages = [stage for run in experiment.runs for stage in run.artifacts if "/" not in stage]  # no stand-ins
    for stage in dict.fromkeys([*TRAININGS, *stages]):
        panels: dict[str, list[svg.Line]] = {}
        legend = []
        for systems, folders in owners(experiment.runs, lambda run, stage=stage: run.artifacts.get(stage)).items():  # type: ignore[misc]
            folders = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
            style = min(looks[name] for name in systems)
            if folders:
                legend.append((style, ", ".join(systems)))
            for folder in folders:
                for key, (steps, values) in series(folder / "metrics.jsonl").items():
                    panels.setdefault(key, []).append(svg.Line(systems[0], *smooth(steps, values), style))
        if panels:
            order = sorted(panels, key=lambda key: key.removeprefix("valid/") != "loss")  # the losses first
            drawn = [svg.lines(key, panels[key], xlabel="step") for key in order]
            note = f"Each line is one training (a seed). Longer series are means of at most {POINTS} runs of steps."
            blocks.append(Plots(drawn, legend, TRAININGS.get(stage, f"Stage {stage}"), note))
    return blocks


def rep(experiment: Experiment, main: str, links: Links) -> list[Any]:
    """Accuracy of REP beside what needs no projector, and the main system's confusion matrix."""
    rows, by_tag = [], []
    for systems, folders in owners(experiment.runs, lambda run: run.artifact("projector")).items():
        seeds = [read_json(folder / "rep.json") for folder in folders]
        cells = [Cell(", ".join(systems)), str(len(folders))]
        for kind, key in (("projector", "accuracy"), ("projector", "weighted_f1"), ("text_only", "accuracy")):
            cells.append(links.cell(spread([seed[f"test/{kind}"][key] for seed in seeds]), systems[0], folders))
        test = seeds[0]["test/projector"]
        rows.append([*cells, f"{100 * test['majority']:.1f}", str(test["n"])])
        for tag, first in test["tags"].items():
            values = [spread([seed[f"test/{kind}"]["tags"][tag]["accuracy"] for seed in seeds])
                      for kind in ("projector", "text_only")]  # fmt: skip
            by_tag.append([f"{', '.join(systems)}: {tag}", *values, f"{100 * first['majority']:.1f}", str(first["n"])])
    if not rows:
        return []
    blocks: list[Any] = [
        Table(
            ["projector trained for", "seeds", "accuracy, %", "weighted F1, %", "text only, %", "majority, %", "n"],
            rows,
            notes=[
                "Test split. Text only: the same language model without video slots. Majority: the commonest class."
            ],
        )
    ]
    if by_tag:
        blocks.append(
            Fold("By tag of the utterance", [Table(["", "accuracy, %", "text only, %", "majority, %", "n"], by_tag)])
        )
    own = {folder for run in experiment.systems[main] if (folder := run.artifact("projector"))}
    if own:
        matrices = [read_json(folder / "rep.json")["test/projector"]["confusion"] for folder in sorted(own)]
        blocks.append(confusion(matrices, f"Confusion of {main}'s projector, test", len(matrices)))
    return blocks


def confusion(matrices: Sequence[dict[str, Any]], title: str, seeds: int) -> Table:
    """Counts summed over seeds; columns that nobody ever chose beside the known emotions are left out."""
    rows, columns = matrices[0]["rows"], matrices[0]["columns"]
    counts = np.sum([matrix["counts"] for matrix in matrices], axis=0).tolist()
    kept = [j for j, name in enumerate(columns) if name in rows or any(row[j] for row in counts)]
    cells = [
        [name, *(Cell(str(counts[i][j]), shade=counts[i][j] / max(1, sum(counts[i]))) for j in kept)]
        for i, name in enumerate(rows)
    ]
    note = f"Counts{f', summed over {seeds} seeds' if seeds > 1 else ''}; shade: share of the row."
    return Table(["gold \\ predicted", *(columns[j] for j in kept)], cells, title, [note])


def vectors(experiment: Experiment, main: str, links: Links) -> tuple[list[Any], str]:
    """t-SNE of the test utterances before and after ERM, from the first run that trained a retriever.

    Returns:
        Blocks, and why there are none.
    """
    runs = [*experiment.systems[main], *experiment.runs]
    run = next((run for run in runs if run.artifact("retriever")), None)
    if run is None:
        return [], "no run here has trained a retriever (erm)"
    config = run.config["retriever"]
    raw = run.artifacts.get("bootstrap/retriever", Path(config["path"] or ""))
    if not raw.is_dir():
        return [], f"the encoder that ERM began with, {config['path']}, is no folder on this machine"
    split = run.config["generate"]["split"]
    samples = [sample for sample in experiment.samples() if sample.split == split]
    from elmd.report.embeddings import LIMIT, clouds

    try:
        places_of = clouds(run.need("retriever") / "model", raw, samples, max_tokens=config["max_tokens"])
    except (ElmdError, OSError) as error:  # a report without this picture is better than none
        logger.warning("no t-SNE: %s", error)
        return [], f"the retriever cannot be read: {error}"
    pictures = [svg.points(name, places) for name, places in places_of.items()]
    legend = [(i, emotion.value) for i, emotion in enumerate(EMOTIONS)]
    shown = min(LIMIT, len(samples))
    note = (
        f"{shown} of {len(samples)} {split} utterances u of {run.system}, seed {run.seed}; colour and shape: emotion "
        "of u. Each picture is laid out by itself (t-SNE, cosine, seed 0). Neighbourhoods mean something; distances "
        "between groups, their sizes and their places do not. The table says how often the nearest training utterance "
        "has the same emotion."
    )
    metrics = run.manifest("retriever")["metrics"]
    if metrics.get("best_step") == 0:
        note += " The best checkpoint on valid was the untrained one (step 0): “after ERM” shows no training here."
    blocks: list[Any] = [Plots(pictures, legend, note=note, glyphs=True)]
    matches = metrics.get("emotion_match", {})
    place = next((name for name in (split, "test", "valid") if name in matches), None)
    if place is not None:
        rows = [
            [
                key.replace("raw E_s", "E_s, untrained"),
                *(
                    links.cell(f"{100 * match[name]:.1f}", run.system, [run.need("retriever")])
                    for name in ("match@1", "match@5")
                ),
                links.cell(f"{match['mrr']:.3f}", run.system, [run.need("retriever")]),
                f"{100 * match['chance']:.1f}",
            ]
            for key, match in matches[place]["all"].items()
        ]
        columns = ["key", "emotion-match@1, %", "@5, %", "MRR", "chance, %"]
        blocks.append(Table(columns, rows, f"Emotion-match, {place} ({run.system}, seed {run.seed})"))
    return blocks, ""


def lengths(experiment: Experiment) -> list[Any]:
    """Lengths in characters of the gold and the generated responses, all seeds together."""
    values: dict[str, list[float]] = {"gold": []}
    gold = {p.id: p.reference for run in experiment.runs for p in run.predictions}
    values["gold"] = [float(len(characters(text))) for text in gold.values()]
    for name, runs in experiment.systems.items():
        values[name] = [float(len(characters(p.hypothesis))) for run in runs for p in run.predictions]
    note = "Box: quartiles and median; whiskers: 5th to 95th percentile; point: mean. White space is not counted."
    return [Plots([svg.boxes("Length of the response", values, xlabel="characters")], title="Lengths", note=note)]


def emotions(experiment: Experiment) -> list[Any]:
    """Shares of the emotions: gold, and those that each system named."""
    gold = {p.id: p.gold_emotion for run in experiment.runs for p in run.predictions}
    named = {"gold": list(gold.values())} | {
        name: [p.predicted_emotion for run in runs for p in run.predictions]
        for name, runs in experiment.systems.items()
    }
    rows, silent = [], []
    for name, values in named.items():
        counts, total = Counter(values), sum(emotion is not None for emotion in values)
        if not total:
            silent.append(name)
            continue
        shares = [counts[emotion] / total for emotion in EMOTIONS]
        none = (len(values) - total) / len(values)
        rows.append(
            [
                name,
                *(Cell(f"{100 * share:.1f}", shade=min(1, 2 * share)) for share in shares),
                f"{100 * none:.1f}" if none else "–",
            ]
        )
    if not rows:
        return []
    notes = ["Percent of the responses with a known emotion; the last column: responses that name none."]
    if silent:
        notes.append(f"{', '.join(silent)}: no emotion is named, so none is counted.")
    return [Table(["", *(e.value for e in EMOTIONS), "none"], rows, "Emotions", notes)]


def distributions(experiment: Experiment) -> list[Any]:
    return [*lengths(experiment), *emotions(experiment)]


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """A mean with its standard deviation over seeds, where there are several."""
    over = over_seeds([scale * value for value in values])
    return f"{over.mean:.{digits}f}" + ("" if over.sd is None else f" ± {over.sd:.{digits}f}")
