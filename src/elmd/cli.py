"""What the command lines share: Hydra, the checked configuration, one-sentence errors, exit codes."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elmd import log
from elmd.checks import check
from elmd.config import BOOTSTRAP, Config
from elmd.engine.files import digest
from elmd.engine.keys import described, plain
from elmd.errors import ConfigError, ElmdError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Bytes of a sweep job's name that are spelt out in its folder's name.
LONGEST = 120
#: What most sweeps vary: such parts of a name come first where it is cut.
AXES = ("ablation=", "baseline=", "seed=")

Action = Callable[[Config, "Accelerator"], None]


def config_dir() -> Path:
    """The configuration directory: `configs/` of the source tree, or its copy inside an installed package."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def command(name: str, action: Action, *, checked: bool = True) -> Callable[[], None]:
    """A command line that composes `configs/<name>.yaml` and hands the configuration to `action`.

    Args:
        checked: whether the rules between fields are checked beforehand.
    """
    register()

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)
    def main(raw: DictConfig) -> None:
        guard(lambda: run(typed(raw, checked=checked), action))

    def start() -> None:
        # Hydra's argument parser refuses overrides on both sides of -m, which is how people type a sweep.
        sweep = [argument for argument in sys.argv[1:] if argument in ("-m", "--multirun")]
        sys.argv[1:] = sweep + [argument for argument in sys.argv[1:] if argument not in sweep]
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra prints its errors itself, at length
        guard(main)
        leave()

    return start


def compose(overrides: Sequence[str] = (), name: str = "train") -> Config:
    """The checked configuration of a command line, for tests and scripts."""
    register()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return typed(hydra.compose(name, overrides=list(overrides)))


def typed(raw: DictConfig, *, checked: bool = True) -> Config:
    """Composed YAML as the dataclass, with the rules between fields checked by default.

    Raises:
        ConfigError: a value is missing or contradicts another.
    """
    # `+key=value` gets past the schema; a key that nothing reads must not look as if it had worked.
    schema = OmegaConf.structured(Config)
    for key in sorted(set(_keys(raw)) - set(_keys(schema))):
        raise _unknown(key, schema)
    try:
        cfg = OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0].rstrip("."), fix="see python -m elmd.train --help") from error
    assert isinstance(cfg, Config)
    if checked:
        check(cfg)
    return cfg


def run(cfg: Config, action: Action) -> None:
    """Start accelerate as the configuration says and act."""
    # Read when transformers is loaded: not yet, since half of the stages do without it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    log.setup()
    if _multirun():
        log.logger.info("job %s of the sweep: %s", HydraConfig.get().job.num, HydraConfig.get().job.override_dirname)
    # peft still asks transformers under the old name; nothing a user could do about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    if (threads := cpu_threads(cfg)) is not None:
        torch.set_num_threads(threads)
    # The others wait for hours where rank 0 works alone, or for another job's lock.
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(cpu=cfg.cpu, kwargs_handlers=[waiting])
    if accelerator.num_processes != (started := int(os.environ.get("WORLD_SIZE", "1"))):
        raise ConfigError(
            f"the launcher started {started} processes, and each would run alone",
            where="cpu",
            fix="add cpu=true to run them on CPU, or start one process",
        )
    action(cfg, accelerator)


def cpu_threads(cfg: Config) -> int | None:
    """Threads of torch on the CPU; None leaves torch's own choice.

    With the stand-in for the language model it is one unless the user says otherwise: small tensors gain nothing from a
    second thread, and two that wait for each other on a busy machine can take fifty times as long.
    """
    return 1 if cfg.threads is None and cfg.llm.path == BOOTSTRAP else cfg.threads


