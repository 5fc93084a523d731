"""Human evaluation: the draw, what a blind page tells, files that are refused, Table 4 from made-up ratings."""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

import clips
from elmd.errors import DataError
from elmd.evaluation.paper import paper_kappa, paper_table
from elmd.evaluation.predictions import Prediction, write_predictions
from elmd.human.__main__ import main
from elmd.human.ratings import checksum, read_key, read_ratings
from elmd.human.score import kappas, score
from elmd.human.study import GROUND_TRUTH, draw, gather, write_study
from elmd.human.tables import human_document, write_result
from elmd.types import Sample, Utterance
from human_study import make_experiment, make_samples, rate, reply, write_ratings

Study = tuple[Path, dict[str, Any]]


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser sees them."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.comments: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def responses(self) -> list[str]:
        """Response ids in the order of the page."""
        ids = [attrs["data-response"] for tag, attrs in self.tags if tag == "fieldset"]
        return [str(id_) for id_ in dict.fromkeys(ids)]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    experiment = make_experiment(tmp_path / "runs", make_samples(12))
    key = write_study(tmp_path / "study", gather([str(experiment)]), n=8, raters=2, seed=0)
    return tmp_path / "study", key


def by_system(**scores: int) -> Callable[[list[str], str, str], int]:
    """A rater who knows the systems: names without blanks and hyphens -> score; 3 for others."""
    return lambda names, sample, metric: scores.get(names[0].replace("-", ""), 3)


# ------------------------------------------------------------------------------------------------------------- sampling
def test_the_same_seed_draws_the_same_samples_and_another_does_not(tmp_path: Path) -> None:
    pool = gather([str(make_experiment(tmp_path, make_samples(40)))])
    first, again, other = (draw(pool, 10, seed) for seed in (0, 0, 1))
    assert [s.id for s in first] == [s.id for s in again]
    assert {s.id for s in first} != {s.id for s in other}
    assert len({s.id for s in first}) == 10


def test_the_draw_does_not_depend_on_the_order_of_systems_and_samples(tmp_path: Path) -> None:
    pool = gather([str(make_experiment(tmp_path, make_samples(40)))])
    turned = replace(pool, systems=pool.systems[::-1], samples=dict(reversed(pool.samples.items())))
    assert [s.id for s in draw(pool, 10, 0)] == [s.id for s in draw(turned, 10, 0)]


def test_too_few_common_samples_are_told_with_numbers(tmp_path: Path) -> None:
    samples = make_samples(12)
    experiment = make_experiment(tmp_path, samples)
    write_predictions(tmp_path / "t.jsonl", [Prediction(s.id, "x", s.response.text) for s in samples[:5]])
    pool = gather([str(experiment), f"Theirs={tmp_path / 't.jsonl'}"])
    with pytest.raises(DataError, match=r"8 test samples are wanted, and all systems have 5 \(of 12: .*Theirs 5\)"):
        draw(pool, 8, 0)
    assert {s.id for s in draw(pool, 5, 0)} == {s.id for s in samples[:5]}


def test_only_the_test_split_is_rated(tmp_path: Path) -> None:
    samples = [replace(s, split="valid") if i < 6 else s for i, s in enumerate(make_samples(8))]
    pool = gather([str(make_experiment(tmp_path, samples))])
    assert {s.id for s in draw(pool, 2, 0)} == {s.id for s in samples[6:]}
    with pytest.raises(DataError, match="all systems have 2"):
        draw(pool, 3, 0)


def test_one_run_and_one_decoding_of_each_system_are_rated_and_recorded(tmp_path: Path) -> None:
    samples = make_samples(4)
    experiment = make_experiment(tmp_path, samples, seeds=(0, 1))
    for path in (experiment / "elmd-0").iterdir():  # seed 0 failed for one system: seed 1 is what all share
        path.unlink()
    (experiment / "elmd-0").rmdir()
    key = write_study(tmp_path / "study", gather([str(experiment)]), n=4, raters=1, seed=0)
    assert {name: (system["seed"], system["decode_seed"]) for name, system in key["systems"].items()} == {
        "ELMD": (1, 3),
        "DialoGPT": (1, 3),
    }
    assert "other" not in Page(tmp_path / "study" / "rater-1.html").texts


