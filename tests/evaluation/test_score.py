"""Predictions files, scores over seeds, floors, comparisons and tables."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from elmd.errors import DataError
from elmd.evaluation import paired
from elmd.evaluation import score as scoring
from elmd.evaluation.paired import compare_metrics
from elmd.evaluation.predictions import Prediction, by_seed_of, read_predictions, write_predictions
from elmd.evaluation.score import common_floor, measure, pool, random_floor, retrieval_floor, score, score_all
from elmd.evaluation.score_tables import group_table, score_document, with_floors
from elmd.evaluation.significance import holm
from elmd.labels import Emotion
from elmd.metrics import text

REFERENCES = ["今天真的好高兴啊", "你怎么了？", "我也不知道。", "谢谢你陪我说话", "别哭了，会好的", "你吓死我了！"]
SAID = ["今天真的好开心啊", "你怎么啦？", "不知道。", "谢谢你", "", "你吓死我了！"]


def predictions(**seeds: list[str]) -> list[Prediction]:
    """Six samples; one run without seed, or one per keyword `s<seed>`."""
    runs: dict[int | None, list[str]] = {int(name[1:]): hypotheses for name, hypotheses in seeds.items()} or {
        None: SAID
    }
    return [
        Prediction(
            id=f"d#{i}",
            hypothesis=hypothesis,
            reference=reference,
            demonstration=["今天好", "怎么了？", None, "谢谢你", "会好的", "你好"][i],
            gold_emotion=Emotion.HAPPY if i % 2 else Emotion.SAD,
            predicted_emotion=None if i == 4 else Emotion.HAPPY,
            seed=seed,
            tags=("hidden",) if i == 0 else (),
            extra={"prompt": {"utterance": "她说：“好”\n吗"}},
        )
        for seed, hypotheses in runs.items()
        for i, (hypothesis, reference) in enumerate(zip(hypotheses, REFERENCES, strict=True))
    ]


# ---- files


def test_predictions_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    written = [*predictions(s0=SAID, s1=REFERENCES)]
    write_predictions(path, written)
    assert read_predictions(path) == written
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert "今天真的好开心啊" in path.read_text(encoding="utf-8")


def test_odd_but_legal_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    line = '{"id": "a", "hypothesis": "好\u2028吗", "reference": "好", "note": 1}'
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b'\r\n\r\n{"id": "b", "hypothesis": "", "reference": "x"}')
    first, second = read_predictions(path)
    assert first == Prediction("a", "好\u2028吗", "好", extra={"note": 1})
    assert second.hypothesis == ""


GOOD = '{"id": "a", "hypothesis": "好", "reference": "好"}'


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ([GOOD, '{"id": "b", "hypothesis": "好", "refer'], 2, "is not JSON"),
        (["<!DOCTYPE html>"], 1, "is not JSON"),
        (["version https://git-lfs.github.com/spec/v1"], 1, "is not JSON"),
        ([GOOD, "", '{"id": "b", "reference": "好"}'], 3, "lacks 'hypothesis'; every prediction needs id, hypothesis"),
        ([GOOD, GOOD], 2, "id 'a' occurs again; it is first in line 1"),
        (['{"id": "a", "id": "b", "hypothesis": "好", "reference": "好"}'], 1, "holds the key 'id' twice"),
        (['["a"]'], 1, "is a JSON list, not an object"),
        (['{"id": 1, "hypothesis": "好", "reference": "好"}'], 1, "has 1 as 'id'; write a string"),
        (['{"id": "a", "hypothesis": null, "reference": "好"}'], 1, "has None as 'hypothesis'"),
        (['{"id": "a", "hypothesis": "\\ud83d", "reference": "好"}'], 1, "half a surrogate pair in 'hypothesis'"),
        (['{"id": "a", "hypothesis": "好", "reference": " "}'], 1, "has an empty reference"),
        ([GOOD[:-1] + ', "gold_emotion": "happyy"}'], 1, "unknown gold_emotion 'happyy'; write one of Happy, Surprise"),
        ([GOOD[:-1] + ', "predicted_emotion": ["Sad"]}'], 1, "unknown predicted_emotion ['Sad']"),
        ([GOOD[:-1] + ', "seed": "1"}'], 1, "has the seed '1'"),
        ([GOOD[:-1] + ', "tags": "x"}'], 1, "has the tags 'x'"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, lines: list[str], line: int, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(DataError, match=r"p\.jsonl: cannot be read \(No such file"):
        read_predictions(path)
    path.write_bytes(b"\n \n")
    with pytest.raises(DataError, match=r"p\.jsonl: holds no predictions"):
        read_predictions(path)
    path.write_bytes((GOOD + "\n").encode() + GOOD.encode("gbk"))
    with pytest.raises(DataError, match=r"p\.jsonl:2: is not UTF-8"):
        read_predictions(path)
    path.write_text(GOOD[:-1] + ', "seed": 0}\n' + GOOD.replace('"a"', '"b"')[:-1] + ', "seed": 1}')
    with pytest.raises(DataError, match=r"p\.jsonl: seeds 0 and 1 do not cover the same samples \(2 differ"):
        read_predictions(path)


# ---- scores


def test_score_is_json_and_says_how_it_was_made() -> None:
    result = score(predictions())
    assert json.loads(json.dumps(result)) == result
    assert result["n"] == 6
    assert result["seeds"] == [None]
    assert result["protocols"] == ["paper", "strict", "chatglm"]
    assert "tok:zh" in result["signatures"]["bleu4_zh"]
    assert set(result["versions"]) == {"nltk", "rouge-chinese", "sacrebleu", "jieba"}
    assert result["paper"] == {name: metric.score for name, metric in text.paper(SAID, REFERENCES).items()}
    assert result["surface"]["empty_rate"] == pytest.approx(1 / 6)
    assert result["surface"]["copy_rate"] == pytest.approx(1 / 5)
    assert (result["emotion"]["accuracy"], result["emotion"]["missing"]) == (0.5, 1)
    assert "sd" not in result
    low, high = result["intervals"]["paper"]["rougeL_char"]
    assert low < result["paper"]["rougeL_char"] < high


def test_emotions_that_were_never_named_get_no_accuracy() -> None:
    silent = [Prediction("a", "好", "好", gold_emotion=Emotion.SAD)]
    assert score(silent, ["paper"])["emotion"] == {"n": 1, "missing": 1}
    assert "emotion" not in score([Prediction("a", "好", "好")], ["paper"])


def test_seeds_are_averaged_with_their_deviation() -> None:
    both = predictions(s0=SAID, s1=REFERENCES)
    both[6:] = both[:5:-1]  # the second seed in another order
    result = score(both, ["paper"])
    first, second = (text.paper(run, REFERENCES)["bleu2_char"].score for run in (SAID, REFERENCES))
    assert result["n"] == 6
    assert result["seeds"] == [0, 1]
    assert result["paper"]["bleu2_char"] == pytest.approx((first + second) / 2)
    assert result["sd"]["paper"]["bleu2_char"] == pytest.approx(abs(first - second) / 2**0.5)
    assert result["emotion"]["n"] == 12
    assert sum(map(sum, result["emotion"]["confusion"]["counts"])) == 12
    assert result["emotion"]["accuracy"] == 0.5


def test_score_refuses() -> None:
    with pytest.raises(DataError, match=r"unknown protocol 'papr'; choose from paper, strict, chatglm"):
        score(predictions(), ["papr"])
    with pytest.raises(DataError, match="no predictions to score"):
        score([])
    with pytest.raises(DataError, match="id 'd#0' occurs twice with seed None"):
        score(predictions() + predictions()[:1])
    other = [Prediction(p.id, p.hypothesis, p.reference + "啊", seed=1) for p in predictions()]
    with pytest.raises(DataError, match="another reference or gold emotion with seed 1 than with seed None"):
        score(predictions() + other)


# ---- floors


def test_floors() -> None:
    run = predictions(s0=SAID, s1=SAID)
    train = ["好", "不好", "好", "嗯", "不好"]
    common = common_floor(run, train)
    assert [p.hypothesis for p in common] == ["好"] * 6
    assert [p.id for p in common] == [f"d#{i}" for i in range(6)]
    assert [p.hypothesis for p in retrieval_floor(run)] == ["今天好", "怎么了？", "", "谢谢你", "会好的", "你好"]
    drawn = random_floor(run, train, seed=3)
    assert len(drawn) == 6 * scoring.FLOOR_SEEDS
    assert {p.hypothesis for p in drawn} <= set(train)
    assert drawn == random_floor(run, train, seed=3)
    assert drawn != random_floor(run, train, seed=4)
    assert len({tuple(p.hypothesis for p in drawn if p.seed == s) for s in range(scoring.FLOOR_SEEDS)}) > 1


def test_score_all_holds_systems_and_floors() -> None:
    result = score_all({"elmd": predictions(), "no_erm": predictions(s0=REFERENCES)}, ["好", "不好"], ["paper"])
    assert result["n"] == 6
    assert result["protocols"] == ["paper"]
    assert "signatures" not in result  # sacrebleu has no part in this
    assert list(result["systems"]) == ["elmd", "no_erm"]
    assert list(result["floors"]) == ["random response", "most common reply", "retrieval only"]
    retrieval = text.paper([p.hypothesis for p in retrieval_floor(predictions())], REFERENCES)
    assert result["floors"]["retrieval only"]["paper"]["rouge1_char"] == pytest.approx(retrieval["rouge1_char"].score)
    assert result["systems"]["no_erm"]["paper"]["bleu4_char"] == pytest.approx(100)
    assert "emotion" not in result["floors"]["random response"]
    bare = [Prediction("a", "好", "好")]
    assert score_all({"mine": bare}, None, ["paper"])["floors"] == {}
    with pytest.raises(DataError, match=r"elmd and mine were not run on the same samples \(7 are in one only"):
        score_all({"elmd": predictions(), "mine": bare}, None, ["paper"])


# ---- comparisons


def pooled(run: list[Prediction]) -> dict[str, text.Metric]:
    return pool([measure(decoded, "strict") for decoded in by_seed_of(run, "predictions").values()])


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "RESAMPLES", 500)


def test_compare_corrects_over_the_family(few_resamples: None) -> None:
    same, gold = pooled(predictions(s9=SAID)), pooled(predictions(s0=REFERENCES))
    result = compare_metrics(pooled(predictions()), {"same": same, "gold": gold})
    assert list(result) == ["same", "gold"]
    for metric in ("bleu2_zh", "bleu4_zh", "rouge1_zh", "rougeL_zh", "chrf_char"):
        assert result["same"][metric] == {"difference": 0, "p": 1, "p_holm": 1}
        assert result["gold"][metric]["difference"] < 0
    # five of six pairs differ, all in one direction: 2 of the 2^5 signs of those
    assert result["gold"]["rougeL_zh"]["p"] == 2 / 32
    family = {f"{name} {metric}": row["p"] for name, rows in result.items() for metric, row in rows.items()}
    corrected = {f"{name} {metric}": row["p_holm"] for name, rows in result.items() for metric, row in rows.items()}
    assert len(family) == 10
    assert corrected == holm(family)
    del gold["chrf_char"]
    fewer = compare_metrics(pooled(predictions()), {"same": same, "gold": gold})
    assert sum(map(len, fewer.values())) == 9


def test_compare_takes_the_seeds_of_a_sample_together(few_resamples: None) -> None:
    gold = {"gold": pooled(predictions(s0=REFERENCES))}
    twice = pooled(predictions(s0=SAID, s1=SAID))
    assert all(len(metric.statistics) == 6 for metric in twice.values())
    assert compare_metrics(twice, gold) == compare_metrics(pooled(predictions()), gold)


# ---- tables


@pytest.fixture(scope="module")
def scores() -> dict[str, Any]:
    return score_all({"full_model & 50%": predictions(s0=SAID, s1=REFERENCES), "a|b": predictions()}, ["好"])


def test_tables_hold_the_scores(scores: dict[str, Any], tmp_path: Path) -> None:
    rows = with_floors(scores)
    assert list(rows) == [
        "full_model & 50%", "a|b", "floor: random response", "floor: most common reply", "floor: retrieval only",
    ]  # fmt: skip
    document = score_document(rows, title="Scores", notes=["CPED, valid."], failed={"x": "x:3: is\nnot JSON."})
    paths = document.write(tmp_path, "scores")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.csv", "scores.md", "scores.tex"]
    md = paths[0].read_text(encoding="utf-8")
    plain = scores["systems"]["a|b"]
    assert f"| a\\|b | 6 | {plain['paper']['bleu2_char']:.2f} |" in md
    full = scores["systems"]["full_model & 50%"]
    assert f"{full['paper']['bleu4_char']:.2f} ± {full['sd']['paper']['bleu4_char']:.2f}" in md
    assert "## Could not be scored\n\n- x: x:3: is not JSON." in md
    assert "- CPED, valid." in md
    assert f"`bleu4_zh`: `{scores['signatures']['bleu4_zh']}`" in md
    assert "- `meteor_char`: mean METEOR on characters" in md
    for heading in ("paper", "strict", "chatglm"):
        assert f"## Protocol `{heading}`" in md
    table = [line for line in md.splitlines() if line.startswith("|")]
    assert len({line.count("|") - line.count("\\|") for line in table[:7]}) == 1


def test_csv_has_full_precision(scores: dict[str, Any]) -> None:
    first, second, *_ = csv.DictReader(io.StringIO(score_document(with_floors(scores), title="t").csv))
    full, plain = scores["systems"].values()
    assert first["system"] == "full_model & 50%"
    assert float(first["strict/chrf_char"]) == full["strict"]["chrf_char"]
    assert float(first["strict/chrf_char_sd"]) == full["sd"]["strict"]["chrf_char"]
    assert float(second["paper/meteor_char_low"]) == plain["intervals"]["paper"]["meteor_char"][0]
    assert second["strict/chrf_char_sd"] == ""


def test_latex_is_escaped_and_whole(scores: dict[str, Any]) -> None:
    tex = score_document(with_floors(scores), title="100% of {all}").latex
    assert r"full\_model \& 50\% & 6 & " in tex
    assert r"a\textbar{}b & 6" in tex
    assert r"\caption{100\% of \{all\}. Protocol paper (characters, $\times$ 100)}" in tex
    assert r"system & n & bleu2\_char & bleu4\_char & meteor\_char & rouge1\_char & rougeL\_char \\" in tex
    assert r" $\pm$ " in tex
    assert r"\begin{tabular}{lrrrrrr}" in tex
    for command in ("toprule", "midrule", "bottomrule", "end{table}"):
        assert tex.count(f"\\{command}") == tex.count(r"\begin{table}") == 5
    assert tex.count("{") == tex.count("}")
    odd = score_document({r"a\b~c^d#$<>": scores["systems"]["a|b"]}, title="t").latex
    assert r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\#\$\textless{}\textgreater{} & 6" in odd


def test_a_missing_group_is_a_dash_or_no_row(scores: dict[str, Any]) -> None:
    rows = with_floors(scores)
    columns, body = group_table(rows, "emotion")
    assert columns[:3] == ["system", "n", "accuracy"]
    assert [row[0] for row in body] == ["full_model & 50%", "a|b"]
    assert group_table({"mine": score([Prediction("a", "好", "好")], ["paper"])}, "emotion") == ([], [])
    _, surface = group_table({"mine": score([Prediction("a", "好", "好")], ["paper"])}, "surface")
    assert surface[0][-2:] == ["–", "–"]
    assert "Could not" not in score_document(rows, title="t").markdown
