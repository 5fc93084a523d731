"""A scored human evaluation on the page: Table 4 beside the paper's, and the raters' agreement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmd.engine.files import read_object
from elmd.engine.store import MANIFEST
from elmd.errors import DataError
from elmd.evaluation.paper import paper_kappa, paper_table
from elmd.evaluation.tables import NONE, Cell, Table, interval_text, p_text
from elmd.report.blocks import Text
from elmd.report.links import Links


@dataclass(frozen=True)
class Study:
    """A scored study: its human.json, and the content (see `elmd.human.score.score`)."""

    file: Path
    result: dict[str, Any]

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
        return cls(file, read_object(file, DataError, "run python -m elmd.human score again"))


def study_blocks(study: Study, dataset: str, links: Links) -> list[Any]:
    """Table 4 of a study, with the raters' agreement.

    Args:
        dataset: the paper's, whose numbers stand beside.
    """
    result = study.result
    blocks: list[Any] = [Text(warning, "warning") for warning in result["warnings"]]
    blocks.append(_systems(study, dataset, links))
    if agreement := _agreement(study, links):
        note = (
            f"The paper gives one kappa for {dataset}: {paper_kappa(dataset):.2f} (§5.2), unweighted as far as it says."
        )
        columns = ["Cohen's kappa", "unweighted", "quadratic"]
        blocks.append(Table(columns, agreement, "Agreement of the raters", [note]))
    return blocks + [Text(note, "note") for note in result["notes"]]


def _systems(study: Study, dataset: str, links: Links) -> Table:
    result, paper, href = study.result, paper_table("Table 4", dataset), links.to(study.file)
    last, rows = list(result["systems"])[-1], []
    for name, system in result["systems"].items():
        printed = paper.printed.get("Ground-Truth" if name == last else name, {})
        manifest = None if system.get("path") is None else Path(system["path"]).resolve().parent / MANIFEST
        cells: list[Any] = [Cell(name, links.to(manifest) if manifest is not None and manifest.is_file() else None)]
        for metric in ("R1", "R2"):
            score, test = system[metric], result["comparison"].get(name, {}).get(metric)
            small = [interval_text(score["low"], score["high"], 2), test and f"p {p_text(test['p_holm'])}"]
            cells.append(Cell(f"{score['mean']:.3f}", href, small="\n".join(filter(None, small))))
            cells.append(printed.get(metric, NONE))
        rows.append(cells)
    raters, reference = len(result["raters"]), result["reference"]
    note = (
        f"{result['n']} samples, {raters} rater{'' if raters == 1 else 's'}, 1 to 5. R1: contextual relevance, R2: "
        "emotional relevance. [95 % bootstrap interval over samples]"
        + (f"; p: paired permutation against {reference}, Holm-corrected." if result["comparison"] else ".")
    )
    return Table(["system", "R1", "paper", "R2", "paper"], rows, f"Table 4, beside the paper's on {dataset}", [note])


def _agreement(study: Study, links: Links) -> list[list[Cell | str]]:
    """A row per metric and pair of raters."""
    rows: list[list[Cell | str]] = []
    for metric, agreement in study.result["kappa"].items():
        for pair in agreement["pairs"]:
            cells: list[Cell | str] = [f"{metric}, raters {' and '.join(map(str, pair['raters']))}"]
            for value in (pair["unweighted"], pair["quadratic"]):
                small = interval_text(value["low"], value["high"], 2)
                defined = value["kappa"] is not None
                cells.append(Cell(f"{value['kappa']:.2f}", links.to(study.file), small=small) if defined else NONE)
            rows.append(cells)
    return rows