def test_another_reference_is_refused(tmp_path: Path) -> None:
    samples = make_samples(4)
    experiment = make_experiment(tmp_path, samples)
    write_predictions(tmp_path / "t.jsonl", [Prediction(s.id, "x", "something else") for s in samples])
    with pytest.raises(DataError, match="Theirs has another reference for the sample 'secret-dialogue-0#2'"):
        draw(gather([str(experiment), f"Theirs={tmp_path / 't.jsonl'}"]), 4, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nowhere"], "nowhere: no such folder; name an experiment's folder, or a file as NAME=predictions.jsonl"),
        (["A={file}"], "no experiment's folder is given"),
        (["{file}"], "this file needs a system's name; write NAME="),
        (["{experiment}", "A={file}", "A={file}"], "the name 'A' is given twice"),
        (["{experiment}", "ELMD={file}"], "the name 'ELMD' is taken"),
        (["{experiment}", "Ground-Truth={file}"], "the name 'Ground-Truth' is taken"),
        (["{experiment}", "{experiment}/elmd-0", "A={missing}"], "missing.jsonl: cannot be read"),
    ],
)
def test_what_is_no_system_is_told(tmp_path: Path, given: list[str], message: str) -> None:
    samples = make_samples(4)
    write_predictions(file := tmp_path / "t.jsonl", [Prediction(s.id, "x", s.response.text) for s in samples])
    places = {"file": file, "experiment": make_experiment(tmp_path, samples), "missing": tmp_path / "missing.jsonl"}
    with pytest.raises(DataError, match=message):
        gather([text.format(**places) for text in given])


def test_a_study_is_never_overwritten_and_a_failed_one_leaves_nothing(study: Study, tmp_path: Path) -> None:
    pool = gather([str(tmp_path / "runs" / "experiments" / "made")])
    before = (study[0] / "key.json").read_bytes()
    with pytest.raises(DataError, match="a study is never overwritten; choose another --out"):
        write_study(study[0], pool, n=8, raters=2, seed=0)
    assert (study[0] / "key.json").read_bytes() == before
    with pytest.raises(DataError, match="500 test samples are wanted"):
        write_study(tmp_path / "new", pool, n=500, raters=2, seed=0)
    with pytest.raises(DataError, match=r"cannot be made \((Not a directory|File exists)\); choose another --out"):
        write_study(study[0] / "key.json" / "new", pool, n=8, raters=2, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "study"]


# ------------------------------------------------------------------------------------------------------------- blinding
def test_a_page_never_holds_the_key(study: Study) -> None:
    folder, key = study
    for number in key["raters"]:
        text = (folder / f"rater-{number}.html").read_text(encoding="utf-8").lower()
        secrets = [*key["systems"], GROUND_TRUTH, "gold", "truth", "hypothesis", "reference", "predictions"]
        secrets += ["secret-dialogue", "key.json", "decode", "seed", "baseline", "elmd", "d0_1", str(folder), "runs/"]
        secrets += [system["sha256"] for system in key["systems"].values()]
        assert [word for word in secrets if word.lower() in text] == []


def test_ids_and_orders_follow_from_nothing(study: Study, tmp_path: Path) -> None:
    """Two studies of one seed share the samples, and neither an id nor an order; nor do two raters of one."""
    pool = gather([str(tmp_path / "runs" / "experiments" / "made")])
    twin = write_study(tmp_path / "twin", pool, n=8, raters=2, seed=0)
    sheets = [key["raters"][number] for key in (study[1], twin) for number in "12"]
    ids = [{id_ for item in sheet for id_ in item["responses"]} for sheet in sheets]
    assert sum(map(len, ids)) == len(set.union(*ids))
    assert len({tuple(item["sample"] for item in sheet) for sheet in sheets}) == 4
    assert len({frozenset(item["sample"] for item in sheet) for sheet in sheets}) == 1
    orders = [{item["sample"]: [tuple(n) for n in item["responses"].values()] for item in sheet} for sheet in sheets]
    assert all(order != other for i, order in enumerate(orders) for other in orders[:i])


