"""Any decoder: GLM-4, Qwen and Llama with prefix, LoRA and neither; checkpointing, the causal split, bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.tiny import LINES, make_demonstrations, make_samples
from elmd.data.encode import Encoder
from elmd.data.examples import Examples
from elmd.data.prompts import SLOTS, Prompt
from elmd.errors import CheckpointError
from elmd.models.adapter import FixedLayer, Lora, Prefix, load_adapter
from elmd.models.decode import generate_all
from elmd.models.elmd import Elmd
from elmd.models.llm import load_llm
from elmd.models.projector import Projector
from llms import TEMPLATES, write_llm
from oracle import slow_loss, slow_reply

PROMPT = Prompt(
    instruction="{task}\n", background="{background}\n", turn="{speaker}：{text}\n", utterance="{speaker}：{text}\n",
    video="画面：{video}\n", demonstration="参考：{response}\n", rep="情感？", eerg="回复？", reply="说？",
)  # fmt: skip
SAMPLES = make_samples(8)
VISUAL: dict[str, Tensor | None] = {
    s.id: torch.randn(3 + i % 2, 6, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SAMPLES)
}
VISUAL[SAMPLES[3].id] = None  # a sample without a clip
ADAPTERS = ["prefix", "lora", "none"]


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp(request.param), request.param, LINES * 20)


def build(
    folder: Path, adapter: str, dtype: str = "float32", *, dropout: float = 0.0, with_target: bool = True
) -> tuple[Elmd, Examples]:
    """A model with the named adapter, none of whose numbers is near zero, and samples to run it on."""
    llm, tokenizer = load_llm(folder, dtype=dtype)
    torch.manual_seed(1)
    created: Any = {
        "prefix": lambda: Prefix.create(llm, 4, dropout),
        "lora": lambda: Lora.create(llm, 2, 4, dropout),
        "none": lambda: None,
    }[adapter]()
    if adapter == "lora":
        for weight in created.weights.values():
            torch.nn.init.normal_(weight, std=0.2)
    data = Examples(
        SAMPLES, Encoder(tokenizer, PROMPT, 400, 60), make_demonstrations(SAMPLES), VISUAL.get, "eerg",
        with_target=with_target,
    )  # fmt: skip
    return Elmd(llm, Projector(6, 32), created), data


def step(model: Elmd, data: Examples, *, split: bool = False) -> tuple[Tensor, list[Tensor], int]:
    """Loss of all samples, gradient of what trains, and bytes kept for the backward pass but parameters."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in own:
            kept[at] = max(kept.get(at, 0), tensor.untyped_storage().nbytes())
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(data.batch(range(len(data)), split=split)).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients, sum(kept.values())


def assert_equal_steps(a: tuple[Tensor, list[Tensor], int], b: tuple[Tensor, list[Tensor], int]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-6)
    assert len(a[1]) == len(b[1]) > 0
    for one, other in zip(a[1], b[1], strict=True):
        assert 0 <= (one - other).norm() < 1e-5 * other.norm(), "float32, in another order"


def test_prompts_open_once_and_the_template_is_read(folder: Path) -> None:
    tokenizer = load_llm(folder)[1]
    encoder = Encoder(tokenizer, PROMPT, 400, 60)
    before, after = encoder.wrap(f"甲：你好{SLOTS}乙")
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"甲：你好{SLOTS}乙"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode([*before, *encoder.text(SLOTS), *after]) == written
    opening = tokenizer.encode("")
    assert before[: len(opening)] == opening
    assert all(before.count(token) == 1 for token in opening)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loss_and_gradients_equal_the_slow_ones(folder: Path, adapter: str) -> None:
    model, data = build(folder, adapter)
    model.eval()
    fast = step(model, data)
    losses = [slow_loss(model, row, VISUAL[s.id]) for row, s in zip(data.rows, SAMPLES, strict=True)]
    torch.stack(losses).sum().backward()
    slow = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert_equal_steps(fast, (torch.stack(losses).sum().detach(), slow, 0))
    trained = {"prefix": 3, "lora": 2 + len(getattr(model.adapter, "weights", ())), "none": 2}[adapter]
    assert len(fast[1]) == trained, "the projector's two and the adapter's; nothing of the language model"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_greedy_ids_equal_recomputing_each_token(folder: Path, adapter: str) -> None:
    model, asked = build(folder, adapter, with_target=False)
    found = generate_all(
        model, asked, 10_000, Accelerator(cpu=True), eos=0, max_new_tokens=8, top_p=1.0, temperature=0, seeds=[0]
    )
    with torch.no_grad():
        slow = [slow_reply(model, row, VISUAL[s.id], 0, 8) for row, s in zip(asked.rows, SAMPLES, strict=True)]
    assert [ids for [ids] in found] == slow
    assert len({tuple(ids) for ids in slow}) > 2


