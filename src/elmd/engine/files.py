"""Reading and writing: files that are whole or absent, JSON without duplicate keys, hashes of contents."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from elmd.errors import DataError, ElmdError, reason

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------- writing
@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write to. At the end it is flushed to disk and renamed; on an error it is removed.

    A reader of `path` sees the old file or the whole new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")  # two jobs may write at once
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    with atomic(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people, indented, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write JSONL, one record a line, atomically."""
    with atomic(path) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def replace_folder(new: Path, folder: Path) -> None:
    """Give `new` the name `folder`, removing what had it."""
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)


# ---------------------------------------------------------------------------------------------------------- reading
class DuplicateKeyError(ValueError):
    """A JSON object holds `key` twice; Python alone would silently keep the last.

    Attributes:
        key: the key.
        trail: keys and positions that lead from the whole value to the object.
    """

    def __init__(self, key: str, trail: list[str]):
        super().__init__(f"the key {key!r} occurs twice")
        self.key, self.trail = key, trail


class _Marked(dict[str, Any]):
    """A JSON object that held `key` twice."""

    key = ""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON.
        DuplicateKeyError: an object holds a key twice.
        ValueError: it is nested too deeply, or holds a number of thousands of digits.
    """
    marked: list[_Marked] = []

    def build(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) == len(items):
            return value
        names = [name for name, _ in items]
        marked.append(_Marked(value))
        marked[-1].key = next(name for i, name in enumerate(names) if name in names[:i])
        return marked[-1]

    try:
        value = json.loads(text, object_pairs_hook=build)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if marked:
        raise DuplicateKeyError(marked[0].key, _trail(value, marked[0]) or [])
    return value


def _trail(value: Any, target: dict[str, Any]) -> list[str] | None:
    """Keys and positions that lead from `value` to `target`."""
    if value is target:
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        rest = _trail(item, target)
        if rest is not None:
            return [str(key), *rest]
    return None


def read_json(path: Path) -> Any:
    """The value of a JSON file in UTF-8.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 or not JSON, or an object in it holds a key twice (see `parse_json`).
    """
    return parse_json(path.read_text(encoding="utf-8-sig"))


def read_object(path: Path, error: type[ElmdError], fix: str) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        error: it is missing or cannot be read, is not JSON, or holds another value than an object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise error("is missing", where=path, fix=fix) from None
    except OSError as cause:
        raise error(f"cannot be read ({cause.strerror or reason(cause)})", where=path, fix=fix) from cause
    except ValueError as cause:
        raise error(f"is not JSON ({reason(cause)})", where=path, fix=fix) from cause
    if not isinstance(value, dict):
        raise error("is not a JSON object", where=path, fix=fix)
    return value


def read_lines(path: Path, build: Callable[[Any], T], what: str, fix: str) -> list[T]:
    """What `build` makes of each line of a JSONL file that `write_lines` wrote.

    Args:
        build: makes the result from a line's value; whatever it does not accept is a KeyError, TypeError,
            AttributeError or ValueError.
        what: what a line holds, for the message.

    Raises:
        DataError: the file cannot be read, or a line is no `what`.
    """
    results = []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                try:
                    results.append(build(json.loads(line)))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    message = f"not a {what} ({type(error).__name__}: {error})"
                    raise DataError(message, where=f"{path}:{number}", fix=f"{fix} again") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix=fix) from None
    return results


# ----------------------------------------------------------------------------------------------------------- hashes
def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a JSON-ready value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
