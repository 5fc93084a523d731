"""Fingerprints and results are those on record: `tests/frozen/record.py` makes the records and says what they cover.

Its texts hold everywhere. Its numbers hold for the recorded versions of the libraries on x86-64 with AVX2, where the
libraries are kept to one path; elsewhere they are not compared.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from frozen import record

AGAIN = "If this is meant, `python tests/frozen/record.py` records anew; say in the commit what moved and why."


@pytest.mark.parametrize("group", record.groups())
def test_fingerprints(group: str, tmp_path: Path) -> None:
    combinations = record.groups()[group]
    recorded = record.read("fingerprints")
    expected = {name: recorded[name] for name in combinations if name in recorded}
    moved = record.differences(expected, record.fingerprints(combinations, tmp_path))
    assert not moved, "\n".join([*moved, AGAIN])


def test_nothing_on_record_is_left_out() -> None:
    combinations = {name for group in record.groups().values() for name in group}
    assert record.read("fingerprints").keys() == combinations


def test_a_change_of_what_is_shared_is_found() -> None:
    old: record.Fingerprints = {"a": {"erm": "1", "rep": "2"}, "b": {"erm": "1", "rep": "3"}, "c": "ConfigError"}
    renamed: record.Fingerprints = {"a": {"erm": "x", "rep": "y"}, "b": {"erm": "x", "rep": "z"}, "c": "ConfigError"}
    assert record.differences(old, old) == []
    assert record.partition_changes(old, renamed) == []
    assert record.differences(old, renamed)[-1].startswith("What configurations share is as before")
    split: record.Fingerprints = {**renamed, "b": {"erm": "w", "rep": "z"}}
    assert record.partition_changes(old, split) == ["shared no more: erm of [a] and erm of [b]"]
    merged: record.Fingerprints = {**renamed, "b": {"erm": "x", "rep": "y"}}
    assert record.partition_changes(old, merged) == ["shared now: rep of [a] and rep of [b]"]
    assert record.differences(old, {**old, "c": {"erm": "1"}})[0] == "[c]: ConfigError -> accepted"


@pytest.fixture(scope="module")
def hashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return record.chain_hashes(tmp_path_factory.mktemp("frozen").resolve())


@pytest.mark.slow
def test_texts_of_a_tiny_chain(hashes: dict[str, dict[str, str]]) -> None:
    assert hashes["texts"] == record.read("chain")["texts"], AGAIN


@pytest.mark.slow
def test_numbers_of_a_tiny_chain(hashes: dict[str, dict[str, str]]) -> None:
    recorded, here = record.read("chain"), record.platform_now()
    if here != recorded["made_with"]:
        pytest.skip(f"the numbers on record hold for {recorded['made_with']}, and here is {here}")
    assert hashes["numbers"] == recorded["numbers"], AGAIN
