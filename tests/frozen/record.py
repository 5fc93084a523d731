"""What must not change unless somebody means it: every stage's fingerprint, and the bits of one tiny chain.

    python tests/frozen/record.py [fingerprints] [chain]

writes `fingerprints.json` and `chain.json` beside this file (both by default), and prints what moved. Where
fingerprints moved, it says whether what configurations share is as before: whether two (configuration, stage) pairs
have one fingerprint exactly where they had one. Then a deliberate change of the fingerprints' form loses no reuse of
results and adds none. `tests/test_frozen.py` compares with the files.

Not covered: the folder of a data set's clips, of which an existing one would stand in the fingerprint by its absolute
path. A folder that does not exist, with a path that is the same everywhere, stands in for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from elmd.cli import compose
from elmd.config import Config
from elmd.errors import ConfigError
from elmd.stages import chain_of

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"

#: Combination of overrides -> stage -> fingerprint, or "ConfigError" where the combination is refused.
Fingerprints = dict[str, dict[str, str] | str]
REFUSED = "ConfigError"


# ------------------------------------------------------------------------------------------------------- fingerprints
#: Choices beyond the groups of experiments, ablations and baselines, each with whatever it needs.
VARIANTS = [
    "",
    "seed=1",
    "threads=4 vision.workers=3 vision.batch_frames=1 rep.micro_tokens=999 eerg.micro_tokens=999 "
    "erm.checkpoint_every=1 rep.checkpoint_every=1 eerg.checkpoint_every=1 generate.batch_tokens=99",  # change nothing
    "data.world.seed=1",
    "bootstrap.seed=1",
    "bootstrap.llm_steps=7",
    "prompt=en",
    "llm=auto llm.path=weights/llm",
    "llm.dtype=bfloat16",
    "vision=visualglm vision.path=weights/vision",
    "vision.frames=8",
    "vision.shuffle=true",
    "vision=precomputed",
    "vision=none",
    "retriever=m3e_base",
    "retriever=none",
    "retriever.key=e_u",
    "retriever.search=exact",
    "retriever.allow_same_dialogue=true",
    "rep.projector_from=weights/projector.safetensors",
    "eerg=lora",
    "eerg.adapter=none",
    "eerg.adapter_from=weights/adapter",
    "generate.split=valid",
    "generate.seeds=[0,1]",
    "baseline=dialogpt baseline.vocab=weights/vocab.txt",
    "baseline=dialogpt_tiny generate.max_new_tokens=999",  # refused by the stage
    "erm.separation_weight=0",  # refused by the configuration
    "data=cped data.path=data/valid_split.csv bootstrap.text=data vision=none",
    "experiment=paper_m3ed eerg=safe",
    "experiment=paper_m3ed data.video_root=/nowhere/videos",
    "experiment=paper_m3ed data.split=official data.emotion_map=emotions.csv data.background=background.json",
    "experiment=paper_m3ed data.split_seed=1 data.filters=[two_speakers]",
]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def groups() -> dict[str, list[str]]:
    """Every combination, in groups of a few seconds each.

    They are the variants, the experiments, and ablations x baselines of the default and of an experiment with the
    paper's settings, with the baselines in the size that goes with each.
    """
    found = {
        "variants of the default": [name for name in VARIANTS if not name.startswith("experiment=")],
        "variants of an experiment": [name for name in VARIANTS if name.startswith("experiment=")],
        "experiments": [f"experiment={name}" for name in choices("experiment")],
    }
    baselines = choices("baseline")
    tiny = [name for name in baselines if f"{name}_tiny" not in baselines]
    large = [name for name in baselines if not name.endswith("_tiny")]
    for experiment, sized in (("", tiny), ("experiment=table2_m3ed ", large)):
        for ablation in choices("ablation"):
            head = f"{experiment}ablation={ablation}"
            found[head] = [f"{head} baseline={baseline}" for baseline in sized]
    return found


def write_stubs(folder: Path) -> None:
    """Data and checkpoints with fixed bytes, of which only the contents count."""
    for name in (
        "data/annotation.json", "data/splitInfo/movie_list_train.txt", "data/train_split.csv", "data/valid_split.csv",
        "data/test_split.csv", "dialogues.jsonl", "emotions.csv", "background.json", "weights/llm/model.safetensors",
        "weights/vision/model.safetensors", "weights/projector.safetensors", "weights/vocab.txt",
        "weights/adapter/adapter_model.safetensors",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"stub of {name}\n".encode())


def overrides(combination: str) -> list[str]:
    """The command line of a combination: with data and checkpoints where an experiment cannot know them."""
    given = combination.split()
    if not combination.startswith("experiment="):
        return given
    data = "dialogues.jsonl" if "experiment=table2_mmed" in given else "data"
    if "demo" in given[0] or "cped" in given[0]:  # with stand-ins
        return [*given, f"data.path={data}"]
    return [*given, f"data.path={data}", "llm.path=weights/llm", "vision.path=weights/vision"]


def stages(cfg: Config) -> dict[str, str]:
    """Fingerprint of every stage that the chain of a configuration has."""
    chain = chain_of(cfg, Accelerator(cpu=True))
    return {name: chain.node(name).fingerprint for name in chain.order("generate")}


def fingerprints(combinations: list[str], folder: Path) -> Fingerprints:
    """Of each combination. `folder` is an empty one: paths are relative to it, and hub ids are no folders there."""
    write_stubs(folder)
    found: Fingerprints = {}
    # Where decord has no wheel the default decoder, which counts, is another.
    with chdir(folder), mock.patch("elmd.vision.find_spec", return_value=True):
        for combination in combinations:
            try:
                found[combination] = stages(compose(overrides(combination)))
            except ConfigError:
                found[combination] = REFUSED
    return found


def pairs(recorded: Fingerprints) -> dict[tuple[str, str], str]:
    """(Combination, stage) -> fingerprint."""
    return {
        (combination, stage): fingerprint
        for combination, of_stage in recorded.items()
        if isinstance(of_stage, dict)
        for stage, fingerprint in of_stage.items()
    }


def partition_changes(old: Fingerprints, new: Fingerprints) -> list[str]:
    """What is shared and was not, or the reverse, among the pairs that both have; empty for a bijection old -> new."""
    before, after = pairs(old), pairs(new)
    both = [pair for pair in before if pair in after]
    return [
        f"{what}: {first[1]} of [{first[0]}] and {second[1]} of [{second[0]}]"
        for what, key, value in (("shared no more", before, after), ("shared now", after, before))
        for first, second in _apart(both, key, value)
    ]


def _apart(
    both: list[tuple[str, str]], key: Mapping[tuple[str, str], str], value: Mapping[tuple[str, str], str]
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs that have one `key` and different `value`s, each beside the first with its key."""
    first: dict[str, tuple[str, str]] = {}
    for pair in both:
        other = first.setdefault(key[pair], pair)
        if value[other] != value[pair]:
            yield other, pair


