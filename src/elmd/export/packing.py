"""A job's folder as a pack with a model card.

What a pack is stands in `elmd.pack`, which loads it; how to share one in docs/sharing_a_model.md.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from elmd.config import BOOTSTRAP, BaselineName
from elmd.data.prompts import Prompt
from elmd.data.samples import load_samples, save_samples
from elmd.errors import ArtifactError, CheckpointError, ConfigError, ElmdError
from elmd.evaluation.tables import GROUPS, group_table, with_floors
from elmd.hub import is_hub_id
from elmd.log import logger
from elmd.models.elmd import ADAPTER, PROJECTOR
from elmd.models.llm import open_llm
from elmd.pack import (
    CARD,
    CHOICES,
    ENDINGS,
    FACTS,
    FORMAT,
    INDEX,
    PROMPT,
    RETRIEVER,
    TEXTS,
    VISION_PARTS,
    file_facts,
    fingerprint,
    packed_files,
    read_facts,
    shape_of,
)
from elmd.retrieval.index import Index
from elmd.training.artifacts import read_manifest, replace_folder, write_json
from elmd.types import Sample

TEMPLATE = Path(__file__).with_name("model_card.md")

#: Scores that go into the card's front matter: kind of metric at the hub, by group and name.
METRICS = {
    "paper": {"bleu2_char": "bleu", "bleu4_char": "bleu", "meteor_char": "meteor", "rouge1_char": "rouge",
              "rougeL_char": "rouge"},
    "emotion": {"accuracy": "accuracy", "weighted_f1": "f1"},
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A job's folder, read.

    Attributes:
        config: its resolved configuration.
        stages: finished artifact folder by stage.
        scores: the content of scores.json where it is of this very run, else None.
    """

    folder: Path
    config: dict[str, Any]
    stages: dict[str, Path]
    scores: dict[str, Any] | None

    def manifest(self, stage: str) -> dict[str, Any]:
        return read_manifest(self.need(stage))

    def need(self, stage: str) -> Path:
        """
        Raises:
            ArtifactError: the stage is not finished.
        """
        folder = self.stages.get(stage)
        if folder is None or not folder.is_dir():
            raise ArtifactError(
                f"stage {stage} of this run is not finished",
                where=self.folder,
                fix="run python -m elmd.train with the same choices",
            )
        return folder

    def checkpoint(self, role: str) -> Path:
        """Where the language model or vision encoder lies that the run used."""
        path = self.config[role]["path"]
        return self.need(f"bootstrap/{role}") if path == BOOTSTRAP else Path(path)


