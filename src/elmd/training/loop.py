"""The training loop of every stage, from top to bottom: rate, micro-batches, reduce, clip, step, log, evaluate, save.

What makes its results independent of machine and interruption:

- A *global* batch is a list of samples, a function of seed and epoch; the objective cuts a rank's share of it into
  micro-batches.
- Each micro-batch's loss is a *sum*, divided by the weight N of the global batch (its number of target tokens), which
  is known beforehand; gradients are then summed over ranks. So 1 × 8 = 8 × 1 micro-batches and 1 = 2 processes; a
  mean of means would weigh short targets more.
- Random numbers are reseeded for each step from (seed, step, rank), so step k draws the same whether or not the run
  was interrupted, and nothing about them needs saving.
- Only what trains is reduced and saved. The frozen model is in no file, and in no message between processes unless it
  is FSDP-sharded (see `elmd.models.sharding`).

When a process dies, the others cannot take another step: rank 0 saves the last whole one, and all report it.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from elmd.engine.store import BEST, CHECKPOINTS
from elmd.errors import TrainingError
from elmd.log import bar, is_main, logger
from elmd.plots import curves
from elmd.training import checkpoint
from elmd.training.plan import Plan

#: A batch by its samples: their positions in the objective's own list of training samples.
Positions = Sequence[int]


class Objective(Protocol):
    """What the loop trains, and by which loss."""

    #: What trains, by the name it has in checkpoints.
    modules: Mapping[str, nn.Module]

    def batches(self, epoch: int) -> list[Positions]:
        """The global batches of an epoch, equal on every rank."""
        ...

    def weight(self, batch: Positions) -> float:
        """N: what the summed loss of the whole global batch is divided by."""
        ...

    def losses(self, batch: Positions, rank: int, world: int) -> Iterator[tuple[Tensor, int]]:
        """For each micro-batch of this rank's share: (summed loss, tokens run). Backward follows each at once."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics on the selection split, equal on every rank."""
        ...


@dataclass
class Progress:
    """Where a training stands; saved with each checkpoint."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(objective: Objective, plan: Plan, folder: Path, accelerator: Accelerator, what: str) -> Progress:
    """Train `objective` by `plan`; continues from the newest checkpoint in `folder`.

    Leaves `metrics.jsonl`, TensorBoard events and `curves.png` in `folder`, and the best weights in the objective's
    modules;
    checkpoints and `best.safetensors` stay until the stage's result is finished.

    Raises:
        TrainingError: the loss is zero or not finite, or another process of the run died.
        SystemExit: 143 after SIGTERM, with a checkpoint written.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    trained = {name: [p for p in module.parameters() if p.requires_grad] for name, module in objective.modules.items()}
    parameters = [p for group in trained.values() for p in group]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": plan.rates[name]} for name, group in trained.items()],
        betas=(0.9, plan.beta2),
        weight_decay=plan.weight_decay,
    )

    saved = checkpoint.load_latest(folder / CHECKPOINTS, objective.modules, optimizer)
    progress = Progress(**saved) if saved else Progress()
    if saved:
        logger.info("%s: resuming from the checkpoint of step %d of %d", what, progress.step, plan.steps)
    journal = Journal(folder, progress.step) if is_main() else None
    stop = StopFlag()
    shown = bar(what, total=plan.steps, initial=progress.step, unit="step")

    try:
        if _due(progress, plan):  # at the start; or the run ended within an evaluation
            _evaluate(objective, plan, progress, folder, journal)
        started = time.perf_counter()
        for step, batch in itertools.islice(_stream(objective, progress.step), plan.steps - progress.step):
            # 1. Rates and random numbers of this step.
            for group, name in zip(optimizer.param_groups, trained, strict=True):
                group["lr"] = plan.rates[name] * plan.factor(step)
            torch.manual_seed((plan.seed * 1_000_003 + step) * 4096 + rank)

            # 2. Gradient of this rank's share, micro-batch by micro-batch, then the sum over ranks.
            weight = objective.weight(batch)
            loss, tokens = torch.zeros((), device=device), 0
            for micro_loss, micro_tokens in objective.losses(batch, rank, world):
                (micro_loss / weight).backward()
                loss, tokens = loss + micro_loss.detach().float() / weight, tokens + micro_tokens
            total = torch.stack(
                [loss, torch.tensor(float(tokens), device=device), torch.tensor(float(stop), device=device)]
            )
            reduce_gradients(parameters, total, world)
            value = total[0].item()
            if not math.isfinite(value) or value == 0.0:
                raise TrainingError(
                    f"the loss of step {step + 1} is {value}",
                    where=what,
                    fix="lower the learning rate, or look at samples "
                    + ", ".join(map(str, batch[:4]))
                    + " …; the checkpoint before it is kept",
                )

            # 3. Clip and step.
            norm = torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step = step + 1

            # 4. Log.
            seconds, started = time.perf_counter() - started, time.perf_counter()
            if journal:
                journal.write(
                    progress.step,
                    {
                        "loss": value,
                        "lr": optimizer.param_groups[0]["lr"],
                        "grad_norm": norm.item(),
                        "samples_per_s": len(batch) / seconds,
                        "tokens_per_s": total[1].item() / seconds,
                        "peak_gib": peak_memory(device),
                    },
                )
                shown.set_postfix(loss=f"{value:.3f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}", refresh=False)
                shown.update()

            # 5. Evaluate, keep the best, save.
            if _due(progress, plan):
                _evaluate(objective, plan, progress, folder, journal)
                started = time.perf_counter()
            stopping = total[2].item() > 0
            if is_main() and (stopping or progress.step % plan.checkpoint_every == 0):
                checkpoint.save(folder / CHECKPOINTS, progress.step, objective.modules, optimizer, vars(progress))
            if stopping:
                logger.warning(
                    "%s: stopped by a signal at step %d; run the same command to resume", what, progress.step
                )
                raise SystemExit(143)
    except RuntimeError as error:
        if not peer_died(error):
            raise
        newest = "the newest checkpoint"
        if is_main() and progress.step > 0:
            checkpoint.save(folder / CHECKPOINTS, progress.step, objective.modules, optimizer, vars(progress))
            newest = f"step {progress.step}, which is saved"
        shown.close()
        raise TrainingError(
            f"another process of this run died at step {progress.step + 1}",
            where=what,
            fix=f"see its own message, and run the same command to resume from {newest}",
        ) from error

    shown.close()
    stop.restore()
    accelerator.wait_for_everyone()
    checkpoint.load_tensors(folder / BEST, objective.modules)
    if journal:
        journal.close()
        curves(folder / "metrics.jsonl", folder / "curves.png", title=what)
    return progress


