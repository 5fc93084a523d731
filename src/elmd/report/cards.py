"""Cards: the data and its leaks, the prompt, decoding, seeds, versions; the table of runs; what failed."""

from __future__ import annotations

import json
from collections import Counter, deque
from pathlib import Path
from typing import Any

from elmd.engine.files import read_json
from elmd.engine.store import MANIFEST, read_manifest
from elmd.evaluation.runs import Experiment, Run
from elmd.evaluation.tables import Cell, Table
from elmd.report.blocks import Fold, Runs, Text, Verbatim
from elmd.report.links import Links
from elmd.types import SPLITS

#: Last lines of a failed job's log that the page shows.
TAIL = 30

#: Leaks that the index counts, as shares.
LEAKS = {"gold_response": "r′ is the gold response", "own_dialogue": "r′ from the own dialogue"}

PARTS = {
    "instruction": "I, instruction",
    "background": "B, background",
    "turn": "H, a turn of the history",
    "utterance": "u, utterance",
    "video": "E_v, video slots",
    "demonstration": "R, demonstration",
    "rep": "what is asked for in REP",
    "eerg": "what is asked for in EERG",
    "reply": "what is asked for without an emotion (VisualGLM)",
    "emotion_end": "between emotion and response in the target",
}


def runs(experiment: Experiment, links: Links) -> list[Any]:
    """Every system's runs, a link to the manifest of each of their stages."""
    rows: list[tuple[str, str, str, list[Cell]]] = []
    for system, of_system in experiment.systems.items():
        for i, run in enumerate(of_system):
            made = [Cell(stage, links.to(folder / MANIFEST), folder.name) for stage, folder in run.artifacts.items()]
            seed = "–" if run.seed is None else str(run.seed)
            rows.append(
                (links.anchor(system) if i == 0 else "", system, seed, [*made, Cell("predictions", links.to(run.path))])
            )
    return [Runs(rows)]


def data(experiment: Experiment, main: Run, links: Links) -> list[Any]:
    """What data there is, what became of it, and what test can know from train."""
    folder = main.artifact("samples")
    if folder is None:
        return []
    manifest, config = read_manifest(folder), main.config["data"]
    counts, audit = manifest["counts"], read_json(folder / "audit.json")

    def cell(value: Any) -> Cell:
        return Cell(f"{value:,}", links.to(folder / MANIFEST))

    blocks: list[Any] = [
        Text(
            f"{config['name']} (reader {config['reader']}), split by {config['split']}"
            + (f", seed {config['split_seed']}" if config["split"] != "official" else "")
            + f"; filters: {', '.join(config['filters']) or 'none'}. Read: "
            + ", ".join(f"{counts[name]:,} {name}" for name in ("dialogues", "sentences", "turns", "pairs"))
            + "."
        ),
        Table(
            ["split", "samples", "with clip", "clip missing", "names no clip"],
            [
                [split, cell(counts["samples"][split]), *(cell(audit["clips"][split][k])
                 for k in ("present", "missing", "none"))]
                for split in SPLITS
            ],
            "Splits",
        ),
    ]  # fmt: skip
    leaks: list[list[Cell | str]] = [
        [f"dialogues in both {pair.replace('/', ' and ')}", cell(shared["dialogues"]), ""]
        for pair, shared in audit["shared_dialogues"].items()
    ]
    for split, repeated in audit["responses_in_train"].items():
        for kind, how in (("exact", "letter by letter"), ("normalised", "without punctuation and case")):
            share = f"{100 * repeated[kind] / max(1, repeated['samples']):.1f} %"
            leaks.append([f"{split} responses that are a response in train, {how}", cell(repeated[kind]), share])
    if index := main.artifact("demonstrations"):
        for split, row in read_manifest(index)["metrics"].items():
            for key, what in LEAKS.items():
                chance = f"by chance {100 * row[f'{key}_chance']:.2f} %" if f"{key}_chance" in row else "must be 0"
                shown = links.cell(f"{100 * row[key]:.2f} %", main.system, [index])
                leaks.append([f"{split}: {what}", shown, chance])
    blocks.append(Table(["what", "found", ""], leaks, f"Leaks that the audit looked for ({main.system})", prose=True))
    lost = {**counts["dropped"], "clip missing, kept as text only": counts["text_only"]}
    lost |= {f"{what}, e.g. {note['example']}": note["count"] for what, note in counts["notes"].items()}
    skipped: list[list[Cell | str]] = [[what, cell(n)] for what, n in lost.items() if n]
    blocks.append(
        Table(["what", "times"], skipped, "Dropped, or odd but used", prose=True)
        if skipped
        else Text("No sample was dropped, and no line was odd.", "note")
    )
    emotions = counts["emotions"]
    rows = [
        [f"{split}, {whose}", *(f"{n:,}" for n in emotions[split][part].values())]
        for split in SPLITS
        for part, whose in (("utterance", "u"), ("response", "r"))
    ]
    blocks.append(Fold("Emotions by split", [Table(["", *emotions["train"]["utterance"]], rows)]))
    return blocks


