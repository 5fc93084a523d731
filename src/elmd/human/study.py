"""A study: which samples of which systems are rated, under which ids, in which order; its pages and its key.

The draw of the samples is seeded, so that it can be repeated. Ids and orders come from the system's secret generator
instead: nobody who knows the seed, the code and the texts can tell from a page which system gave a response.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from elmd.engine.files import write_json, write_text
from elmd.errors import DataError
from elmd.evaluation.runs import Run, read_experiment
from elmd.human.page import Item, Response, render
from elmd.log import logger
from elmd.types import Sample
from elmd.vision.thumbnails import thumbnails

KEY = "key.json"
#: The name of the gold responses among the systems, as Table 4 has it.
GROUND_TRUTH = "Ground-Truth"
#: Changes with the meaning of key.json or of the exported files.
FORMAT = "dialogue-ratings/1"
#: Height in pixels of the frames on a page: a face must be readable. Ours.
FRAME_HEIGHT = 180


@dataclass(frozen=True)
class System:
    """The responses of one system: of one training and one decoding.

    Attributes:
        name: as in the tables.
        responses: by sample id. references: the gold responses that the file names, by sample id.
        seed: of training; decode_seed: of decoding; None where the file does not say.
        path: the predictions file.
    """

    name: str
    responses: Mapping[str, str]
    references: Mapping[str, str]
    seed: int | None
    decode_seed: int | None
    path: Path


@dataclass(frozen=True)
class Pool:
    """What a study can be drawn from.

    Attributes:
        systems: in table order. samples: the test split by id.
        data: the data set's name. paper: the one of the paper's two that its Table 4 is read for.
        notes: what a reader of a table of these systems has to know.
    """

    systems: list[System]
    samples: dict[str, Sample]
    data: str
    paper: str
    notes: list[str]


def gather(paths: Sequence[str]) -> Pool:
    """The systems and test samples of experiments' folders and of third parties' files (`NAME=predictions.jsonl`).

    Of each system one run is rated: the lowest training seed that all systems of experiments have (each system's own
    lowest where they share none), in its lowest decode seed.

    Raises:
        DataError: a path that is neither; no folder among them; two runs of one name; what cannot be read.
    """
    folders: list[Path] = []
    others: dict[str, Path] = {}
    for given in paths:
        name, equals, file = given.partition("=")
        if Path(given).is_dir():
            folders.append(Path(given))
        elif Path(given).exists():
            raise DataError("this file needs a system's name", where=given, fix=f"write NAME={given}")
        elif not (equals and name.strip() and file):
            raise DataError(
                "no such folder", where=given, fix="name an experiment's folder, or a file as NAME=predictions.jsonl"
            )
        elif name in others:
            raise DataError(f"the name {name!r} is given twice", where=given, fix="give each system its own name")
        else:
            others[name] = Path(file)
    if not folders:
        raise DataError(
            "no experiment's folder is given, and predictions alone do not hold the dialogues",
            where="PATH",
            fix="add the folder of an experiment on the same data, runs/experiments/<name>",
        )
    experiments = [read_experiment(folder) for folder in folders]
    for experiment in experiments:
        for job in experiment.missing:
            logger.warning("%s is left out with seed %s: %s", job.system, job.seed, job.why)
    systems = _one_run_each([run for experiment in experiments for run in experiment.runs])
    for name, path in others.items():
        if name in (*(system.name for system in systems), GROUND_TRUTH):
            raise DataError(f"the name {name!r} is taken", where=path, fix="give the system another name")
        systems.append(_system(Run.of_file(name, path)))
    splits = [{s.id: s for s in experiment.samples() if s.split == "test"} for experiment in experiments]
    shared = {id_: s for id_, s in splits[0].items() if all(id_ in other for other in splits)}
    notes = dict.fromkeys(note for experiment in experiments for note in experiment.notes)
    config = experiments[0].runs[0].config
    return Pool(systems, shared, config["data"]["name"], config["paper_dataset"], list(notes))


def _one_run_each(runs: Sequence[Run]) -> list[System]:
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        others = by_name.setdefault(run.system, [])
        if any(other.path.resolve() == run.path.resolve() for other in others):
            continue
        if twin := next((other for other in others if other.seed == run.seed), None):
            raise DataError(
                f"{run.system} with seed {run.seed} is in {twin.path} and in {run.path}",
                fix="name only one of the two experiments",
            )
        others.append(run)
    shared = set.intersection(*({run.seed for run in group} for group in by_name.values()))
    if not shared:
        logger.warning("the systems share no training seed: each is rated in its own lowest")
    return [
        _system(min((run for run in group if run.seed in shared or not shared), key=lambda run: run.seed or 0))
        for group in by_name.values()
    ]


def _system(run: Run) -> System:
    decode_seed = min((p.seed for p in run.predictions if p.seed is not None), default=None)
    chosen = [p for p in run.predictions if p.seed == decode_seed]
    return System(
        run.system,
        {p.id: p.hypothesis for p in chosen},
        {p.id: p.reference for p in chosen},
        run.seed,
        decode_seed,
        run.path,
    )


def draw(pool: Pool, n: int, seed: int) -> list[Sample]:
    """n test samples that all systems have; the same for the same seed, samples and n.

    Raises:
        DataError: there are fewer than n; or a system was run on other data (another reference).
    """
    counts = {system.name: len(pool.samples.keys() & system.responses.keys()) for system in pool.systems}
    common = sorted(pool.samples.keys() & set.intersection(*({*system.responses} for system in pool.systems)))
    for system in pool.systems:
        for id_ in common:
            if " ".join(system.references[id_].split()) != " ".join(pool.samples[id_].response.text.split()):
                raise DataError(
                    f"{system.name} has another reference for the sample {id_!r} than the data",
                    where=system.path,
                    fix="rate systems that were run on the same data",
                )
    if len(common) < n:
        had = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(
            f"{n} test samples are wanted, and all systems have {len(common)} (of {len(pool.samples)}: {had})",
            where="--n",
            fix=f"give --n {len(common)}, or generate the missing ones" if common else "generate on the test split",
        )
    return [pool.samples[id_] for id_ in Random(f"human-{seed}").sample(common, n)]


def blind(samples: Sequence[Sample], systems: Sequence[System]) -> list[Item]:
    """One rater's items, in a secret order of their own, under ids that say nothing.

    White space is evened out: a system's trailing blanks would give it away. Systems that gave the same text then share
    one response: nobody rates a text twice, and it cannot get two scores.
    """
    order = secrets.SystemRandom()
    items = []
    for sample in samples:
        sources: dict[str, list[str]] = {}
        for name, text in [
            *((system.name, system.responses[sample.id]) for system in systems),
            (GROUND_TRUTH, sample.response.text),
        ]:
            sources.setdefault(" ".join(text.split()), []).append(name)
        responses = [Response(secrets.token_hex(8), text, tuple(names)) for text, names in sources.items()]
        order.shuffle(responses)
        items.append(Item(sample, tuple(responses)))
    order.shuffle(items)
    return items


def write_study(
    out: Path, pool: Pool, *, n: int, raters: int, seed: int, frames: int = 4, workers: int = 2
) -> dict[str, Any]:
    """Draw, blind and write a study: `rater-1.html` … and `key.json`, readable by its owner only. Returns the key.

    The key holds `study` (its id), `seed`, `n`, `with_frames`, `data`, `paper`, `notes`, `systems` (name -> seed,
    decode_seed, path, sha256) and `raters` (number -> items in the rater's order: `sample`, and `responses`, id ->
    names of the systems that gave it).

    Raises:
        DataError: `out` is in use or cannot be made; what `draw` refuses.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError("is in use, and a study is never overwritten", where=out, fix="choose another --out")
    drawn = draw(pool, n, seed)
    clips = {s.id: s.utterance.clip for s in drawn if s.utterance.clip}
    pictures = thumbnails(clips, frames=frames, height=FRAME_HEIGHT, workers=workers) if clips else {}
    study = secrets.token_hex(8)
    sheets = {str(number): blind(drawn, pool.systems) for number in range(1, raters + 1)}
    key = {
        "format": FORMAT,
        "study": study,
        "seed": seed,
        "n": n,
        "with_frames": sum(bool(frames) for frames in pictures.values()),
        "data": pool.data,
        "paper": pool.paper,
        "notes": pool.notes,
        "systems": {
            system.name: {
                "seed": system.seed,
                "decode_seed": system.decode_seed,
                "path": str(system.path),
                "sha256": hashlib.sha256(system.path.read_bytes()).hexdigest(),
            }
            for system in pool.systems
        },
        "raters": {
            number: [
                {
                    "sample": item.sample.id,
                    "responses": {response.id: list(response.systems) for response in item.responses},
                }
                for item in items
            ]
            for number, items in sheets.items()
        },
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))  # closed to others: the key is in it
    except OSError as error:
        raise DataError(f"cannot be made ({error.strerror})", where=out, fix="choose another --out") from None
    try:
        for number, items in sheets.items():
            write_text(making / f"rater-{number}.html", render(study, int(number), FORMAT, items, pictures))
        write_json(making / KEY, key)
        (making / KEY).chmod(0o600)
        making.chmod(0o777 & ~_umask())
        making.replace(out)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return key


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
