"""Experiments' folders as `elmd.evaluate` leaves them, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tiny import make_samples
from elmd.data.samples import save_samples
from elmd.evaluation.predictions import Prediction, write_predictions
from elmd.labels import Emotion

EMOTIONS = list(Emotion)
#: As `the roles of elmd.stages.STAGES`; written out, because reading a run must not depend on the code that made it.
ROLES = {
    "samples": "prepare", "retriever": "erm", "demonstrations": "index", "features": "features", "projector": "rep",
    "generator": "eerg", "replies": "generate",
}  # fmt: skip


def config(name: str = "demo", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A resolved configuration with the keys that matter; changes as `erm__slots=2`."""
    values: dict[str, Any] = {
        "seed": seed, "experiment_name": name, "job": None, "threads": 0, "runs_dir": "runs",
        "data": {"name": "tiny", "reader": "tiny", "path": None, "split": "official"},
        "llm": {"name": "tiny", "path": "bootstrap"}, "vision": {"name": "tiny", "kind": "encoder", "frames": 4},
        "retriever": {"name": "tiny", "k": 1, "key": "E_s"}, "erm": {"slots": 4, "emotion_weight": 1.0},
        "eerg": {"micro_tokens": 4096}, "prompt": {"instruction": "你在扮演电视剧中的人物。"},
        "baseline": {"name": "none"}, "generate": {"split": "test"}, "ablation_name": "none",
        "paper_dataset": "M3ED",
    }  # fmt: skip
    for key, value in changes.items():
        group, _, rest = key.partition("__")
        if rest:
            values[group][rest] = value
        else:
            values[group] = value
    return values


def predictions(hypotheses: Sequence[str], references: Sequence[str], *, right: int | None = None) -> list[Prediction]:
    """One decoding; the first `right` emotions named are right, the rest wrong; None: none is named."""
    return [
        Prediction(
            f"d{i}#1", hypothesis, reference, demonstration="好的。", gold_emotion=EMOTIONS[i % 7], seed=0,
            predicted_emotion=None if right is None else EMOTIONS[(i + (i >= right)) % 7],
        )
        for i, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True))
    ]  # fmt: skip


def job(
    folder: Path,
    config: Mapping[str, Any],
    predicted: Sequence[Prediction] | None,
    stages: Mapping[str, Mapping[str, Any]] = {},
    axes: Mapping[str, Any] | None = None,
) -> Path:
    """A job's folder with its artifacts beside the experiment's; without predictions where `predicted` is None.

    Args:
        axes: what the sweep sets for this job, beside the seed; None: no sweep's job.
    """
    runs = folder.parent.parent.parent
    artifacts = {}
    for stage, manifest in {"prepare": {"stage": "prepare"}, **stages}.items():
        artifact = runs / stage / "abc"
        artifact.mkdir(parents=True, exist_ok=True)
        (artifact / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        artifacts[stage] = f"../../../{stage}/abc"
    save_samples(runs / "prepare" / "abc" / "samples.jsonl", make_samples(12))
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "config": config, "artifacts": artifacts, "roles": ROLES, "job": None if axes is None else folder.name,
        "axes": None if axes is None else {"seed": config["seed"], **axes},
    }  # fmt: skip
    (folder / "artifacts.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    if predicted is not None:
        write_predictions(folder / "predictions.jsonl", predicted)
    return folder
