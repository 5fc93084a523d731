"""Tables 2, 3 and 4 beside the paper's numbers, Fig. 6, and what they say in plain sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from elmd.engine.files import read_json
from elmd.engine.store import MANIFEST
from elmd.errors import DataError
from elmd.evaluation.comparison import DIFFERS, NOISE, TOO_FEW, Comparison, Row
from elmd.evaluation.comparison import Cell as Score
from elmd.evaluation.comparison_tables import metrics_of, p_text
from elmd.evaluation.paper import paper_kappa, paper_table
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.systems import FULL, SYMBOLS
from elmd.evaluation.tables import GROUPS, digits
from elmd.metrics.text import MEANING
from elmd.report import svg
from elmd.report.blocks import Cell, Files, Fold, Plots, Table, Text
from elmd.report.links import Links

#: The paper's columns by metric of the protocol `paper`.
PRINTED = {key: column for column, key in paper_table("Table 2", "M3ED").metrics.items()}

#: The metrics of Fig. 6, with what it divides them by.
DRAWN = {"bleu4_char": 1, "meteor_char": 10, "rougeL_char": 10}

#: What a sweep's picture is called, by the key that it varies.
SWEPT = {"erm.slots": "Fig. 6: the self-separation coefficient s", "vision.frames": "The number of frames m"}

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
            f"{one.system}" + ("" if one.seed is None else f", seed {one.seed}") for one in experiment.missing
        )
        told = f"Not in these tables, because their jobs are missing (why: under What is missing): {'; '.join(names)}."
        blocks.append(Text(told, "warning"))
    folded = []
    for group, heading in GROUPS.items():
        said = heading.replace("`", "").replace("fractions", "%")
        made = table(comparison, experiment, links, group, said)
        if made is None:
            continue
        if group in (OPEN, "emotion"):
            blocks.append(made)
        else:
            folded.append(Fold(made.title, [made]))
    warned = [Text(warning, "warning") for warning in comparison.warnings]
    blocks += [Text(note, "note") for note in comparison.notes]
    signed = [Text(f"{name}: {text}", "note") for name, text in comparison.signatures.items()]
    last = [Fold(f"Warnings: what these numbers do not show ({len(warned)})", warned)] if warned else []
    return [*blocks, *last, *folded, *([Fold("Signatures of sacrebleu", signed)] if signed else [])]


def table(comparison: Comparison, experiment: Experiment, links: Links, group: str, heading: str) -> Table | None:
    """One group of scores; in the protocol `paper` with a column of the paper's numbers beside each metric it has."""
    rows = [row for row in comparison.rows if group in row.cells]
    if not rows:
        return None
    metrics = metrics_of(comparison, group)
    printed = {key for row in rows for key in row.paper} if group == OPEN else set()
    columns = ["system", "seeds"]
    for metric in metrics:
        columns += [metric, *(["paper"] if metric in printed else [])]
    body, groups = [], {}
    for i, row in enumerate(rows):
        if row.kind != "system" and (i == 0 or rows[i - 1].kind != row.kind):
            groups[i] = {"floor": "Floors: no model", "third party": "Others' predictions"}[row.kind]
        line: list[Any] = [row.name.removeprefix("floor: "), seeds(row, experiment, links)]
        for metric in metrics:
            score = row.cells[group].get(metric)
            line.append("–" if score is None else number(score, row, comparison, experiment, links, group, metric))
            if metric in printed:
                line.append(row.paper.get(metric, "–"))
        body.append(line)
    held = f" beside {' and '.join(comparison.paper)}" if printed else ""
    meaning = "; ".join(f"{metric}: {MEANING[metric]}" for metric in metrics if metric in MEANING)
    notes = [f"{comparison.n} {comparison.split} samples. {meaning}." if meaning else f"{comparison.n} samples."]
    varied = {row.name for row in rows if any(one.sd is not None for one in row.cells[group].values())}
    spread = "; ".join(said for name, said in SPREADS.items() if name in varied)
    told = f"Mean ± sd over training seeds{spread and f' ({spread})'}"
    if any(one.low is not None for row in rows for one in row.cells[group].values()):
        told += "; [95 % bootstrap interval, over samples, of the mean over all of them]"
    if group in comparison.tests:
        told += (
            f"; p: paired test against {comparison.reference}, Holm-corrected over the {comparison.tests[group]} tests "
            "of this table; “≈”: within noise (the p, or the spread over seeds); “?”: too few seeds or samples to say; "
            "bold: best of the systems; “≤ floor”: no better than the best floor"
        )
    notes.append(f"{told}.")
    return Table(columns, body, f"{heading}{held}", notes, groups)