def test_every_place_is_taken_by_every_system(tmp_path: Path) -> None:
    """Over many items no system favours a position (a chi-square far beyond chance would show)."""
    samples = make_samples(300)
    key = write_study(tmp_path / "s", gather([str(make_experiment(tmp_path, samples))]), n=300, raters=1, seed=0)
    places = np.zeros((3, 3))
    names = ["ELMD", "DialoGPT", GROUND_TRUTH]
    for item in key["raters"]["1"]:
        for place, given in enumerate(item["responses"].values()):
            places[names.index(given[0]), place] += 1
    assert ((places - 100) ** 2 / 100).sum() < 40  # 4 degrees of freedom: p about 4e-8


def test_pages_show_the_key_s_responses_in_the_key_s_order(study: Study) -> None:
    folder, key = study
    samples = {s.id: s for s in make_samples(12)}
    for number, sheet in key["raters"].items():
        page = Page(folder / f"rater-{number}.html")
        assert page.responses == [id_ for item in sheet for id_ in item["responses"]]
        shown = [text for text in page.texts if text.startswith(("甲", "乙", "丙", "丁", "在这里"))]
        wanted = [
            samples[item["sample"]].response.text if GROUND_TRUTH in names else reply(names[0], samples[item["sample"]])
            for item in sheet
            for names in item["responses"].values()
        ]
        assert shown == wanted


def test_equal_responses_are_rated_once_and_an_empty_one_is_named(tmp_path: Path) -> None:
    samples = make_samples(3)

    def text(system: str, sample: Sample) -> str:
        return "" if sample is samples[2] else f" {sample.response.text}  "

    key = write_study(
        tmp_path / "s", gather([str(make_experiment(tmp_path, samples, text=text))]), n=3, raters=1, seed=0
    )
    given = {item["sample"]: sorted(map(len, item["responses"].values())) for item in key["raters"]["1"]}
    assert given == {samples[0].id: [3], samples[1].id: [3], samples[2].id: [1, 2]}
    page = Page(tmp_path / "s" / "rater-1.html")
    assert page.texts.count("(an empty reply)") == 1
    assert page.texts.count(samples[0].response.text) == 1, "without the blanks that would tell the systems apart"
    assert len(page.responses) == 4


def test_the_key_is_private(study: Study) -> None:
    assert stat.S_IMODE((study[0] / "key.json").stat().st_mode) == 0o600
    assert sorted(path.name for path in study[0].iterdir()) == ["key.json", "rater-1.html", "rater-2.html"]


# ------------------------------------------------------------------------------------------------------------ the page
NASTY = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "{{ 7*7 }} <!-- x -->",
]


