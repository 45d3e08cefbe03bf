"""Signals: a training that is told to end finishes its step, saves, says how to go on, and ends with 128 + the signal.

    with stopping() as asked:            SIGTERM (kill, a queue's time limit), SIGHUP (a closed terminal), Ctrl-C
        for step in ...:
            if asked():                  0, or the number of the signal that came
                save, and raise Stopped(asked(), "stopped after ...")

The second signal ends the program at once, as if nobody had listened.  Under torchrun the agent hands signals on to its
processes; train.py sums what each was asked, so that all stop after the same step.

# ours: all of it; the exit status is the shell's convention.

Tests: tests/guards/test_stopping.py.  Read next: locking.py.
"""

import os
import signal
from contextlib import contextmanager

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name))


class Stopped(SystemExit):
    """The program was asked to stop, and did so in good order; its status is 128 + the signal."""

    def __init__(self, signum):
        super().__init__(128 + signum)


@contextmanager
def stopping():
    """Listen to SIGNALS inside the block; gives `asked() -> int`, 0 until one came.  Only in the main thread."""
    came = []

    def heard(signum, frame):
        if came:                                              # the second one: whoever sends it does not want to wait
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        came.append(signum)

    before = {signum: signal.signal(signum, heard) for signum in SIGNALS}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
