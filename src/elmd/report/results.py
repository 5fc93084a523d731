"""Tables 2 and 3 beside the paper's numbers, and what they say in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from elmd.engine.store import MANIFEST
from elmd.evaluation.comparison import Comparison
from elmd.evaluation.comparison_tables import metrics_of, score_table
from elmd.evaluation.paper import paper_table
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.score_tables import GROUPS, digits
from elmd.evaluation.tables import NONE, Cell, Table, interval_text, p_text
from elmd.evaluation.verdicts import DIFFERS, NOISE, TOO_FEW, Row, Score
from elmd.metrics.text import MEANING
from elmd.report.blocks import Files, Fold, Text
from elmd.report.links import Links

#: The paper's columns by metric of the protocol `paper`.
PRINTED = {key: column for column, key in paper_table("Table 2", "M3ED").metrics.items()}

#: What the ± of a floor is over: its draws, or its retrievers, stand where a system has training seeds.
SPREADS = {
    "floor: random response": "of the random floor over its draws",
    "floor: retrieval only": "of retrieval only over the retrievers of those seeds",
}

#: The protocol whose numbers stand open on the page; the others fold.
OPEN = "paper"


def tables(comparison: Comparison, experiment: Experiment, links: Links) -> list[Any]:
    """Every group of scores as a table: `paper` and the emotions open, the others folded."""
    stem = experiment.name
    files = [Cell(f"{stem}.{ending}", quote(f"{stem}.{ending}")) for ending in ("md", "csv", "tex", "json")]
    blocks: list[Any] = [Files("These tables as files", files)]
    if experiment.missing:
        names = dict.fromkeys(
            f"{job.system}" + ("" if job.seed is None else f", seed {job.seed}") for job in experiment.missing
        )
        text = f"Not in these tables, because their jobs are missing (why: under What is missing): {'; '.join(names)}."
        blocks.append(Text(text, "warning"))
    folded = []
    for group, heading in GROUPS.items():
        made = table(comparison, experiment, links, group, heading.replace("`", "").replace("fractions", "%"))
        if made is not None and group in (OPEN, "emotion"):
            blocks.append(made)
        elif made is not None:
            folded.append(Fold(made.title, [made]))
    warnings = [Text(warning, "warning") for warning in comparison.warnings]
    blocks += [Text(note, "note") for note in comparison.notes]
    if warnings:
        blocks.append(Fold(f"Warnings: what these numbers do not show ({len(warnings)})", warnings))
    blocks += folded
    if comparison.signatures:
        signatures = [Text(f"{name}: {text}", "note") for name, text in comparison.signatures.items()]
        blocks.append(Fold("Signatures of sacrebleu", signatures))
    return blocks


def table(comparison: Comparison, experiment: Experiment, links: Links, group: str, heading: str) -> Table | None:
    """One group of scores; in the protocol `paper` with a column of the paper's numbers beside each metric it has."""
    columns, body = score_table(
        comparison,
        group,
        lambda row, metric, score: number(score, row, comparison, experiment, links, group, metric),
        lambda row: seeds(row, experiment, links),
    )
    if not body:
        return None
    rows, groups = [row for row in comparison.rows if group in row.cells], {}
    for i, row in enumerate(rows):
        body[i][0] = row.name.removeprefix("floor: ")
        if row.kind != "system" and (i == 0 or rows[i - 1].kind != row.kind):
            groups[i] = {"floor": "Floors: no model", "third party": "Others' predictions"}[row.kind]
    beside = f" beside {' and '.join(comparison.paper)}" if "paper" in columns else ""
    meaning = "; ".join(f"{name}: {MEANING[name]}" for name in metrics_of(comparison, group) if name in MEANING)
    size = f"{comparison.n} {comparison.split} samples. {meaning}." if meaning else f"{comparison.n} samples."
    varied = {row.name for row in rows if any(score.sd is not None for score in row.cells[group].values())}
    spread = "; ".join(text for name, text in SPREADS.items() if name in varied)
    note = f"Mean ± sd over training seeds{spread and f' ({spread})'}"
    if any(score.low is not None for row in rows for score in row.cells[group].values()):
        note += "; [95 % bootstrap interval, over samples, of the mean over all of them]"
    if group in comparison.tests:
        note += (
            f"; p: paired test against {comparison.reference}, Holm-corrected over the {comparison.tests[group]} tests "
            "of this table; “≈”: within noise (the p, or the spread over seeds); “?”: too few seeds or samples to say; "
            "bold: best of the systems; “≤ floor”: no better than the best floor"
        )
    return Table(columns, body, f"{heading}{beside}", [size, f"{note}."], groups=groups)


