"""Runs of training steps of EERG in loops of one's own, under HF's `Trainer` and under TRL's `SFTTrainer`.

A run takes a task's samples once, a global batch a step. Each step computes its gradient, clips it, and lets AdamW step
at rate 0, so all runs begin at the same values. A trainer draws its own global batches, so what runs must agree in is
each step's loss and gradients, weighted by its target tokens and summed over the run: these sums are the same for any
order. peft moves positions by P, the original does not; here it is handed positions minus P, by the trainers' collators
as well.

Samples with visual tokens are spliced into words by ELMD's own embedding, in a module around peft's, as one writes it
for `Trainer`. `SFTTrainer` takes a language model itself, so it trains on samples of text alone.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.harness import Way
from benchmarks.ways import Step, Task, peak_bytes
from elmd.data.collate import IGNORED, Batch

#: Clipping does its work but changes no gradient: the trainers show theirs after it.
CLIP = 1e9

#: Does the steps; returns the sums of losses and of each trained tensor's gradients.
Run = Callable[[], Mapping[str, Any]]


def trl_is_here() -> bool:
    return importlib.util.find_spec("trl") is not None


def loops(task: Task, *names: str, peak: bool = True) -> list[Way]:
    """Ways that run in a loop of one's own.

    Args:
        peak: whether to measure peak memory, which takes a run more on a CPU.
    """
    return [loop(task, task.steps[name], peak=peak) for name in names]


def loop(task: Task, step: Step, *, peak: bool = True) -> Way:
    return _way(step.name, task, partial(_loop, task, step), peak)


def hf(task: Task, folder: str, *, peak: bool = True) -> list[Way]:
    """HF's `Trainer`, with a global batch at once and in four parts; it may write to `folder`."""
    return _cuts("Trainer", task, _hf, folder, peak)


def trl(task: Task, folder: str) -> list[Way]:
    """TRL's `SFTTrainer`, likewise; for samples of text alone."""
    return _cuts("TRL", task, _trl, folder, peak=True)


def _cuts(name: str, task: Task, prepare: Callable[[Task, int, str], Run], folder: str, peak: bool) -> list[Way]:
    size = task.scale.batch
    return [
        _way(f"{name}, {rows} × {size // rows}", task, partial(prepare, task, rows, folder), peak)
        for rows in (size, size // 4)
    ]


def _way(name: str, task: Task, prepare: Callable[[], Run], peak: bool) -> Way:
    """Args: prepare: makes one run ready, which is not timed."""
    device = task.llm.device
    on_gpu = device.type == "cuda"
    ready: list[Run] = []
    found: list[Mapping[str, Any]] = []
    tokens = most = 0

    def count(_: Any, inputs: tuple[Tensor]) -> None:
        nonlocal tokens
        tokens += inputs[0].numel()

    def before() -> None:
        ready[:] = [prepare()]
        if on_gpu:
            torch.cuda.empty_cache()  # as a trainer does when it begins, so all begin alike
            torch.cuda.synchronize(device)

    def go() -> None:
        found.append(ready.pop()())

    def run() -> Mapping[str, Any]:
        nonlocal tokens, most
        tokens = 0
        hook = task.llm.get_input_embeddings().register_forward_pre_hook(count)
        gc.freeze()  # a trainer collects garbage once as it begins, which is no part of a step
        try:
            if on_gpu:
                most = peak_bytes(go, device)  # costs nothing there
            else:
                go()
        finally:
            gc.unfreeze()
            hook.remove()
        if on_gpu:
            torch.cuda.synchronize(device)
        return found.pop()

    def facts() -> dict[str, float]:
        """Of the last run; but on a CPU a profiler sees the peak in a run of its own."""
        figures: dict[str, float] = {"tokens, padding included": tokens}
        if peak:
            figures["peak, MiB"] = (most if on_gpu else peak_bytes(prepare())) / 2**20
        return figures

    return Way(name, run, facts, before)


class _Sums:
    """Losses and gradients, weighted by target tokens."""

    def __init__(self, trained: Sequence[nn.Parameter]):
        self.trained, self.loss = trained, 0.0
        self.gradients = [torch.zeros_like(p) for p in trained]

    def add(self, targets: int) -> None:
        """What stands in the trained tensors' `grad`."""
        for total, parameter in zip(self.gradients, self.trained, strict=True):
            assert parameter.grad is not None
            total.add_(parameter.grad, alpha=targets)

    def result(self) -> dict[str, Any]:
        return {"loss": torch.tensor(self.loss), "gradients": self.gradients}


def _loop(task: Task, step: Step) -> Run:
    """Steps in a loop of one's own."""
    sums, size = _Sums(task.trained), task.scale.batch

    def run() -> Mapping[str, Any]:
        for start in range(0, len(task.samples), size):
            batch = range(start, start + size)
            loss = task.gradient(step, batch)[0]
            torch.nn.utils.clip_grad_norm_(task.trained, CLIP)
            sums.add(task.samples.targets(batch))
            sums.loss += task.samples.targets(batch) * loss.item()
            task.optimizer.step()
            task.optimizer.zero_grad(set_to_none=True)
        return sums.result()

    return run


class _Seen(TrainerCallback):
    """Sums up what a trainer computes; its collator notes the target tokens of each micro-batch in `targets`."""

    def __init__(self, task: Task):
        self.sums, self.targets = _Sums(task.trained), list[int]()

    def _of_step(self, args: TrainingArguments, step: int) -> int:
        cut = args.gradient_accumulation_steps
        return sum(self.targets[step * cut : (step + 1) * cut])

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **others: Any) -> None:
        self.sums.add(self._of_step(args, state.global_step))

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if "loss" in logs:
            self.sums.loss += self._of_step(args, state.global_step - 1) * logs["loss"]


