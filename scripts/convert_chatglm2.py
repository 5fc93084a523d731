"""Convert a ChatGLM2 checkpoint, as published, into a folder that transformers 5 loads without remote code.

    python scripts/convert_chatglm2.py downloads/chatglm2-6b checkpoints/chatglm2-6b
    python scripts/convert_chatglm2.py downloads/chatglm2-6b checkpoints/chatglm2-6b --ptuning output/checkpoint-3000
    python scripts/convert_chatglm2.py checkpoints/chatglm2-6b --ptuning output/checkpoint-3000

SRC holds config.json, tokenizer.model and the weights (pytorch_model-*.bin or model-*.safetensors); remote code in it
is not run. DST gets weights in safetensors, configuration and tokenizer; use it as llm.path=DST. --ptuning takes the
prefix that ChatGLM2's own ptuning/main.py trained (a file, or the folder of a checkpoint) and writes it to DST/adapter;
with DST alone, which was converted before, only that. Takes as much disk again as the weights, and memory for one
shard. Where it fails, nothing is left behind; a killed run leaves DST.partial, which the next removes. Exit code: 0
done, 1 cannot be done, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elmd import log
from elmd.cli import guard


def main(arguments: Sequence[str] | None = None) -> None:
    first, *rest = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", nargs="?", type=Path, metavar="SRC", help="folder of the original checkpoint")
    parser.add_argument(
        "dst",
        type=Path,
        metavar="DST",
        help="folder for the result, new or empty; with --ptuning alone, one that was converted before",
    )
    parser.add_argument("--ptuning", type=Path, metavar="PATH", help="P-Tuning v2 prefix to convert too")
    args = parser.parse_args(arguments)
    if args.src is None and args.ptuning is None:
        parser.error("give SRC and DST, or DST and --ptuning")
    log.setup()
    guard(lambda: convert(args.src, args.dst, args.ptuning))
    print(f"converted: {args.dst}")


def convert(src: Path | None, dst: Path, ptuning: Path | None) -> None:
    import transformers

    from elmd.convert.chatglm2 import convert_chatglm2, convert_prefix

    transformers.logging.set_verbosity_error()
    if src is None:
        assert ptuning is not None
        log.table(f"Converted {ptuning}", ["", "value"], [["virtual tokens", convert_prefix(ptuning, dst)]])
        return
    result = convert_chatglm2(src, dst, ptuning)
    rows: list[list[Any]] = [
        ["tensors", result.written.tensors],
        ["parameters", result.written.parameters],
        ["dtype", str(result.config.dtype).removeprefix("torch.")],
        ["files", result.written.files],
        ["bytes", result.written.bytes],
        ["tokenizer ids", result.ids],
        ["rows of the embedding", result.config.vocab_size],
        ["virtual tokens of the prefix", result.prefix],
    ]
    log.table(f"Converted {src}", ["", "value"], rows)


if __name__ == "__main__":
    main()