@pytest.mark.parametrize(("adapter", "dropout"), [("prefix", 0.0), ("prefix", 0.3), ("lora", 0.3), ("none", 0.0)])
def test_checkpointing_keeps_less_and_gives_the_same(folder: Path, adapter: str, dropout: float) -> None:
    model, data = build(folder, adapter, dropout=dropout)
    model.train()
    plain = step(model, data)
    model.checkpointing = True
    lean = step(model, data)
    assert torch.equal(plain[0], lean[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], lean[1], strict=True))
    assert lean[2] < 0.6 * plain[2]
    if dropout:
        model.eval()
        assert not torch.equal(step(model, data)[0], plain[0]), "there was dropout to reproduce"
    assert "forward" not in vars(model.llm.get_decoder().layers[0]), "the language model is left as it was"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_causal_split_keeps_less_and_gives_the_same(folder: Path, checkpointing: bool) -> None:
    model, data = build(folder, "none")
    model.train()
    model.checkpointing = checkpointing
    whole, parted = step(model, data), step(model, data, split=True)
    assert_equal_steps(parted, whole)
    share = sum(len(row.before) for row in data.rows) / sum(data.lengths)
    assert share > 0.5
    assert parted[2] < (0.8 if checkpointing else 1 - 0.5 * share) * whole[2]


@pytest.mark.parametrize("adapter", ["prefix", "lora"])
def test_what_is_split_by_mistake_still_runs_whole(folder: Path, adapter: str) -> None:
    """A prefix and LoRA reach every token, so a batch with a hole in its middle must give all the gradient."""
    model, data = build(folder, adapter)
    assert_equal_steps(step(model, data, split=True), step(model, data))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_bfloat16_weights_with_float32_trainables(folder: Path, adapter: str) -> None:
    exact, data = build(folder, adapter)
    rough, _ = build(folder, adapter, "bfloat16")
    assert next(rough.llm.parameters()).dtype == torch.bfloat16
    trained = [p for p in rough.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    a, b = step(exact, data), step(rough, data)
    # bfloat16 holds 8 bits. Found over all nine: 0.18 % of the loss at most, cosines of gradients from 0.970 up.
    assert b[0].item() == pytest.approx(a[0].item(), rel=0.005)
    for one, other in zip(a[1], b[1], strict=True):
        assert other.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("adapter", ["prefix", "lora"])
def test_saved_adapters_load_and_hold_nothing_else(folder: Path, tmp_path: Path, adapter: str) -> None:
    model, data = build(folder, adapter)
    model.eval()
    model.save(tmp_path)
    assert (
        sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
        < 4 * 1.2 * sum(p.numel() for p in model.parameters() if p.requires_grad) + 20_000
    )
    again = Elmd.load(tmp_path, load_llm(folder)[0]).eval()
    assert type(again.adapter) is type(model.adapter)
    with torch.no_grad():
        batch = data.batch(range(len(data)))
        assert torch.equal(again.loss(batch), model.loss(batch))


@pytest.mark.parametrize("adapter", ["prefix", "lora"])
def test_saved_adapters_go_on_training(folder: Path, tmp_path: Path, adapter: str) -> None:
    model, data = build(folder, adapter)
    model.adapter.save(tmp_path)
    llm, _ = load_llm(folder)
    again = Elmd(llm, model.projector, load_adapter(llm, tmp_path, trainable=True, dropout=0.2)).eval()
    assert_equal_steps(step(again, data), step(model.eval(), data))
    again.train()
    assert adapter == "lora" or not torch.equal(step(again, data)[0], step(model, data)[0]), "dropout as asked for"


def test_a_prefix_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    build(folder, "prefix")[0].adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_layers": 7}))
    with pytest.raises(
        CheckpointError, match=r"is a prefix of 7 layers, .* this language model has 2, .* trained with"
    ):
        load_adapter(load_llm(folder)[0], tmp_path)


def test_a_folder_without_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    llm, _ = load_llm(folder)
    with pytest.raises(CheckpointError, match="holds no adapter for this language model; train it with this llm"):
        load_adapter(llm, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_adapter(llm, tmp_path)


def test_weights_go_straight_to_where_they_are_wanted(folder: Path) -> None:
    llm, _ = load_llm(folder, onto="meta")
    assert {p.device.type for p in llm.parameters()} == {"meta"}, "they never were anywhere else"
    assert {p.device.type for p in load_llm(folder)[0].parameters()} == {"cpu"}


def test_language_models_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'flash_attention_2' cannot be used here .*; install its"):
        load_llm(folder, attention="flash_attention_2")
    (tmp_path / "config.json").write_text('{"model_type": "chatglm", "num_layers": 28}')
    with pytest.raises(CheckpointError, match=r"is ChatGLM as published, .* convert it once: python"):
        load_llm(tmp_path)


def test_fixed_layers_stay_as_they_are() -> None:
    layer: Any = FixedLayer()
    layer.lazy_initialization(torch.zeros(1), torch.zeros(1))
    layer.keys = layer.values = torch.ones(1, 2, 3, 4)
    for _ in range(2):
        keys, values = layer.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
        assert keys.shape == values.shape == (1, 2, 8, 4)
    assert layer.get_seq_length() == 3
    assert layer.get_mask_sizes(5) == (8, 0)