def _arguments(task: Task, rows: int, folder: str) -> dict[str, Any]:
    on_cpu = task.llm.device.type == "cpu"
    return {
        "output_dir": folder, "per_device_train_batch_size": rows, "num_train_epochs": 1,
        "gradient_accumulation_steps": task.scale.batch // rows, "train_sampling_strategy": "group_by_length",
        "max_grad_norm": CLIP, "learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": on_cpu, "remove_unused_columns": False, "dataloader_pin_memory": not on_cpu,
        # Weights have the dtype that they run in: autocast would only cast to and fro.
        "bf16": False,
    }  # fmt: skip


def _ready(trainer: Trainer, seen: _Seen) -> Run:
    trainer.remove_callback(PrinterCallback)

    def run() -> Mapping[str, Any]:
        trainer.train()
        return seen.sums.result()

    return run


class Spliced(nn.Module):
    """ELMD's input embeddings before peft's own forward and the stock loss of transformers, for `Trainer`."""

    def __init__(self, task: Task):
        super().__init__()
        assert task.prefix is not None
        self.model, self.prefix = task.model, task.prefix

    def forward(
        self, input_ids: Tensor, slots: Tensor, visual: Tensor, attention_mask: Tensor, labels: Tensor,
        position_ids: Tensor, **others: Any,
    ) -> Any:  # fmt: skip
        """[B, L] each, but features `visual` [number of slots, q]; transformers' output with its `loss`."""
        batch = Batch(input_ids, slots, attention_mask, position_ids, labels, visual, keep=0, at=labels)
        return self.prefix.peft(
            inputs_embeds=self.model.embed(batch), attention_mask=attention_mask, labels=labels,
            position_ids=position_ids, **others,
        )  # fmt: skip


def _hf(task: Task, rows: int, folder: str) -> Run:
    """HF `Trainer` on peft's model; samples are padded to the longest of a micro-batch."""
    prefix, samples = task.prefix, task.samples
    assert prefix is not None
    seen = _Seen(task)

    def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = samples.batch([item["at"] for item in items])
        seen.targets.append(int((batch.labels != IGNORED).sum()))
        seeing = {} if batch.visual is None else {"slots": batch.slots, "visual": batch.visual}
        return {
            "input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": batch.labels,
            "position_ids": batch.positions - prefix.length, **seeing,
        }  # fmt: skip

    rows_of: Any = [
        {"input_ids": row.before + [0] * row.slots + row.after + row.target, "at": i}
        for i, row in enumerate(samples.rows)
    ]
    trainer = Trainer(
        Spliced(task) if samples.slots else prefix.peft,
        TrainingArguments(**_arguments(task, rows, folder)),
        collate,
        rows_of,
        callbacks=[seen],
    )
    return _ready(trainer, seen)


def _trl(task: Task, rows: int, folder: str) -> Run:
    """TRL's `SFTTrainer` on peft's model: ready-made ids and labels, its own collator, its own loss."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    prefix = task.prefix
    assert prefix is not None
    assert not task.samples.slots
    seen = _Seen(task)
    stock = DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True)

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = stock(items)
        seen.targets.append(int((batch["labels"] != IGNORED).sum()))
        return {**batch, "position_ids": batch["position_ids"] - prefix.length}

    prompts = [row.before + row.after for row in task.samples.rows]
    targets = [row.target for row in task.samples.rows]
    data = Dataset.from_dict(
        {
            "input_ids": [prompt + target for prompt, target in zip(prompts, targets, strict=True)],
            "labels": [[IGNORED] * len(prompt) + target for prompt, target in zip(prompts, targets, strict=True)],
        }
    )
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "[EOS]": 2}, unk_token="[UNK]"))

    trainer = SFTTrainer(
        prefix.peft,
        SFTConfig(
            **_arguments(task, rows, folder),
            gradient_checkpointing=False,  # it loses the prefix
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        data_collator=collate,  # its own, with positions
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
        ),
        callbacks=[seen],
    )
    go = _ready(trainer, seen)

    def run() -> Mapping[str, Any]:
        try:
            return go()
        finally:
            vars(task.llm).pop("forward", None)  # TRL gives the model another one

    return run
