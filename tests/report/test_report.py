"""The report on a made-up experiment's folder: nothing is trained, every artifact is a few lines of JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from benchmarks.tiny import make_samples
from elmd.cli import compose
from elmd.data.audit import audit
from elmd.data.samples import save_samples
from elmd.engine.keys import plain
from elmd.errors import DataError
from elmd.evaluation import paired
from elmd.evaluation.comparison import compare_systems
from elmd.evaluation.predictions import Prediction, write_predictions
from elmd.evaluation.runs import read_experiment
from elmd.evaluation.tables import p_text
from elmd.labels import EMOTIONS
from elmd.metrics.emotion import emotion_scores
from elmd.report import findings, results, svg, sweeps
from elmd.report.__main__ import main, report
from elmd.report.embeddings import clouds
from elmd.report.gallery import pick
from elmd.report.links import Links
from elmd.types import SPLITS, Sample, Utterance
from experiments import ROLES

EVIL = '<script>alert("u")</script><img src=x onerror=alert(1)> & $x_1$ </script>'
PARTS = {"instruction": "写。", "background": "背景：{background}", "turn": "{text}", "utterance": "{text}",
         "video": "", "demonstration": "{response}", "rep": "", "eerg": "", "emotion_end": "。"}  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of the page: elements by tag, ids, addresses, text by element."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.loaded: list[str] = []
        self.attributes: list[str] = []
        self.cases: list[dict[str, str | None]] = []
        self.choices: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes += values
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "a":
            self.hrefs.append(str(values["href"]))
        elif tag == "use":
            assert str(values["href"])[1:] in self.ids
        elif tag != "use":
            self.loaded += [str(values[name]) for name in ("src", "href", "data", "srcset") if name in values]
        if tag == "article":
            self.cases.append(values)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] == "option" and data.strip():
            self.choices.append(data)


def samples() -> list[Sample]:
    made = []
    for i, sample in enumerate(make_samples(28)):
        split = SPLITS[0] if i < 12 else SPLITS[1] if i < 14 else SPLITS[2]
        made.append(replace(sample, split=split, background=EVIL if i % 2 else None))
    last = made[-1]
    evil = Utterance("x", EVIL, EVIL, last.utterance.emotion, tags=())
    return [*made[:-1], replace(last, utterance=evil, response=replace(last.response, text=EVIL))]


def predictions(which: int) -> list[Prediction]:
    test = [sample for sample in samples() if sample.split == "test"]
    return [
        Prediction(
            sample.id,
            EVIL if i % 5 == 4 else test[(i + which) % len(test)].response.text,
            sample.response.text,
            demonstration=None if which == 9 else EVIL,
            gold_emotion=sample.response.emotion,
            predicted_emotion=sample.response.emotion if i % (2 + which) else EMOTIONS[(i + which) % 7],
            seed=0,
            tags=("<b>tag</b>",),
            extra={"prompt": {"instruction": EVIL, "utterance": EVIL}},
        )
        for i, sample in enumerate(test)
    ]  # fmt: skip


def lay(runs: Path, stage: str, name: str, files: dict[str, Any], **more: Any) -> Path:
    """An artifact with its manifest; `files` are JSON, lists of lines for .jsonl."""
    folder = runs / stage / name
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "stage": stage, "git": {"commit": "c0ffee" * 6, "dirty": stage == "rep"}, "versions": {"python": "3.11"},
        "device": "cpu", "world_size": 1, "wall_seconds": 1.5, "metrics": {}, "counts": {}, **more,
    }  # fmt: skip
    for file, content in {**files, "manifest.json": manifest}.items():
        lines = [json.dumps(value) for value in (content if file.endswith(".jsonl") else [content])]
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def experiment(runs: Path, name: str, jobs: dict[tuple[str, int], int], **changes: Any) -> Path:
    """An experiment's folder with a job per (ablation, seed); the number says which predictions it made."""
    folder = runs / "experiments" / name
    everything = samples()
    counts = {
        "dialogues": 2, "sentences": 50, "turns": 40, "pairs": 28, "dropped": {"too <b>odd</b>": 3}, "text_only": 0,
        "samples": {split: sum(sample.split == split for sample in everything) for split in SPLITS},
        "emotions": {split: {part: {e.value: 2 for e in EMOTIONS} for part in ("utterance", "response")}
                     for split in SPLITS},
        "filters": {}, "notes": {"a label that <b>nobody</b> knows": {"count": 2, "example": EVIL}},
    }  # fmt: skip
    prepare = lay(runs, "prepare", "p", {"audit.json": audit(everything)}, counts=counts)
    save_samples(prepare / "samples.jsonl", everything)
    demonstrations = [
        {"sample": sample.id, "source": everything[0].id, "utterance": EVIL, "response": EVIL, "emotion": "Sad",
         "similarity": 0.5}
        for sample in everything
    ]  # fmt: skip
    leak = {"gold_response": 0.25, "gold_response_chance": 0.01, "own_dialogue": 0.0}
    index = lay(runs, "index", "i", {"demonstrations.jsonl": demonstrations}, metrics={"test": leak})
    curve = [
        {"step": 0, "valid/loss": 2.0},
        *({"step": i, "loss": 1 / i} for i in range(1, 200)),
        {"step": 200, "valid/loss": 1.0},
    ]
    erm = lay(runs, "erm", "e", {"metrics.jsonl": curve})
    failed = [{"clip": EVIL, "error": EVIL, "samples": ["a"]}]
    features = lay(runs, "features", "f", {"failed.json": failed})
    emotions = [sample.response.emotion for sample in everything if sample.split == "test"]
    for (ablation, seed), which in jobs.items():
        rep_scores = {**emotion_scores(emotions, [EMOTIONS[0]] * len(emotions)), "tags": {}}
        rep = lay(runs, "rep", f"r{seed}", {"rep.json": {"test/projector": rep_scores, "test/text_only": rep_scores},
                                            "metrics.jsonl": curve})  # fmt: skip
        eerg = lay(runs, "eerg", f"{ablation}{seed}", {"metrics.jsonl": curve, "prompt.json": PARTS})
        made = lay(runs, "generate", f"{name}-{ablation}{seed}", {}, counts={"predictions": 14, "empty": 1})
        write_predictions(made / "predictions.jsonl", predictions(which))
        artifacts = {
            "prepare": prepare,
            "erm": erm,
            "index": index,
            "features": features,
            "eerg": eerg,
            "generate": made,
        }
        if ablation != "no_rep":
            artifacts["rep"] = rep
        config = plain(compose(["experiment=demo", f"seed={seed}", f"ablation={ablation}"])) | {"experiment_name": name}
        for key, values in changes.items():
            group, _, leaf = key.partition("__")
            config[group][leaf] = values[seed, ablation] if isinstance(values, dict) else values
        job = folder / f"ablation={ablation},seed={seed}"
        job.mkdir(parents=True)
        axes = {"ablation": ablation, "seed": seed}
        axes |= {key.replace("__", "."): config[(path := key.split("__"))[0]][path[1]] for key in changes}
        about = {
            "config": config, "artifacts": {k: f"../../../{v.relative_to(runs)}" for k, v in artifacts.items()},
            "roles": ROLES, "job": job.name, "axes": axes,
        }  # fmt: skip
        (job / "artifacts.json").write_text(json.dumps(about))
        (job / "predictions.jsonl").symlink_to(made / "predictions.jsonl")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Paired bootstraps of 200 resamples: here p-values are shown, and tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paired, "RESAMPLES", 200)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems in two seeds, a failed job of a third, and one that has not begun."""
    root = tmp_path_factory.mktemp("runs")
    folder = experiment(root, "table", {("none", 0): 0, ("none", 1): 1, ("no_rep", 0): 2, ("no_rep", 1): 3})
    (folder / "logs").mkdir()
    (folder / "logs" / "v.log").write_text("step 1\nerror: " + EVIL + "\n")

    def state(ablation: str, system: str, seed: int = 0, **more: Any) -> dict[str, Any]:
        job = {
            "job": f"ablation={ablation},seed={seed}",
            "system": system,
            "seed": seed,
            "axes": {"ablation": ablation},
        }
        return {**job, "status": "done", "stage": None, "error": None, "log": None, **more}

    failed = state("no_v", "w/o V", status="failed", stage="train", error=f"the disk is full {EVIL}.", log="logs/v.log")
    waiting = state("no_erm", "w/o ERM", status="waiting", log="logs/erm.log")
    done = [state(a, name, s) for a, name in (("none", "ELMD"), ("no_rep", "w/o REP")) for s in (0, 1)]
    (folder / "sweep.json").write_text(json.dumps({"experiment": "table", "jobs": [*done, failed, waiting]}))
    return root


@pytest.fixture(scope="module")
def made(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    theirs = tmp_path_factory.mktemp("theirs") / "p.jsonl"
    write_predictions(theirs, [replace(p, demonstration=None, extra={}) for p in predictions(4)])
    return report([str(runs / "experiments" / "table"), f"<b>Their's</b>={theirs}"], cases=9)


@pytest.fixture(scope="module")
def html(made: Path) -> str:
    return (made / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_sections(page: Page) -> None:
    expected = ["summary", "tables", "training", "rep", "distributions", "cases", "missing", "data", "prompt",
                "decoding", "provenance", "runs", "left-out"]  # fmt: skip
    assert [id_ for id_ in page.ids if id_ in {*expected, "human", "sweeps", "vectors"}] == expected
    assert "Human evaluation: no study is given (--human DIR)" in page.text
    assert "Utterances before and after ERM: the encoder that ERM began with" in page.text


def test_text_of_users_stays_text(page: Page, made: Path) -> None:
    assert page.tags.count("script") == 1
    assert "b" in page.tags, "speakers are bold, so the next line can fail"
    assert EVIL in page.text
    assert "<b>tag</b>" in page.text
    assert "<b>Their's</b>" in page.text
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.loaded)
    errors = Page((made / "errors.html").read_text(encoding="utf-8"))
    assert errors.tags.count("script") == 1
    assert "the disk is full" in errors.text


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in html
    assert not re.search(r"<(link|iframe|object|embed|base)\b", html)


def test_every_link_leads_somewhere(page: Page, made: Path) -> None:
    manifests = 0
    for href in page.hrefs:
        if href.startswith("#"):
            assert href[1:] in page.ids, href
        else:
            target = made / unquote(href)
            assert target.is_file(), href
            manifests += target.name == "manifest.json"
    assert manifests > 20


def test_numbers_are_those_of_the_comparison_and_link_to_their_runs(runs: Path, html: str, made: Path) -> None:
    table_runs = read_experiment(runs / "experiments" / "table")
    links = Links.of(made, 0, table_runs)
    comparison = compare_systems(table_runs, "ELMD")
    table = results.table(comparison, table_runs, links, "paper", "paper")
    assert table is not None
    row = next(row for row in table.rows if row[0] == "w/o REP")
    cell = row[table.columns.index("bleu4_char")]
    score = comparison.row("w/o REP").cells["paper"]["bleu4_char"]
    assert cell.text == f"{score.mean:.2f} ± {score.sd:.2f}"
    assert f"p {p_text(score.p_holm)}" in cell.small
    assert cell.href == "#runs-0-1"
    assert [cell.text for cell in row[1]] == ["0", "1"]
    assert [unquote(cell.href) for cell in row[1]] == [
        f"../../../generate/table-no_rep{seed}/manifest.json" for seed in (0, 1)
    ]
    paper = row[table.columns.index("bleu4_char") + 1]
    assert paper == "1.139", "Table 3 of the paper"
    assert cell.text in html


def test_missing_jobs_are_named_with_their_reason_and_log(page: Page) -> None:
    assert (
        "Not in these tables, because their jobs are missing (why: under What is missing): w/o V, seed 0" in page.text
    )
    assert "failed in train: the disk is full" in page.text
    assert "step 1\nerror:" in page.text
    assert re.search(r"w/o ERM\s*0\s*not begun", page.text)
    assert "2 jobs are missing" in page.text
    assert "cannot be read" not in page.text, "a job that has not begun has no log"


def test_data_card_shows_leaks_and_what_was_dropped(page: Page) -> None:
    assert re.search(r"test: r′ is the gold response\s*25\.00 %\s*by chance 1\.00 %", page.text)
    assert "too <b>odd</b>" in page.text
    assert "c0ffeec0ffee (with changes)" in page.text
    assert "top-p" in page.text


def test_files_of_tables(made: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((made / "table.csv").read_text(encoding="utf-8"))))
    assert {row["system"] for row in rows} >= {"ELMD", "w/o REP", "<b>Their's</b>", "floor: random response"}
    assert "w/o REP" in (made / "table.md").read_text(encoding="utf-8")
    assert r"\toprule" in (made / "table.tex").read_text(encoding="utf-8")


def test_cases_carry_what_the_filters_read(page: Page, runs: Path) -> None:
    assert len(page.cases) == 9
    assert {case["data-emotion"] for case in page.cases} <= {emotion.value for emotion in EMOTIONS}
    wrong = [str(case["data-wrong"]).split() for case in page.cases]
    answers = [{p.id: p for p in predictions(which)} for which in (0, 2, 4)]  # ELMD, w/o REP, theirs: first seeds
    gold = {sample.id: sample.response.emotion for sample in samples()}
    shown = [id_ for id_ in answers[0] if f">{id_}<" in (runs / "experiments/table/report/report.html").read_text()]
    assert wrong == [
        [str(i) for i, run in enumerate(answers) if run[id_].predicted_emotion != gold[id_]] for id_ in shown
    ]
    differ = ["data-differ" in case for case in page.cases]
    assert differ == [len({run[id_].predicted_emotion for run in answers}) > 1 for id_ in shown]
    assert len(set(differ)) == 2


def test_filters_offer_only_what_can_be_found(page: Page, tmp_path: Path) -> None:
    named = ["ELMD ≠ gold", "w/o REP ≠ gold", "<b>Their's</b> ≠ gold"]
    assert page.choices[-6:] == ["all cases", "systems name different emotions", "some system ≠ gold", *named]
    silent = tmp_path / "silent.jsonl"
    write_predictions(silent, [replace(p, predicted_emotion=None) for p in predictions(1)])
    write_predictions(tmp_path / "naming.jsonl", predictions(2))
    out = report([f"silent={silent}", f"naming={tmp_path / 'naming.jsonl'}"], cases=5)
    choices = Page((out / "report.html").read_text(encoding="utf-8")).choices
    assert choices[-2:] == ["all cases", "naming ≠ gold"]
    out = report([f"silent={silent}"], cases=5)
    assert "all cases" not in Page((out / "report.html").read_text(encoding="utf-8")).choices


def test_the_spread_of_floors_is_told_apart(page: Page) -> None:
    message = (
        "training seeds (of the random floor over its draws; of retrieval only over the retrievers of those seeds)"
    )
    assert message in page.text
    assert "over samples, of the mean over all of them" in page.text


def test_styles_go_with_the_system_and_not_with_the_report() -> None:
    first = findings.styles(["Livebot", "ELMD", "theirs"], "ELMD")
    second = findings.styles(["ELMD", "w/o REP"], "ELMD")
    assert first["ELMD"] == second["ELMD"] == 0
    assert findings.styles(["ELMD, s = 1", "ELMD, s = 4"], "ELMD, s = 4")["ELMD, s = 4"] == 0
    assert first["Livebot"] == findings.styles(["Livebot", "DialoGPT"], "Livebot")["Livebot"] == 1
    assert first["theirs"] == len(second), "after all that are known"
    assert len(set(first.values())) == len(first)


def test_headline_claims_no_more_than_the_tests() -> None:
    assert results.sentence((5, 0, 0, 0, 0), ["A", "B", "C"]) == "It is above A, B and C in all 5 metrics."
    assert results.sentence((0, 0, 5, 0, 0), ["A"]) == "It is within noise of A in all 5 metrics."
    assert results.sentence((3, 1, 1, 0, 0), ["A"]) == (
        "Against A it is above in 3, below in 1 and within noise in 1 of 5 metrics."
    )


def test_two_seeds_are_too_few_to_say(page: Page) -> None:
    assert re.search(r"Too few seeds or samples for a verdict: its bare mean is higher than .* of 5 metrics", page.text)
    assert "It is above" not in page.text


def test_a_sweep_of_s_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {(0, "none"): 1, (1, "none"): 4}
    folder = experiment(tmp_path, "fig6", {("none", 0): 0, ("none", 1): 1}, erm__slots=values, retriever__key="e_u")
    read = read_experiment(folder)
    comparison = compare_systems(read, "ELMD, s = 4")
    (plots,) = sweeps.sweep(comparison, read, "erm.slots")
    assert [name for _, name in plots.legend] == ["BLEU-4", "METEOR / 10", "ROUGE-L / 10"]
    assert plots.title.startswith("Fig. 6")
    assert "what is noise is not known" in plots.note
    assert sweeps.sweep(comparison, read, "vision.frames") == []


def test_a_single_run_without_rep_or_video(tmp_path: Path) -> None:
    folder = experiment(tmp_path, "one", {("no_rep", 0): 9})
    out = report([str(folder)], out=tmp_path / "out", cases=0)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "Response emotion prediction: no run here has the stage REP" in page.text
    assert "Cases: --cases 0" in page.text
    assert "One run: w/o REP." in page.text


def test_several_experiments_share_a_page(tmp_path: Path) -> None:
    first, other = (experiment(tmp_path, name, {("none", 0): 0}) for name in ("one", "other"))
    out = report([str(first), str(other)], out=tmp_path / "both", cases=2)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert {"runs-0-0", "runs-1-0"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert (out / "other.tex").is_file()
    for href in page.hrefs:
        assert (out / unquote(href)).is_file() if not href.startswith("#") else href[1:] in page.ids
    with pytest.raises(DataError, match="one: is given twice"):
        report([str(first)] * 2, out=tmp_path / "twice", cases=0)


def test_predictions_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.jsonl"
    write_predictions(theirs, predictions(1))
    out = report([f"theirs={theirs}"], cases=3)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert out == tmp_path / "report"
    assert "Training curves: no run here was trained by ELMD" in page.text
    assert "Data card: no data set is known" in page.text
    assert len(page.cases) == 3
    assert page.tags.count("script") == 1
    assert "../theirs.jsonl" in page.hrefs


def test_human_evaluation(tmp_path: Path) -> None:
    folder = experiment(tmp_path, "rated", {("none", 0): 0})
    score = {"mean": 4.125, "low": 3.9, "high": 4.3, "raters": {"1": 4.0, "2": 4.25}}
    value = {"kappa": 0.41, "low": 0.2, "high": 0.6}
    study = {
        "study": "x", "seed": 0, "n": 30, "responses": 60, "raters": [1, 2], "notes": [EVIL], "warnings": [],
        "systems": {name: {"seed": 0, "decode_seed": 0, "path": None, "R1": score, "R2": score}
                    for name in ("ELMD", "Ground-Truth")},
        "kappa": {m: {"pairs": [{"raters": [1, 2], "unweighted": value, "quadratic": {**value, "kappa": None}}]}
                  for m in ("R1", "R2")},
        "reference": "ELMD",
        "comparison": {"Ground-Truth": {m: {"difference": 0.1, "p": 0.2, "p_holm": 0.4} for m in ("R1", "R2")}},
    }  # fmt: skip
    (tmp_path / "human.json").write_text(json.dumps(study))
    for ending in ("md", "csv", "tex"):
        (tmp_path / f"human.{ending}").write_text("table")
    out = report([str(folder)], human=tmp_path, out=tmp_path / "out", cases=0)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert re.search(r"ELMD\s*4\.125\[3\.90, 4\.30\]\s*4\.13", page.text), "ours, then Table 4's"
    assert re.search(r"R1, raters 1 and 2\s*0\.41\[0\.20, 0\.60\]\s*–", page.text)
    assert (out / "human.tex").read_text() == "table"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "human.json").write_text("{")
    with pytest.raises(DataError, match=r"human\.json: is not JSON"):
        report([str(folder)], human=tmp_path / "broken", out=tmp_path / "none", cases=0)
    assert not (tmp_path / "none").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: is no folder; name an experiment's folder, or NAME=FILE."),
        (["a=x.jsonl", "a=y.jsonl"], "a=y.jsonl: the name 'a' is given twice; give another name."),
        (["a=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["nowhere", "--human", "study"], "study: no such folder; name a study that"),  # before anything is read
        (["nowhere", "--human", "."], ".: holds no human.json; run python -m elmd.human score first."),
    ],
)
def test_bad_arguments_end_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cases_are_drawn_evenly_and_again_alike() -> None:
    emotions = {f"{i}": ("Happy", "Sad", "Neutral", "Neutral", "Neutral")[i % 5] for i in range(50)}
    chosen = pick(emotions, 12, seed=1)
    assert [sum(emotions[id_] == emotion for id_ in chosen) for emotion in ("Happy", "Sad", "Neutral")] == [4, 4, 4]
    assert chosen == pick(emotions, 12, seed=1) != pick(emotions, 12, seed=2)
    assert chosen == sorted(chosen, key=int), "in the order of the data"
    assert len(pick(emotions, 99)) == 50


def test_pictures_take_their_colours_from_the_page() -> None:
    first = svg.lines(
        "a < b", [svg.Line("one", [1, 2], [1.0, 2.0]), svg.Line("$x_1$", [1, 2], [2.0, 1.0], 8)], xlabel="s"
    )
    second = svg.boxes("b", {EVIL: [1.0, 2.0, 3.0]}, xlabel="n")
    assert all(colour in first for colour in ("currentColor", "var(--c1)", "var(--grid)"))
    assert not {svg.INK, svg.GRID, *svg.COLOURS} & set(re.findall(r"#[0-9a-f]{6}", first))
    assert "http" not in first + second
    assert "<script>" not in second
    ids = Page(first).ids
    assert all(id_.startswith(svg.PICTURE) for id_ in ids)
    assert len(ids) == len(set(ids)) > 0


def test_long_curves_are_means_of_runs_of_steps() -> None:
    steps, values = findings.smooth(range(1, 101), [float(i) for i in range(100)], points=10)
    assert (steps[0], values[0]) == (5.5, 4.5)
    assert len(values) == 10
    assert findings.smooth([3, 4], [1.0, 2.0]) == ([3.0, 4.0], [1.0, 2.0])


def test_confusion_sums_seeds_and_shades_by_row() -> None:
    matrix = {"rows": ["Happy", "Sad"], "columns": ["Happy", "Sad", "missing"], "counts": [[1, 3, 0], [0, 0, 0]]}
    table = findings.confusion([matrix, matrix], "t", 2)
    assert list(table.columns[1:]) == ["Happy", "Sad"]
    assert [(cell.text, cell.shade) for cell in table.rows[0][1:]] == [("2", 0.25), ("6", 0.75)]
    assert table.rows[1][1].shade == 0


@pytest.mark.parametrize("step", [0, 7])
def test_an_untrained_retriever_is_told(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = experiment(tmp_path, "one", {("none", 0): 0}, retriever__path=str(tmp_path))
    lay(tmp_path, "erm", "e", {}, metrics={"best_step": step})
    monkeypatch.setattr("elmd.report.embeddings.clouds", lambda *_, **__: {"e_u": {"Happy": [(0.0, 1.0)]}})
    read = read_experiment(folder)
    (plots,), _ = findings.vectors(read, "ELMD", Links.of(tmp_path, 0, read))
    assert ("best checkpoint on valid was the untrained one" in plots.note) == (step == 0)


def test_vectors_before_and_after_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def encode(model: str, texts: list[str]) -> dict[str, torch.Tensor]:
        rows = torch.randn(len(texts), 8, generator=torch.Generator().manual_seed(len(model)))
        return {"e_u": rows} if model == "raw" else {"e_u": rows, "E_s": rows.repeat(1, 2)}

    monkeypatch.setattr("elmd.retrieval.retriever.load_retriever", lambda path, max_tokens: path.name)
    monkeypatch.setattr("elmd.retrieval.retriever.encode", encode)
    places_of = clouds(Path("model"), Path("raw"), samples(), max_tokens=8)
    assert list(places_of) == ["e_u, raw encoder", "e_u after ERM", "E_s after ERM"]
    assert all(sum(map(len, places.values())) == 28 for places in places_of.values())
    assert list(places_of["E_s after ERM"]) == [emotion.value for emotion in EMOTIONS]
    assert len(set(map(str, places_of.values()))) == 3
