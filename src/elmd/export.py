"""`python -m elmd.export JOB_FOLDER --out DIR`: pack a trained model with a model card, to share and to load."""

from __future__ import annotations

import argparse
from pathlib import Path

from elmd import log
from elmd.cli import guard
from elmd.pack.folder import earlier_export
from elmd.pack.trained import read_trained


def main() -> None:
    guard(_main)


def _main() -> None:
    parser = argparse.ArgumentParser("python -m elmd.export", description="Pack a trained model with a model card.")
    parser.add_argument("job", type=Path, help="folder of a finished run: runs/experiments/NAME or …/NAME/JOB")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an earlier export there is replaced")
    parser.add_argument("--name", help="title of the model card; default: the experiment's name")
    parser.add_argument(
        "--license",
        help="license of the trained weights, as the hub names them (apache-2.0, …); "
        "default: that of the earlier export, else unknown",
    )
    parser.add_argument("--language", help="ISO code of the language of the dialogues; default: likewise, else zh")
    parser.add_argument(
        "--no-index", action="store_true", help="leave out the training texts; replies then have no demonstration"
    )
    given = parser.parse_args()
    log.setup()
    # What is wrong with either folder is said before seconds of loading libraries.
    trained = read_trained(given.job)
    earlier_export(given.out)

    from elmd.pack.packing import export

    print(f"artifact: {export(trained, given.out, given.name, given.license, given.language, not given.no_index)}")


if __name__ == "__main__":
    main()
