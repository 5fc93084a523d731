"""Systems side by side: numbers against plain numpy, verdicts, floors, the paper's numbers, and the tables."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from elmd.data.samples import load_samples
from elmd.errors import ArtifactError, DataError
from elmd.evaluation.comparison import Comparison, compare_systems, reference_of
from elmd.evaluation.comparison_tables import comparison_document, score_table, verdict_table, write_comparison
from elmd.evaluation.cost import coefficient_points, search_cost
from elmd.evaluation.paired import emotion_metrics
from elmd.evaluation.predictions import Prediction, write_predictions
from elmd.evaluation.runs import Experiment, read_experiment
from elmd.evaluation.score import score
from elmd.evaluation.significance import holm, welch
from elmd.evaluation.verdicts import DIFFERS, NOISE, TOO_FEW
from elmd.labels import Emotion
from elmd.metrics.emotion import emotion_scores
from elmd.retrieval.index import Index
from experiments import config, job, predictions

N = 120
NASTY = r"a&b_c%d$e#f{g}h~i^j\k|l [m]*<script>`"


def texts(seed: int, share: float) -> tuple[list[str], list[str]]:
    """N hypotheses of which about `share` of the characters are the reference's."""
    words, rng = "今天真的好高兴啊你怎么了我也不知道", Random(0)
    references = ["".join(rng.choices(words, k=8)) for _ in range(N)]
    rng = Random(f"{seed} {share}")
    hypotheses = [
        "".join(c if rng.random() < share else rng.choice(words) for c in reference) for reference in references
    ]
    return hypotheses, references


def answers(seed: int, share: float, right: int | None = 60) -> list[Prediction]:
    return predictions(*texts(seed, share), right=right)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """ELMD, the same again as w/o SSC, a clearly worse w/o ERM without emotions, a third party; one job is missing."""
    runs = tmp_path_factory.mktemp("runs")
    folder = runs / "experiments" / "demo"
    for seed in range(3):
        job(folder / f"full,{seed}", config(seed=seed), answers(seed, 0.6, 60 + seed))
        job(folder / f"ssc,{seed}", config(seed=seed, ablation_name="no_ssc"), answers(seed, 0.6, 60 + seed))
        job(folder / f"erm,{seed}", config(seed=seed, ablation_name="no_erm"), answers(seed, 0.2, None))
    job(folder / "v,0", config(seed=0, ablation_name="no_v"), None)
    theirs = [Prediction(p.id, p.hypothesis, p.reference) for p in answers(7, 0.9)]
    write_predictions(runs / "theirs.jsonl", theirs)
    return read_experiment(folder, {NASTY: runs / "theirs.jsonl"})


@pytest.fixture(scope="module")
def comparison(experiment: Experiment) -> Comparison:
    return compare_systems(experiment, "ELMD", ["paper"])


def test_means_are_over_seeds_of_what_score_gives(comparison: Comparison) -> None:
    values = [score(answers(seed, 0.6, 60 + seed), ["paper"]) for seed in range(3)]
    row = comparison.row("ELMD")
    assert (row.kind, row.seeds, row.decodings) == ("system", [0, 1, 2], 1)
    assert [Path(folder).name for folder in row.folders] == ["full,0", "full,1", "full,2"]
    for group, metric in (("paper", "bleu2_char"), ("paper", "meteor_char"), ("emotion", "accuracy"),
                          ("emotion", "weighted_f1"), ("surface", "distinct1_char")):  # fmt: skip
        ours = np.array([scores[group][metric] for scores in values])
        cell = row.cells[group][metric]
        assert cell.values == pytest.approx(ours.tolist())
        assert (cell.mean, cell.sd) == (pytest.approx(ours.mean()), pytest.approx(ours.std(ddof=1)))
    assert row.cells["surface"]["distinct1_char"].low is None


