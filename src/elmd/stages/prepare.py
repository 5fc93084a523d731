"""Stage `prepare`: raw data set -> samples.jsonl (§3.1, §4.1) and audit.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elmd.config import Config, SplitRule
from elmd.data.audit import audit
from elmd.data.readers import dataset
from elmd.data.readers.source import Source, load_background
from elmd.data.samples import prepare, save_samples
from elmd.engine.files import write_json
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.log import table
from elmd.types import SPLITS

SAMPLES, AUDIT = "samples.jsonl", "audit.json"


def reads(cfg: Config) -> Inputs:
    data, kind = cfg.data, dataset(cfg.data.reader)
    keys = ["data.reader", "data.path", "data.split", "data.filters", "data.on_missing_clip", "data.emotion_map"]
    keys += ["data.background", "data.video_root", "data.video_template"]
    if data.split is not SplitRule.official:
        keys.append("data.split_seed")
    files = {
        word: Path(path)
        for word, path in (("emotion_map", data.emotion_map), ("background", data.background))
        if path is not None
    }
    if kind.upstream:
        return Inputs(keys, (kind.upstream,), files)
    path = Path(data.path or "")
    media = kind.listing(path, _video_root(cfg), data.video_template)
    return Inputs(keys, (), {**kind.contents(path), **files}, {"media": media})


def run(cfg: Config, job: Job) -> Outcome:
    """Every rank reads and counts, so that all of them stop at the same error; rank 0 writes."""
    data = cfg.data
    prepared = prepare(
        read(cfg, job),
        split=data.split.value,
        seed=0 if data.split is SplitRule.official else data.split_seed,
        filters=data.filters,
        on_missing_clip=data.on_missing_clip.value,
        background=load_background(Path(data.background)) if data.background else None,
    )
    report = audit(prepared.samples)
    if job.accelerator.is_main_process:
        save_samples(job.folder / SAMPLES, prepared.samples)
        write_json(job.folder / AUDIT, report)
    show(prepared.counts, report)
    return Outcome(counts=prepared.counts)


def read(cfg: Config, job: Job) -> Source:
    """The source that the configuration names."""
    data, kind = cfg.data, dataset(cfg.data.reader)
    path = job.upstream[kind.upstream] if kind.upstream else Path(data.path or "")
    emotion_map = Path(data.emotion_map) if data.emotion_map else None
    return kind.source(path, emotion_map, _video_root(cfg), data.video_template)


def _video_root(cfg: Config) -> Path | None:
    return Path(cfg.data.video_root) if cfg.data.video_root else None


def show(counts: dict[str, Any], report: dict[str, Any]) -> None:
    """Print what was read, what became of it, and what was changed or lost on the way."""
    columns = ("dialogues", "sentences", "turns", "pairs")
    table("Data", ("", *columns), [("read", *(counts[name] for name in columns))])
    rows = []
    for split in SPLITS:
        clips, leak = report["clips"][split], report["responses_in_train"].get(split, {})
        rows.append((split, counts["samples"][split], clips["present"], leak.get("exact"), leak.get("normalised")))
    table("Samples", ("split", "samples", "with clip", "response in train", "… normalised"), rows)
    emotions = counts["emotions"]
    table(
        "Emotions of u / of r",
        ("", *SPLITS),
        [
            (
                name,
                *(
                    f"{emotions[split]['utterance'][name]:,} / {emotions[split]['response'][name]:,}"
                    for split in SPLITS
                ),
            )
            for name in emotions["train"]["utterance"]
        ],
    )
    table(
        "Filters",
        ("", "chosen", "drops alone"),
        [(name, "yes" if f["chosen"] else "no", f["drops_alone"]) for name, f in counts["filters"].items()],
    )
    lost = {**counts["dropped"], "clip missing, kept as text only": counts["text_only"]}
    if any(lost.values()):
        table("Dropped", ("cause", "samples"), [(cause, n) for cause, n in lost.items() if n])
    shared = [
        (pair, n["dialogues"], n["examples"][0]) for pair, n in report["shared_dialogues"].items() if n["dialogues"]
    ]
    if shared:
        table("Dialogues in two splits", ("splits", "dialogues", "such as"), shared)
    if counts["notes"]:
        odd = [(what, note["count"], note["example"]) for what, note in counts["notes"].items()]
        table("Warnings: odd, but usable", ("what, and what was done", "times", "first"), odd)
