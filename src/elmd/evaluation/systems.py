"""What tables call a system: the full model, the baselines, the ablations, and the values that a sweep varies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elmd.engine.files import digest

#: The full model's name in every table; "ours" in the paper's.
FULL = "ELMD"

#: Baselines by `baseline.name`, in Table 2's order. VisualGLM itself is ChatGLM-1, which is not run here: ELMD's parts
#: arranged as VisualGLM, on another backbone, must not pass for it.
BASELINES = {"livebot": "Livebot", "dialogpt": "DialoGPT", "visualglm": "VisualGLM-style"}

#: Baselines that are networks of their own, by name in tables, and the keys of ELMD that they do not read.
NETWORKS = ("Livebot", "DialoGPT")
ELMDS_OWN = ("llm", "retriever", "prompt", "bootstrap", "erm", "rep", "eerg")

#: Ablations by `ablation_name`, in Table 3's order.
ABLATIONS = {"no_erm": "w/o ERM", "no_ert": "w/o ERT", "no_ssc": "w/o SSC", "no_v": "w/o V", "no_rep": "w/o REP"}

#: What the paper calls the numbers that its figures vary.
SYMBOLS = {"erm.slots": "s", "vision.frames": "m"}

#: Axes of a sweep that the system's name or the seed shows already.
SHOWN = ("seed", "baseline", "baseline.name", "ablation", "ablation_name")

#: Longest value that a system's name holds in full; of a longer one (a prompt's text) it holds a digest.
LONGEST_VALUE = 24


def system_name(config: Mapping[str, Any]) -> str:
    """What tables call the system of a resolved configuration: "ELMD", "w/o ERM", "DialoGPT"."""
    baseline, ablation = kind_of(config)
    parts = [BASELINES.get(baseline, baseline)] if baseline != "none" else []
    if ablation != "none":
        parts.append(ABLATIONS.get(ablation, ablation if parts else f"{FULL}, {ablation}"))
    return ", ".join(parts or [FULL])


def kind_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Baseline and ablation of a configuration, "none" each for the full model."""
    return str(config["baseline"]["name"]), str(config["ablation_name"])


def with_labels(system: str, settings: Mapping[str, Any], keys: Iterable[str]) -> str:
    """A system's name with what a sweep sets for it: "ELMD, s = 2"; keys that it does not read are left out."""
    ours = [key for key in keys if key in settings]
    if system.startswith(NETWORKS):
        ours = [key for key in ours if key.partition(".")[0] not in ELMDS_OWN]
    return ", ".join([system, *(_label(key, settings[key]) for key in ours)])


def position(config: Mapping[str, Any], system: str) -> tuple[Any, ...]:
    """Sort key of table order: baselines as in Table 2, the full model, ablations as in Table 3; then values of what is
    varied by size (s = 2 before s = 16)."""
    baseline, ablation = kind_of(config)
    places = [
        names.index(name) if name in names else len(names)
        for name, names in ((baseline, [*BASELINES, "none"]), (ablation, ["none", *ABLATIONS]))
    ]
    values = [part.rpartition("=")[2].strip() for part in system.split(", ")[1:]]
    return *places, ablation, [_by_size(value) for value in values], system


def settings_of(config: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a run by dotted key, and the choice of each group by the group's name."""
    return {**_flat(config), **axes}


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys whose values are not equal in all of these settings."""
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({json.dumps(values.get(key), default=str) for values in settings}) > 1]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{key}.")
            if "name" in value:
                values[prefix + key] = value["name"]
        else:
            values[prefix + key] = value
    return values


def _label(key: str, value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text if len(text) <= LONGEST_VALUE else digest(text)[:6]
    return f"{SYMBOLS[key]} = {text}" if key in SYMBOLS else f"{key.removesuffix('.name')}={text}"


def _by_size(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0.0, text