def reduce_gradients(parameters: Sequence[nn.Parameter], extra: Tensor, world: int) -> None:
    """Sum gradients and the vector `extra` [E] over ranks, in one message; a rank without a gradient adds zero."""
    if world == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]  # each of its parameter's shape; G numbers in all
    flat = torch.cat([extra.float(), *(gradient.float().flatten() for gradient in gradients)])  # [E + G]
    dist.all_reduce(flat)
    sizes = [len(extra), *(gradient.numel() for gradient in gradients)]
    for target, part in zip([extra, *gradients], flat.split(sizes), strict=True):
        target.copy_(part.view_as(target))


def peer_died(error: RuntimeError) -> bool:
    """Whether an error is a collective that another process did not take part in any more, as it is gone.

    NCCL's errors have a class; gloo's are recognised by the source file that they name.
    """
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _stream(objective: Objective, start: int) -> Iterator[tuple[int, Positions]]:
    """(step, global batch) from step `start`, epoch after epoch."""
    step = 0
    for epoch in itertools.count():
        batches = objective.batches(epoch)
        if not batches:
            raise TrainingError("there is no training sample", fix="look at the counts that stage=prepare printed")
        if step + len(batches) > start:
            for i, batch in enumerate(batches):
                if step + i >= start:
                    yield step + i, batch
        step += len(batches)


def _due(progress: Progress, plan: Plan) -> bool:
    """Whether the model as it stands is still to be evaluated."""
    now = progress.step % plan.evaluate_every == 0 or progress.step == plan.steps
    return now and not any(entry["step"] == progress.step for entry in progress.history)


def _evaluate(objective: Objective, plan: Plan, progress: Progress, folder: Path, journal: Journal | None) -> None:
    """Evaluate; write the trained tensors to `best.safetensors` if they are the best so far."""
    metrics = objective.evaluate()
    value = metrics[plan.select]
    progress.history.append({"step": progress.step, **metrics})
    better = progress.best is None or (value > progress.best if plan.higher_is_better else value < progress.best)
    if better:
        progress.best, progress.best_step = value, progress.step
        if is_main():
            checkpoint.save_tensors(folder / BEST, checkpoint.tensors(objective.modules))
    if journal:
        journal.write(progress.step, {f"valid/{key}": number for key, number in metrics.items()})
        shown = "  ".join(f"{key} {number:.4g}" for key, number in metrics.items())
        logger.info("step %d: %s%s", progress.step, shown, "  (best so far)" if better else "")


class Journal:
    """`metrics.jsonl` and TensorBoard events of a run; on resume, what came after the checkpoint is cut off."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = []
        if step and path.is_file():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the last line of a killed run
                    continue
                if entry["step"] <= step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self.file = path.open("a")
        self.events = SummaryWriter(folder / "events", purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for key, value in values.items():
            self.events.add_scalar(key, value, step)

    def close(self) -> None:
        self.file.close()
        self.events.close()


class StopFlag:
    """Becomes 1 when SIGTERM arrives; the loop then finishes its step, saves and leaves."""

    def __init__(self) -> None:
        self.raised = False
        self.before: Any = signal.signal(signal.SIGTERM, self._raise)

    def _raise(self, number: int, frame: Any) -> None:
        self.raised = True

    def __float__(self) -> float:
        return float(self.raised)

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self.before)
