"""A made-up experiment on disk, and raters who fill in its pages by the key: for the tests of human evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elmd.data.samples import save_samples
from elmd.engine.files import write_json
from elmd.evaluation.predictions import Prediction, write_predictions
from elmd.human.ratings import checksum
from elmd.human.study import FORMAT
from elmd.labels import Emotion
from elmd.types import Clip, Sample, Utterance

#: What a run's configuration must hold to be named.
CONFIGS = {
    "ELMD": {"baseline": {"name": "none"}, "ablation_name": "none", "vision": {"kind": "encoder"}},
    "DialoGPT": {"baseline": {"name": "dialogpt"}, "ablation_name": "none"},
}


def make_samples(count: int = 8, clip: Path | None = None) -> list[Sample]:
    """Test samples with two turns before the response; every text is its own. The first has the clip."""
    samples = []
    for i in range(count):
        turns = [
            Utterance(f"d{i}_{j}", ("小明", "Zoé")[j % 2], text, Emotion.NEUTRAL)
            for j, text in enumerate((f"你好{i}。", f"Where is number {i}?", f"在这里，第{i}个。"))
        ]
        if clip and i == 0:
            turns[1] = Utterance("d0_1", "Zoé", turns[1].text, Emotion.NEUTRAL, Clip(str(clip)))
        samples.append(
            Sample(f"secret-dialogue-{i}#2", f"secret-dialogue-{i}", "show", "test", (turns[0],), turns[1], turns[2],
                   background="他们在找东西。" if i % 2 else None)
        )  # fmt: skip
    return samples


def reply(system: str, sample: Sample) -> str:
    """A made-up response that differs by system and sample and names neither."""
    return f"{'甲乙丙丁'[sum(map(ord, system)) % 4]}说了{sample.id[16:-2]}次。" + "嗯" * len(system)


def make_experiment(
    folder: Path,
    samples: Sequence[Sample],
    *,
    seeds: Sequence[int] = (0,),
    systems: Sequence[str] = tuple(CONFIGS),
    text: Callable[[str, Sample], str] = reply,
    data: str = "m3ed",
) -> Path:
    """`experiments/made/<job>/` with predictions of two decode seeds (the second says "other"), and `prepare/1/`."""
    prepare = folder / "prepare" / "1"
    prepare.mkdir(parents=True)
    save_samples(prepare / "samples.jsonl", samples)
    write_json(prepare / "manifest.json", {})
    experiment = folder / "experiments" / "made"
    about = {"experiment_name": "made", "data": {"name": data}, "paper_dataset": "M3ED"}
    for system in systems:
        for seed in seeds:
            job = experiment / f"{system.lower()}-{seed}"
            write_json(
                job / "artifacts.json",
                {
                    "config": {**CONFIGS[system], **about, "seed": seed},
                    "artifacts": {"prepare": "../../../prepare/1"},
                    "roles": {"samples": "prepare"},
                    "job": f"{system.lower()}-{seed}",
                    "axes": {"seed": seed},
                },
            )
            write_predictions(
                job / "predictions.jsonl",
                [
                    Prediction(s.id, text(system, s) if decode == 3 else "other", s.response.text, seed=decode)
                    for decode in (4, 3)
                    for s in samples
                ],
            )
    return experiment


def rate(key: dict[str, Any], rater: int, score: Callable[[list[str], str, str], int], path: Path) -> Path:
    """The file of a rater who gives score(systems, sample, metric) to every response."""
    scores = {
        id_: {metric: score(names, item["sample"], metric) for metric in ("R1", "R2")}
        for item in key["raters"][str(rater)]
        for id_, names in item["responses"].items()
    }
    return write_ratings(path, key["study"], rater, scores)


def write_ratings(path: Path, study: str, rater: int, scores: Any, **other: Any) -> Path:
    content = {"format": FORMAT, "study": study, "rater": rater, "ratings": scores}
    content["checksum"] = checksum(study, rater, scores) if "checksum" not in other else None
    path.write_text(json.dumps(content | other), encoding="utf-8")
    return path
