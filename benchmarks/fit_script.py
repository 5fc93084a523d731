"""Trains a tiny adapter and projector through the real loop; run by tests and benchmarks in processes of its own.

python fit_script.py LLM_FOLDER OUT STEPS [WORLD] [kill=step:N | kill=checkpoint:N | kill=evaluation:N | term=step:N]

Environment: KILL_RANK is the process that the last argument is about (0), ADAPTER is prefix (default), lora or none,
NO_DROPOUT=1 makes processes comparable, and TELL=1 also generates and writes `report-<rank>.json`: the responses, and
the bytes that passed between processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # where it is run by its path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.tiny import make_demonstrations, make_samples
from elmd.cli import guard, leave
from elmd.data.encode import Encoder
from elmd.data.examples import Examples
from elmd.data.prompts import Prompt
from elmd.models.adapter import Lora, Prefix
from elmd.models.decode import generate_all
from elmd.models.elmd import Elmd
from elmd.models.llm import load_llm
from elmd.models.projector import Projector
from elmd.stages.parts import place
from elmd.training import checkpoint
from elmd.training.loop import fit
from elmd.training.plan import Plan
from elmd.training.tokens import ElmdObjective, token_loss

BUDGET = int(os.getenv("BUDGET", "300"))  # tokens per batch


class Messages(TorchDispatchMode):
    """Counts what collectives are called with: bytes by operation, within the loop's steps and outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.where = "before"
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            sent = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            name = function.name().removeprefix("c10d::")
            self.bytes[f"{self.where}:{name}"] += sum(x.numel() * x.element_size() for x in sent)
        return function(*args, **(kwargs or {}))


class Objective(ElmdObjective):
    def losses(self, batch, rank, world):
        self.count = getattr(self, "count", 0) + 1
        if what == "kill=step" and self.count == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "term=step" and self.count == int(at):
            os.kill(os.getpid(), signal.SIGTERM)
        messages.where = "step"
        for loss, tokens in super().losses(batch, rank, world):
            self.micro_batches.append(tokens)
            yield loss, tokens


def local_bytes(llm) -> int:
    """Bytes of the frozen weights that this process holds."""
    frozen = [p for p in llm.parameters() if not p.requires_grad]
    return sum(x.numel() * x.element_size() for x in (getattr(p, "_local_tensor", p) for p in frozen))


def die_on(number: int) -> None:
    died_on[0] += 1
    if died_on[0] == number:
        os.kill(os.getpid(), signal.SIGKILL)


def save_then_die(path, values) -> None:
    if path.name == "optimizer.safetensors":
        path.write_bytes(b"half of it")
        die_on(int(at))
    save(path, values)


def evaluate() -> dict[str, float]:
    messages.where = "evaluation"
    if what == "kill=evaluation":
        die_on(int(at))
    return {"loss": token_loss(model, examples[1], BUDGET, accelerator, "valid")}


llm_folder, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
world = int(sys.argv[4]) if len(sys.argv) > 4 else 1
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == world, f"{accelerator.num_processes} processes instead of {world}"
what, _, at = (sys.argv[5] if len(sys.argv) > 5 else "=:0").partition(":")
if accelerator.process_index != int(os.getenv("KILL_RANK", "0")):
    what = ""
died_on, save = [0], checkpoint.save_tensors
if what == "kill=checkpoint":
    checkpoint.save_tensors = save_then_die

messages = Messages()
with messages:
    llm, tokenizer = load_llm(llm_folder)
    whole_bytes = local_bytes(llm)
    torch.manual_seed(0)
    projector = Projector(6, 32)
    dropout = 0 if os.getenv("NO_DROPOUT") else 0.1
    made = {"prefix": lambda: Prefix.create(llm, 4, dropout), "lora": lambda: Lora.create(llm, 2, 4, dropout)}
    adapter = made.get(os.getenv("ADAPTER", "prefix"), lambda: None)()
    model = place(Elmd(llm, projector, adapter, checkpointing=bool(os.getenv("CHECKPOINTING"))), accelerator)

    samples = make_samples(24)
    visual = {s.id: torch.randn(3, 6, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(samples)}
    prompt = Prompt("{task}\n", "{background}\n", "{speaker}：{text}\n", "{speaker}：{text}\n", "画面：{video}\n",
                    "参考：{response}\n", "情感？", "回复？" * int(os.getenv("LONG", "1")), "说？")  # fmt: skip
    encoder = Encoder(tokenizer, prompt, 200, 40)
    demonstrations = make_demonstrations(samples)
    parts = [s for s in samples if s.split == "train"][:17], [s for s in samples if s.split != "train"]
    examples = [Examples(part, encoder, demonstrations, visual.get, "eerg", with_target=True) for part in parts]

    modules = {"projector": projector} if adapter is None else {"adapter": adapter, "projector": projector}
    objective = Objective(
        model, modules, examples[0], accelerator, batch_size=8, micro_tokens=BUDGET, seed=0, evaluate=evaluate
    )  # fmt: skip
    objective.micro_batches = []
    plan = Plan(
        rates={"adapter": 2e-2, "projector": 1e-3}, steps=steps, seed=0, select="loss", higher_is_better=False,
        evaluate_every=4, checkpoint_every=3, warmup=0.2,
    )  # fmt: skip
    trained = sum(p.numel() for module in modules.values() for p in module.parameters() if p.requires_grad)
    guard(lambda: fit(objective, plan, out, accelerator, "test"))

    if os.getenv("TELL"):
        messages.where = "generation"
        to_answer = Examples(samples[:23], encoder, demonstrations, visual.get, "eerg", with_target=False)
        # Mostly one row a batch, and a likely token in the place of EOS: some batches end long before others.
        ids = generate_all(
            model, to_answer, 120, accelerator, eos=8, max_new_tokens=20, top_p=0.9, temperature=1.0, seeds=[1]
        )  # fmt: skip
        report = {
            "ids": [one for [one] in ids], "bytes": messages.bytes, "trained": trained, "steps": steps,
            "micro_batches": objective.micro_batches, "whole_bytes": whole_bytes, "local_bytes": local_bytes(llm),
        }  # fmt: skip
        (out / f"report-{accelerator.process_index}.json").write_text(json.dumps(report))

leave()