def number(
    score: Score, row: Row, comparison: Comparison, experiment: Experiment, links: Links, group: str, metric: str
) -> Cell:
    """A score as it is shown, with its interval and verdict under it and a link to where it comes from."""
    scale, places = (100, 2) if group == "emotion" else (1, digits(group, metric))
    text = f"{scale * score.mean:.{places}f}"
    if score.sd is not None:
        text += f" ± {scale * score.sd:.{places}f}"
    small = []
    if score.low is not None and score.high is not None:
        small.append(f"[{scale * score.low:.{places}f}, {scale * score.high:.{places}f}]")
    if score.p_holm is not None:
        verdict = {NOISE: " ≈", TOO_FEW: " ?"}.get(score.verdict or "", "")
        small.append(f"p {p_text(score.p_holm)}{verdict}")
    if score.floor:
        small.append("≤ floor")
    told = "\n".join(small) or None
    if row.kind == "floor":
        return Cell(text, floor_source(row.name, experiment.systems[comparison.reference], links), small=told)
    return replace(links.score(text, row.name, experiment.systems[row.name]), small=told, strong=score.best)


def floor_source(name: str, runs: Sequence[Run], links: Links) -> str:
    """What a floor is made of: the index for the retrieved response, the data set for the others."""
    found = runs[0].artifact("demonstrations" if "retrieval" in name else "samples")
    return links.run(runs[0]) if found is None else links.to(found / MANIFEST)


def seeds(row: Row, experiment: Experiment, links: Links) -> Any:
    """Each training seed as a link to its manifest."""
    if row.name not in experiment.systems:
        return "–"
    return [Cell("–" if run.seed is None else str(run.seed), links.run(run)) for run in experiment.systems[row.name]]


def headline(comparison: Comparison) -> str:
    """What the `paper` protocol says of the reference against all others, no stronger than the tests."""
    mine = comparison.row(comparison.reference)
    reached = " and ".join(
        ", ".join(
            f"{PRINTED[metric]} {mine.cells[OPEN][metric].mean:.2f}" for metric in PRINTED if metric in mine.cells[OPEN]
        ).rsplit(", ", 1)
    )
    alone = mine.kind == "third party"  # whose data and training are not known
    data = f"{comparison.n} samples" if alone else f"{comparison.n} {comparison.split} samples of {comparison.data}"
    trained = "" if alone else f" ({_count(len(mine.seeds), 'training seed')})"
    told = [f"On {data}, {mine.name}{trained} reaches {reached}."]
    said: dict[tuple[int, ...], list[str]] = {}
    for row in comparison.rows:
        if row.name != mine.name:
            name = row.name.removeprefix("floor: ") + (" (floor)" if row.kind == "floor" else "")
            said.setdefault(standing(row.cells[OPEN]), []).append(name)
    told += [sentence(counts, names) for counts, names in said.items() if not any(counts[3:])]
    if guesses := [(counts, names) for counts, names in said.items() if any(counts[3:])]:
        parts = [f"than {_list(names)} in {counts[3]} of {sum(counts)}" for counts, names in guesses]
        told.append(f"Too few seeds or samples for a verdict: its bare mean is higher {'; '.join(parts)} metrics.")
    return " ".join(told)


def standing(scores: Mapping[str, Score]) -> tuple[int, ...]:
    """In how many metrics the reference is above a system, below it, and within noise of it by the tests; and, where a
    verdict would be a guess, in how many its bare mean is higher, and lower."""
    tested = [(one.difference, one.verdict) for one in scores.values() if one.difference is not None]
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
    parts = [(above, "above"), (below, "below"), (noise, "within noise of")]
    known = [(count, how) for count, how in parts if count]
    if len(known) == 1:
        return f"It is {known[0][1]} {whom} in all {n} metrics."
    return (
        f"Against {whom} it is "
        + _list([f"{how.removesuffix(' of')} in {count}" for count, how in known])
        + f" of {n} metrics."
    )


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
    drawn = []
    for style, (metric, divisor) in enumerate(DRAWN.items()):
        scores = [comparison.row(system).cells[OPEN][metric] for system in systems]
        said = PRINTED[metric] + (f" / {divisor}" if divisor > 1 else "")
        errors = [None if score.sd is None else score.sd / divisor for score in scores]
        drawn.append(svg.Line(said, xs, [score.mean / divisor for score in scores], style, errors))
    pictures = [svg.lines(f"Scores against {symbol}", drawn, xlabel=symbol, ticks=xs, log=True, markers=True)]
    for line, (metric, divisor) in zip(drawn, DRAWN.items(), strict=True):
        errors = [error and error * divisor for error in line.errors or ()]
        own = replace(line, ys=[y * divisor for y in line.ys], errors=errors)
        pictures.append(svg.lines(PRINTED[metric], [own], xlabel=symbol, ticks=xs, log=True, markers=True))
    several = any(len(experiment.systems[system]) > 1 for system in systems)
    told = "Bars: ± sd over training seeds. " if several else "One training seed each: what is noise is not known. "
    told += "In the first picture METEOR and ROUGE-L are divided by 10"
    told += ", as in the paper's figure, whose values are not printed." if key == "erm.slots" else "."
    legend = [(line.style, line.label) for line in drawn]
    return [Plots(pictures, legend, SWEPT[key], f"Protocol {OPEN}. {told}", glyphs=True)]


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
    size = [statistics.mean(one.key_bytes / 1e6 for one in point.costs.values()) for point in points]
    spent = [[one.microseconds for one in point.costs.values()] for point in points]
    pictures = [
        svg.lines("Size of the searched key, MB", [svg.Line("size", xs, size, 3)], xlabel="s", ticks=xs, log=True,
                  markers=True, zero=True),
        svg.lines("Search, µs per query", [svg.Line("time", xs, [statistics.mean(one) for one in spent], 4,
                  [statistics.stdev(one) if len(one) > 1 else None for one in spent])], xlabel="s", ticks=xs, log=True,
                  markers=True, zero=True),
    ]  # fmt: skip
    rows = []
    for point, mb, times in zip(points, size, spent, strict=True):
        runs = experiment.systems[point.system]
        one = next(iter(point.costs.values()))
        indices = list(dict.fromkeys(run.need("demonstrations") for run in runs))
        trainings = list(dict.fromkeys(run.need("retriever") for run in runs))
        rows.append([
            str(point.slots),
            f"{one.width:,}",
            links.cell(f"{one.candidates:,}", point.system, indices),
            links.cell(f"{mb:.2f}", point.system, indices),
            links.cell(f"{statistics.mean(times):.1f}", point.system, indices),
            links.cell(f"{statistics.mean(point.train_seconds.values()):.0f}", point.system, trainings),
        ])  # fmt: skip
    columns = ["s", "width of the key", "candidates", "size, MB", "µs per query", "training of ERM, s"]
    queries = next(iter(points[0].costs.values())).queries
    note = (
        f"Exact search for {queries:,} queries at once on one thread, timed now on the machine that made this page; "
        "mean over training seeds."
    )
    return [Plots(pictures, title="The cost of s (§5.4)"), Table(columns, rows, notes=[note])]


