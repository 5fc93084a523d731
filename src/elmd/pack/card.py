"""The model card of a pack: metadata that the hub reads, and the text of `model_card.md`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from elmd.engine.files import read_json
from elmd.evaluation.score_tables import GROUPS, group_table, with_floors
from elmd.models import ADAPTER, PROJECTOR
from elmd.pack.folder import INDEX, PROMPT, RETRIEVER, TEXTS
from elmd.pack.trained import Trained

TEMPLATE = Path(__file__).with_name("model_card.md")

#: Scores that go into the card's front matter: kind of metric at the hub, by group and name.
METRICS = {
    "paper": {"bleu2_char": "bleu", "bleu4_char": "bleu", "meteor_char": "meteor", "rouge1_char": "rouge",
              "rougeL_char": "rouge"},
    "emotion": {"accuracy": "accuracy", "weighted_f1": "f1"},
}  # fmt: skip


def model_card(trained: Trained, facts: Mapping[str, Any], *, license: str | None, language: str) -> ModelCard:
    """The card of a pack.

    Args:
        facts: the content of `elmd.json`.
        license, language: as in `elmd.pack.packing.export`.
    """
    config, scores, data = trained.config, trained.scores, one_line(str(trained.config["data"]["name"]))
    sees_video, with_emotion = config["vision"]["kind"] != "none", config["eerg"]["with_emotion"]
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
    prepared = trained.manifest("samples")["counts"]["samples"]
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
    llm, files = facts["llm"], facts["files"]

    def elsewhere(base: Mapping[str, Any]) -> str:
        return f"{base['model']}; not packed{', fingerprint ' + base['fingerprint'] if base['fingerprint'] else ''}"

    shape = llm["shape"]
    about = f"{shape['model_type']}, {shape['layers']} layers of width {shape['hidden_size']}, "
    yield "language model", elsewhere(llm), f"{about}vocabulary {shape['vocabulary']}; frozen"
    kind = config["eerg"]["adapter"]
    yield "adapter", f"{ADAPTER}/" if kind != "none" else "none", kind
    vision = config["vision"]
    if facts["vision"]:
        sampling = f"{vision['frames']} frames, {vision['sampling']}"
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
    audit = read_json(trained.artifact("samples") / "audit.json")
    for pair, shared in audit["shared_dialogues"].items():
        yield f"dialogues in both of {pair}: {shared['dialogues']}"
    for split, count in audit["responses_in_train"].items():
        yield f"responses of {split} that are word for word a training response: {count['exact']} of {count['samples']}"


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
    notes = [f"The trained weights: {_plain(license)}." if license else "No license was given for the trained weights."]
    if facts["index"]:
        notes.append("The texts in `index/` are under the license of the data set.")
    notes.append("The language model and the vision encoder have licenses of their own, which bind their users.")
    return " ".join(notes)


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
        "deviations": any("sd" in system for system in systems.values()),
    }


def one_line(text: str) -> str:
    """A user's text on one line."""
    return " ".join(text.split())


def _plain(text: str) -> str:
    """A user's text as Markdown that shows exactly it."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(one_line(text), quote=False))