def number(
    score: Score, row: Row, comparison: Comparison, experiment: Experiment, links: Links, group: str, metric: str
) -> Cell:
    """A score as it is shown, with its interval and verdict under it and a link to where it comes from."""
    scale, places = (100, 2) if group == "emotion" else (1, digits(group, metric))
    text = f"{scale * score.mean:.{places}f}"
    if score.sd is not None:
        text += f" ± {scale * score.sd:.{places}f}"
    small = [interval_text(score.low, score.high, places, scale)]
    if score.p_holm is not None:
        verdict = {NOISE: " ≈", TOO_FEW: " ?"}.get(score.verdict or "", "")
        small.append(f"p {p_text(score.p_holm)}{verdict}")
    if score.floor:
        small.append("≤ floor")
    below = "\n".join(filter(None, small)) or None
    if row.kind == "floor":
        return Cell(text, floor_source(row.name, experiment.systems[comparison.reference], links), small=below)
    return links.score(text, row.name, experiment.systems[row.name], small=below, strong=score.best)


def floor_source(name: str, runs: Sequence[Run], links: Links) -> str:
    """What a floor is made of: the index for the retrieved response, the data set for the others."""
    folder = runs[0].artifact("demonstrations" if "retrieval" in name else "samples")
    return links.run(runs[0]) if folder is None else links.to(folder / MANIFEST)


def seeds(row: Row, experiment: Experiment, links: Links) -> Any:
    """Each training seed as a link to its manifest."""
    if row.name not in experiment.systems:
        return NONE
    return [Cell(NONE if run.seed is None else str(run.seed), links.run(run)) for run in experiment.systems[row.name]]


def headline(comparison: Comparison) -> str:
    """What the `paper` protocol says of the reference against all others, no stronger than the tests."""
    reference = comparison.row(comparison.reference)
    scores = reference.cells[OPEN]
    reached = _list([f"{PRINTED[metric]} {scores[metric].mean:.2f}" for metric in PRINTED if metric in scores])
    alone = reference.kind == "third party"  # whose data and training are not known
    data = f"{comparison.n} samples" if alone else f"{comparison.n} {comparison.split} samples of {comparison.data}"
    n = len(reference.seeds)
    trained = "" if alone else f" ({n} training seed{'' if n == 1 else 's'})"
    sentences = [f"On {data}, {reference.name}{trained} reaches {reached}."]
    names_of: dict[tuple[int, ...], list[str]] = {}
    for row in comparison.rows:
        if row.name != reference.name:
            name = row.name.removeprefix("floor: ") + (" (floor)" if row.kind == "floor" else "")
            names_of.setdefault(standing(row.cells[OPEN]), []).append(name)
    sentences += [sentence(counts, names) for counts, names in names_of.items() if not any(counts[3:])]
    if guesses := [(counts, names) for counts, names in names_of.items() if any(counts[3:])]:
        parts = [f"than {_list(names)} in {counts[3]} of {sum(counts)}" for counts, names in guesses]
        sentences.append(f"Too few seeds or samples for a verdict: its bare mean is higher {'; '.join(parts)} metrics.")
    return " ".join(sentences)


def standing(scores: Mapping[str, Score]) -> tuple[int, ...]:
    """In how many metrics the reference is above a system, below it, and within noise of it by the tests; and, where a
    verdict would be a guess, in how many its bare mean is higher, and lower."""
    tested = [(score.difference, score.verdict) for score in scores.values() if score.difference is not None]
    return (
        sum(verdict == DIFFERS and difference < 0 for difference, verdict in tested),
        sum(verdict == DIFFERS and difference > 0 for difference, verdict in tested),
        sum(verdict == NOISE for _, verdict in tested),
        sum(verdict == TOO_FEW and difference < 0 for difference, verdict in tested),
        sum(verdict == TOO_FEW and difference >= 0 for difference, verdict in tested),
    )


def sentence(counts: tuple[int, ...], names: Sequence[str]) -> str:
    """`standing` in words, where there are verdicts."""
    above, below, noise, *_ = counts
    n, whom = sum(counts), _list(names)
    parts = [(count, how) for count, how in ((above, "above"), (below, "below"), (noise, "within noise of")) if count]
    if len(parts) == 1:
        return f"It is {parts[0][1]} {whom} in all {n} metrics."
    return (
        f"Against {whom} it is "
        + _list([f"{how.removesuffix(' of')} in {count}" for count, how in parts])
        + f" of {n} metrics."
    )


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