def test_users_text_stays_text(tmp_path: Path) -> None:
    first, second, third, fourth = NASTY
    samples = make_samples(2)
    bad = Sample(
        "d#2", "d", "s", "test", (Utterance("a", second, first, samples[0].utterance.emotion),),
        Utterance("b", fourth, third, samples[0].utterance.emotion),
        Utterance("c", first, second, samples[0].utterance.emotion), background=fourth,
    )  # fmt: skip
    experiment = make_experiment(tmp_path, [bad, *samples], text=lambda system, sample: f"{third} {system[::-1]}")
    write_study(tmp_path / "s", gather([str(experiment)]), n=3, raters=1, seed=0)
    page = Page(tmp_path / "s" / "rater-1.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert tags.count("img") == 0
    assert page.comments == []
    for text in NASTY:
        assert text in "\n".join(page.texts), text
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    script = next(attrs for tag, attrs in page.tags if tag == "script")
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'nonce-{script['nonce']}'" in str(policy)


def test_a_page_needs_nothing_else_and_holds_the_frames(tmp_path: Path) -> None:
    clip = clips.write_video(tmp_path / "secret-clip.mp4")
    experiment = make_experiment(tmp_path, make_samples(2, clip))
    key = write_study(tmp_path / "s", gather([str(experiment)]), n=2, raters=1, seed=0)
    page = Page(tmp_path / "s" / "rater-1.html")
    sources = [str(attrs["src"]) for tag, attrs in page.tags if "src" in attrs]
    assert len(sources) == 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert key["with_frames"] == 1
    text = (tmp_path / "s" / "rater-1.html").read_text(encoding="utf-8")
    assert "secret-clip" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert not [tag for tag, attrs in page.tags if tag in ("link", "iframe") or "href" in attrs]


# -------------------------------------------------------------------------------------------------------------- refusal
def test_an_incomplete_file_is_told_with_what_is_missing(study: Study, tmp_path: Path) -> None:
    folder, key = study
    whole = json.loads(rate(key, 1, by_system(), tmp_path / "a.json").read_text())["ratings"]
    third, seventh = ([*key["raters"]["1"][i]["responses"]] for i in (2, 6))
    del whole[third[0]], whole[seventh[1]]["R2"]
    path = write_ratings(tmp_path / "part.json", key["study"], 1, whole)
    message = r"part.json: is incomplete: 3 scores are missing in 2 of 8 dialogues \(number 3, 7 of rater 1's page\)"
    with pytest.raises(DataError, match=message):
        read_ratings(path, read_key(folder))


def _edited(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[dict[str, Any], Path], None]:
    """Change ratings or the whole file, with a checksum that fits."""

    def apply(key: dict[str, Any], path: Path) -> None:
        content = json.loads(path.read_text())
        change(content, key)
        content["checksum"] = checksum(content["study"], content["rater"], content["ratings"])
        path.write_text(json.dumps(content))

    return apply


def _first(content: dict[str, Any]) -> dict[str, Any]:
    return next(iter(content["ratings"].values()))


def _swap_raters(content: dict[str, Any], key: dict[str, Any]) -> None:
    id_ = next(iter(key["raters"]["2"][0]["responses"]))
    content["ratings"][id_] = {"R1": 1, "R2": 1}


def _tamper(key: dict[str, Any], path: Path) -> None:
    content = json.loads(path.read_text())
    _first(content)["R1"] = 5
    path.write_text(json.dumps(content))


def _twice(key: dict[str, Any], path: Path) -> None:
    path.write_text(path.read_text().replace('"rater": 1', '"rater": 1, "rater": 1'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_tamper, "has been changed since its export, or is damaged"),
        (_twice, r"is not JSON \(the key '.*' occurs twice\)"),
        (lambda key, path: path.write_text("{not json"), "is not JSON"),
        (lambda key, path: path.write_bytes(b"\xff\xfe{"), "is not JSON"),
        (lambda key, path: path.write_text("[]"), "is not a file that a rating page exports"),
        (lambda key, path: path.unlink(), "cannot be read"),
        (_edited(lambda c, key: c.update(study="0" * 16)), "belongs to another study"),
        (_edited(lambda c, key: c.update(rater=3)), "names the rater 3, and the study has 1, 2"),
        (_edited(lambda c, key: c.update(rater=2)), "rates a response of rater 1 as rater 2"),
        (_edited(_swap_raters), "rates a response of rater 2 as rater 1"),
        (_edited(lambda c, key: c["ratings"].update(abc={"R1": 1, "R2": 1})), "the unknown response 'abc'"),
        (_edited(lambda c, key: _first(c).update(R1=6)), r"has 6 as R1 of '\w+', not 1 to 5"),
        (_edited(lambda c, key: _first(c).update(R1=0)), "has 0 as R1"),
        (_edited(lambda c, key: _first(c).update(R2=True)), "has True as R2"),
        (_edited(lambda c, key: _first(c).update(R2=3.0)), "has 3.0 as R2"),
        (_edited(lambda c, key: _first(c).update(R2="4")), "has '4' as R2"),
        (_edited(lambda c, key: _first(c).update(R3=4)), "has 4 as R3"),
    ],
)
def test_files_that_are_refused_by_name(
    study: Study, tmp_path: Path, change: Callable[[dict[str, Any], Path], Any], message: str
) -> None:
    folder, key = study
    path = rate(key, 1, by_system(), tmp_path / "mine.json")
    assert read_ratings(path, read_key(folder)).rater == 1
    change(key, path)
    with pytest.raises(DataError, match=rf"mine\.json: .*{message}"):
        read_ratings(path, read_key(folder))