def test_intervals_resample_the_samples_with_all_their_seeds(comparison: Comparison) -> None:
    right = np.zeros(N)
    for seed in range(3):
        right += [p.gold_emotion == p.predicted_emotion for p in answers(seed, 0.6, 60 + seed)]
    drawn = np.random.default_rng(1).integers(0, N, (4000, N))
    low, high = np.percentile((right / 3)[drawn].mean(axis=1), [2.5, 97.5])
    cell = comparison.row("ELMD").cells["emotion"]["accuracy"]
    assert (cell.low, cell.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_identical_systems_are_within_noise_and_a_worse_one_differs(comparison: Comparison) -> None:
    for metric, cell in comparison.row("w/o SSC").cells["paper"].items():
        assert (cell.difference, cell.p, cell.p_holm, cell.p_seeds, cell.verdict) == (0, 1, 1, 1, NOISE), metric
    for metric, cell in comparison.row("w/o ERM").cells["paper"].items():
        full = comparison.row("ELMD").cells["paper"][metric]
        assert cell.difference == pytest.approx(cell.mean - full.mean)
        assert cell.difference is not None
        assert cell.difference < 0
        assert (cell.verdict, cell.p_seeds) == (DIFFERS, welch(cell.values, full.values)), metric
    assert comparison.row(NASTY).cells["paper"]["bleu2_char"].verdict == TOO_FEW  # nobody knows its spread over seeds
    assert all(cell.verdict is None for cell in comparison.row("ELMD").cells["paper"].values())
    assert "Within noise of ELMD: w/o SSC in every metric." in comparison.warnings
    assert any(f"takes 3: {NASTY} (unknown)" in warning for warning in comparison.warnings)


def test_holm_runs_over_every_test_of_a_table(comparison: Comparison) -> None:
    tested = {
        f"{row.name} {metric}": cell
        for row in comparison.rows
        for metric, cell in row.cells["paper"].items()
        if cell.p is not None
    }
    assert len(tested) == comparison.tests["paper"] == 6 * 5  # two ablations, a third party and three floors
    assert {name: cell.p_holm for name, cell in tested.items()} == holm({n: c.p or 0 for n, c in tested.items()})
    assert comparison.tests["emotion"] == 2  # only w/o SSC names emotions as well
    assert set(comparison.tests) == {"paper", "emotion"}


def test_floors_are_rows_and_mark_what_does_not_beat_them(comparison: Comparison, experiment: Experiment) -> None:
    floors = [row for row in comparison.rows if row.kind == "floor"]
    assert [row.name for row in floors] == [
        "floor: random response", "floor: most common reply", "floor: retrieval only",
    ]  # fmt: skip
    assert [row.name for row in comparison.rows[-3:]] == [row.name for row in floors]
    assert len(floors[0].cells["paper"]["bleu2_char"].values) == 5  # draws
    assert floors[1].cells["paper"]["bleu2_char"].sd is None
    retrieval = [Prediction(p.id, "好的。", p.reference) for p in experiment.runs[0].predictions]
    theirs = score(retrieval, ["paper"])["paper"]["rouge1_char"]
    assert floors[2].cells["paper"]["rouge1_char"].mean == pytest.approx(theirs)
    for row in comparison.rows:
        for metric, cell in row.cells["paper"].items():
            best = max(floor.cells["paper"][metric].mean for floor in floors)
            assert (cell.floor is not None) == (row.kind != "floor" and cell.mean <= best)
            assert not (row.kind == "floor" and cell.best)
            assert cell.best == (row.name == NASTY)  # the best system is the third party's
    assert comparison.row("ELMD").cells["emotion"]["accuracy"].best


def test_a_floor_above_a_system_is_said(tmp_path: Path) -> None:
    hopeless = predictions(["嗯"] * N, ["好的。吧"] * N)  # their demonstration is nearly the reference
    job(tmp_path / "experiments" / "demo", config(), hopeless)
    compared = compare_systems(read_experiment(tmp_path / "experiments" / "demo"), "ELMD", ["paper"])
    assert compared.row("ELMD").cells["paper"]["rouge1_char"].floor == "floor: retrieval only"
    assert any("ELMD does not beat floor: retrieval only in " in warning for warning in compared.warnings)
    columns, rows = score_table(compared, "paper")
    assert str(rows[0][columns.index("rouge1_char")]).endswith("†")


def test_few_samples_or_seeds_say_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "demo"
    for seed in range(3):
        job(folder / f"a{seed}", config(seed=seed), answers(seed, 0.6)[:90])
        job(folder / f"b{seed}", config(seed=seed, ablation_name="no_erm"), answers(seed, 0.1)[:90])
    compared = compare_systems(read_experiment(folder), "ELMD", ["paper"])
    assert compared.n == 90
    assert {cell.verdict for cell in compared.row("w/o ERM").cells["paper"].values()} == {TOO_FEW}
    assert compared.warnings[0] == "n too small to say: 90 samples, and a verdict takes 100."
    for path in folder.glob("*2"):
        (path / "artifacts.json").unlink()
    compared = compare_systems(read_experiment(folder), "ELMD", ["paper"])
    assert compared.warnings[1] == "Too few training seeds to say, a verdict takes 3: ELMD (2), w/o ERM (2)."


def test_a_difference_between_samples_that_seeds_do_not_bear_out_is_noise(tmp_path: Path) -> None:
    """Tested over samples alone it would be a finding; over trainings it is luck."""
    folder = tmp_path / "experiments" / "demo"
    for seed, share in enumerate((0.2, 0.5, 0.8)):
        job(folder / f"a{seed}", config(seed=seed), answers(seed, 0.6))
        job(folder / f"b{seed}", config(seed=seed, ablation_name="no_erm"), answers(seed, share))
    cell = compare_systems(read_experiment(folder), "ELMD", ["paper"]).row("w/o ERM").cells["paper"]["rouge1_char"]
    assert cell.p_holm is not None
    assert cell.p_holm < 0.05
    assert cell.p_seeds is not None
    assert cell.p_seeds > 0.05
    assert cell.verdict == NOISE


def test_unknown_reference(experiment: Experiment) -> None:
    with pytest.raises(DataError, match=r"no system 'ours' in demo; choose from ELMD, w/o ERM, w/o SSC"):
        compare_systems(experiment, "ours")
    with pytest.raises(DataError, match=r"unknown protocol 'papr'"):
        compare_systems(experiment, "ELMD", ["papr"])


def test_emotions_that_contradict_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "demo"
    job(folder, config(), answers(0, 0.5))
    odd = [Prediction(p.id, "嗯", p.reference, gold_emotion=Emotion.FEAR) for p in answers(0, 0.5)]
    write_predictions(tmp_path / "odd.jsonl", odd)
    with pytest.raises(DataError, match=r"odd\.jsonl: id 'd0#1' has the gold emotion Fear, and "):
        compare_systems(read_experiment(folder, {"odd": tmp_path / "odd.jsonl"}), "ELMD", ["paper"])


@pytest.mark.parametrize(
    ("slots", "reference"),
    [((1, 4, 8), "ELMD, s = 4"), ((1, 8), "ELMD, s = 1"), ((4,), "ELMD")],
)
def test_the_reference_is_the_full_model(tmp_path: Path, slots: Sequence[int], reference: str) -> None:
    for s in slots:
        job(
            tmp_path / "experiments" / "demo" / f"s{s}",
            config(erm__slots=s),
            answers(0, 0.5)[:3],
            axes={"erm.slots": s},
        )
    assert reference_of(read_experiment(tmp_path / "experiments" / "demo")) == reference


def test_emotion_metrics_equal_the_scores() -> None:
    rng, names = Random(0), list(Emotion)
    gold = [rng.choice(names[:5]) for _ in range(50)]
    predicted = [rng.choice([*names, None]) for _ in range(50)]
    metrics, scores = emotion_metrics([*gold, None], [*predicted, names[0]]), emotion_scores(gold, predicted)
    assert metrics["accuracy"].score == pytest.approx(scores["accuracy"])
    assert metrics["weighted_f1"].score == pytest.approx(scores["weighted_f1"])
    assert metrics["accuracy"].values.mean() == pytest.approx(scores["accuracy"])
    assert emotion_metrics(gold, [None] * 50) == emotion_metrics([None], [names[0]]) == {}


# ---- the paper's numbers


def test_the_papers_numbers_stand_beside_ours(comparison: Comparison) -> None:
    assert comparison.paper == ["Table 3, M3ED"]
    assert comparison.row("w/o ERM").paper == {"bleu4_char": "1.161", "meteor_char": "8.788", "rougeL_char": "12.272"}
    assert comparison.row(NASTY).paper == {}
    columns, rows = score_table(comparison, "paper")
    assert columns == [
        "system", "seeds", "bleu2_char", "bleu4_char", "paper", "meteor_char", "paper", "rouge1_char", "rougeL_char",
        "paper",
    ]  # fmt: skip
    assert rows[0][columns.index("bleu4_char") + 1] == "1.552"
    assert any("here other: data=tiny, data.split=official, llm=tiny" in note for note in comparison.notes)


def test_which_paper_table(tmp_path: Path) -> None:
    changes = {
        "paper_dataset": "MMED",
        "data__name": "jsonl",
        "data__reader": "jsonl",
        "data__split": "paper",
        "llm__name": "chatglm2_6b",
    }
    folder = tmp_path / "experiments" / "any_name"
    job(folder / "a", config("any_name", **changes), answers(0, 0.5)[:9])
    job(folder / "b", config("any_name", **changes, baseline__name="livebot"), answers(0, 0.4)[:9])
    compared = compare_systems(read_experiment(folder), "ELMD", ["paper"])
    assert compared.paper == ["Table 2, MMED"]
    assert [row.name for row in compared.rows[:2]] == ["Livebot", "ELMD"]
    assert compared.row("ELMD").paper["bleu2_char"] == "5.525"
    assert compared.row("Livebot").paper["rougeL_char"] == "7.558"
    assert not any("here other" in note for note in compared.notes)


# ---- tables


def test_json_is_all_of_it(comparison: Comparison, tmp_path: Path) -> None:
    paths = write_comparison(tmp_path, comparison, title="T")
    assert [path.name for path in paths] == ["comparison.md", "comparison.csv", "comparison.tex", "comparison.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert json.loads(paths[-1].read_text(encoding="utf-8")) == json.loads(json.dumps(asdict(comparison)))


def test_markdown_names_everything(comparison: Comparison) -> None:
    md = comparison_document(comparison, "Ours & theirs").markdown
    cell = comparison.row("w/o SSC").cells["paper"]["meteor_char"]
    assert f" {cell.mean:.2f} ± {cell.sd:.2f}° [{cell.low:.2f}, {cell.high:.2f}] | 9.183 |" in md
    best = comparison.row(NASTY).cells["paper"]["meteor_char"]
    assert f"| **{best.mean:.2f}° [{best.low:.2f}, {best.high:.2f}]** |" in md
    assert "### Against ELMD (30 tests)" in md
    assert "## Protocol `paper`" in md
    assert "## Missing\n\n- w/o V, seed 0: v,0 has no predictions.jsonl" in md
    assert r"a&b_c%d$e#f{g}h~i^j\\k\|l [m]\*\<script>\`" in md
    assert not re.search(r"(?<!\\)<script>", md)
    for block in re.findall(r"(?:^\|.*\n)+", md, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "> Within noise of ELMD: w/o SSC in every metric." in md


def test_csv_has_full_precision(comparison: Comparison) -> None:
    rows = {
        (row["system"], row["metric"]): row
        for row in csv.DictReader(io.StringIO(comparison_document(comparison, "T").csv))
    }
    cell = comparison.row("w/o ERM").cells["paper"]["bleu4_char"]
    row = rows["w/o ERM", "bleu4_char"]
    assert (float(row["mean"]), float(row["sd"]), float(row["low"])) == (cell.mean, cell.sd, cell.low)
    assert (float(row["difference"]), float(row["p_holm"])) == (cell.difference, cell.p_holm)
    assert (row["group"], row["verdict"], row["paper"], row["n"], row["seeds"]) == (
        "paper", DIFFERS, "1.161", "120", "3",
    )  # fmt: skip
    assert rows["ELMD", "bleu4_char"]["verdict"] == ""
    assert (NASTY, "bleu4_char") in rows


def test_latex_is_whole_and_escaped(comparison: Comparison) -> None:
    tex = comparison_document(comparison, "100% of {all}").latex
    assert tex.startswith("% needs \\usepackage{booktabs}")
    tables = re.findall(r"\\begin\{table\}.*?\\end\{table\}", tex, re.DOTALL)
    assert len(tables) == tex.count(r"\begin{table}") == tex.count(r"\end{tabular}") == 5  # paper 2, emotion 2, surface
    for table in tables:
        bare = re.sub(r"\\[\\{}&%$#_]", "", table)  # what is left of these is LaTeX's own
        assert bare.count("{") == bare.count("}")
        depth = np.cumsum([(c == "{") - (c == "}") for c in bare])
        assert depth.min() == 0
        assert bare.count("$") % 2 == 0
        assert not set("#%_~|*<>±°†×") & set(bare.replace("{*}", ""))
        spec = re.search(r"\\begin\{tabular\}\{(l+r+)\}", table)
        assert spec is not None
        body = table.split(r"\toprule")[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
        lines = [line for line in body.splitlines() if line.strip()]
        assert len(lines) > 2
        for line in lines:
            assert line.endswith(r" \\")
            assert len(re.findall(r"(?<!\\)&", line)) == len(spec[1]) - 1
            assert not line.startswith(("[", "*"))
    assert r"a\&b\_c\%d\$e\#f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k\textbar{}l {[}m{]}{*}" in tex
    assert r"\caption{100\% of \{all\}. " in tex
    cell = comparison.row("w/o SSC").cells["paper"]["meteor_char"]
    assert rf"& {cell.mean:.2f} $\pm$ {cell.sd:.2f}$^{{\circ}}$ & 9.183" in tex
    best = comparison.row(NASTY).cells["paper"]["meteor_char"]
    assert rf"\textbf{{{best.mean:.2f}$^{{\circ}}$}}" in tex
    assert "Missing: w/o V, seed 0" in tex


def test_the_table_of_verdicts_has_a_row_per_test(comparison: Comparison) -> None:
    columns, rows = verdict_table(comparison, "paper")
    assert len(rows) == comparison.tests["paper"]
    assert columns == ["system", "metric", "difference", "p (Holm)", "p (seeds)", "verdict"]
    assert ["w/o SSC", "bleu2_char", "+0.00", "1.000", "1.000", NOISE] in rows
    assert verdict_table(comparison, "surface") == ([], [])


# ---- trainings


def test_welch() -> None:
    from scipy.stats import ttest_ind

    a, b = [1.0, 2.0, 3.0], [2.5, 2.7, 4.0]
    assert welch(a, b) == pytest.approx(ttest_ind(a, b, equal_var=False).pvalue)
    assert welch([1.0], b) is None
    assert welch([1.0, 1.0], [2.0, 2.0]) is None
    near = welch([0.0, 1.0, -1.0], [2.2, 3.2, 1.2])  # sd 1 on both sides: three seeds see 2.3 of them, and no less
    far = welch([0.0, 1.0, -1.0], [2.3, 3.3, 1.3])
    assert near is not None
    assert far is not None
    assert far < 0.05 < near


# ---- what s costs


def test_search_cost_and_points(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "demo"
    for slots in (4, 1):
        for seed in (0, 1):
            stages = {f"index{slots}": {}, "erm": {"wall_seconds": 3.5}}
            varied = config(seed=seed, erm__slots=slots)
            made = job(folder / f"{slots},{seed}", varied, answers(seed, 0.5)[:9], stages, {"erm.slots": slots})
            about = json.loads((made / "artifacts.json").read_text(encoding="utf-8"))
            about["artifacts"]["index"] = about["artifacts"].pop(f"index{slots}")
            (made / "artifacts.json").write_text(json.dumps(about), encoding="utf-8")
        samples = load_samples(tmp_path / "prepare" / "abc" / "samples.jsonl")
        train = [sample for sample in samples if sample.split == "train"]
        keys = {"e_u": torch.randn(len(train), 8), "E_s": torch.randn(len(train), 8 * slots)}
        Index.build(train, keys).save(tmp_path / f"index{slots}" / "abc")
    varied = read_experiment(folder)
    compared = compare_systems(varied, reference_of(varied), ["paper"])
    single, four = coefficient_points(varied, compared, repeats=3)
    assert (single.slots, single.system, four.slots, four.system) == (1, "ELMD, s = 1", 4, "ELMD, s = 4")
    cell = compared.row("ELMD, s = 4").cells["paper"]["rougeL_char"]
    assert (four.scores["ROUGE-L"].mean, four.scores["ROUGE-L"].sd) == (cell.mean, cell.sd)
    assert list(four.scores) == ["BLEU-4", "METEOR", "ROUGE-L"]
    assert four.train_seconds == {0: 3.5, 1: 3.5}
    n = len(train)
    for point in (single, four):
        for cost in point.costs.values():
            assert (cost.width, cost.candidates) == (8 * point.slots, n)
            assert cost.key_bytes == n * 8 * point.slots * 4
            assert cost.file_bytes > n * 8 * (point.slots + 1) * 4  # both keys and their names
            assert cost.queries == sum(sample.split == "test" for sample in samples)
            assert 0 < cost.low <= cost.microseconds <= cost.high
    assert torch.get_num_threads() >= 1
    (tmp_path / "index4" / "abc" / "index.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"index4/abc: is not a complete index"):
        search_cost(varied.systems["ELMD, s = 4"][0], samples)


def test_no_points_where_s_does_not_vary(experiment: Experiment, comparison: Comparison) -> None:
    assert coefficient_points(experiment, comparison) == []
