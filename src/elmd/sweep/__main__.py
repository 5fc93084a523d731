"""The command line of the sweep launcher."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from elmd import log
from elmd.cli import guard
from elmd.sweep.expand import expand, sweepable
from elmd.sweep.run import MODULES, Sweep, launch, slots_for, visible_gpus
from elmd.sweep.state import up_to_date


def sweep(arguments: Sequence[str], *, dry: bool = False) -> None:
    """Run, or only list, the jobs of a command line; exit code 1 if a job failed."""
    environment = dict(os.environ)  # as it was before any library wrote into it
    log.setup()
    jobs = expand(arguments)
    folder = jobs[0].folder.parent
    if dry:
        for job in jobs:
            print(f"# {job.name}", *(shlex.join(launch(job, module)) for module in MODULES.values()), sep="\n")
        log.logger.info("%d jobs of %s; nothing is started", len(jobs), folder)
        return
    slots = slots_for(jobs[0].cfg, [] if jobs[0].cfg.cpu else visible_gpus())
    done = up_to_date(jobs)
    log.logger.info(
        "%d jobs, %d of them up to date, %d at a time; logs: %s", len(jobs), len(done), len(slots), folder / "logs"
    )
    running = Sweep(folder, jobs, slots, done=done, environment=environment)
    running.run()
    running.record.show()
    log.logger.info("tables, figures and what is missing: python -m elmd.report %s", folder)
    print(f"artifact: {folder}", flush=True)
    if failed := running.record.count("failed"):
        fix = "correct what their logs say and run the same command again."
        print(f"error: {failed} of {len(jobs)} jobs failed; {fix}", file=sys.stderr)
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, `sys.argv` by default, and act."""
    parser = argparse.ArgumentParser(
        prog="python -m elmd.sweep",
        description="Train and evaluate every job of a sweep, each in processes of its own under accelerate launch.",
        epilog=f"""\
examples:
  python -m elmd.sweep experiment=demo_table2 seed=0,1,2
  python -m elmd.sweep experiment=demo_table3 seed=0 launcher.slots=2    two jobs at a time on CPU
  python -m elmd.sweep experiment=table3_m3ed seed=0,1,2 launcher.gpus=2 data.path=…    a job takes two GPUs
  python -m elmd.sweep experiment=demo ablation=none,no_v erm.slots=2,4  any comma list
  then: python -m elmd.report runs/experiments/NAME

experiments that are sweeps: {" ".join(sweepable())}

launcher.slots=N   jobs at a time (0: as many as there are GPUs for, one without a GPU)
launcher.gpus=N    GPUs of a job (1)

On CPU a job has one thread; OMP_NUM_THREADS=N gives it more. Run the same command again to resume after a break or to
try failed jobs again: what is done is reused.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and their commands, start nothing")
    parser.add_argument("override", nargs="*", help="as of python -m elmd.train; a comma list is swept over")
    given = parser.parse_intermixed_args(arguments)
    guard(lambda: sweep(given.override, dry=given.dry_run))


if __name__ == "__main__":
    main()
