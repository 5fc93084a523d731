"""A job's folder as a pack with a model card.

What a pack is stands in `elmd.pack`, which loads it; how to share one in docs/sharing_a_model.md.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elmd.engine.files import replace_folder, write_json
from elmd.errors import ArtifactError, ElmdError
from elmd.log import logger
from elmd.pack.folder import CARD, FACTS, INDEX, read_facts
from elmd.pack.job import read_job


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

    # What is wrong with either folder is told before seconds of loading libraries.
    from elmd.pack.card import model_card, one_line
    from elmd.pack.contents import pack_facts, pack_files

    given = {"license": license, "language": language}
    kept = {key: str(earlier[key]) for key, value in given.items() if not value and earlier.get(key)}
    license = one_line(license or kept.get("license", "")) or None
    language = one_line(language or kept.get("language", "zh"))
    title = one_line(name) if name else f"elmd-{one_line(str(trained.config['experiment_name']))}"
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
