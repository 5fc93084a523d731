"""Score many runs at once: BLEU, METEOR and ROUGE tables as Markdown, CSV and LaTeX, one row per run.

    python scripts/evaluate_runs.py runs/experiments/demo runs/experiments/table3_m3ed --out results/
    python scripts/evaluate_runs.py mine.jsonl theirs.jsonl --out results/ --protocol paper
    python scripts/evaluate_runs.py runs/experiments/table2_m3ed "their system=theirs.jsonl" --out results/

A PATH is a predictions file, or a folder in which every `predictions.jsonl` is scored. An experiment's folder also
gets a table of its systems side by side (comparison.md, .csv, .tex, .json): baselines, ablations and floors, means over
training seeds, intervals, tests against the full model, the paper's numbers. NAME=FILE joins somebody else's
predictions to it under that name. A file that cannot be scored is named with its line in the log and in the Markdown
table, and does not stop the others.
Exit code: 0 all scored, 1 something could not be scored, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elmd import log
from elmd.engine.files import read_json
from elmd.errors import DataError, ElmdError
from elmd.evaluation.comparison import compare_systems, reference_of
from elmd.evaluation.comparison_tables import score_table, write_comparison
from elmd.evaluation.jobs import ARTIFACTS, PREDICTIONS
from elmd.evaluation.predictions import read_predictions
from elmd.evaluation.runs import read_experiment
from elmd.evaluation.score import score
from elmd.evaluation.score_tables import GROUPS, group_table, score_document
from elmd.metrics.text import PROTOCOLS


def find(folder: Path) -> Iterator[Path]:
    """Every predictions.jsonl under `folder`, links followed once, unfinished (`.partial`) artifacts left out."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in [name for name in folders if name.endswith(".partial")]:
            log.logger.warning("%s is not finished: left out", Path(root) / name)
        folders[:] = sorted(name for name in folders if not name.endswith(".partial"))
        if PREDICTIONS in files:
            yield Path(root) / PREDICTIONS


def collect(paths: Sequence[Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """Prediction files by system name, and what was given but holds none, with the reason."""
    files: dict[str, Path] = {}
    failed: dict[str, str] = {}
    real: dict[Path, str] = {}
    for path in paths:
        inside = sorted(find(path)) if path.is_dir() else [path]
        if not inside:
            failed[str(path)] = f"holds no {PREDICTIONS}"
        for file in inside:
            if (same := real.get(file.resolve())) is not None:
                log.logger.warning("%s is the same file as %s: scored once", file, same)
                continue
            name = _name(file, path)
            name = name if name not in files else str(file)
            files[name], real[file.resolve()] = file, name
    return files, failed


def given(text: str) -> Path | tuple[str, Path]:
    """A path, or a NAME=FILE. What exists is a path: sweeps name folders `ablation=none,seed=0`."""
    name, _, path = text.partition("=")
    other = name and (Path(path).is_file() or (path and "/" not in name)) and not Path(text).exists()
    return (name, Path(path)) if other else Path(text)


def experiments(path: Path) -> list[Path]:
    """The experiments' folders at or below `path` that have predictions; `path` itself where it is a job of one."""
    folders: dict[Path, None] = {}
    for file in sorted(path.absolute().rglob(ARTIFACTS)):
        if not (file.parent / PREDICTIONS).is_file():
            continue
        try:
            name = read_json(file)["config"]["experiment_name"]
        except (ValueError, KeyError, TypeError):
            name = None  # reading the experiment says what is wrong with it
        folder = next((place for place in (file.parent, file.parent.parent) if place.name == name), path.absolute())
        folders[folder if folder.is_relative_to(path.absolute()) else path.absolute()] = None
    return list(folders)


def compare(folders: Sequence[Path], others: Mapping[str, Path], protocols: Sequence[str], out: Path) -> dict[str, str]:
    """Write each experiment's comparison into `out`; returns what could not be compared, with the reason."""
    failed: dict[str, str] = {}
    for folder in folders:
        stem = "comparison" if len(folders) == 1 else f"comparison_{folder.name}"
        try:
            experiment = read_experiment(folder, others)
            log.logger.info("comparing %s", ", ".join(experiment.systems))
            comparison = compare_systems(experiment, reference_of(experiment), protocols)
        except ElmdError as error:
            failed[f"comparison of {folder.name}"] = str(error)
            continue
        written = write_comparison(out, comparison, title=f"Systems of {experiment.name}", stem=stem)
        columns, rows = score_table(comparison, protocols[0])
        log.table(f"{experiment.name}, {protocols[0]}", columns, [[str(cell) for cell in row] for row in rows])
        for job in comparison.missing:
            log.logger.warning("missing: %s, seed %s: %s", job["system"], job["seed"], job["why"])
        for warning in comparison.warnings:
            log.logger.warning("%s", warning)
        log.logger.info("wrote %s", ", ".join(map(str, written)))
    return failed


def _name(file: Path, given: Path) -> str:
    """A file's own name, or for predictions.jsonl that of its folder, below the folder that was given."""
    if file.name != PREDICTIONS:
        return file.stem
    if file == given:
        return file.absolute().parent.name
    return (Path(given.absolute().name) / file.parent.relative_to(given)).as_posix()


def main(arguments: Sequence[str] | None = None) -> int:
    first, *rest = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="+", type=given, metavar="PATH", help="folder of runs, predictions file, NAME=FILE"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for scores.md, .csv and .tex")
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "all"], default="all", help="default: all")
    args = parser.parse_args(arguments)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; name a folder")
    log.setup()

    protocols = list(PROTOCOLS) if args.protocol == "all" else [args.protocol]
    paths = [path for path in args.paths if isinstance(path, Path)]
    others = dict(path for path in args.paths if not isinstance(path, Path))
    files, failed = collect(paths)
    if taken := others.keys() & files.keys():
        parser.error(f"{sorted(taken)[0]} is the name of a run; give the file another")
    files |= others
    scores: dict[str, dict[str, Any]] = {}
    for name, file in log.progress(files.items(), "scoring", total=len(files), unit="file"):
        try:
            scores[name] = score(read_predictions(file), protocols)
        except DataError as error:
            failed[name] = str(error)
    folders = [folder for path in paths if path.is_dir() for folder in experiments(path)]
    failed |= compare(list(dict.fromkeys(folders)), others, protocols, args.out)
    written = score_document(scores, title="Evaluated runs", failed=failed).write(args.out, "scores") if scores else []
    for group in GROUPS:
        columns, rows = group_table(scores, group)
        if rows and group in protocols:
            log.table(group, columns, rows)
    for name, why in failed.items():
        log.logger.error("%s could not be scored: %s", name, why)
    log.logger.info(
        "%d scored, %d could not be scored; wrote %s",
        len(scores),
        len(failed),
        ", ".join(map(str, written)) or "nothing",
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
