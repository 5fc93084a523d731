"""Bad data: one sentence with the file and the place; odd data that can be used: a counted warning.

Clips that exist but cannot be decoded are in the tests of vision.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bad_data import CASES, HTML, Make, annotation, cped, edit, jsonl, lines, m3ed, table
from elmd.data.readers import dataset
from elmd.data.readers.cped import read_cped
from elmd.data.readers.jsonl import read_jsonl
from elmd.data.readers.m3ed import read_m3ed
from elmd.data.readers.source import ClipTemplate, Source
from elmd.data.samples import prepare
from elmd.errors import DataError, ElmdError

READERS: dict[str, Callable[..., Source]] = {"cped": read_cped, "m3ed": read_m3ed, "jsonl": read_jsonl}


@pytest.mark.parametrize("name", CASES)
def test_reader_names_file_and_place(name: str, tmp_path: Path) -> None:
    make, message = CASES[name]
    reader, path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare(READERS[reader](path), split="dialogue")
    assert re.search(message, str(caught.value)), caught.value
    assert caught.value.fix, "an error says what to do next"


# --- bad, but the text is still usable: a counted warning that names the place -------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "warning", "place"),
    [
        ("end before start", annotation('"00:00:01:20"', '"00:00:00:20"'), "EndTime before StartTime", "show0_0_1"),
        ("zero-length", annotation('"00:00:01:20"', '"00:00:01:00"'), "zero-length span", "show0_0_1"),
        ("zero-length clip", lines(clip="1.mp4", start=1, end=1), "zero-length span", "d.jsonl:4: utterance 2"),
        ("FF >= 25", annotation('"00:00:01:20"', '"00:00:01:25"'), "frame number of 25 or more", "show0_0_1"),
        ("stray spaces", annotation('"00:00:01:20"', '" 00:00: 01:20"'), "with spaces", "show0_0_1"),
        ("one digit", annotation('"00:00:01:20"', '"00:0:01:20"'), "another number of digits", "show0_0_1"),
        ("comma list", annotation('mul_emo": "Happy"', 'mul_emo": "Happy,Sad"'), "several emotions", "show0_0_1"),
        ("gap in ids", annotation('"show0_0_2"', '"show0_0_4"'), "gap in the numbering", "show0_0_1 and show0_0_4"),
        ("no name", annotation('"Name": "甲"', '"Name": ""'), "speaker without a name", "show0_0/SpeakerInfo/A"),
        ("one speaker", annotation('"Speaker": "B"', '"Speaker": "A"'), "dialogue of one speaker", "show0_0"),
        ("line break", table("第0句", '"第0\r\n句"'), "line break inside a text", "cped.csv:3"),
        (
            "rows apart",
            table("1_029,1_029_001", "1_000,1_000_002"),
            "rows of one dialogue in different places",
            "cped.csv:61",
        ),
        ("unknown key", lines(cilp="1.mp4"), "did you mean 'clip'", "d.jsonl:4: utterance 2"),
    ],
)
def test_what_is_usable_is_read_with_a_counted_warning(
    name: str, make: Make, warning: str, place: str, tmp_path: Path
) -> None:
    reader, path = make(tmp_path)
    counts = prepare(READERS[reader](path), split="dialogue").counts
    matches = {what: note for what, note in counts["notes"].items() if warning in what}
    assert len(matches) == 1, counts["notes"]
    note = next(iter(matches.values()))
    assert note["count"] == 1
    assert place in note["example"]
    assert counts["sentences"] == 60, "no text is lost"


def test_good_data_warns_of_nothing(tmp_path: Path) -> None:
    """The cases above start from these, so a warning or error there comes from what was spoilt."""
    sources = (
        read_m3ed(m3ed(tmp_path / "m")),
        read_cped(cped(tmp_path / "c.csv")),
        read_jsonl(jsonl(tmp_path / "d.jsonl")),
    )
    for source in sources:
        counts = prepare(source, split="dialogue").counts
        assert not counts["notes"]
        assert (counts["dialogues"], counts["sentences"], counts["pairs"]) == (30, 60, 30)


# --- the small files beside the data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("happy,Happy\n", r"map\.csv:1: the first row must be a header"),
        ("label,emotion\nhappy,Hapy\n", r"map\.csv:2: 'Hapy' is none of the seven emotions; did you mean 'Happy'\?"),
        ("label,emotion\nhappy,Happy\nhappy,Sad\n", r"map\.csv:3: the label 'happy' is mapped twice"),
        ("label,emotion\nhappy\n", r"map\.csv:2: 1 fields where `label,emotion` is expected"),
        (HTML, r"map\.csv:1: this is a web page"),
    ],
)
def test_a_bad_emotion_map(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        dataset("cped").source(cped(tmp_path / "c.csv"), tmp_path / "map.csv", None, "")


@pytest.mark.parametrize(
    ("template", "show", "message"),
    [
        ("{show}/{dialog}.mp4", "show0", r"data\.video_template: .* holds a field that does not exist; use \{show\}"),
        ("{show.__class__}", "show0", "holds a field that does not exist"),
        ("../{dialogue}.mp4", "show0", r"leads out of data\.video_root"),
        ("/etc/{dialogue}.mp4", "show0", r"leads out of data\.video_root"),
        ("{show}/1.mp4", "..", r"annotation\.json: \.\./show0_0/show0_0_1: show id '\.\.' cannot be part of a path"),
        ("{show}/1.mp4", "../../x", r"show id '\.\./\.\./x' cannot be part of a path below data\.video_root"),
    ],
)
def test_no_video_lies_outside_its_root(template: str, show: str, message: str, tmp_path: Path) -> None:
    folder = m3ed(tmp_path / "m")
    edit(folder / "annotation.json", '"show0": {', f'"{show}": {{')
    (folder / "splitInfo" / "movie_list_train.txt").write_text(show)
    with pytest.raises(ElmdError, match=message):
        read_m3ed(folder, clips=ClipTemplate(tmp_path, template))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.csv: no such file; check data\.path and the layout in data/README\.md"):
        read_cped(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"no such folder; give the folder that holds annotation\.json"):
        read_m3ed(tmp_path / "x")
    (m3ed(tmp_path / "m") / "splitInfo" / "movie_list_val.txt").unlink()
    with pytest.raises(DataError, match=r"movie_list_val\.txt: no such file"):
        read_m3ed(tmp_path / "m")
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path)
