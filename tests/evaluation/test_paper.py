"""The paper's numbers are data, equal to the paper's text, and typed nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT
from elmd.cli import compose
from elmd.errors import DataError
from elmd.evaluation.paper import _content, paper_kappa, paper_settings, paper_table

EXPERIMENTS = ROOT / "configs" / "experiment"
NUMBER = re.compile(r"(?<![\d.])\d+\.\d{2,}(?![\d.])")


def read_text(shared: Path) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Tables of the paper's text: table -> data set -> row -> numbers as printed."""
    tables: dict[str, dict[str, dict[str, list[str]]]] = {}
    table, dataset = "", ""
    for line in (shared / "paper" / "elmd_icmr2024.txt").read_text(encoding="utf-8").splitlines():
        if caption := re.match(r"\**(Table [1-4]): ", line):
            table, dataset = caption[1], "M3ED"
            continue
        cells = [re.sub(r"</?b>", "", cell).strip() for cell in line.split("\t")]
        if not table or len(cells) < 3 or not re.fullmatch(r"[\d.]+", cells[-1]):
            continue
        if cells[0] in ("M3ED", "MMED"):
            dataset = cells[0]
        numbers = [cell for cell in cells if re.fullmatch(r"[\d.]+", cell)]
        row = "samples" if table == "Table 1" else next(c for c in cells if c not in ("", "M3ED", "MMED", *numbers))
        tables.setdefault(table, {}).setdefault(dataset, {})[row] = numbers
    return tables


def test_every_number_is_the_papers(shared: Path) -> None:
    text = read_text(shared)
    assert list(text) == ["Table 1", "Table 2", "Table 3", "Table 4"]
    assert text == {entry["table"]: entry["datasets"] for entry in _content()["tables"]}
    assert sum(len(numbers) for sets in text.values() for rows in sets.values() for numbers in rows.values()) == 84
    whole = (shared / "paper" / "elmd_icmr2024.txt").read_text(encoding="utf-8")
    assert "a coefficient of 0.41 for M3ED and 0.38 for MMED" in whole
    assert (paper_kappa("M3ED"), paper_kappa("MMED")) == (0.41, 0.38)
    for caption in (entry["caption"] for entry in _content()["tables"]):
        assert caption in whole


def test_tables_speak_our_names() -> None:
    table = paper_table("Table 2", "M3ED")
    assert list(table.printed) == ["Livebot", "DialoGPT", "VisualGLM-style", "ELMD"]
    assert table.cell("ELMD", "bleu4_char") == "1.552"
    assert table.cell("Livebot", "bleu4_char") == "0.070"  # as printed
    assert table.values["Livebot"]["BLEU-4"] == 0.07
    assert table.cell("ELMD", "chrf_char") is None
    assert table.cell("floor: random response", "bleu4_char") is None
    assert list(paper_table("Table 3", "M3ED").printed)[1:] == ["w/o ERM", "w/o ERT", "w/o SSC", "w/o V", "w/o REP"]
    assert "DialoGPT" in paper_table("Table 4", "MMED").printed  # misspelt there


def test_unknown_names_are_answered_with_the_known() -> None:
    with pytest.raises(DataError, match=r"no numbers under 'Table 9'; choose from Table 1, Table 2, Table 3, Table 4"):
        paper_table("Table 9", "M3ED")
    with pytest.raises(DataError, match=r"Table 3 has no data set 'MMED'; choose from M3ED"):
        paper_table("Table 3", "MMED")
    with pytest.raises(DataError, match=r"no kappa on 'CPED'; choose from M3ED, MMED"):
        paper_kappa("CPED")


def test_headers_of_experiments_hold_the_papers_numbers() -> None:
    """What an experiment says it is held against is the paper's, number for number."""
    seen = 0
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        header = " ".join(
            line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"
        )
        numbers = NUMBER.findall(header.partition("Held against")[2])
        if not numbers:
            continue
        seen += 1
        dataset = "MMED" if "mmed" in path.stem else "M3ED"
        tables = [paper_table(name, dataset) for name in re.findall(r"Table [23]", header)]
        printed = {text for table in tables for row in table.printed.values() for text in row.values()}
        assert set(numbers) <= printed, path.name
        ours = next(table.printed["ELMD"] for table in tables)
        assert set(numbers) & set(ours.values()), path.name
    assert seen >= 3
    held = (EXPERIMENTS / "table3_m3ed.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
    for row, cells in paper_table("Table 3", "M3ED").printed.items():
        assert f"{'ours' if row == 'ELMD' else row} {' '.join(cells.values())}" in held


def test_settings_are_those_of_the_experiment() -> None:
    cfg = compose(["experiment=table2_m3ed", "data.path=x", "llm.path=x", "vision.path=x", "retriever.path=x"])
    for key, value in paper_settings().items():
        group, _, name = key.partition(".")
        assert getattr(getattr(cfg, group), name) == value, key
