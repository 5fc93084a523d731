"""Atomic writing and strict reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elmd.engine.files import (
    DuplicateKeyError,
    atomic,
    parse_json,
    read_json,
    read_lines,
    read_object,
    write_json,
    write_lines,
    write_text,
)
from elmd.errors import CheckpointError, DataError


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    write_text(path, "old\n")

    def fail() -> None:
        with atomic(path) as new:
            new.write_text("half")
            assert path.read_text() == "old\n"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old\n"
    write_text(path, "new\n")
    assert path.read_text() == "new\n"
    assert [file.name for file in path.parent.iterdir()] == ["x.txt"], "nothing else is left"


def test_values_survive_the_file(tmp_path: Path) -> None:
    value = {"text": "一\u2028二\n", "numbers": [1, 2.5, None]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    write_lines(tmp_path / "x.jsonl", [value, "\u2029"])
    assert read_lines(tmp_path / "x.jsonl", lambda line: line, "value", fix="write it") == [value, "\u2029"]


def test_a_duplicate_key_is_refused_with_its_place() -> None:
    assert parse_json('{"a": 1, "b": {"a": 1}}') == {"a": 1, "b": {"a": 1}}
    with pytest.raises(DuplicateKeyError, match="the key 'x' occurs twice") as caught:
        parse_json('{"a": [0, {"b": {"x": 1, "y": 2, "x": 3}}]}')
    assert (caught.value.key, caught.value.trail) == ("x", ["a", "1", "b"])


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000], ids=["cut", "deep", "long"])
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"{", r"is not JSON \(Expecting property name"),
        (b"\xff\xfe{", r"is not JSON \('utf-8' codec"),
        (b'{"a": 1, "a": 2}', r"is not JSON \(the key 'a' occurs twice\)"),
        (b"[]", "is not a JSON object"),
    ],
)
def test_an_object_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.json: {message}.*; get it again\.$"):
        read_object(path, CheckpointError, "get it again")


def test_a_line_that_is_not_what_it_should_be_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n{}\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2: not a number \(KeyError: 'a'\); make it again"):
        read_lines(path, lambda record: record["a"], "number", fix="make it")
