"""Fixtures that several test files share: tiny random checkpoints and made-up samples, nothing from a hub."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.tiny import write_llm

if TYPE_CHECKING:
    from trained_runs import Runs

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).parents[1]

#: Tensors and ids that the original implementations gave; its README says which.
GOLDEN_FILES = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real dialogues and clips beside the checkout; skips where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs ../shared (real dialogues and clips), which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def pairs() -> tuple[list[str], list[str]]:
    """120 hypotheses and references that share words, with short, long, empty, equal and spaced ones among them."""
    words = [*"我你好不了啊吗呢，。？！", "今天", "明天", "高兴", "难过", "怎么", "好的", "谢谢", "OK"]
    rng = random.Random(7)
    references = ["".join(rng.choices(words, k=rng.randint(1, 15))) for _ in range(120)]
    hypotheses = [
        "".join(rng.choice(words) if rng.random() < 0.5 else c for c in reference) for reference in references
    ]
    hypotheses[:6] = ["", " \u3000", references[2], "好", "好 的 。", " " + references[5] + "\n"]
    references[4] = "好的。"
    return hypotheses, references


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_llm`."""
    return write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `encoders.write_bert`."""
    from encoders import write_bert

    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def trained_folder(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retriever with self-separation, as the ERM's stage leaves it."""
    import torch

    from elmd.retrieval import load_retriever
    from elmd.retrieval.retriever import add_separation

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("trained")
    add_separation(load_retriever(bert), 4, "mlp").save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, llm_folder: Path, trained_folder: Path) -> Runs:
    """See `trained_runs.make_runs`."""
    from trained_runs import make_runs

    return make_runs(tmp_path_factory.mktemp("made") / "runs", llm_folder, trained_folder)


@pytest.fixture
def full_pack(runs: Runs, tmp_path: Path) -> Path:
    """A pack of the full model."""
    from trained_runs import pack_of

    return pack_of(runs("full")[0], tmp_path / "pack")


@pytest.fixture(scope="module")
def llm(llm_folder: Path) -> Any:
    """The tiny language model and its tokenizer."""
    from elmd.models.llm import load_llm

    return load_llm(llm_folder)


@pytest.fixture(scope="module")
def encoder(llm: Any) -> Any:
    """That of the tiny language model, with the prompt of `tiny_elmd`."""
    from elmd.data.encode import Encoder
    from tiny_elmd import PROMPT

    return Encoder(llm[1], PROMPT, 200, 40)