def leave() -> None:
    """Leave the other processes, at the successful end of a command.

    The communication threads that are still there when the interpreter shuts down may abort the process (gloo, seen
    as SIGABRT after finished work). Not after an error: leaving waits for what a dead peer will never answer.
    """
    if "torch" in sys.modules:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def guard(act: Callable[[], Any]) -> None:
    """Run `act`; an error becomes one sentence on standard error and exit code 1, a traceback only on request."""
    try:
        act()
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("ELMD_DEBUG") == "1":
            raise
        if isinstance(error, HydraException | OmegaConfBaseException):
            error = composition_error(error)
        if isinstance(error, RuntimeError) and "torch" in sys.modules:
            from elmd.training.loop import peer_died

            if peer_died(error):
                error = TrainingError(
                    "another process of this run died",
                    fix="see its own error, and run the same command to resume",
                )
        message = (
            str(error)
            if isinstance(error, ElmdError)
            else f"{type(error).__name__}: {error}\nThis looks like a bug in ELMD; ELMD_DEBUG=1 shows where."
        )
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def composition_error(error: Exception) -> ConfigError:
    """Hydra's error about a command line, as one sentence."""
    text = str(error)
    if match := re.match(r"Could not override '([^']+)'", text):
        return _unknown(match[1], OmegaConf.structured(Config))
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, choice = match[1].rpartition("/")
        choices = ", ".join(sorted(path.stem for path in (config_dir() / group).glob("*.yaml")))
        return ConfigError(f"there is no choice {choice!r}", where=group, fix=f"choose from {choices}")
    if match := re.match(r"Error merging override ([^=]+)=", text):
        return ConfigError(str(error.__cause__).splitlines()[0].rstrip("."), where=match[1], fix="see --help")
    lines = [line for line in text.splitlines() if line.strip()]
    where = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key")), None)
    return ConfigError(lines[0].rstrip("."), where=where, fix="see --help, or --cfg job for every key")


def _unknown(key: str, schema: DictConfig) -> ConfigError:
    near = difflib.get_close_matches(key, _keys(schema), n=1)
    fix = f"did you mean {near[0]}" if near else "--cfg job prints every key"
    return ConfigError(f"there is no key {key!r}", where="configuration", fix=fix)


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    """Every key below `node`, dotted."""
    names = []
    for key in node:
        dotted = prefix + str(key)
        names.append(dotted)
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            names += _keys(node[key], dotted + ".")
    return names


def experiment_folder(cfg: Config) -> Path:
    """`runs/experiments/<name>/`; each job of a sweep has its own folder there, named by what the job sets."""
    folder = Path(cfg.runs_dir) / "experiments" / cfg.experiment_name
    job = HydraConfig.get().job.override_dirname or "job" if _multirun() else cfg.job
    return folder / job_name(job) if job else folder


def job_about(cfg: Config) -> dict[str, Any]:
    """What `artifacts.json` says of this process's job: its name and its `axes`; both null outside a sweep."""
    if HydraConfig.initialized() and (_multirun() or cfg.job):
        return {"job": experiment_folder(cfg).name, "axes": axes(HydraConfig.get(), cfg)}
    return {"job": None, "axes": None}


def unnamed() -> list[str]:
    """Keys that are left out of the name of a sweep's job: those that do not change its results."""
    return [
        "experiment",
        *(name for name, info in described(Config) if not info.counts or (info.place and not info.named)),
    ]


def axes(job: HydraConf | DictConfig, cfg: Config) -> dict[str, Any]:
    """What a job of a sweep sets that can tell its results from another job's: dotted key -> value, group -> choice.

    Args:
        job: Hydra's own configuration of the job, with its overrides.
        cfg: what the overrides compose to.
    """
    left_out = unnamed()
    values: dict[str, Any] = {}
    for override in job.overrides.task:
        key, _, choice = override.lstrip("+~").partition("=")
        if key not in left_out:
            value: Any = plain(cfg)
            for name in key.split("."):
                value = value.get(name, {}) if isinstance(value, dict) else {}
            values[key] = choice if isinstance(value, dict) else value
    return values


def _multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def job_name(job: str) -> str:
    """The folder of a job: file systems take names of 255 bytes, and a longer name ends in its digest instead."""
    if len(job.encode()) <= LONGEST:
        return job
    # What a reader looks for must not fall into the part that is cut.
    parts = sorted(job.split(","), key=lambda part: not part.startswith(AXES))
    return f"{','.join(parts).encode()[:LONGEST].decode(errors='ignore')}…{digest(job)}"


def register() -> None:
    """Make known to Hydra the schema, and what it says of keys."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("unnamed", unnamed, replace=True)
