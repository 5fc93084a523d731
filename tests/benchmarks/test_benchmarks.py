"""How benchmarks run, and those of retrieval and generation once at their smallest size: their ways agree."""

from __future__ import annotations

import gc
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="peers of the benchmarks are not installed (pip install -e '.[bench]')")

from benchmarks import __main__ as bench
from benchmarks import encode, erm, generation, retrieval
from benchmarks.harness import Case, Unequal, Way, measure


@pytest.mark.parametrize("module", [erm, encode, retrieval, generation])
def test_its_ways_agree(module) -> None:
    for case in module.cases(small=True):
        measure(case, 1)
        assert len(case.ways) > 1
        compared = case.tolerance is not None and all(way.same for way in case.ways)
        assert compared or case.note, "what is not compared is told"


def test_a_trainer_with_another_loss_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, step = erm.cases(small=True)
    monkeypatch.setattr(erm.ERM, "temperature", 0.51)  # elmd's way has its own already
    with pytest.raises(Unequal, match=r"trainer, eq\. 4, losses|trainer, eq\. 4 and elmd"):
        measure(step, 1)


def test_what_is_frozen_for_a_run_is_not_for_the_next() -> None:
    gc.unfreeze()
    *_, step = erm.cases(small=True)
    for way in step.ways:
        way.before()
        way.run()
        assert gc.get_freeze_count() == 0


def test_recall_is_held_against_double_precision() -> None:
    """On trained vectors and on others; what is built on all cores leaves the threads of the search as they were."""
    threads = torch.get_num_threads()
    exact, near = {}, {}
    for i, case in enumerate(retrieval.cases(small=True)):
        facts = {way.name: way.facts() for way in case.ways}
        assert facts[case.ways[0].name].items() >= {"recall@1": 1.0, "recall@10": 1.0}.items()
        (near if i % 2 else exact)[case.size] = facts
        assert torch.get_num_threads() == threads
    assert [size.split("; ")[1].split(" ")[0] for size in exact] == ["e_u", "E_s", "made"]
    assert all(facts["torch, double, topk"]["recall@10"] > 0.999 for facts in exact.values())
    assert all(0.9 < one["recall@1"] <= 1 for facts in near.values() for one in facts.values())


def test_what_an_index_does_not_find_lowers_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = retrieval.clustered(220, 16)
    cases = list(retrieval.compared(rows[:200], rows[200:], ""))
    monkeypatch.setattr(retrieval, "searched", lambda *_: retrieval.Neighbours(torch.full((20, 10), -1), None))
    for case in cases:
        recalls = {way.name: way.facts()["recall@10"] for way in case.ways}
        assert all((recall == 0) == name.startswith("FAISS") for name, recall in recalls.items())


def test_an_exact_way_that_finds_others_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, search = retrieval.clustered(220, 16), retrieval.searched

    def next_to_it(*asked: Any) -> Any:
        found = search(*asked)
        return found._replace(positions=(found.positions + 1) % 200)

    monkeypatch.setattr(retrieval, "searched", next_to_it)
    with pytest.raises(Unequal, match="FAISS, flat finds candidates that are less near"):
        next(retrieval.compared(rows[:200], rows[200:], ""))


@pytest.mark.parametrize("wrong", [math.nan, torch.tensor([1.0, math.nan]), [torch.tensor(math.inf)]])
def test_what_is_not_finite_equals_nothing(wrong: Any) -> None:
    right = {float: 1.0, list: [torch.tensor(1.0)]}.get(type(wrong), torch.tensor([1.0, 2.0]))
    for one, other in ((wrong, right), (right, wrong), (wrong, wrong)):
        ways = [Way("elmd", lambda one=one: one), Way("other", lambda other=other: other)]
        with pytest.raises(Unequal, match="not finite"):
            measure(Case("", "", ways, tolerance=1.0), 1)


def test_many_candidates_get_a_graph_with_fewer_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MANY", 100)
    rows = retrieval.clustered(220, 16)
    exact, near = retrieval.compared(rows[:200], rows[200:], "")
    assert [way.name for way in exact.ways] == ["elmd", "FAISS, flat"]
    assert "left out" in exact.note
    assert "FAISS, HNSW (16 links)" in [way.name for way in near.ways]
    assert "half the links" in near.note


def test_a_case_is_told_as_a_table() -> None:
    done: list[str] = []

    def run() -> tuple[torch.Tensor, list[int]]:
        done.append("run")
        return torch.arange(3.0), [1, 2]

    slow = Way("slow", run, facts=lambda: {"MiB": 7}, before=partial(done.append, "before"))
    found = measure(Case("Something", "3 numbers", [Way("elmd", lambda: (torch.arange(3.0), [1, 2])), slow], per=3,
                         unit="numbers"), 3)  # fmt: skip
    assert done == ["before", "run"] * 4, "once to compare, and three rounds"
    lines = found.markdown().splitlines()
    assert lines[0] == "**Something**. 3 numbers"
    assert lines[2] == "| way | median, ms | least – most | × elmd | numbers/s | MiB |"
    assert lines[4].split(" | ")[3] == "1"
    assert lines[5].endswith("| 7 |")
    middle, low, high = found.timings[1].ratio
    assert low <= middle <= high
    assert len(found.json()["timings"][0]["seconds"]) == 3


def test_no_ratio_without_a_reference() -> None:
    ways = [Way("one", lambda: 1), Way("two", lambda: 2)]
    found = measure(Case("Things", "2", ways, tolerance=None, reference=False), 1)
    lines = found.markdown().splitlines()
    assert lines[2] == "| way | median, ms | least – most |"
    assert [line.count("|") for line in lines[2:6]] == [4] * 4
    assert all(not timing["ratio"] for timing in found.json()["timings"])


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (torch.tensor([1.001]), torch.tensor([1.0]), r"b and a differ by 1\.0e-03"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0]), "shapes"),
        ([1, 2], [1, 3], "2 and 3"),
        ({"x": [1]}, {"x": [1, 2]}, "1 and 2 values"),
        ({"x": 1}, {"y": 1}, r"\['x'\] and \['y'\]"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "tensor"),
    ],
)
def test_ways_that_differ_are_not_timed(one: object, other: object, message: str) -> None:
    ways = [Way("a", lambda: other), Way("b", lambda: one)]
    with pytest.raises(Unequal, match=message):
        measure(Case("t", "s", ways), 1)
    measure(Case("t", "s", [ways[0], Way("b", lambda: one, same=False)]), 1)


def test_measurements_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {"generate": bench.BENCHMARKS["generate"]})
    monkeypatch.setattr("sys.argv", ["benchmarks", "--small", "--rounds", "1", "--json", str(tmp_path / "x.json")])
    bench.main()
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert written["benchmarks"]["generate"][0]["title"] == "Greedy replies"
    assert "| generate, one by one |" in capsys.readouterr().out


def test_what_is_not_installed_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {"erm": ("benchmarks.no_such_peer", "")})
    monkeypatch.setattr("sys.argv", ["benchmarks", "--small"])
    bench.main()
    assert (
        "erm: left out, benchmarks.no_such_peer is not installed (pip install -e '.[bench]')" in capsys.readouterr().err
    )
    monkeypatch.setattr("sys.argv", ["benchmarks", "--small", "erm"])
    with pytest.raises(SystemExit):
        bench.main()
