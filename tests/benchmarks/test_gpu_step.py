"""The training-step benchmark at its smallest size: its ways agree, its figures are there, its formula counts right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.ways import step_flops
from conftest import ROOT
from elmd.config import EergConfig, GenerateConfig, LlmConfig, RepConfig, VisionConfig
from elmd.convert.chatglm2 import CHATGLM2_6B, native_config

WAYS = {
    "rep": ["elmd", "elmd, checkpointing", "transformers", "elmd, no split"],
    "eerg": ["elmd", "elmd, checkpointing", "peft", "p-tuning"],
}
#: As on a machine that has PyTorch and the libraries around it, but not what the command lines need.
BARE = (
    "import runpy, sys\n"
    "for name in ('hydra', 'omegaconf', 'decord', 'av', 'nltk', 'jieba', 'rouge_chinese'): sys.modules[name] = None\n"
    "runpy.run_path('benchmarks/gpu_step.py', run_name='__main__')\n"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # before each run: with all the tests' modules half a second
    import benchmarks.gpu_step

    return benchmarks.gpu_step


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.samples

    return benchmarks.samples


def task(bench: ModuleType, kind: str, dtype: torch.dtype = torch.float32, rounds: int = 1) -> Any:
    scale = bench.SCALES["smoke"]
    llm = bench.language_model(scale, torch.device("cpu"), dtype)
    found, _ = bench.lengths(rounds * scale.batch, None)
    rows = bench.Samples(found, 300, tokens_per_character=0.3, target=3 if kind == "rep" else None)
    return bench.Task(kind, llm, scale, rows, longest=400)


def test_it_runs_as_a_file_with_few_libraries_and_leaves_its_figures(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, "--scale", "smoke", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path),
         "--peak-tflops", "0.1"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": "src"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "neither libraries' warnings nor their logs"
    report = json.loads((tmp_path / "gpu_step.json").read_text())
    assert torch.__version__.startswith(report["versions"]["torch"])
    assert report["peak_tflops"] == 0.1
    rate = report["features"]["frames_per_s"]
    eerg = report["tasks"]["eerg"]["ways"]
    assert [one["part"] for one in report["in_the_loop"]] == ["steps"]
    assert report["in_the_loop"][0]["seconds"] == pytest.approx(eerg["p-tuning"]["median_s"] + 4 * 8 / rate)
    assert report["in_the_loop"][0]["slower"] > eerg["p-tuning"]["median_s"] / eerg["elmd"]["median_s"]
    assert {kind: list(found["ways"]) for kind, found in report["tasks"].items()} == WAYS
    for found in report["tasks"].values():
        assert found["about"]["samples"] == 2 * 4
        for way in found["ways"].values():
            assert way["fits"]
            assert way["largest_relative_difference"] < 1e-4
            assert len(way["seconds"]) == 2
            assert way["tokens_per_s"] > way["samples_per_s"] > 0
            assert 0 < way["mfu_percent"] < 200
            assert way["step_bytes"] > 0
            assert abs(way["deviation_percent"]) < 40  # small steps: what is not predicted weighs more
        assert found["ways"]["elmd"]["slower_range"] == [1, 1]
    text = (tmp_path / "gpu_step.md").read_text()
    assert text == done.stdout
    assert "| p-tuning, batch of 1 | " in text


def test_the_other_parts_tell_their_figures(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = ["--scale", "smoke", "--device", "cpu", "--peak-tflops", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["gpu_step", *choices, "--part", "grid", "decode", "epochs"])
    bench.main()
    report = json.loads((tmp_path / "gpu_step.json").read_text())
    assert not report["tasks"]
    cells = {(c["length"], c["micro_tokens"], c["checkpointing"]): c for c in report["grid"]}
    assert len(cells) == 2 * 4 * 2
    assert len({(c["length"], tuple(map(tuple, c["micro_batches"]))) for c in cells.values()}) == 2 * 4, "no cell twice"
    assert [cells[96, budget, False]["batch"] for budget in (128, 256, 512, 1024)] == [4, 4, 5, 10]
    for cell in cells.values():
        assert max(shape[0] * shape[1] for shape in cell["micro_batches"]) > cell["micro_tokens"] - cell["length"]
        assert cell["tokens_per_s"] == pytest.approx(cell["length"] * cell["samples_per_s"])
        assert 0 < cell["mfu_percent"] < 200
    assert [cell["rows"] for cell in report["decode"]] == [1, 16, 64, 128]
    assert all(cell["tokens_per_s"] > 0 for cell in report["decode"])
    parts = {cell["part"]: cell for cell in report["epochs"]}
    features, *rest = [
        "features, at the measured frames/s", "rep, one epoch", "eerg, one epoch", "replies", "end to end, the sum"
    ]  # fmt: skip
    assert list(parts) == [features, *rest]
    assert parts["rep, one epoch"]["samples"] == 16
    assert parts[features]["seconds"] == pytest.approx(18 * 8 / report["features"]["frames_per_s"])
    assert parts[rest[-1]]["seconds"] == pytest.approx(sum(parts[part]["seconds"] for part in [features, *rest[:-1]]))
    assert "| replies | 2 |" in capsys.readouterr().out


def test_replies_are_those_of_generation_by_default_and_as_long_as_their_targets(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu_parts

    found: list[list[int]] = []
    plain = gpu_parts.generate_batch

    def generate(model: Any, batch: Any, *args: Any, **others: Any) -> list[list[int]]:
        assert model.adapter is not None
        assert batch.slots.sum() == 40 * len(batch.ids)
        new = plain(model, batch, *args, **others)
        found.extend(new)
        return new

    one = task(bench, "eerg")
    targets = sorted(len(row.target) - 1 for row in one.samples.rows)
    monkeypatch.setattr(gpu_parts, "generate_batch", generate)
    told = gpu_parts._replies(one.model, one.samples, lambda work: work() or 1.0)
    assert sorted(map(len, found)) == targets
    assert told == {"seconds": 1.0, "tokens": sum(targets)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "cuda"], "--device: cuda is not here, torch sees 0 GPUs; use --device cpu"),
        (["--device", "gpu"], "--device: there is no 'gpu'; use cpu or cuda"),
        (["--device", "meta"], "--device: meta is not measured; use cpu or cuda"),
        (["--device", "cpu", "--scale", "6b"], "--scale: 6b takes a GPU of 40 GB or more; use --scale cpu"),
        (["--device", "cpu", "--scale", "smoke", "--rounds", "0"], "--rounds: 0 is too few; use 1 or more"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("sys.argv", ["gpu_step", *arguments])
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_one_gpu_is_measured(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told = bench.refused(Namespace(device="cuda:1", scale="6b", rounds=1))
    assert told == "--device: torch sees 2 GPUs, and one is measured; set CUDA_VISIBLE_DEVICES to its number"


@pytest.mark.parametrize(
    ("free", "wanted"),
    [
        (0, 4 * 10 * 7 + 4 * 6 * 2),  # every token forward and backward, two logits
        (3, 2 * 10 * 3 + 4 * 10 * 4 + 4 * 6 * 2),  # three of the seven tokens forward only
    ],
)
def test_the_formula_by_hand(bench: ModuleType, free: int, wanted: int) -> None:
    assert step_flops(decoder=10, head=6, tokens=7, free=free, targets=2) == wanted


def test_a_step_counts_its_own_tokens(bench: ModuleType) -> None:
    rep, eerg = task(bench, "rep"), task(bench, "eerg")
    # Two layers of q, k, v (two groups), o, gate, up, down and two norms; a bias at q, k and v. Width 32, inner 106.
    layer = (32 * 32 + 32) + 2 * (32 * 32 + 32) + 32 * 32 + 3 * 32 * 106 + 2 * 32
    assert (eerg.decoder, eerg.head) == (2 * layer, 300 * 32)
    rows = [eerg.samples.rows[i] for i in (0, 2)]
    length, targets = sum(row.length for row in rows), sum(len(row.target) for row in rows)
    assert eerg.tokens([0, 2]) == length
    assert eerg.flops([0, 2]) == 4 * (2 * layer * length + 300 * 32 * targets)
    row = rep.samples.rows[1]
    assert rep.flops([1]) == 2 * layer * (4 * row.length - 2 * len(row.before)) + 4 * 300 * 32 * 3


def test_the_true_shape_is_chatglm2_6b(bench: ModuleType) -> None:
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(native_config(CHATGLM2_6B | bench.SCALES["6b"].llm))
    assert sum(p.numel() for p in llm.parameters()) == 6_243_584_000  # the index of the public checkpoint: 12.49 GB
    with torch.device("meta"):
        encoder = bench.VisionEncoder(bench.SCALES["6b"].vision)
    assert sum(p.numel() for p in encoder.vision_model.parameters()) == 985_952_256


def test_its_sizes_are_those_of_the_configuration(bench: ModuleType, samples: ModuleType) -> None:
    from benchmarks import gpu_parts

    scale, eerg, rep = bench.Scale(), EergConfig(), RepConfig()
    assert (scale.prefix, scale.batch, scale.micro_tokens) == (eerg.prefix_length, eerg.batch_size, eerg.micro_tokens)
    assert (scale.batch, scale.micro_tokens) == (rep.batch_size, rep.micro_tokens)
    assert (scale.frames, bench.FRAMES_PER_CLIP) == (VisionConfig.batch_frames, VisionConfig.frames)
    assert LlmConfig.max_target_tokens == samples.LONGEST_TARGET
    replies = gpu_parts.TOP_P, gpu_parts.TEMPERATURE, gpu_parts.LONGEST_REPLY, gpu_parts.BATCH_TOKENS
    default = GenerateConfig()
    assert replies == (default.top_p, default.temperature, default.max_new_tokens, default.batch_tokens)
    assert default.seeds == [0]
    assert bench.FRAMES_PER_CLIP + scale.vision.num_query_tokens == samples.SLOTS


def test_ways_agree_in_half_precision_as_far_as_it_goes(bench: ModuleType) -> None:
    one = task(bench, "eerg", torch.bfloat16)
    off = bench.differences(one, [candidates[0] for candidates in one.ways], range(4))
    assert 1e-4 < off["p-tuning"] < bench.BF16


@pytest.mark.slow
def test_half_precision_is_timed_after_the_ways_agree_in_float32(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "pick_dtype", lambda *_: torch.bfloat16)  # as on a GPU
    monkeypatch.setitem(bench.SCALES, "cpu", bench.SCALES["smoke"])
    monkeypatch.setattr("benchmarks.gpu_parts.PASSES", 1)
    monkeypatch.setattr("benchmarks.gpu_parts.trl_is_here", lambda: False)
    report = bench.run(arguments("steps", "peers", "profile"))
    assert report["dtype"] == "bfloat16"
    exact = [cell["largest_relative_difference"] for cell in report["float32_peers"] if cell["fits"]]
    rounded = [cell["largest_relative_difference"] for cell in report["peers"] if cell["fits"]]
    assert max(exact) < 1e-4 < max(rounded)
    assert len(exact) == len(rounded)
    assert [seen["task"] for seen in report["profile"]] == ["rep", "eerg"]
    for kind, off in report["float32_differences"].items():
        assert list(off) == WAYS[kind]
        assert max(off.values()) < 1e-4 < report["tasks"][kind]["ways"][WAYS[kind][3]]["largest_relative_difference"]


def arguments(*parts: str, rounds: int = 1, out: Path | None = None) -> Namespace:
    return Namespace(
        part=parts, device="cpu", scale="smoke", rounds=rounds, out=out, data=None, tokens_per_character=0.3,
        peak_tflops=None,
    )  # fmt: skip


def test_peers_take_the_same_steps_or_say_why_not(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu_parts

    monkeypatch.setattr(gpu_parts, "PASSES", 1)
    report = bench.run(arguments("peers", rounds=2, out=tmp_path))
    cells = {(cell["samples"], cell["way"]): cell for cell in report["peers"]}
    seeing = [way for samples, way in cells if samples == "40 visual tokens"]
    assert seeing == ["elmd", "peft, batch of 4", "p-tuning, batch of 1", "Trainer, 4 × 1", "Trainer, 1 × 4"]
    text = [way for samples, way in cells if samples == "text alone"]
    assert text == seeing + (["TRL, 4 × 1", "TRL, 1 × 4"] if gpu_parts.trl_is_here() else ["TRL"])
    assert [one["part"] for one in bench.in_the_loop(report)] == ["peers"]
    for cell in cells.values():
        if cell["fits"]:
            assert cell["largest_relative_difference"] < 1e-4
            assert cell["samples_per_s"] == pytest.approx(4 / cell["seconds"])
            assert cell["tokens_run"] > cell["tokens_per_s"] * cell["seconds"] - 1e-6, "padding is run as well"
            assert cell["step_bytes"] > 0
    for samples in {samples for samples, _ in cells}:
        useful = {cell["flops"] for (one, _), cell in cells.items() if one == samples and cell["fits"]}
        assert len(useful) <= 1, "all are held against the same work"
    single = cells["40 visual tokens", "Trainer, 1 × 4"]
    assert single["tokens_run"] == pytest.approx(single["tokens_per_s"] * single["seconds"]), "it needs no padding"
    assert "| 40 visual tokens | Trainer, 4 × 1 | " in (tmp_path / "gpu_step.md").read_text()


def test_peers_that_do_not_fit_are_tried_smaller_and_told(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_parts

    passes = {"elmd": 0, "p-tuning": 0}
    plain = bench.Task.gradient

    def gradient(self: Any, way: Any, batch: Any) -> Any:
        if way.name in passes:
            passes[way.name] += 1
        if (way.rows or 0) > 2 or (way.rows == 1 and passes["p-tuning"] > 1):
            raise torch.OutOfMemoryError("no room")
        return plain(self, way, batch)

    def full(*_: Any) -> list[Any]:
        def run() -> None:
            raise torch.OutOfMemoryError("no room")

        return [gpu_parts.Way("Trainer, 4 × 1", run)]

    monkeypatch.setattr(bench.Task, "gradient", gradient)
    monkeypatch.setattr(gpu_parts, "PASSES", 1)
    monkeypatch.setattr(gpu_parts, "hf", full)
    monkeypatch.setattr(gpu_parts, "trl_is_here", lambda: False)
    found = list(gpu_parts._peers(task(bench, "eerg"), {"samples": "x"}, "", lambda work: work() and 1.0))
    assert {cell["way"]: cell["fits"] for cell in found} == {
        "elmd": True, "peft, batch of 4": False, "peft, batch of 2": True, "p-tuning, batch of 1": False,
        "Trainer, 4 × 1": False,
    }  # fmt: skip
    assert passes["elmd"] == 3, "once to try, once timed, once for the profiler of a CPU"
    report = {"device": "x", "dtype": "y", "versions": {}, "command": "c", "tasks": {}, "peers": found}
    assert "| x | Trainer, 4 × 1 | does not fit |" in bench.tables(report)


def test_what_does_not_fit_is_told_in_every_part(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench.Task, "gradient", full)
    monkeypatch.setattr("benchmarks.gpu_parts.generate_batch", full)
    monkeypatch.setattr(bench, "features", full)
    monkeypatch.setattr("benchmarks.gpu_parts.trl_is_here", lambda: False)
    monkeypatch.setattr(bench, "version", lambda library: "not installed")
    report = bench.run(arguments(*bench.PARTS[1:]))
    assert [cell["fits"] for part in bench.PARTS[2:] for cell in report[part]] == [False] * (2 + 16 + 4 + 5)
    told = bench.tables(report)
    assert "| text alone | TRL | not installed (pip install trl) |" in told
    assert "| ViT and Q-Former | – | does not fit |" in told
    assert "| end to end, the sum | 18 | – | does not fit |" in told
    assert "REP: does not fit" in told
    assert "trl not installed" in told


def test_a_peer_that_computes_something_else_is_found_out(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks import gpu_parts, trainers

    monkeypatch.setattr(gpu_parts, "PASSES", 1)
    monkeypatch.setattr(gpu_parts, "trl_is_here", lambda: False)
    plain = trainers.Spliced.forward

    def moved(self: Any, position_ids: Any, **others: Any) -> Any:
        return plain(self, position_ids=position_ids + 4, **others)

    monkeypatch.setattr(trainers.Spliced, "forward", moved)
    with pytest.raises(AssertionError, match="40 visual tokens: Trainer, 4 × 1 differs from elmd by"):
        bench.run(arguments("peers", out=tmp_path))
    assert "| 40 visual tokens | Trainer, 4 × 1 | " in (tmp_path / "gpu_step.md").read_text(), "figures are kept"


def test_a_profile_adds_up(bench: ModuleType) -> None:
    from benchmarks.gpu_parts import ATTENTION, ELEMENTWISE, IDLE, MATRIX, MOVES, OPTIMISER

    report = bench.run(arguments("profile"))
    for seen in report["profile"]:
        groups = {one["group"]: one["share"] for one in seen["groups"]}
        assert list(groups) == [MATRIX, ATTENTION, ELEMENTWISE, MOVES, OPTIMISER, IDLE]
        assert sum(groups.values()) == pytest.approx(1)
        assert all(share > 0 for share in groups.values())
        assert sum(one["seconds"] for one in seen["groups"]) == pytest.approx(seen["seconds"])
        for group, share in groups.items():
            listed = sum(one["share"] for one in seen["operators"] if one["group"] == group)
            assert listed <= share + 1e-9
        assert [one["share"] for one in seen["operators"]] == sorted(
            (o["share"] for o in seen["operators"]), reverse=True
        )
        del groups[MATRIX]
        assert f"cost beside matrix products: {max(groups, key=groups.__getitem__)}, " in seen["largest"]
    products = next(one for one in report["profile"][1]["operators"] if one["operator"] == "aten::mm")
    assert products["group"] == MATRIX
    assert products["calls"] > 0
    assert report["profile"][1]["largest"] in bench.tables(report)


def test_a_gpu_is_idle_while_no_kernel_runs() -> None:
    from torch.autograd import DeviceType

    from benchmarks.gpu_parts import shares, spent

    def event(name: str, *micros: int, parent: Any = None, device: Any = DeviceType.CPU) -> Any:
        kernels = [SimpleNamespace(duration=one) for one in micros]
        return SimpleNamespace(name=name, kernels=kernels, cpu_parent=parent, device_type=device)

    end = event("optimiser", 900_000)
    product = event("aten::mm", 100_000, 50_000)
    events = [
        event("aten::linear", parent=None), product, event("aten::mm", 50_000), end, event("aten::mul", 20_000),
        event("aten::mul", 10_000, parent=event("aten::x", parent=end)), event("aten::copy_", 30_000),
        event("gemm_kernel", 100_000, device=DeviceType.CUDA),
    ]  # fmt: skip
    seconds, calls = spent(events, on_gpu=True)
    found = shares(seconds, calls, 0.5)
    assert {one["group"]: round(one["seconds"], 6) for one in found["groups"]} == {
        "matrix products": 0.2, "attention": 0, "elementwise, norms, sums": 0.02, "copies, cat, index": 0.03,
        "optimiser": 0.01, "idle": 0.24,
    }  # fmt: skip
    assert found["operators"][0] == {
        "operator": "aten::mm", "group": "matrix products", "seconds": pytest.approx(0.2), "share": pytest.approx(0.4),
        "calls": 2,
    }  # fmt: skip
    assert found["largest"] == (
        "The largest cost beside matrix products: idle, 48 %; the largest operator beside them: aten::copy_, 6 %."
    )
    assert shares(seconds, calls, 0.1)["groups"][-1]["seconds"] == 0, "kernels that overlap"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_scaled_dot_product_efficient_attention_backward", "attention"),
        ("_cudnn_attention_forward", "attention"),
        ("_addmm_activation", "matrix products"),
        ("baddbmm", "matrix products"),
        ("_to_copy", "copies, cat, index"),
        ("masked_scatter", "copies, cat, index"),
        ("index_add_", "copies, cat, index"),
        ("t", "copies, cat, index"),
        ("embedding_dense_backward", "copies, cat, index"),
        ("_log_softmax_backward_data", "elementwise, norms, sums"),
        ("native_layer_norm", "elementwise, norms, sums"),
        ("mul", "elementwise, norms, sums"),
        ("tanh", "elementwise, norms, sums"),
    ],
)
def test_operators_have_their_group(bench: ModuleType, name: str, group: str) -> None:
    from benchmarks.gpu_parts import _group

    event = SimpleNamespace(name=f"aten::{name}", cpu_parent=None)
    assert _group(event) == group
    end = SimpleNamespace(name="optimiser", cpu_parent=None)
    assert (
        _group(SimpleNamespace(name="aten::mul", cpu_parent=SimpleNamespace(name="x", cpu_parent=end))) == "optimiser"
    )


def test_rounded_figures_are_kept_where_ways_do_not_agree(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    one, saved = task(bench, "eerg", torch.bfloat16), []
    monkeypatch.setattr(bench, "BF16", 1e-9)
    with pytest.raises(AssertionError, match=r"eerg: .* differs from elmd by"):
        bench.compare(one, 1, None, lambda result: saved.append(json.loads(json.dumps(result))))
    assert all("median_s" in way for way in saved[-1].values())


@pytest.mark.parametrize("kind", ["rep", "eerg"])
def test_a_way_that_computes_something_else_is_found_out(
    bench: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = task(bench, kind)
    ways = [candidates[0] for candidates in one.ways]
    plain = one.samples.batch

    def moved(positions: Any, **others: Any) -> Any:
        batch = plain(positions, **others)
        if not others:  # neither ELMD's batches (split=…) nor those of p-tuning (columns=…)
            batch.labels = batch.labels.roll(1, 1)
        return batch

    monkeypatch.setattr(one.samples, "batch", moved)
    off = bench.differences(one, ways, range(4))
    with pytest.raises(AssertionError, match=f"{kind}: {ways[2].name} differs from elmd by"):
        bench.agree(kind, off, torch.float32)
    with pytest.raises(AssertionError, match=f"{kind}: {ways[2].name} differs from elmd by"):
        bench.compare(one, 1, None, lambda _: None)


def test_what_does_not_fit_is_tried_smaller_and_told(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    one = task(bench, "eerg", rounds=2)
    step, saved = one.step, []

    def short(way: Any, batch: Any) -> None:
        if way.checkpointing or (way.rows or 0) > 2:
            raise torch.OutOfMemoryError("no room")
        step(way, batch)

    monkeypatch.setattr(one, "step", short)
    bench.compare(one, 2, None, lambda result: saved.append(json.loads(json.dumps(result))))
    last = saved[-1]
    assert {name: way["fits"] for name, way in last.items()} == {
        "elmd": True, "elmd, checkpointing": False, "peft": True, "p-tuning": False,
    }  # fmt: skip
    assert last["peft"]["rows"] == 2
    assert last["peft"]["mfu_percent"] is None
    assert any(
        "peft" in result and "seconds" not in result["peft"] for result in saved
    )  # what is known stands there at once
    report = {"device": "x", "dtype": "y", "versions": {}, "command": "c"}
    about = {"samples": 8, "shortest": 1, "longest": 2, "mean": 1.5}
    assert "| p-tuning | does not fit |" in bench.tables({**report, "tasks": {"eerg": {"about": about, "ways": last}}})


def test_lengths_are_drawn_like_those_of_the_data(samples: ModuleType, shared: Path) -> None:
    real = samples.read(shared / "data" / "cped" / "valid_split.csv")
    made = samples.drawn(4000)
    assert len(real) == 2699
    assert max(map(sum, real)) == samples.CPED_LONGEST
    for part in samples.Lengths._fields:
        a, b = (sorted(getattr(one, part) for one in every) for every in (real, made))
        for share in (0.1, 0.5, 0.9):
            assert b[int(share * len(b))] == pytest.approx(a[int(share * len(a))], rel=0.08)
        assert sum(b) / len(b) == pytest.approx(sum(a) / len(a), rel=0.08)


def test_lengths_of_a_missing_file_are_one_sentence(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_step", "--scale", "smoke", "--device", "cpu", "--data", "nowhere.csv"])
    monkeypatch.setattr(bench, "features", lambda *_: None)
    with pytest.raises(SystemExit, match=r"^error: .*nowhere\.csv"):
        bench.main()


def test_a_device_of_unknown_name_has_no_utilisation(bench: ModuleType) -> None:
    assert bench.PEAKS["H200"] == 989
    seen = SimpleNamespace(part=["steps"], flops=lambda _: 989e12, tokens=lambda _: 10)
    assert bench._figures(seen, [[0]], [2.0], [1.0], None)["mfu_percent"] is None
    figures = bench._figures(seen, [[0]], [2.0], [1.0], 989e12)
    assert (figures["mfu_percent"], figures["tokens_per_s"], figures["slower"]) == (50, 5, 2)
