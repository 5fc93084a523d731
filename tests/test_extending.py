"""What docs/architecture.md says it takes to add something: a data set, a stage and a strategy, added that way."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.tiny import make_samples
from conftest import ROOT
from elmd.cli import compose
from elmd.config import Config
from elmd.data.readers import DATASETS, Dataset
from elmd.data.readers.source import ClipTemplate, RawDialogue, Source
from elmd.data.samples import load_samples
from elmd.engine.stage import Inputs, Job, Outcome, Stage
from elmd.errors import ConfigError
from elmd.labels import BY_NAME, Emotion
from elmd.retrieval.index import Index, Queries
from elmd.retrieval.search import Neighbours
from elmd.retrieval.strategy import STRATEGIES, Settings
from elmd.stages import STAGES, chain_of
from elmd.types import Sentence


def write_lines(path: Path) -> Path:
    """The made-up format: `dialogue|speaker|emotion|text`."""
    rows = [f"d{d}|{'AB'[t % 2]}|{'Happy' if t % 2 else 'Sad'}|第{d}段第{t}句" for d in range(12) for t in range(4)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_the_page_names_only_files_that_are_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    names = {name for name in re.findall(r"`([\w/]+(?:\.py|/))", text) if not name.startswith("runs/")}
    assert len(names) > 25
    missing = [name for name in names if not any((ROOT / part / name).exists() for part in ("src/elmd", "."))]
    assert not missing


def test_a_data_set_is_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, labels: Mapping[str, Emotion], clips: ClipTemplate | None) -> Source:
        dialogues: dict[str, list[Sentence]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
            dialogue, speaker, emotion, text = line.split("|")
            dialogues.setdefault(dialogue, []).append(Sentence(f"l{number}", speaker, text, labels[emotion]))
        return Source([RawDialogue(name, "show", tuple(sentences)) for name, sentences in dialogues.items()])

    monkeypatch.setitem(DATASETS, "lines", Dataset(read, BY_NAME))
    configs = tmp_path / "configs" / "data"
    configs.mkdir(parents=True)
    (configs / "lines.yaml").write_text("name: lines\nreader: lines\n")
    path = write_lines(tmp_path / "talks.txt")
    chosen = [f"hydra.searchpath=[file://{configs.parent}]", "data=lines"]
    with pytest.raises(ConfigError, match=r"data\.path"):
        compose(chosen)
    cfg = compose([*chosen, f"data.path={path}", "vision=none", f"runs_dir={tmp_path / 'runs'}"])
    folder = chain_of(cfg, Accelerator(cpu=True)).run("prepare")
    samples = load_samples(folder / "samples.jsonl")
    assert len(samples) == 12 * 3
    assert samples[0].response.text == "第0段第1句"


def test_a_stage_is_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cfg: Config, job: Job) -> Outcome:
        lengths = [len(s.response.text) for s in load_samples(job.upstream["samples"] / "samples.jsonl")]
        (job.folder / "longest.json").write_text(json.dumps(max(lengths) * (1 + cfg.seed)))
        return Outcome(metrics={"longest": max(lengths)})

    stage = Stage("longest", "longest", 1, lambda cfg: Inputs(("seed",), ("samples",)), run)
    monkeypatch.setitem(STAGES, stage.name, stage)
    path = tmp_path / "d.jsonl"
    turns = [{"speaker": "AB"[t % 2], "text": "好" * (t + 1), "emotion": "Happy"} for t in range(4)]
    path.write_text("\n".join(json.dumps({"id": f"d{i}", "utterances": turns}) for i in range(10)))
    cfg = compose(["data=jsonl", f"data.path={path}", "vision=none", f"runs_dir={tmp_path / 'runs'}", "seed=1"])
    chain = chain_of(cfg, Accelerator(cpu=True))
    for name in chain.order("longest"):
        chain.run(name)
    assert json.loads((chain.folder("longest") / "longest.json").read_text()) == 8
    assert chain.manifest("longest")["reads"] == {"seed": 1}


def test_a_strategy_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(index: Index, queries: Queries, settings: Settings) -> Neighbours:
        count = len(queries.ids)
        positions = torch.arange(len(index.ids) - 1, len(index.ids) - 1 - settings.k, -1).expand(count, -1)
        return Neighbours(positions, torch.zeros(count, settings.k))

    monkeypatch.setitem(STRATEGIES, "last", last)
    samples = [s for s in make_samples() if s.split == "train"]
    index = Index.build(samples, {"e_u": torch.eye(len(samples))})
    queries = Queries.of(torch.eye(len(samples)), samples)
    settings = Settings("e_u", k=1, strategy="last")
    assert STRATEGIES[settings.strategy](index, queries, settings).positions.unique().tolist() == [len(samples) - 1]
