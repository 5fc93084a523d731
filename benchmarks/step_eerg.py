"""A training step of EERG against peft with the stock loss, HF `Trainer`, TRL's `SFTTrainer` and p-tuning's defaults.

A run takes a few global batches of random ids, text alone, as the trainers splice no visual tokens in. Each step
computes its gradient, clips it, and lets AdamW step at rate 0, so all begin at the same values. A trainer draws its own
global batches, so what the ways must agree in is each step's loss and gradient, weighted by its target tokens and
summed over the run: that sum is the same for any order. peft moves positions by P, the original does not; here it is
handed positions minus P, by the trainers' collators as well.
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.harness import Case, Way
from benchmarks.samples import CPED_LONGEST, drawn
from benchmarks.ways import SCALES, Samples, Scale, Step, Task, language_model, peak_bytes, small_llm
from elmd.data.collate import IGNORED
from elmd.models.adapter import Prefix

TOKENS_PER_CHARACTER = 0.7
#: Clipping does its work but changes no gradient: the trainers show theirs after it.
CLIP = 1e9
NOTE = (
    "p-tuning runs on ELMD's forward, as the original's code needs old versions. Trainers have "
    'train_sampling_strategy="group_by_length": in so few samples it sorts each global batch; in a whole data set it '
    "also makes global batches of equal lengths, whose samples are then no longer drawn at random (16 × 1 pads by 3 % "
    "in 3 200 samples of these lengths)."
)
TRL_NOTE = (
    " TRL scores only target positions on a GPU; on CPU it scores all of them, in tiles of 32 768 words whatever the "
    "vocabulary, which its peak shows."
)


def cases(small: bool) -> Iterator[Case]:
    """The step, and the memory of its logits where the vocabulary is as large as ChatGLM2's."""
    scale = SCALES["smoke"] if small else replace(SCALES["cpu"], llm=small_llm(4, 1000, 8))
    trl = TRL_NOTE if trl_is_here() else " TRL is not installed (pip install -e '.[bench]'), so it is left out."
    with tempfile.TemporaryDirectory() as folder:
        task, size = made_up(scale, 2)
        ways = loops(task, "elmd", "peft", "p-tuning") + trainers(task, folder)
        yield Case("EERG, a training step", size, ways, note=NOTE + trl, per=2 * scale.batch, unit="samples")
    task, size = made_up(replace(scale, llm=small_llm(1, 2000, 2, 16) if small else small_llm(2, 65_024, 2)), 1)
    told = "Read the peak: beside so small a decoder, logits take more of the time and of the memory than at 6B."
    yield Case("EERG, the memory of logits", size, loops(task, "elmd", "peft"), note=told)


def trl_is_here() -> bool:
    return importlib.util.find_spec("trl") is not None


def made_up(scale: Scale, count: int) -> tuple[Task, str]:
    """A task with samples for `count` steps, and both in words."""
    llm = language_model(scale, torch.device("cpu"), torch.float32)
    shape = llm.config
    samples = Samples(drawn(count * scale.batch), shape.vocab_size, tokens_per_character=TOKENS_PER_CHARACTER, slots=0)
    longest = max(round(TOKENS_PER_CHARACTER * CPED_LONGEST), *samples.lengths)
    return Task("eerg", llm, scale, samples, longest), (
        f"GLM of {shape.hidden_size} × {shape.num_hidden_layers}, vocabulary {shape.vocab_size}, prefix "
        f"{scale.prefix}; {count} × {scale.batch} samples of {min(samples.lengths)} to {max(samples.lengths)} tokens, "
        f"{sum(samples.lengths)} in all; p-tuning pads to {longest}."
    )


def loops(task: Task, *names: str) -> list[Way]:
    """Ways that run in a loop of one's own."""
    return [_way(name, task.llm, _loop(task, task.steps[name])) for name in names]


