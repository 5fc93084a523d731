"""What an interruption costs, and what a finished chain costs when it is asked for again.

Each run is a process of its own, see `benchmarks.forks`.
"""

from __future__ import annotations

import io
import shutil
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.forks import forked, train, write_llm
from benchmarks.harness import Case, Way
from elmd.cli import compose
from elmd.engine.store import BEST, CHECKPOINTS
from elmd.stages import chain_of
from elmd.vision.store import SHARDS

#: The demo, cut down until its trainings are a few steps.
TINY = [
    "experiment=demo", "cpu=true", "data.world.train=40", "data.world.valid=10", "data.world.test=10",
    "bootstrap.dialogues=60", "bootstrap.llm_steps=2", "bootstrap.retriever_steps=2", "bootstrap.vision_steps=2",
    "erm.epochs=1", "rep.epochs=1", "eerg.steps=4", "eerg.evaluate_every=4",
]  # fmt: skip


def cases(small: bool) -> Iterator[Case]:
    with TemporaryDirectory() as folder:
        yield interrupted(Path(folder), 6 if small else 60)
    with TemporaryDirectory() as folder:
        yield again(Path(folder), small)


def interrupted(folder: Path, steps: int) -> Case:
    """A training that is killed once, between two checkpoints, against one that is let run."""
    llm = write_llm(folder / "llm")
    out, at = folder / "out", steps // 2 + 2  # checkpoints come every 3 steps: the last one is two steps back

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    def weights(code: int) -> dict[str, Tensor]:
        assert code == 0, out.with_suffix(".0.log").read_text()
        last = max((out / CHECKPOINTS).iterdir())
        return {f"{path.name}:{name}": tensor for path in (last / "model.safetensors", last / "optimizer.safetensors",
                out / BEST) for name, tensor in load_file(path).items()}  # fmt: skip

    def in_one_go() -> dict[str, Tensor]:
        return weights(train(llm, out, steps))

    def killed() -> dict[str, Tensor]:
        assert train(llm, out, steps, f"kill=step:{at}") == -signal.SIGKILL
        return weights(train(llm, out, steps))

    return Case(
        "A training that is killed and resumed, against one that is let run",
        f"{steps} steps, an evaluation every 4 and a checkpoint every 3; SIGKILL in step {at}",
        [
            Way("elmd, in one go", in_one_go, before=clear),
            Way("elmd, killed and resumed", killed, before=clear),
        ],
        tolerance=0.0,
        note="Weights, the optimizer's state and the best checkpoint are equal to the last bit. What is paid twice: "
        "loading the model, and the steps since the last checkpoint. Without resuming, all steps before the kill "
        "would be.",
    )  # fmt: skip


def again(folder: Path, small: bool) -> Case:
    """A chain whose results are all there, against the run that made them."""
    choices = [*TINY, *(["stage=prepare", "data=tiny"] if small else ["stage=all"])]

    def run(runs: Path) -> dict[str, Any]:
        def work() -> None:
            cfg = compose([*choices, f"runs_dir={runs}"])
            chain = chain_of(cfg, Accelerator(cpu=True))
            names = ["bootstrap/world", "prepare"] if small else list(chain.order("eerg"))
            with redirect_stdout(io.StringIO()):
                for name in names:
                    chain.run(name)

        code = forked(work, folder / "chain.log")()
        assert code == 0, (folder / "chain.log").read_text()
        found: dict[str, Any] = {}
        for path in sorted(runs.rglob("*.safetensors")):
            if path.parent.name != SHARDS:  # rows of features lie in the order in which clips were decoded
                for name, tensor in load_file(path).items():
                    found[f"{path.relative_to(runs)}: {name}"] = tensor
        for path in sorted(runs.rglob("*.jsonl")):
            if path.name != "metrics.jsonl":  # that holds seconds
                found[str(path.relative_to(runs))] = path.read_text("utf-8").replace(str(runs), "")  # paths of clips
        return found

    finished, fresh = folder / "finished", folder / "fresh"
    run(finished)
    return Case(
        "A finished chain, asked for again",
        "the tiny world, read and prepared" if small else "all stages of the tiny world, 4 steps of EERG",
        [
            Way("elmd, again", lambda: run(finished)),
            Way("elmd, the first time", lambda: run(fresh), before=lambda: shutil.rmtree(fresh, ignore_errors=True)),
        ],
        note="Equal folders, texts and weights. Loading libraries is not in it.",
    )