def export(
    job: Path,
    out: Path,
    name: str | None = None,
    license: str | None = None,
    language: str | None = None,
    with_index: bool = True,
) -> Path:
    """Write the pack `out`, whole or not at all.

    An `out` that exists is replaced where it is empty or holds an earlier export and nothing else.

    Args:
        job: `runs/experiments/<name>[/<job>]` with `artifacts.json`.
        name: title of the card; None: from the experiment's name.
        license: of what was trained, as the hub names licenses; None: that of the earlier export, or `unknown`.
        language: ISO code of the dialogues' language; None: that of the earlier export, or `zh`.
        with_index: pack the training texts that demonstrations are drawn from.

    Raises:
        ArtifactError: the job is not finished, or `out` holds something else.
        ConfigError: the job trained no adapter or projector of a language model, or is a control.
        CheckpointError: what it trained, or the base models it used, cannot be read.
    """
    trained = read_job(job)
    earlier = _check_free(out)
    given = {"license": license, "language": language}
    kept = {key: str(earlier[key]) for key, value in given.items() if not value and earlier.get(key)}
    license, language = _line(license or kept.get("license", "")) or None, _line(language or kept.get("language", "zh"))
    title = _line(name) if name else f"elmd-{_line(str(trained.config['experiment_name']))}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:100]}-") as unfinished:
        folder = Path(unfinished) / "pack"
        folder.mkdir()
        indexed = pack_files(trained, folder, with_index)
        facts = pack_facts(trained, folder, title, indexed) | {"license": license, "language": language}
        write_json(folder / FACTS, facts)
        card = model_card(trained, facts, license=license, language=language)
        card.save(folder / CARD)
        replace_folder(folder, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    logger.info("%s: %.1f MB in %d files", out, size / 1e6, len(facts["files"]) + 2)
    if kept:
        told = ", ".join(f"{key} {value}" for key, value in kept.items())
        logger.info("%s: kept from the earlier export: %s", out, told)
    if indexed:
        logger.warning(
            "%s holds the texts of the training samples, which stay under the license of the data set; "
            "--no-index leaves them out",
            out / INDEX,
        )
    return out


# --- what was trained ----------------------------------------------------------------------------------------------


def read_job(folder: Path) -> Trained:
    """A finished job that can be packed.

    Raises:
        ArtifactError, ConfigError: see `export`.
    """
    path = folder / "artifacts.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        config, places = found["config"], found["artifacts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if jobs := sorted(inside.parent for inside in folder.glob("*/artifacts.json")):
            raise ArtifactError(
                f"is a sweep of {len(jobs)} jobs", where=folder, fix=f"name one of them, such as {jobs[0]}"
            ) from error
        raise ArtifactError(
            "is no folder of a run (artifacts.json is missing or damaged)",
            where=folder,
            fix="give runs/experiments/NAME of a finished run",
        ) from error
    baseline = BaselineName(config.get("baseline", {}).get("name", BaselineName.none))
    if baseline.own_model:
        raise ConfigError(
            f"{baseline} is a network of its own and no adapter of a language model",
            where=folder,
            fix="export a run of ELMD, or of baseline=visualglm",
        )
    if config["vision"].get("shuffle"):
        raise ConfigError(
            "was trained with clips permuted among samples, which is a control and no model to use",
            where=folder,
            fix="export a run with vision.shuffle=false",
        )
    trained = Trained(folder, config, {stage: folder / place for stage, place in places.items()}, None)
    return replace(trained, scores=_scores(trained))


def _scores(trained: Trained) -> dict[str, Any] | None:
    """The run's scores; those of an earlier configuration may still lie in its folder."""
    path, generated = trained.folder / "scores.json", trained.stages.get("generate")
    if not path.is_file():
        logger.warning("%s: not scored yet, so the card has no scores (python -m elmd.evaluate)", trained.folder)
        return None
    scores = json.loads(path.read_text(encoding="utf-8"))
    if generated is None or Path(scores.get("predictions", "")).parent.name != generated.name:
        logger.warning("%s is not of this training, so the card has no scores (python -m elmd.evaluate)", path)
        return None
    return scores


def pack_files(trained: Trained, folder: Path, with_index: bool) -> bool:
    """Copy what was trained into `folder`; returns whether the index is among it."""
    eerg = trained.need("eerg")
    trained.manifest("eerg")  # finished
    Prompt.load(eerg / PROMPT)
    for name in (PROMPT, PROJECTOR):
        if (eerg / name).is_file():
            shutil.copyfile(eerg / name, folder / name)
    if (eerg / ADAPTER).is_dir():
        _copy_adapter(eerg / ADAPTER, folder / ADAPTER)
    if not (folder / ADAPTER).exists() and not (folder / PROJECTOR).exists():
        raise CheckpointError("holds neither a projector nor an adapter", where=eerg, fix="train it again (stage=eerg)")
    chosen = trained.config["retriever"]
    if chosen["k"] == 0:
        return False
    _copy_tree(trained.need("erm") / "model", folder / RETRIEVER)
    if not with_index:
        return False
    index, key = Index.load(trained.need("index")), chosen["key"]
    Index(index.ids, index.dialogues, {key: index.vectors[key]}).save(folder / INDEX)
    samples = {sample.id: sample for sample in load_samples(trained.need("prepare") / "samples.jsonl")}
    save_samples(folder / TEXTS, [_bare(samples[id]) for id in index.ids])
    return True


def _bare(sample: Sample) -> Sample:
    """An indexed sample with what a demonstration takes of it, and without names and paths."""
    u, r = (
        replace(turn, speaker="", clip=None, features=None, tags=()) for turn in (sample.utterance, sample.response)
    )
    return replace(sample, history=(), background=None, utterance=u, response=r)


def _copy_adapter(source: Path, target: Path) -> None:
    target.mkdir()
    shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
    settings = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = None  # a path of this machine; elmd.json names the model
    write_json(target / "adapter_config.json", settings)


def _copy_tree(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if not path.is_file() or path.name.startswith(".") or path.suffix == ".md":
            continue
        if path.suffix not in ENDINGS:
            raise CheckpointError(
                f"a pack holds no {path.suffix or 'such'} files", where=path, fix="train the retriever from safetensors"
            )
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def pack_facts(trained: Trained, folder: Path, title: str, indexed: bool) -> dict[str, Any]:
    """The content of `elmd.json`."""
    config, manifest = trained.config, trained.manifest("eerg")
    llm = str(trained.checkpoint("llm"))
    shape = shape_of(*open_llm(llm))
    vision = None
    if config["vision"]["kind"] == "encoder":
        path = str(trained.checkpoint("vision"))
        vision = _base(trained, "vision") | {"fingerprint": fingerprint(path, VISION_PARTS)}
    return {
        "format": FORMAT,
        "name": title,
        # Keys that are younger than the run are left to their defaults, which is what it did.
        "config": {
            group: {key: config[group][key] for key in keys if key in config[group]} for group, keys in CHOICES.items()
        },
        "llm": _base(trained, "llm") | {"fingerprint": fingerprint(llm), "shape": shape},
        "vision": vision,
        "index": indexed,
        "experiment": config["experiment_name"],
        "ablation": config["ablation_name"],
        "baseline": config.get("baseline", {}).get("name", "none"),
        "seed": manifest["seed"],
        "commit": manifest["git"],
        "versions": manifest["versions"],
        "artifacts": {stage: path.name for stage, path in sorted(trained.stages.items())},
        "files": {name: file_facts(folder / name) for name in packed_files(folder)},
    }


def _base(trained: Trained, role: str) -> dict[str, Any]:
    """How others can find a base model: its hub id, or else what this project calls it and its folder's name.

    `artifact` is the place below the run's own runs/ of a stand-in that stage `bootstrap` made, else None.
    """
    chosen, path = trained.config[role], trained.checkpoint(role)
    artifact = f"bootstrap/{role}/{path.resolve().name}" if chosen["path"] == BOOTSTRAP else None
    hub = artifact is None and is_hub_id(str(path))
    model = str(path) if hub else f"{chosen['name']} ({artifact or path.resolve().name})"
    return {"model": model, "hub": hub, "artifact": artifact}


def _check_free(out: Path) -> dict[str, Any]:
    """The facts of the earlier export that will be replaced; empty where there is none.

    Raises:
        ArtifactError: the folder holds more than an earlier export.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    fix = "choose a new folder for --out"
    try:
        facts = read_facts(out)
    except ElmdError as error:
        raise ArtifactError("exists and is no earlier export", where=out, fix=fix) from error
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if more := sorted(found - {*facts["files"], FACTS, CARD}):
        raise ArtifactError(f"also holds {more[0]}, which is no part of an export", where=out, fix=fix)
    return facts


# --- the card ------------------------------------------------------------------------------------------------------


def model_card(trained: Trained, facts: Mapping[str, Any], *, license: str | None, language: str) -> ModelCard:
    """The card: metadata that the hub reads, and the text of `model_card.md`."""
    config, scores, data = trained.config, trained.scores, _line(str(trained.config["data"]["name"]))
    sees_video, with_emotion = config["vision"]["kind"] != "none", config["eerg"].get("with_emotion", True)
    bases = [facts["llm"], *([facts["vision"]] if facts["vision"] else [])]
    results = list(_results(scores, data)) if scores else []
    metadata = ModelCardData(
        language=language,
        license=license or "unknown",
        library_name="elmd",
        base_model=[base["model"] for base in bases if base["hub"]] or None,
        base_model_relation="adapter" if facts["llm"]["hub"] else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=facts["name"] if results else None,  # the name that the results are under
        eval_results=results or None,
        pipeline_tag="video-text-to-text" if sees_video else "text-generation",
        tags=["elmd", "emotional-dialogue", "dialogue", *(["multimodal"] if sees_video else [])],
    )
    prepared = trained.manifest("prepare")["counts"]["samples"]
    clip = config["vision"]["kind"] == "encoder"
    loading = "" if facts["llm"]["hub"] else ', llm="path/or/hub-id/of/the/language-model"'
    if clip and not facts["vision"]["hub"]:
        loading += ', vision="path/or/hub-id/of/the/vision-encoder"'
    git = facts["commit"]
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=_plain(facts["name"]),
        run=_plain(f"{config['experiment_name']}, ablation {config['ablation_name']}"),
        data=_plain(data),
        sees_video=sees_video,
        with_emotion=with_emotion,
        parts=[[_plain(cell) for cell in row] for row in _parts(facts, config)],
        loading=loading,
        clip_argument=', clip="u.mp4"' if clip else "",
        split=config["data"]["split"],
        filters=_plain(", ".join(config["data"]["filters"])),
        samples=prepared,
        leaks=list(_leaks(trained)),
        index_note=_index_note(facts, config),
        seed=facts["seed"],
        stages=", ".join(f"{stage} `{name}`" for stage, name in facts["artifacts"].items()),
        decoding=config["generate"],
        commit=f"{git['commit'][:12]}{' with local changes' if git['dirty'] else ''}" if git else "not known",
        versions=", ".join(f"{library} {number}" for library, number in facts["versions"].items()),
        scores=_card_scores(scores) if scores else None,
        license_note=_license_note(license, facts),
    )


def _parts(facts: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the model is made of: part, where it is, and a word about it."""
    known, files = facts["llm"], facts["files"]

    def elsewhere(base: Mapping[str, Any]) -> str:
        return f"{base['model']}; not packed{', fingerprint ' + base['fingerprint'] if base['fingerprint'] else ''}"

    shape = known["shape"]
    about = f"{shape['model_type']}, {shape['layers']} layers of width {shape['hidden_size']}, "
    yield "language model", elsewhere(known), f"{about}vocabulary {shape['vocabulary']}; frozen"
    kind = config["eerg"].get("adapter", "prefix")
    yield "adapter", f"{ADAPTER}/" if kind != "none" else "none", kind
    vision = config["vision"]
    if facts["vision"]:
        sampling = f"{vision['frames']} frames, {vision.get('sampling', 'uniform')}"
        yield "vision encoder", elsewhere(facts["vision"]), f"{sampling}; frozen"
    elif vision["kind"] == "precomputed":
        yield "vision encoder", "none", "visual features are read from arrays"
    yield "projector", PROJECTOR if PROJECTOR in files else "none", "eq. 9" if PROJECTOR in files else "no video"
    chosen = config["retriever"]
    if chosen["k"]:
        about = f"{chosen['k']} in the prompt, by cosine of {chosen['key']}"
        yield "retriever", f"{RETRIEVER}/", about
        yield "index", f"{INDEX}/" if facts["index"] else "left out", "the training texts that demonstrations are from"
    yield "prompt", PROMPT, "as in training"


def _leaks(trained: Trained) -> Iterator[str]:
    audit = json.loads((trained.need("prepare") / "audit.json").read_text(encoding="utf-8"))
    for pair, shared in audit["shared_dialogues"].items():
        yield f"dialogues in both of {pair}: {shared['dialogues']}"
    for split, found in audit["responses_in_train"].items():
        yield f"responses of {split} that are word for word a training response: {found['exact']} of {found['samples']}"


def _index_note(facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if facts["index"]:
        return (
            f"**This folder holds data.** `{TEXTS}` has the utterance and the response of every training sample, with "
            "emotion labels and ids, because prompts show retrieved training responses. These texts stay under the "
            "license of the data set; do not publish the folder where that forbids it. Names, histories, backgrounds "
            "and clips are not in it."
        )
    if config["retriever"]["k"]:
        return (
            "The training texts were left out of this folder, so prompts have no demonstration, unlike those of "
            "training and of the scores below: expect lower scores."
        )
    return "This model was trained without demonstrations, and the folder holds no text of the data set."


def _license_note(license: str | None, facts: Mapping[str, Any]) -> str:
    told = [f"The trained weights: {_plain(license)}." if license else "No license was given for the trained weights."]
    if facts["index"]:
        told.append("The texts in `index/` are under the license of the data set.")
    told.append("The language model and the vision encoder have licenses of their own, which bind their users.")
    return " ".join(told)


def _results(scores: Mapping[str, Any], data: str) -> Iterator[EvalResult]:
    system = next(iter(scores["systems"].values()))
    for group, names in METRICS.items():
        for name, kind in names.items():
            if (value := system.get(group, {}).get(name)) is not None:
                yield EvalResult(
                    task_type="text-generation",
                    task_name="Emotional dialogue",
                    dataset_type=data,
                    dataset_name=data,
                    dataset_split=scores["split"],
                    metric_type=kind,
                    metric_name=f"{name} ({'emotion of the response' if group == 'emotion' else f'{group} protocol'})",
                    metric_value=round(value, 4),
                )


def _card_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Score tables with a metric per row, as cards are read on narrow screens."""
    systems, groups = with_floors(scores), []
    for group in METRICS:
        columns, rows = group_table(systems, group)
        if not columns:
            continue
        lines = []
        for place, name in enumerate(columns[2:], start=2):
            cells = [f"`{name}`"]
            for row in rows:
                interval = systems[row[0]].get("intervals", {}).get(group, {}).get(name)
                digits = 2 if group == "paper" else 4
                limits = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
                cells.append(row[place] + limits)
            lines.append(cells)
        groups.append({"heading": GROUPS[group], "columns": ["", *(_plain(row[0]) for row in rows)], "rows": lines})
    return {
        "n": scores["n"],
        "split": scores["split"],
        "groups": groups,
        "deviations": any("sd" in one for one in systems.values()),
    }


def _line(text: str) -> str:
    """A user's text on one line."""
    return " ".join(text.split())


def _plain(text: str) -> str:
    """A user's text as Markdown that shows exactly it."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(_line(text), quote=False))