@dataclass(frozen=True)
class Study:
    """A scored human evaluation: its human.json, and what that says."""

    file: Path
    found: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Study:
        """
        Raises:
            DataError: no such folder, or one without a human.json that can be read.
        """
        file = folder / "human.json"
        if not folder.is_dir():
            raise DataError(
                "no such folder", where=folder, fix="name a study that python -m elmd.human score has scored"
            )
        if not file.is_file():
            raise DataError("holds no human.json", where=folder, fix="run python -m elmd.human score first")
        try:
            return cls(file, read_json(file))
        except (OSError, ValueError) as error:
            fix = "run python -m elmd.human score again"
            raise DataError(f"cannot be read ({type(error).__name__})", where=file, fix=fix) from None


def human(study: Study, dataset: str, links: Links) -> list[Any]:
    """Table 4 of a study, with the raters' agreement."""
    found, paper = study.found, paper_table("Table 4", dataset)
    href, rows = links.to(study.file), []
    for name, one in found["systems"].items():
        printed = paper.printed.get("Ground-Truth" if name == list(found["systems"])[-1] else name, {})
        source = None if one.get("path") is None else Path(one["path"])
        manifest = None if source is None else source.resolve().parent / MANIFEST
        at = links.to(manifest) if manifest is not None and manifest.is_file() else None
        cells: list[Any] = [Cell(name, at)]
        for metric in ("R1", "R2"):
            test = found["comparison"].get(name, {}).get(metric)
            small = f"[{one[metric]['low']:.2f}, {one[metric]['high']:.2f}]"
            small += "" if test is None else f"\np {p_text(test['p_holm'])}"
            cells += [Cell(f"{one[metric]['mean']:.3f}", href, small=small), printed.get(metric, "–")]
        rows.append(cells)
    kappa = []
    for metric, one in found["kappa"].items():
        for pair in one["pairs"]:
            cells = [f"{metric}, raters {' and '.join(map(str, pair['raters']))}"]
            for weights in ("unweighted", "quadratic"):
                value = pair[weights]
                known = value["kappa"] is not None
                cells.append(Cell(f"{value['kappa']:.2f}", href, small=_interval(value)) if known else "–")  # type: ignore[arg-type]
            kappa.append(cells)
    note = (
        f"{found['n']} samples, {_count(len(found['raters']), 'rater')}, 1 to 5. R1: contextual relevance, R2: "
        "emotional relevance. [95 % bootstrap interval over samples]"
        + (f"; p: paired permutation against {found['reference']}, Holm-corrected." if found["comparison"] else ".")
    )
    blocks: list[Any] = [Text(warning, "warning") for warning in found["warnings"]]
    blocks.append(
        Table(["system", "R1", "paper", "R2", "paper"], rows, f"Table 4, beside the paper's on {dataset}", [note])
    )
    if kappa:
        told = (
            f"The paper gives one kappa for {dataset}: {paper_kappa(dataset):.2f} (§5.2), unweighted as far as it says."
        )
        blocks.append(Table(["Cohen's kappa", "unweighted", "quadratic"], kappa, "Agreement of the raters", [told]))
    return blocks + [Text(one, "note") for one in found["notes"]]


def _interval(value: Mapping[str, float | None]) -> str | None:
    low, high = value["low"], value["high"]
    return None if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
