"""Read the runs of experiment=demo_claims and write what they say of the claims on the tiny world: claims.md.

    python scripts/demo_claims.py runs/experiments/demo_claims

Nothing is trained here: numbers come from the artifacts' manifests and predictions. A run that is missing is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elmd.cli import guard
from elmd.engine.files import read_json, write_text
from elmd.engine.store import read_manifest
from elmd.errors import ArtifactError
from elmd.evaluation.comparison import compare_systems
from elmd.evaluation.comparison_tables import LEGEND, score_text
from elmd.evaluation.jobs import JobFolder
from elmd.evaluation.runs import read_experiment
from elmd.evaluation.significance import over_seeds
from elmd.evaluation.systems import FULL
from elmd.evaluation.tables import NONE, Table, bullets, p_text

#: What Table 3 reports, and the emotion of the reply beside it.
METRICS = (("paper", "bleu4_char"), ("paper", "meteor_char"), ("paper", "rougeL_char"), ("emotion", "accuracy"))


Jobs = Mapping[tuple[str, bool, int], JobFolder]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="runs/experiments/demo_claims")
    folder: Path = parser.parse_args().folder
    read = [JobFolder.read(path) for path in sorted(folder.glob("*/artifacts.json"))]
    jobs = {(job.config["ablation_name"], job.config["vision"]["shuffle"], job.seed): job for job in read}
    if not jobs:
        raise ArtifactError("holds no runs", where=folder, fix="run make claims")
    seeds = sorted({seed for _, _, seed in jobs})
    text = "\n\n".join([erm(jobs, seeds), rep(jobs, seeds), ablations(folder)]) + "\n"
    write_text(folder / "claims.md", text)
    print(text)
    print(f"written: {folder / 'claims.md'}", file=sys.stderr)


def artifact(jobs: Jobs, ablation: str, seed: int, stage: str, *, shuffle: bool = False) -> Path:
    """The folder of a finished stage.

    Raises:
        ArtifactError: it has not been run.
    """
    job = jobs.get((ablation, shuffle, seed))
    if job is None or stage not in job.artifacts:
        raise ArtifactError(
            f"there is no finished {stage} of ablation={ablation} seed={seed} vision.shuffle={str(shuffle).lower()}",
            fix="run make claims again; it resumes where it stopped",
        )
    return job.artifacts[stage]


def points(values: Sequence[float]) -> str:
    """Mean of fractions over seeds in percent, with the 95 % t interval of the mean."""
    spread = over_seeds([100 * value for value in values])
    return f"{spread.mean:.1f}" if spread.low is None else f"{spread.mean:.1f} [{spread.low:.1f}, {spread.high:.1f}]"


def erm(jobs: Jobs, seeds: Sequence[int]) -> str:
    """Emotion-match@1 on test utterances whose text shows the emotion, for both keys, and w/o ERT, w/o SSC."""
    values: dict[tuple[str, str], list[float]] = {}
    for ablation in ("none", "no_ert", "no_ssc"):
        for seed in seeds:
            metrics = read_manifest(artifact(jobs, ablation, seed, "erm"))["metrics"]
            for key, score in metrics["emotion_match"]["test"]["text_shows"].items():
                values.setdefault((ablation, key), []).append(score["match@1"])
    raw = values["none", "raw e_u"]
    rows = []
    for (ablation, key), scores in values.items():
        if key.startswith("raw ") and (ablation, key) != ("none", "raw e_u"):
            continue
        gain = [a - b for a, b in zip(scores, raw, strict=True)]
        name = {"none": "ERM", "no_ert": "w/o ERT", "no_ssc": "w/o SSC"}[ablation]
        first = "raw encoder" if key == "raw e_u" else f"{name}, {key}"
        rows.append([first, points(scores), NONE if key == "raw e_u" else points(gain)])
    title = f"ERM: emotion-match@1 in percent, test utterances whose text shows the emotion ({len(seeds)} seeds)"
    return Table(["key", "match@1", "gain over raw, points"], rows, title, level=3).markdown


def rep(jobs: Jobs, seeds: Sequence[int]) -> str:
    """Accuracy of response emotion on test samples whose text hides the emotion: true against permuted clips."""
    true = [artifact(jobs, "none", seed, "rep") for seed in seeds]
    mixed = [artifact(jobs, "none", seed, "rep", shuffle=True) for seed in seeds]

    def tag(rep: Path, kind: str) -> dict[str, Any]:
        return read_json(rep / "rep.json")[f"test/{kind}"]["tags"]["text_hides"]

    world = read_json(artifact(jobs, "none", seeds[0], "bootstrap/world") / "world.json")
    a, b = ([tag(folder, "projector")["accuracy"] for folder in group] for group in (true, mixed))
    n = tag(true[0], "projector")["n"]
    rows = [
        ["true clips", points(a)],
        ["clips permuted among samples", points(b)],
        ["difference", points([x - y for x, y in zip(a, b, strict=True)])],
        ["text only (no video slots)", points([tag(folder, "text_only")["accuracy"] for folder in true])],
        ["majority class", points([tag(true[0], "projector")["majority"]])],
        ["ceiling, by the generator", points([world["reply_emotion"]["ceiling"]])],
    ]
    title = f"REP: accuracy in percent on {n} test samples whose text hides the emotion ({len(seeds)} seeds)"
    return Table(["", "accuracy"], rows, title, level=3).markdown


def ablations(folder: Path) -> str:
    """The full model against its ablations: means over training seeds, and paired tests with Holm's correction."""
    comparison = compare_systems(read_experiment(folder), FULL, ["paper"])
    rows = []
    for row in comparison.rows:
        cells = []
        for group, metric in METRICS:
            score = row.cells.get(group, {}).get(metric)
            cells.append(NONE if score is None else score_text(score, group, metric))
            if score is not None and score.p_holm is not None:
                cells[-1] += f" (p {p_text(score.p_holm)}; seeds {p_text(score.p_seeds)})"
        rows.append([row.name, *cells])
    title = "Full model, ablations and floors: mean ± sd over training seeds; p against the full model, after Holm"
    table = Table(["", *(metric for _, metric in METRICS)], rows, title, level=3)
    return f"{table.markdown}\n\n{bullets([*comparison.warnings, *LEGEND])}"


if __name__ == "__main__":
    guard(main)