def prompt(main: Run) -> list[Any]:
    """The texts of the prompt that the model was trained with."""
    file = (main.artifact("generator") or Path()) / "prompt.json"
    parts = read_json(file) if file.is_file() else main.config.get("prompt", {})
    texts = {name: parts[name] for name in PARTS if name in parts}
    if not texts:
        return []
    rows = [
        [what, Cell(json.dumps(texts[name], ensure_ascii=False)[1:-1])] for name, what in PARTS.items() if name in texts
    ]
    blocks: list[Any] = [Table(["part, in this order", "text; fields in braces are filled in"], rows, prose=True)]
    example = next((p.extra["prompt"] for p in main.predictions if isinstance(p.extra.get("prompt"), dict)), None)
    if example is not None:
        whole = "".join(str(text) for text in example.values())
        blocks.append(Fold("One whole prompt", [Verbatim(f"Sample {main.predictions[0].id}", whole)]))
    return blocks


def decoding(experiment: Experiment) -> list[Any]:
    """How responses were drawn, by system."""
    rows = []
    for name, of_system in experiment.systems.items():
        decoding = of_system[0].config.get("generate")
        if decoding is None:
            rows.append([name, "unknown", "–", "–", "–", "–", "–"])
            continue
        seeds = ", ".join(str(seed) for seed in decoding["seeds"])
        trained = ", ".join(str(run.seed) for run in of_system)
        temperature = f"{decoding['temperature']:g}" + ("" if decoding["temperature"] else " (greedy)")
        longest = str(decoding["max_new_tokens"])
        rows.append([name, decoding["split"], f"{decoding['top_p']:g}", temperature, longest, seeds, trained])
    columns = ["system", "split", "top-p", "temperature", "max new tokens", "decode seeds", "training seeds"]
    return [Table(columns, rows)]


def provenance(experiment: Experiment) -> list[Any]:
    """Commits, versions and devices of everything that went into the runs."""
    manifests = {folder: read_manifest(folder) for run in experiment.runs for folder in run.artifacts.values()}
    if not manifests:
        return []
    commits: dict[str, Counter[str]] = {}
    machines: dict[tuple[str, str, str], Counter[str]] = {}
    for manifest in manifests.values():
        git = manifest.get("git")
        commit = "no git checkout" if git is None else git["commit"][:12] + (" (with changes)" if git["dirty"] else "")
        commits.setdefault(commit, Counter())[manifest["stage"]] += 1
        libraries = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
        machine = (manifest["device"], str(manifest["world_size"]), libraries)
        machines.setdefault(machine, Counter())[manifest["stage"]] += 1
    seconds: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for manifest in manifests.values():
        seconds[manifest["stage"]] += manifest["wall_seconds"]
        number[manifest["stage"]] += 1
    rows = [[stage, str(number[stage]), f"{seconds[stage] / 60:.1f}"] for stage in number]
    rows.append(["together", str(sum(number.values())), f"{sum(seconds.values()) / 60:.1f}"])
    return [
        Table(["commit", "made"], [[commit, _counted(stages)] for commit, stages in commits.items()], "Code",
              ["“with changes”: the source tree had changes that no commit holds."]
              if any("changes" in commit for commit in commits) else [], prose=True),
        Table(["device", "processes", "versions", "made"],
              [[*machine, _counted(stages)] for machine, stages in machines.items()], "Machine", prose=True),
        Fold("Time by stage", [Table(["stage", "artifacts", "minutes"], rows)]),
    ]  # fmt: skip


def missing(experiment: Experiment) -> list[Any]:
    """Missing jobs with their sentence and the end of their log, and clips that could not be used."""
    blocks: list[Any] = []
    if experiment.missing:
        rows = [[job.system, "–" if job.seed is None else str(job.seed), Cell(job.why)] for job in experiment.missing]
        blocks.append(Table(["system", "seed", "why"], rows, "Jobs that are missing from every table", prose=True))
        blocks += [Fold(f"Log of {job.system}, seed {job.seed}: its end", [Verbatim(str(job.log), tail(job.log))])
                   for job in experiment.missing if job.log is not None and job.log.is_file()]  # fmt: skip
    clips = {folder for run in experiment.runs if (folder := run.artifact("features"))}
    for folder in sorted(clips):
        failed = read_json(folder / "failed.json")
        if failed:
            rows = [
                [Cell(str(clip.get("clip") or clip.get("features"))), str(len(clip["samples"])), Cell(clip["error"])]
                for clip in failed
            ]
            blocks.append(Table(["clip", "samples", "why"], rows, "Clips that could not be used", prose=True))
    return blocks


def odd(experiment: Experiment) -> list[Any]:
    """Responses that are empty, name no emotion or did not end, by run; they count in every score."""
    rows = []
    for run in experiment.runs:
        if run.artifact("replies") is None:
            continue
        counts = run.manifest("replies")["counts"]
        cells = [str(counts.get(key, "–")) for key in ("empty", "without_emotion_word", "cut_at_max_new_tokens")]
        if any(cell not in ("0", "–") for cell in cells):
            rows.append([run.system, str(run.seed), str(counts["predictions"]), *cells])
    columns = ["system", "seed", "responses", "empty", "without emotion word", "cut at max new tokens"]
    return [Fold("Odd responses (they count in every score)", [Table(columns, rows)])] if rows else []


def tail(log: Path) -> str:
    """The last lines of a job's log."""
    try:
        with log.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, TAIL))
    except OSError as error:
        return f"(cannot be read: {error.strerror})"


def _counted(stages: Counter[str]) -> str:
    return ", ".join(stage if n == 1 else f"{n} × {stage}" for stage, n in stages.items())
