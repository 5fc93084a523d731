"""The model card of a pack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from elmd.errors import CheckpointError
from elmd.pack.card import model_card
from elmd.pack.trained import read_trained
from trained_runs import SCORES, Runs, job_with, pack_of


# ------------------------------------------------------------------------------------------------------------ card
def test_the_card_parses_back_with_its_scores(runs: Runs, tmp_path: Path) -> None:
    job = job_with(runs("full")[0], tmp_path / "job", SCORES, llm__path="THUDM/chatglm2-6b")
    with pytest.raises(CheckpointError, match="THUDM/chatglm2-6b"):
        pack_of(job, tmp_path / "pack")  # not to be had offline, and nothing is left
    assert not (tmp_path / "pack").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".pack")]
    job = job_with(runs("full")[0], tmp_path / "job", SCORES)
    card = ModelCard.load(pack_of(job, tmp_path / "pack", license="apache-2.0") / "README.md")
    data = card.data
    assert (data.language, data.license, data.library_name) == ("zh", "apache-2.0", "elmd")
    assert data.datasets is None, "what a data set is called here is no id of the hub"
    assert data.metrics == ["accuracy", "bleu", "rouge"]
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {
        "bleu2_char (paper protocol)": 33.6, "rouge1_char (paper protocol)": 43.15,
        "accuracy (emotion of the response)": 0.875,
    }  # fmt: skip
    assert {(r.dataset_name, r.dataset_split) for r in data.eval_results} == {("tiny", "test")}
    for words in (
        "| `bleu2_char` | 33.60 ± 0.65 [32.40, 34.80] | 10.80 |", "floor: most common reply", "load_pack(",
        "| train | 16 |", "word for word a training response: 1 of 4", "Training seed 3", "top-p 0.7",
        "commit cccccccccccc with local changes", "Not for clinical use", "10.1145/3652583.3658104",
        "**This folder holds data.**", "apache-2.0",
    ):  # fmt: skip
        assert words in card.text, words


def test_the_card_names_base_models_of_the_hub(runs: Runs, full_pack: Path, tmp_path: Path) -> None:
    facts = json.loads((full_pack / "elmd.json").read_text(encoding="utf-8"))
    facts["llm"] |= {"hub": True, "model": "zai-org/chatglm2-6b", "fingerprint": None}
    model_card(read_trained(runs("full")[0]), facts, license=None, language="zh").save(tmp_path / "card.md")
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.base_model == ["zai-org/chatglm2-6b"]
    assert card.data.base_model_relation == "adapter"
    assert 'load_pack("path/to/this/folder")' in card.text, "it needs no other path"


def test_scores_of_another_training_stay_off_the_card(runs: Runs, tmp_path: Path) -> None:
    other = {**SCORES, "predictions": "generate/8/predictions.jsonl"}
    job = job_with(runs("full")[0], tmp_path / "job", other)
    card = ModelCard.load(pack_of(job, tmp_path / "pack") / "README.md")
    assert card.data.eval_results is None
    assert card.data.license == "unknown"
    assert "Not scored when it was exported." in card.text


def test_users_text_stays_text_in_the_card(runs: Runs, tmp_path: Path) -> None:
    evil = 'x\n---\nlicense: mit\n<script>alert("{{ 7 * 7 }}")</script> | `a` *b*: [c](d)'
    job = job_with(runs("full")[0], tmp_path / "job", SCORES, data__name=evil, experiment_name=evil)
    pack = pack_of(job, tmp_path / "pack", name=f"我的: {evil}", license=evil)
    card, line = ModelCard.load(pack / "README.md"), " ".join(evil.split())
    assert card.data.license == line
    assert card.data.model_name == f"我的: {line}"
    assert set(card.data.to_dict()) == set(
        ModelCard.load(pack_of(runs("full")[0], tmp_path / "plain") / "README.md").data.to_dict()
    ) | {"metrics", "model-index"}
    assert "<script>" not in card.text
    assert "49" not in card.text.split("## What is in it")[0]
    assert r"\`a\` \*b\*: \[c\](d)" in card.text
