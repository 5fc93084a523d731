"""`python -m elmd.train` that kills itself with SIGKILL at a chosen point; run by test_chain.py.

KILL_AT=step:N|finish:1 python killed_train.py OVERRIDES…
"""

from __future__ import annotations

import os
import signal

from elmd.engine.store import Store
from elmd.train import main
from elmd.training import loop

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
else:

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    Store.finish = die

main()
