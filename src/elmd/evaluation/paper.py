"""The paper's numbers, as data under the names of its tables: `paper.json`, read once, never typed elsewhere.

Each row has our name of the system (the paper's "ours" is "ELMD", its "VisualGLM" our "VisualGLM-style"), and each
automatic metric has our key of the protocol `paper`, whose tokens are inferred: the paper does not give them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from elmd.errors import DataError


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper on one data set.

    Attributes:
        table: its name, "Table 2". dataset: "M3ED" or "MMED".
        metrics: our metric key by the paper's column; Tables 1 and 4 have columns of their own.
        printed: our name of the row -> the paper's column -> the number as printed ("0.070").
    """

    table: str
    dataset: str
    caption: str
    metrics: Mapping[str, str]
    printed: Mapping[str, Mapping[str, str]]

    @property
    def values(self) -> dict[str, dict[str, float]]:
        """Row -> column -> number."""
        return {row: {column: float(text) for column, text in cells.items()} for row, cells in self.printed.items()}

    def cell(self, system: str, metric: str) -> str | None:
        """The number as printed for our system and metric key, None where the table has none."""
        column = next((column for column, key in self.metrics.items() if key == metric), None)
        return self.printed.get(system, {}).get(column) if column is not None else None


def paper_table(table: str, dataset: str) -> PaperTable:
    """A table of the paper, such as `paper_table("Table 2", "M3ED")`.

    Raises:
        DataError: the paper has no such table, or not on this data set; those it has are listed.
    """
    content = _content()
    tables = {entry["table"]: entry for entry in content["tables"]}
    if table not in tables:
        raise DataError(f"the paper has no numbers under {table!r}", fix=f"choose from {', '.join(tables)}")
    entry = tables[table]
    if dataset not in entry["datasets"]:
        raise DataError(f"{table} has no data set {dataset!r}", fix=f"choose from {', '.join(entry['datasets'])}")
    columns: list[str] = entry["columns"]
    rows = {
        content["systems"].get(row, row): dict(zip(columns, numbers, strict=True))
        for row, numbers in entry["datasets"][dataset].items()
    }
    metrics = {column: content["metrics"][column] for column in columns if column in content["metrics"]}
    return PaperTable(table, dataset, entry["caption"], metrics, rows)


def paper_kappa(dataset: str) -> float:
    """Cohen's kappa of the two annotators behind Table 4 (§5.2).

    Raises:
        DataError: the paper has none for this data set.
    """
    kappas = _content()["kappa"]
    if dataset not in kappas:
        raise DataError(f"the paper gives no kappa on {dataset!r}", fix=f"choose from {', '.join(kappas)}")
    return float(kappas[dataset])


def paper_settings() -> dict[str, float]:
    """What §4.3 says of training and decoding, by configuration key."""
    return dict(_content()["settings"])


@cache
def _content() -> dict[str, Any]:
    return json.loads(files("elmd.evaluation").joinpath("paper.json").read_text(encoding="utf-8"))
