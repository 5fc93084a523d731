"""Which decoder is the default: decord where it has wheels and so is installed, else PyAV."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib.machinery import ModuleSpec

import pytest
from packaging.requirements import Requirement

from conftest import ROOT
from elmd.config import Decoder, VisionConfig
from elmd.vision import default_decoder


@pytest.mark.parametrize(("installed", "decoder"), [(True, "decord"), (False, "pyav")])
def test_the_default_is_what_is_installed(monkeypatch: pytest.MonkeyPatch, installed: bool, decoder: str) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None) if installed else None

    monkeypatch.setattr("elmd.vision.find_spec", find_spec)
    assert default_decoder() == decoder
    assert VisionConfig().decoder is Decoder(decoder), "of the configuration"
    assert VisionConfig(decoder=Decoder.decord).decoder is Decoder.decord, "whoever names one gets it"


def test_this_machine_has_the_decoder_that_its_default_names() -> None:
    assert importlib.util.find_spec({"pyav": "av"}.get(default_decoder(), "decord"))


@pytest.mark.parametrize(
    ("system", "machine", "wheels"),
    [
        ("Linux", "x86_64", True), ("Windows", "AMD64", True), ("Linux", "aarch64", False), ("Darwin", "arm64", False),
        ("Darwin", "x86_64", False),
    ],
)  # fmt: skip
def test_decord_is_required_where_it_has_wheels(system: str, machine: str, wheels: bool) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [decord] = [line for line in project["dependencies"] if line.startswith("decord")]
    marker = Requirement(decord).marker
    assert marker is not None
    assert marker.evaluate({"platform_system": system, "platform_machine": machine}) is wheels