def test_a_rater_twice_and_an_unknown_reference_are_refused(study: Study, tmp_path: Path) -> None:
    _, key = study
    first, again = (rate(key, 1, by_system(), tmp_path / f"{name}.json") for name in "ab")
    with pytest.raises(DataError, match=r"b\.json: is of rater 1, as .*a\.json is"):
        score(key, [first, again])
    with pytest.raises(DataError, match="there is no system 'Ours'; choose from DialoGPT, ELMD, Ground-Truth"):
        score(key, [first], "Ours")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": "other", "raters": {"1": []}, "systems": {"a": 1}}'])
def test_a_folder_without_a_key_is_no_study(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "key.json").write_text(text)
    with pytest.raises(DataError, match=r"key\.json: (cannot be read|is no study's key)"):
        read_key(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- table
def test_known_ratings_give_the_known_table(study: Study, tmp_path: Path) -> None:
    folder, key = study
    files = [
        rate(key, 1, by_system(ELMD=4, DialoGPT=2, GroundTruth=5), tmp_path / "rater-1.json"),
        rate(key, 2, by_system(ELMD=5, DialoGPT=2, GroundTruth=5), tmp_path / "rater-2.json"),
    ]
    result = score(key, files)
    means = {name: (system["R1"]["mean"], system["R2"]["mean"]) for name, system in result["systems"].items()}
    assert means == {"DialoGPT": (2, 2), "ELMD": (4.5, 4.5), "Ground-Truth": (5, 5)}
    assert result["systems"]["ELMD"]["R1"]["raters"] == {"1": 4, "2": 5}
    assert (result["systems"]["ELMD"]["R1"]["low"], result["systems"]["ELMD"]["R1"]["high"]) == (4.5, 4.5)
    assert list(result["systems"])[-1] == GROUND_TRUTH
    assert result["reference"] == "ELMD"
    row = result["comparison"]["DialoGPT"]["R1"]
    assert row["difference"] == -2.5
    assert row["p"] == 2 / 2**8  # exact: only all signs as they are, or all turned
    assert row["p_holm"] == pytest.approx(4 * 2 / 2**8)
    assert result["n"] == 8
    assert row["verdict"] == "n too small to say"
    assert result["warnings"] == ["n too small to say: 8 samples, and a verdict takes 100."]

    paths = write_result(folder, result)
    assert [path.name for path in paths] == ["human.json", "human.md", "human.csv", "human.tex"]
    assert json.loads(paths[0].read_text()) == result
    lines = list(csv.DictReader(paths[2].open()))
    assert [(line["system"], float(line["R1"])) for line in lines] == [(name, r1) for name, (r1, _) in means.items()]
    assert "| ELMD | 8 | 4.500 |" in human_document(result).markdown


def test_a_rater_s_choice_follows_the_response_not_its_place(study: Study, tmp_path: Path) -> None:
    """Scores by sample: raters see other orders and other ids, and must still meet on the same responses."""
    _, key = study

    def taste(names: list[str], sample: str, metric: str) -> int:
        return 1 + (len(names[0]) + int(sample[16:-2]) + (metric == "R2")) % 5

    result = score(key, [rate(key, i, taste, tmp_path / f"{i}.json") for i in (1, 2)])
    for metric in ("R1", "R2"):
        assert result["kappa"][metric]["unweighted"] == 1
        assert result["kappa"][metric]["quadratic"] == 1
        wanted = np.mean([taste(["ELMD"], item["sample"], metric) for item in key["raters"]["1"]])
        assert result["systems"]["ELMD"][metric]["mean"] == pytest.approx(wanted)


def slow_kappa(a: list[int], b: list[int], quadratic: bool) -> float:
    """Cohen (1968) by the word: one minus observed over expected disagreement."""
    cost = (lambda x, y: (x - y) ** 2) if quadratic else (lambda x, y: float(x != y))
    observed = sum(cost(x, y) for x, y in zip(a, b, strict=True)) / len(a)
    expected = sum(cost(x, y) for x in a for y in b) / len(a) ** 2
    return 1 - observed / expected


@pytest.mark.parametrize("seed", range(3))
def test_kappa_equals_scikit_learn_and_the_formula(study: Study, tmp_path: Path, seed: int) -> None:
    _, key = study
    rng = np.random.default_rng(seed)
    given: list[dict[tuple[str, str, str], int]] = [{}, {}, {}]

    def noisy(rater: int) -> Callable[[list[str], str, str], int]:
        def taste(names: list[str], sample: str, metric: str) -> int:
            base = 1 + (len(names[0]) + len(sample) + len(metric)) % 5
            value = int(np.clip(base + rng.integers(-1, 2), 1, 5))
            given[rater][names[0], sample, metric] = value
            return value

        return taste

    result = score(key, [rate(key, i + 1, noisy(i), tmp_path / f"{i}.json") for i in range(2)], resamples=200)
    for metric in ("R1", "R2"):
        order = sorted(place for place in given[0] if place[2] == metric)
        a, b = ([given[i][place] for place in order] for i in range(2))
        (pair,) = result["kappa"][metric]["pairs"]
        for name, weights in (("unweighted", None), ("quadratic", "quadratic")):
            assert pair[name]["kappa"] == pytest.approx(cohen_kappa_score(a, b, weights=weights))
            assert pair[name]["kappa"] == pytest.approx(slow_kappa(a, b, weights is not None))
            counts = np.zeros((1, 5, 5))
            np.add.at(counts[0], (np.array(a) - 1, np.array(b) - 1), 1)
            assert kappas(counts, name)[0] == pytest.approx(pair[name]["kappa"])
            assert pair[name]["low"] <= pair[name]["kappa"] <= pair[name]["high"]


def test_three_raters_give_each_pair_and_the_mean(tmp_path: Path) -> None:
    pool = gather([str(make_experiment(tmp_path, make_samples(6)))])
    key = write_study(tmp_path / "s", pool, n=6, raters=3, seed=0)
    tastes = [by_system(ELMD=4, DialoGPT=2), by_system(ELMD=4, DialoGPT=2), by_system(ELMD=2, DialoGPT=4)]
    result = score(key, [rate(key, i + 1, taste, tmp_path / f"{i}.json") for i, taste in enumerate(tastes)])
    pairs = {tuple(pair["raters"]): pair["unweighted"]["kappa"] for pair in result["kappa"]["R1"]["pairs"]}
    assert pairs[1, 2] == 1
    assert pairs[1, 3] == pairs[2, 3] == pytest.approx(0)
    assert result["kappa"]["R1"]["unweighted"] == pytest.approx(1 / 3)
    assert "| mean |" in human_document(result).markdown


def test_one_rater_has_no_kappa(study: Study, tmp_path: Path) -> None:
    _, key = study
    result = score(key, [rate(key, 2, by_system(ELMD=4), tmp_path / "2.json")])
    assert result["kappa"]["R1"] == {"pairs": [], "unweighted": None, "quadratic": None}
    assert "| one only | – | – | – | – |" in human_document(result).markdown
    assert any("1 of 2 raters' files" in text for text in result["warnings"])


def test_raters_of_one_score_only_have_no_kappa(study: Study, tmp_path: Path) -> None:
    _, key = study
    result = score(key, [rate(key, i, by_system(), tmp_path / f"{i}.json") for i in (1, 2)])
    assert result["kappa"]["R1"]["pairs"][0]["unweighted"] == {"kappa": None, "low": None, "high": None}
    json.dumps(result, allow_nan=False)


def test_noise_is_called_noise_and_a_difference_a_difference(tmp_path: Path) -> None:
    pool = gather([str(make_experiment(tmp_path, make_samples(100)))])
    key = write_study(tmp_path / "s", pool, n=100, raters=2, seed=0)

    def taste(rater: int) -> Callable[[list[str], str, str], int]:
        """Ground-Truth is liked; of the others each score is drawn by what is rated, whatever the page's order."""
        return lambda names, sample, metric: (
            5 if names == [GROUND_TRUTH] else Random(f"{rater} {names} {sample} {metric}").randint(1, 5)
        )

    result = score(key, [rate(key, i, taste(i), tmp_path / f"{i}.json") for i in (1, 2)], "DialoGPT")
    assert result["warnings"] == ["Within noise of DialoGPT: ELMD in R1 and R2."]
    assert result["comparison"][GROUND_TRUTH]["R2"]["verdict"] == "differs"


@pytest.mark.parametrize(("data", "message"), [("m3ed", False), ("tiny", True)])
def test_the_paper_s_table_stands_beside_ours(tmp_path: Path, data: str, message: bool) -> None:
    pool = gather([str(make_experiment(tmp_path, make_samples(4), data=data))])
    key = write_study(tmp_path / "s", pool, n=4, raters=1, seed=0)
    result = score(key, [rate(key, 1, by_system(ELMD=4), tmp_path / "1.json")])
    table = paper_table("Table 4", "M3ED")
    assert {name: system["R1"]["paper"] for name, system in result["systems"].items()} == {
        name: table.printed[name]["R1"] for name in ("DialoGPT", "ELMD", GROUND_TRUTH)
    }
    text = human_document(result).markdown
    assert f"| ELMD | 4 | 4.000 | 4.00–4.00 | – | {table.printed['ELMD']['R1']} |" in text
    assert f"is {paper_kappa('M3ED'):.2f} (§5.2)" in text
    assert (f"other data ({data}): no yardstick" in text) == message


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    samples = make_samples(4)
    write_predictions(tmp_path / "t.jsonl", [Prediction(s.id, "x", s.response.text) for s in samples])
    pool = gather([str(make_experiment(tmp_path, samples)), f"50%_A&B={tmp_path / 't.jsonl'}"])
    key = write_study(tmp_path / "s", pool, n=4, raters=2, seed=0)
    result = score(key, [rate(key, i, by_system(ELMD=4), tmp_path / f"{i}.json") for i in (1, 2)])
    text = human_document(result).latex
    assert r"50\%\_A\&B" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 4
    assert text.count("{") == text.count("}")
    tables = text.split(r"\begin{tabular}")[1:]
    for table in tables:
        columns = len(table[1 : table.index("}")])
        body = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert len(body) >= 2
        assert {line.replace(r"\&", "").count("&") + 1 for line in body} == {columns}


# --------------------------------------------------------------------------------------------------------- command line
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = make_experiment(tmp_path, make_samples(6))
    out = tmp_path / "study"
    main(["sample", str(experiment), "--out", str(out), "--n", "5"])
    shown = capsys.readouterr()
    assert shown.out == f"artifact: {out}\n"
    assert "DialoGPT" in shown.err
    key = read_key(out)
    files = [str(rate(key, i, by_system(ELMD=4, DialoGPT=1), tmp_path / f"{i}.json")) for i in (1, 2)]
    main(["score", str(out), *files])
    assert capsys.readouterr().out == f"artifact: {out}\n"
    assert json.loads((out / "human.json").read_text())["systems"]["ELMD"]["R1"]["mean"] == 4


def test_an_error_is_one_sentence_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["score", str(tmp_path), "rater-1.json"])
    streams = capsys.readouterr()
    assert streams.out == ""
    wanted = f"error: {tmp_path}/key.json: cannot be read (No such file or directory); name the folder that"
    assert streams.err.startswith(wanted)
    assert streams.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
