"""`python -m elmd.train` that kills itself with SIGKILL at a chosen point; run by test_chain.py.

python killed_train.py step:N|checkpoint:N|finish:1 OVERRIDES…
"""

from __future__ import annotations

import os
import signal

from elmd.engine.store import Store
from elmd.train import main
from elmd.training import checkpoint, loop

what, at = os.environ["KILL_AT"].split(":")
count = 0


def die_on_call(number: int) -> bool:
    global count
    count += 1
    return count == number


if what == "step":
    reduce = loop.reduce_gradients

    def reduce_or_die(*arguments):
        if die_on_call(int(at)):
            os.kill(os.getpid(), signal.SIGKILL)
        reduce(*arguments)

    loop.reduce_gradients = reduce_or_die
elif what == "finish":

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    Store.finish = die
else:
    save = checkpoint.save_tensors

    def save_or_die(path, values):
        if path.name == "optimizer.safetensors" and die_on_call(int(at)):
            path.write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, values)

    checkpoint.save_tensors = save_or_die

main()
