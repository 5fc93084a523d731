"""`python -m elmd.reply PACK --utterance "…"`: one reply of a packed model, on one line: emotion, tab, text."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from elmd import log
from elmd.cli import guard
from elmd.engine.files import read_json
from elmd.errors import DataError
from elmd.pack.bases import check_base
from elmd.pack.dialogue import check_clip, turns
from elmd.pack.folder import fetch, read_facts


def main() -> None:
    guard(_main)


def _main() -> None:
    parser = argparse.ArgumentParser("python -m elmd.reply", description="Ask a packed model for one reply.")
    parser.add_argument("pack", help="folder that python -m elmd.export wrote, or a hub id")
    parser.add_argument("--utterance", required=True, help="what is said to the model")
    parser.add_argument("--speaker", default="A", help="who says it (default: A)")
    parser.add_argument("--history", type=Path, help='earlier turns, a JSON file: [["A", "…"], ["B", "…"]]')
    parser.add_argument("--background", help="what is known about the scene")
    parser.add_argument("--clip", type=Path, help="a video of the utterance")
    parser.add_argument("--llm", help="folder or hub id of the language model, where the pack names none")
    parser.add_argument("--vision", help="folder or hub id of the vision encoder, likewise")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    given = parser.parse_args()
    log.setup()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    # What was typed is checked before libraries and gigabytes are loaded.
    history = read_history(given.history) if given.history else []
    if given.clip:
        check_clip(given.clip)
    for role, path in (("llm", given.llm), ("vision", given.vision)):
        if path is not None:
            check_base(role, path)
    folder = fetch(given.pack)
    read_facts(folder)

    import transformers

    from elmd.pack.model import load_pack

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = load_pack(folder, llm=given.llm, vision=given.vision, cpu=given.cpu)
    reply = model.reply(
        (given.speaker, given.utterance), history, clip=given.clip, background=given.background, seed=given.seed
    )
    if reply.demonstration:
        log.logger.info("demonstration: %s", reply.demonstration)
    print(f"{reply.emotion or '–'}\t{' '.join(reply.text.split())}")


def read_history(path: Path) -> list[tuple[str, str]]:
    """Turns of a JSON file, oldest first.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        value = read_json(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix="check the path") from error
    except ValueError as error:  # also what is not UTF-8
        raise DataError(f"is not JSON ({error})", where=path, fix='write [["A", "…"], ["B", "…"]]') from error
    return turns(value, path)


if __name__ == "__main__":
    main()