def trainers(task: Task, folder: str) -> list[Way]:
    """HF's and TRL's, each with a global batch at once and in four parts; they may write to `folder`."""
    cuts = [task.scale.batch // parts for parts in (1, 4)]
    ways = [_way(f"Trainer, {rows} × {task.scale.batch // rows}", task.llm, partial(_hf, task, rows, folder))
            for rows in cuts]  # fmt: skip
    if trl_is_here():
        llm = language_model(task.scale, torch.device("cpu"), torch.float32)  # TRL gives a model another forward
        ways += [_way(f"TRL, {rows} × {task.scale.batch // rows}", llm, partial(_trl, task, llm, rows, folder))
                 for rows in cuts]  # fmt: skip
    return ways


#: Does the steps; returns the sums of losses and of the prefix's gradients.
Run = Callable[[], Mapping[str, Tensor]]


def _way(name: str, llm: Any, prepare: Callable[[], Run]) -> Way:
    """Args: prepare: makes one run ready, which is not timed."""
    ready: list[Run] = []

    def run() -> Mapping[str, Tensor]:
        gc.freeze()  # a trainer collects garbage once as it begins, which is no part of a step
        try:
            return ready.pop()()
        finally:
            gc.unfreeze()

    def facts() -> dict[str, float]:
        tokens = 0

        def count(_: Any, inputs: tuple[Tensor]) -> None:
            nonlocal tokens
            tokens += inputs[0].numel()

        hook = llm.get_input_embeddings().register_forward_pre_hook(count)
        prepared = prepare()
        peak = peak_bytes(prepared)
        hook.remove()
        return {"peak, MiB": peak / 2**20, "tokens, padding included": tokens}

    return Way(name, run, facts, lambda: ready.append(prepare()))


@dataclass
class _Sums:
    """Losses and gradients, weighted by target tokens."""

    loss: float = 0.0
    gradient: Tensor | None = None

    def add(self, targets: int, gradient: Tensor) -> None:
        """The gradient is copied."""
        weighted = targets * gradient
        self.gradient = weighted if self.gradient is None else self.gradient.add_(weighted)

    def result(self) -> dict[str, Tensor]:
        assert self.gradient is not None
        return {"loss": torch.tensor(self.loss), "gradient": self.gradient}


def _loop(task: Task, step: Step) -> Callable[[], Run]:
    """Steps in a loop of one's own."""

    def run() -> Mapping[str, Tensor]:
        sums = _Sums()
        for start in range(0, len(task.samples), task.scale.batch):
            batch = range(start, start + task.scale.batch)
            loss, gradient = task.gradient(step, batch)
            torch.nn.utils.clip_grad_norm_(task.trained, CLIP)
            sums.add(task.samples.targets(batch), gradient)
            sums.loss += task.samples.targets(batch) * loss.item()
            task.optimizer.step()
            task.optimizer.zero_grad(set_to_none=True)
        return sums.result()

    return lambda: run


class _Seen(TrainerCallback):
    """Sums up what a trainer computes; its collator notes the target tokens of each micro-batch in `targets`."""

    def __init__(self, table: Tensor):
        self.table, self.sums, self.targets = table, _Sums(), list[int]()

    def _of_step(self, args: TrainingArguments, step: int) -> int:
        cut = args.gradient_accumulation_steps
        return sum(self.targets[step * cut : (step + 1) * cut])

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **others: Any) -> None:
        assert self.table.grad is not None
        self.sums.add(self._of_step(args, state.global_step), self.table.grad)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if "loss" in logs:
            self.sums.loss += self._of_step(args, state.global_step - 1) * logs["loss"]


def _arguments(task: Task, rows: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": rows, "num_train_epochs": 1,
        "gradient_accumulation_steps": task.scale.batch // rows, "train_sampling_strategy": "group_by_length",
        "max_grad_norm": CLIP, "learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False, "dataloader_pin_memory": False,
    }  # fmt: skip


def _ready(trainer: Trainer, seen: _Seen) -> Run:
    trainer.remove_callback(PrinterCallback)

    def run() -> Mapping[str, Tensor]:
        trainer.train()
        return seen.sums.result()

    return run


def _hf(task: Task, rows: int, folder: str) -> Run:
    """HF `Trainer` on peft's model; samples are padded to the longest of a micro-batch."""
    prefix, samples = task.prefix, task.samples
    assert prefix is not None
    seen = _Seen(prefix.table.embedding.weight)

    def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = samples.batch([item["at"] for item in items])
        seen.targets.append(int((batch.labels != IGNORED).sum()))
        return {
            "input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": batch.labels,
            "position_ids": batch.positions - prefix.length,
        }  # fmt: skip

    rows_of: Any = [{"input_ids": row.before + row.after + row.target, "at": i} for i, row in enumerate(samples.rows)]
    trainer = Trainer(
        prefix.peft, TrainingArguments(**_arguments(task, rows, folder)), collate, rows_of, callbacks=[seen]
    )
    return _ready(trainer, seen)


def _trl(task: Task, llm: Any, rows: int, folder: str) -> Run:
    """TRL's `SFTTrainer` on peft's model: ready-made ids and labels, its own collator, its own loss."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    assert task.prefix is not None
    prefix = Prefix.create(llm, task.scale.prefix, dropout=0.0)
    prefix.table.load_state_dict(task.prefix.table.state_dict())
    seen = _Seen(prefix.table.embedding.weight)
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
            bf16=False,  # else TRL computes in bfloat16 also on CPU
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
    return _ready(trainer, seen)
