"""`python -m elmd.sweep experiment=… seed=0,1,2 …`: the jobs of a sweep, each in processes of its own.

The jobs are those of `python -m elmd.train -m …`. Here each is trained and evaluated under `accelerate launch`,
several at a time where there are GPUs or slots for them, and one that fails does not stop the others. Jobs share
stages through `runs/`: a job that needs a stage which another job is running waits for it.

A command line becomes jobs (`expand`), which run in slots (`run`); `sweep.json` holds their states (`state`).
"""
