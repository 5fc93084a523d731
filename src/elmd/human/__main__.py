"""Human evaluation (Table 4): blind rating pages drawn from finished runs, and Table 4 from what the raters send back.

    python -m elmd.human sample runs/experiments/table2_m3ed Theirs=theirs.jsonl --out study --n 100 --raters 2
    python -m elmd.human score study rater-1.json rater-2.json

`sample` writes one offline page per rater (rater-1.html …) and key.json, which says what is what: send out the pages,
keep the key. `score` reads what the pages export and writes human.json, human.md, human.csv and human.tex beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from elmd import log
from elmd.cli import guard
from elmd.human.ratings import read_key
from elmd.human.score import score
from elmd.human.study import KEY, gather, write_study
from elmd.human.tables import kappa_rows, notes, rows, write_result


def sample_command(args: argparse.Namespace) -> None:
    pool = gather(args.paths)
    key = write_study(args.out, pool, n=args.n, raters=args.raters, seed=args.seed)
    log.table(
        "What is rated",
        ["system", "training seed", "decode seed", "predictions"],
        [(name, system["seed"], system["decode_seed"], system["path"]) for name, system in key["systems"].items()],
    )
    log.logger.info(
        "%d dialogues (%d with pictures) for %d raters; send out the pages, and keep %s to yourself",
        args.n, key["with_frames"], args.raters, args.out / KEY,
    )  # fmt: skip
    print(f"artifact: {args.out}", flush=True)


def score_command(args: argparse.Namespace) -> None:
    result = score(read_key(args.folder), args.files, args.reference)
    written = write_result(args.folder, result)
    log.table(f"Human evaluation ({result['n']} samples)", *rows(result))
    log.table("Cohen's kappa", *kappa_rows(result))
    for note in notes(result):
        log.logger.info("%s", note)
    for warning in result["warnings"]:
        log.logger.warning("%s", warning)
    log.logger.info("written: %s", ", ".join(map(str, written)))
    print(f"artifact: {args.folder}", flush=True)


def parser() -> argparse.ArgumentParser:
    first, *rest = (__doc__ or "").split("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(
        "python -m elmd.human", description=first, epilog="\n\n".join(rest), formatter_class=form
    )
    commands = whole.add_subparsers(required=True, metavar="sample|score")

    sampling = commands.add_parser("sample", help="draw a study and its pages", formatter_class=form, description=(
        "Draw test samples that all systems have, and write one blind page per rater. Of each system one run is\n"
        "rated: the lowest training seed that all share, in its lowest decode seed; both are shown and recorded."
    ))  # fmt: skip
    sampling.add_argument(
        "paths", nargs="+", metavar="PATH", help="folder of an experiment (runs/experiments/<name>), or NAME=FILE.jsonl"
    )
    sampling.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the pages and the key")
    sampling.add_argument("--n", type=_positive, default=100, help="number of samples (default: 100, as in the paper)")
    sampling.add_argument("--raters", type=_positive, default=2, help="number of raters (default: 2, as in the paper)")
    sampling.add_argument("--seed", type=int, default=0, help="of the draw of samples (default: 0)")
    sampling.set_defaults(act=sample_command)

    scoring = commands.add_parser("score", help="make Table 4 of the raters' files", formatter_class=form, description=(
        "Read what the pages exported (complete files only) and write human.json, .md, .csv and .tex into DIR."
    ))  # fmt: skip
    scoring.add_argument("folder", type=Path, metavar="DIR", help="the study's folder")
    scoring.add_argument("files", nargs="+", type=Path, metavar="rater-N.json", help="what the pages exported")
    scoring.add_argument("--reference", metavar="SYSTEM", help="the system the others are held against (default: ELMD)")
    scoring.set_defaults(act=score_command)
    return whole


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    log.setup()
    guard(lambda: args.act(args))


if __name__ == "__main__":
    main()
