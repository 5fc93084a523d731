"""`python -m elmd.evaluate …`: generate with a trained model and score it; or score any predictions file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmd.cli import command, experiment_folder, job_about
from elmd.config import Config, StageName
from elmd.engine.keys import plain
from elmd.errors import ConfigError
from elmd.log import logger, table

if TYPE_CHECKING:
    from accelerate import Accelerator


def evaluate(cfg: Config, accelerator: Accelerator) -> None:
    if cfg.predictions is not None:
        if accelerator.is_main_process:
            score_file(Path(cfg.predictions), Path(cfg.runs_dir) / "experiments")
        return

    if cfg.stage is not StageName.all:
        raise ConfigError("has no stages", where="elmd.evaluate", fix="leave stage= out; python -m elmd.train has them")

    from elmd.data.samples import load_samples
    from elmd.evaluation.jobs import PREDICTIONS
    from elmd.evaluation.predictions import read_predictions
    from elmd.evaluation.systems import system_name
    from elmd.stages import chain_of

    chain = chain_of(cfg, accelerator)
    made = chain.run("generate")
    folder = experiment_folder(cfg)
    chain.point(folder, **job_about(cfg))
    if not accelerator.is_main_process:
        return
    samples = load_samples(chain.folder("prepare") / "samples.jsonl")
    responses = [sample.response.text for sample in samples if sample.split == "train"]
    name = system_name(plain(cfg))
    stages = {
        stage: chain.manifest(stage)["metrics"] for stage in chain.order("generate") if stage in ("erm", "index", "rep")
    }
    about = {
        "experiment": cfg.experiment_name,
        "system": name,
        "baseline": cfg.baseline.name.value,
        "ablation": cfg.ablation_name,
        "seed": cfg.seed,
        "split": cfg.generate.split.value,
        "predictions": str((made / PREDICTIONS).resolve().relative_to(Path(cfg.runs_dir).resolve())),
        "stages": stages,
    }
    link = folder / PREDICTIONS
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(made / PREDICTIONS, folder))
    predictions = read_predictions(made / PREDICTIONS)
    write_scores({name: predictions}, responses, folder, about)
    table(
        f"The first of them; all are in {link}",
        ["utterance", "demonstration", f"reply by {name}", "emotion", "gold reply", "emotion"],
        [
            (
                str(p.extra["prompt"]["utterance"]).strip(),
                p.demonstration,
                p.hypothesis,
                p.predicted_emotion,
                p.reference,
                p.gold_emotion,
            )
            for p in predictions[:5]
        ],
    )
    print(f"artifact: {folder}", flush=True)


def score_file(path: Path, folder: Path) -> None:
    """Score one predictions file into a folder of its name; the floors that need a training split are left out."""
    from elmd.evaluation.predictions import read_predictions

    write_scores({path.stem: read_predictions(path)}, None, folder / path.stem, {"predictions": path.name})
    print(f"artifact: {folder / path.stem}", flush=True)


def write_scores(systems: dict[str, Any], responses: list[str] | None, folder: Path, about: dict[str, Any]) -> None:
    """Score, write `scores.json` and the tables into `folder`, and show the first of them."""
    from elmd.engine.files import write_json
    from elmd.evaluation.score import score_all
    from elmd.evaluation.score_tables import group_table, score_document, with_floors

    logger.info("scoring %s", ", ".join(systems))
    scores = {**about, **score_all(systems, responses)}
    write_json(folder / "scores.json", scores)
    rows = with_floors(scores)
    written = score_document(rows, title=f"Scores of {folder.name}", notes=NOTES).write(folder, "scores")
    for group in ("paper", "emotion"):
        columns, cells = group_table(rows, group)
        if columns:
            table(f"{group} ({scores['n']} samples)", columns, cells)
    logger.info("written: %s", ", ".join(str(path) for path in (folder / "scores.json", *written)))


NOTES = (
    "The `paper` protocol is inferred: corpus character BLEU fits Table 2 of the paper best of the conventions tried; "
    "the paper does not say how it tokenises.",
    "Floors need no model: a random training response, the most common one, and the retrieved r' itself.",
)

main = command("evaluate", evaluate)

if __name__ == "__main__":
    main()