def differences(old: Fingerprints, new: Fingerprints) -> list[str]:
    """Every fingerprint that moved, is new or is gone, and whether what is shared is as before."""
    lines = []
    before, after = pairs(old), pairs(new)
    for combination in sorted({*old, *new}):
        refused = [recorded.get(combination, "not there") for recorded in (old, new)]
        if refused[0] != refused[1] and not all(isinstance(value, dict) for value in refused):
            was, now = ("accepted" if isinstance(value, dict) else value for value in refused)
            lines.append(f"[{combination}]: {was} -> {now}")
    for pair in sorted({*before, *after}):
        if before.get(pair) != after.get(pair) and pair[0] in old and pair[0] in new:
            lines.append(f"[{pair[0]}] {pair[1]}: {before.get(pair, 'not there')} -> {after.get(pair, 'not there')}")
    if lines:
        changes = partition_changes(old, new)
        lines += changes or ["What configurations share is as before: the fingerprints of both are a bijection."]
    return lines


# -------------------------------------------------------------------------------------------------------- a tiny chain
#: The whole method with prefix and LoRA, and Livebot, as small as each training can be and still move its weights.
SMALL = [
    "-m", "experiment=demo", "baseline=none,livebot_tiny", "eerg=paper,lora", "threads=1", "cpu=true",
    "data.world.train=40", "data.world.valid=8", "data.world.test=8", "bootstrap.dialogues=200",
    "bootstrap.vocab_size=1000", "bootstrap.llm_hidden=64", "bootstrap.llm_steps=5", "bootstrap.retriever_steps=5",
    "bootstrap.retriever_hidden=32", "bootstrap.vision_steps=3", "bootstrap.vision_hidden=16", "vision.frames=2",
    "vision.workers=1", "erm.epochs=1", "erm.batch_size=8", "rep.epochs=2", "rep.lr=1e-1", "eerg.steps=4",
    "eerg.evaluate_every=2", "eerg.prefix_length=4", "eerg.lr_adapter=1e-2",
    "eerg.lr_projector=1e-3", "baseline.epochs=1", "generate.max_new_tokens=8",
]  # fmt: skip

