"""The groups of the configuration directory: a choice says what its file states, whatever is chosen beside it."""

from __future__ import annotations

from itertools import combinations
from random import Random

import hydra
import pytest
import yaml
from hydra.core.config_loader import ConfigLoader  # noqa: F401  (its import registers Hydra's loaders)
from omegaconf import OmegaConf

from conftest import ROOT
from elmd.cli import config_dir, register

CONFIGS = ROOT / "configs"
#: Groups that name one component or one stage; experiments, baselines and ablations set keys of many by intention.
GROUPS = ("data", "llm", "vision", "retriever", "prompt", "erm", "rep", "eerg", "generate")
CHOICES = {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in GROUPS}


def composed(*overrides: str) -> dict:
    register()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("train", overrides=list(overrides)))


def stated(group: str, choice: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{choice}.yaml"))


def covering() -> list[dict[str, str]]:
    """Combinations of a choice of each group in which every two choices of different groups occur together."""
    missing = {frozenset({(a, x), (b, y)}) for a, b in combinations(GROUPS, 2) for x in CHOICES[a] for y in CHOICES[b]}
    chosen, draw = [], Random(0)
    while missing:
        drawn = ({group: draw.choice(CHOICES[group]) for group in GROUPS} for _ in range(40))
        best = max(drawn, key=lambda drawn_choices: len(missing & _pairs(drawn_choices)))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(combination: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in combinations(combination.items(), 2)}


def test_no_choice_of_a_group_changes_what_the_file_of_another_states() -> None:
    files = {(group, choice): stated(group, choice) for group in GROUPS for choice in CHOICES[group]}
    assert len(files) >= 25
    for combination in covering():
        values = composed(*(f"{group}={choice}" for group, choice in combination.items()))
        for group, choice in combination.items():
            wanted = files[group, choice]
            assert {key: values[group][key] for key in wanted} == wanted, (group, combination)


def test_a_group_file_is_of_its_group() -> None:
    for group in GROUPS:
        assert CHOICES[group]
        for choice in CHOICES[group]:
            assert "@package" not in (CONFIGS / group / f"{choice}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        ([], (1e-2, 1e-3, 800)),
        (["eerg=safe"], (2e-2, 2e-5, 3000)),
        (["eerg=lora"], (1e-4, 2e-5, 3000)),
        (["llm=auto"], (2e-2, 2e-2, 3000)),
        (["llm=auto", "eerg=safe"], (2e-2, 2e-5, 3000)),
    ],
)
def test_rates_follow_the_language_model_unless_they_are_chosen(overrides: list[str], rates: tuple) -> None:
    eerg = composed(*overrides)["eerg"]
    assert (eerg["lr_adapter"], eerg["lr_projector"], eerg["steps"]) == rates


def test_files_state_no_default_of_the_schema_again() -> None:
    from elmd.config import Config
    from elmd.engine.keys import plain

    defaults = plain(Config())
    for group in GROUPS:
        for choice in CHOICES[group]:
            text = (CONFIGS / group / f"{choice}.yaml").read_text(encoding="utf-8")
            again = [
                key
                for key, value in (yaml.safe_load(text) or {}).items()
                if defaults[group].get(key) == OmegaConf.create({"x": value}).x
            ]
            assert not again, f"{group}/{choice}.yaml: {again}"
