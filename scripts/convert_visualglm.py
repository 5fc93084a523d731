"""Convert VisualGLM-6B's image encoder (ViT, Q-Former, query tokens, glm_proj) to the format of vision=visualglm.

    python scripts/convert_visualglm.py downloads/visualglm-6b checkpoints/visualglm-vision

SRC is the hub's repository THUDM/visualglm-6b or SwissArmyTransformer's folder; its language model is left out, and
code in it is not run. DST gets weights in safetensors, the configuration, and glm_proj.safetensors; use it as
vision.path=DST, and glm_proj, if wanted, as rep.projector_from=DST/glm_proj.safetensors. Nothing is left behind where
it fails. Exit code: 0 done, 1 cannot be done, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from elmd import log
from elmd.cli import guard


def main(arguments: Sequence[str] | None = None) -> None:
    first, *rest = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of the original checkpoint")
    parser.add_argument("dst", type=Path, metavar="DST", help="folder for the result; new or empty")
    args = parser.parse_args(arguments)
    log.setup()
    guard(lambda: convert(args.src, args.dst))
    print(f"converted: {args.dst}")


def convert(src: Path, dst: Path) -> None:
    from elmd.convert.visualglm import PROJECTION, convert_visualglm

    result = convert_visualglm(src, dst)
    rows: list[list[object]] = [
        ["tensors", result.written.tensors],
        ["parameters", result.written.parameters],
        ["files", result.written.files],
        ["bytes", result.written.bytes],
        [f"numbers of glm_proj, in {PROJECTION}", " × ".join(map(str, result.projection))],
        *([f"left out: {start}… (language model), tensors", count] for start, count in result.left_out.items()),
    ]
    log.table(f"Converted {src}", ["", "value"], rows)


if __name__ == "__main__":
    main()
