"""Trains a tiny prefix and projector through the real loop; run by test_training.py in processes of its own.

python fit_script.py LLM_FOLDER OUT STEPS [WORLD] [kill=step:N | kill=checkpoint:N | term=step:N]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from conftest import make_demonstrations, make_samples
from elmd.data.encode import Encoder
from elmd.data.examples import Examples
from elmd.data.prompts import Prompt
from elmd.models.elmd import Elmd
from elmd.models.llm import load_llm
from elmd.models.prefix import Prefix
from elmd.models.projector import Projector
from elmd.training import checkpoint
from elmd.training.loop import Plan, fit
from elmd.training.tokens import TokenTask, token_loss

llm_folder, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
world = int(sys.argv[4]) if len(sys.argv) > 4 else 1
what, _, at = (sys.argv[5] if len(sys.argv) > 5 else "=:0").partition(":")

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == world, f"{accelerator.num_processes} processes instead of {world}"

llm, tokenizer = load_llm(llm_folder)
torch.manual_seed(0)
model = Elmd(
    llm, Projector(6, 32), Prefix.create(llm, 4, dropout=0.1 if world == 1 and not os.getenv("NO_DROPOUT") else 0)
)
samples = make_samples(24)
visual = {s.id: torch.randn(3, 6, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(samples)}
prompt = Prompt("{task}\n", "{background}\n", "{speaker}：{text}\n", "{speaker}：{text}\n", "画面：{video}\n",
                "参考：{response}\n", "情感？", "回复？")  # fmt: skip
encoder = Encoder(tokenizer, prompt, 200, 40)
demonstrations = make_demonstrations(samples)
examples = [
    Examples(part, encoder, demonstrations, visual.get, "eerg", with_target=True)
    for part in ([s for s in samples if s.split == "train"], [s for s in samples if s.split != "train"])
]


class Task(TokenTask):
    def losses(self, batch, rank, world):
        self.count = getattr(self, "count", 0) + 1
        if what == "kill=step" and self.count == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "term=step" and self.count == int(at):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(batch, rank, world)


if what == "kill=checkpoint":
    written, save = [0], checkpoint.save_tensors

    def save_then_die(path, values):
        if path.name == "optimizer.safetensors":
            written[0] += 1
            if written[0] == int(at):
                path.write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
        save(path, values)

    checkpoint.save_tensors = save_then_die

task = Task(
    model, {"prefix": model.prefix, "projector": model.projector}, examples[0], accelerator, batch_size=8,
    micro_tokens=300, seed=0,
    evaluate=lambda: {"loss": token_loss(model, examples[1], 300, accelerator, "valid")},
)  # fmt: skip
plan = Plan(
    rates={"prefix": 2e-2, "projector": 1e-3}, steps=steps, seed=0, select="loss", higher_is_better=False,
    evaluate_every=4, checkpoint_every=3, warmup=0.2,
)  # fmt: skip
fit(task, plan, out, accelerator, "test")
