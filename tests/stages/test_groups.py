"""The groups of the configuration directory: a choice says what its file states, whatever is chosen beside it."""

from __future__ import annotations

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


@pytest.mark.parametrize("group", GROUPS)
def test_no_choice_of_another_group_changes_what_a_file_states(group: str) -> None:
    assert CHOICES[group]
    others = [f"{other}={choice}" for other in GROUPS if other != group for choice in CHOICES[other]]
    for choice in CHOICES[group]:
        assert "@package" not in (CONFIGS / group / f"{choice}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        wanted = stated(group, choice)
        # One composition has a choice of every other group; each choice of each occurs in one.
        rounds = max(len(CHOICES[other]) for other in GROUPS if other != group)
        for number in range(rounds):
            beside = [f"{o}={CHOICES[o][number % len(CHOICES[o])]}" for o in GROUPS if o != group]
            values = composed(f"{group}={choice}", *beside)[group]
            assert {key: values[key] for key in wanted} == wanted, (group, choice, beside)
    assert len(others) >= 10


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