#: One path through the libraries on every x86-64 machine with AVX2, or they choose by processor, and rounding differs.
ONE_PATH = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}

#: Files that no rounding gets into: they are equal on every machine.
TEXTS = ("dialogues.jsonl", "samples.jsonl")
#: What a training's log says of the results; the rest is speed and memory.
LOGGED = ("step", "loss", "lr", "grad_norm")


def platform_now() -> dict[str, str]:
    """What the numbers hold for: another processor's instructions or another library round otherwise."""
    libraries = (
        "torch", "numpy", "transformers", "tokenizers", "sentencepiece", "peft", "sentence-transformers", "accelerate",
        "av", "decord",
    )  # fmt: skip
    versions = {name: version(name) for name in libraries}
    return {"machine": platform.machine(), "cpu_capability": _cpu_capability(), **versions}


def _cpu_capability() -> str:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ONE_PATH, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def chain_hashes(folder: Path) -> dict[str, dict[str, str]]:
    """Train and generate in an empty folder, as one types it; SHA-256 of every result: `texts` and `numbers`."""
    environment = {key: value for key, value in os.environ.items() if key != "ELMD_DEBUG"} | ONE_PATH
    for module in ("elmd.train", "elmd.evaluate"):
        done = subprocess.run(
            [sys.executable, "-m", module, *SMALL, f"runs_dir={folder / 'runs'}"],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, str]] = {"texts": {}, "numbers": {}}
    for job in sorted((folder / "runs" / "experiments" / "demo").glob("*/artifacts.json")):
        about = json.loads(job.read_text(encoding="utf-8"))
        baseline, adapter = about["config"]["baseline"]["name"], about["config"]["eerg"]["adapter"]
        system = adapter if baseline == "none" else baseline
        for stage, where in about["artifacts"].items():
            artifact = job.parent / where
            for file in sorted([*artifact.rglob("*.safetensors"), *artifact.rglob("*.jsonl")]):
                name = f"{stage}[{system}]" if stage in ("eerg", "generate") else stage
                kind = "texts" if file.name in TEXTS else "numbers"
                found[kind][f"{name}/{file.relative_to(artifact).as_posix()}"] = _hash(file, folder)
    return found


def _hash(file: Path, root: Path) -> str:
    """SHA-256 of what a file says: tensors by sorted name, text without the folder that it was made in."""
    found = hashlib.sha256()
    if file.suffix == ".safetensors":
        for name, tensor in sorted(load_file(file).items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif file.name == "metrics.jsonl":
        for line in file.read_text(encoding="utf-8").splitlines():
            logged = {key: x for key, x in json.loads(line).items() if key in LOGGED or key.startswith("valid/")}
            found.update((json.dumps(logged, sort_keys=True) + "\n").encode())
    else:
        text = file.read_bytes().replace(str(root).encode(), b"")
        found.update(re.sub(rb"(bootstrap/world)/[0-9a-f]+", rb"\1", text))  # where the clips of the tiny world lie
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------------- the script
def read(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def _write(name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _record_fingerprints(folder: Path) -> None:
    combinations = list(dict.fromkeys(name for group in groups().values() for name in group))
    new = fingerprints(combinations, folder)
    if (HERE / "fingerprints.json").is_file():
        print("\n".join(differences(read("fingerprints"), new)) or "Every fingerprint is as before.")
    _write("fingerprints", new)


def _record_chain(folder: Path) -> None:
    new = {"made_with": platform_now(), **chain_hashes(folder)}
    if (HERE / "chain.json").is_file():
        old = read("chain")
        moved = [
            f"{kind} {name}: {old[kind].get(name, 'not there')} -> {new[kind].get(name, 'not there')}"
            for kind in new
            for name in sorted({*old[kind], *new[kind]})
            if old[kind].get(name) != new[kind].get(name)
        ]
        print("\n".join(moved) or "Every hash of the tiny chain is as before.")
    _write("chain", new)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = {"fingerprints": _record_fingerprints, "chain": _record_chain}
    parser.add_argument("what", nargs="*", help=" or ".join(what))
    for name in parser.parse_args().what or what:
        with tempfile.TemporaryDirectory() as temporary:
            what[name](Path(temporary).resolve())
