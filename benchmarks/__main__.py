"""Speed of ELMD's ways against the obvious ones, in turn within one process: `python -m benchmarks [NAME …]`.

Each benchmark first shows that both ways give the same numbers. Times are of this machine; compare ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers import GlmConfig, GlmForCausalLM

from benchmarks.samples import WIDTH, MadeUp, drawn
from elmd.config import EergConfig, ErmConfig
from elmd.data.collate import IGNORED
from elmd.losses import emotion_loss, separation_loss
from elmd.models.adapter import Prefix
from elmd.models.elmd import Elmd
from elmd.models.llm import freeze
from elmd.models.projector import Projector
from elmd.training.tokens import TokenTask

#: Computes once and returns the loss and its gradients.
Way = Callable[[], list[Tensor]]


def step_eerg(small: bool) -> tuple[Way, Way, str]:
    """EERG's gradient: sorted micro-batches and target logits, against one padded batch with all logits."""
    # At so small a width the logits weigh more than in a 6B model, where leaving them out saves memory, not time.
    hidden, layers, vocabulary, count, scale = (64, 1, 500, 4, 0.3) if small else (192, 4, 8000, 16, 1.0)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32, "num_key_value_heads": 2, "head_dim": 32, "partial_rotary_factor": 0.5,
        "attention_bias": True, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    llm = freeze(GlmForCausalLM(GlmConfig(**sizes)))
    model = Elmd(llm, Projector(WIDTH, hidden), Prefix.create(llm, 16, dropout=0.0))
    trained = [p for p in model.parameters() if p.requires_grad]
    examples = MadeUp(drawn(count), vocabulary, tokens_per_character=scale)
    everything = list(range(count))
    task = TokenTask(
        model, {}, examples, Accelerator(cpu=True), batch_size=count, seed=0, evaluate=dict,
        micro_tokens=300 if small else EergConfig.micro_tokens,
    )  # fmt: skip
    weight = task.weight(everything)

    def gradients(total: float) -> list[Tensor]:
        found = [torch.tensor(total), *(p.grad.clone() for p in trained if p.grad is not None)]
        model.zero_grad(set_to_none=True)
        return found

    def ours() -> list[Tensor]:
        total = 0.0
        for loss, _ in task.losses(everything, rank=0, world=1):
            (loss / weight).backward()
            total += loss.item() / weight
        return gradients(total)

    def padded() -> list[Tensor]:
        batch = examples.batch(everything)
        logits = model(batch, keep=0).logits[:, :-1].float()  # 0: logits of all tokens
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        return gradients(loss.item())

    size = f"GLM of {hidden} x {layers}, vocabulary {vocabulary}, {count} samples of {min(examples.lengths)} to "
    return ours, padded, f"{size}{max(examples.lengths)} tokens, mean {statistics.mean(examples.lengths):.0f}"


def erm_loss(small: bool) -> tuple[Way, Way, str]:
    """Eq. 2-4 with gradients: vectorised, against a loop over anchors and one over pairs of samples."""
    batch, d, s, tau = (6, 16, 2, 0.5) if small else (ErmConfig.batch_size, 768, ErmConfig.slots, ErmConfig.temperature)
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(batch, d, generator=generator).requires_grad_()
    slots = torch.randn(batch, s, d, generator=generator).requires_grad_()
    labels = torch.arange(batch) % min(7, batch // 2)

    def vectorised() -> list[Tensor]:
        loss = emotion_loss(e, labels, tau).loss + separation_loss(slots, tau)
        return [loss.detach(), *torch.autograd.grad(loss, (e, slots))]

    def looped() -> list[Tensor]:
        anchors, pairs = [], []
        for i in range(batch):
            others = [k for k in range(batch) if k != i]
            log_p = (F.cosine_similarity(e[i], e[others], dim=-1) / tau).log_softmax(0)
            positives = [at for at, k in enumerate(others) if labels[k] == labels[i]]
            anchors.append(-log_p[positives].mean())
            for j in range(i + 1, batch):
                similarity = F.cosine_similarity(slots[i][:, None], slots[j][None, :], dim=-1)  # [s, s]
                pairs.append(-(similarity / tau).log_softmax(1).diagonal().mean())
        loss = torch.stack(anchors).mean() + torch.stack(pairs).mean()
        return [loss.detach(), *torch.autograd.grad(loss, (e, slots))]

    return vectorised, looped, f"batch {batch}, s = {s}, d = {d}"


BENCHMARKS = {"step-eerg": step_eerg, "erm-loss": erm_loss}


def compare(ours: Way, other: Way, rounds: int) -> None:
    """Assert equality (which also warms up), time both in turn, print medians, spread and ratio."""
    for a, b in zip(ours(), other(), strict=True):
        off = ((a - b).norm() / b.norm()).item()
        assert off < 1e-4, f"the two ways differ by {off:.1e}"
    seconds: dict[Way, list[float]] = {ours: [], other: []}
    for i in range(rounds):
        for way in (ours, other) if i % 2 else (other, ours):
            started = time.perf_counter()
            way()
            seconds[way].append(time.perf_counter() - started)
    for way, name in ((ours, "ours"), (other, "other")):
        times = [1000 * one for one in seconds[way]]
        print(f"  {name:<5} median {statistics.median(times):9.2f} ms   ({min(times):.2f} to {max(times):.2f})")
    ratios = [b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
    print(f"  ratio {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds)\n")


def main() -> None:
    names = "\n".join(f"  {name:<10} {make.__doc__}" for name, make in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=f"Both ways give equal results; ratio > 1: ours is faster.\n\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=9, help="times that each way is run (9)")
    parser.add_argument("--small", action="store_true", help="smallest size: shows that it runs, not how fast")
    args = parser.parse_args()
    if unknown := set(args.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in args.names or BENCHMARKS:
        ours, other, size = BENCHMARKS[name](args.small)
        print(f"{name}: {BENCHMARKS[name].__doc__}\n  {size}; {torch.get_num_threads()} threads")
        compare(ours, other, args.rounds)


if __name__ == "__main__":
    main()
