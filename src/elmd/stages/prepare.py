"""Stage `prepare`: raw data set -> samples.jsonl (§3.1, §4.1) and audit.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elmd.config import Config
from elmd.data.audit import audit
from elmd.data.readers import dataset
from elmd.data.readers.source import Source, load_background
from elmd.data.samples import prepare, save_samples
from elmd.engine.files import write_json
from elmd.log import table
from elmd.stages.base import Job, Outcome
from elmd.stages.depends import WORLD
from elmd.types import SPLITS

SAMPLES, AUDIT = "samples.jsonl", "audit.json"


def run(cfg: Config, job: Job) -> Outcome:
    """Every rank reads and counts, so that all of them stop at the same error; rank 0 writes."""
    data = cfg.data
    found = prepare(
        read(cfg, job.upstream.get(WORLD)),
        split=data.split.value,
        seed=data.split_seed,
        filters=data.filters,
        on_missing_clip=data.on_missing_clip.value,
        background=load_background(Path(data.background)) if data.background else None,
    )
    report = audit(found.samples)
    if job.accelerator.is_main_process:
        save_samples(job.folder / SAMPLES, found.samples)
        write_json(job.folder / AUDIT, report)
    show(found.counts, report)
    return Outcome(counts=found.counts)


def read(cfg: Config, world: Path | None) -> Source:
    """The source that the configuration names; `world` is the folder of the tiny world, where data=tiny."""
    data, kind = cfg.data, dataset(cfg.data.reader)
    path = world if kind.upstream else Path(data.path or "")
    assert path is not None, "it is upstream of data=tiny"
    emotion_map = Path(data.emotion_map) if data.emotion_map else None
    root = Path(data.video_root) if data.video_root else None
    return kind.source(path, emotion_map, root, data.video_template)


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
