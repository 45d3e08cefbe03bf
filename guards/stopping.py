"""Signals: a training that is told to end finishes its step, saves, says how to go on, and ends with 128 + the signal.

    with Stopping() as asked:            SIGTERM (kill, a queue's time limit), SIGHUP (a closed terminal), Ctrl-C
        for step in ...:
            if asked():                  0, or the number of the signal that came
                save, and raise Stopped(asked())
        asked.end()                      training is over: from here on a signal ends the program at once

The second signal, too, ends the program at once, as if nobody had listened.  Under torchrun the agent hands signals on to its
processes; train.py sums what each was asked, so that all stop after the same step.

# ours: all of it; the exit status is the shell's convention.

Tests: tests/guards/test_stopping.py.  Read next: locking.py.
"""

import os
import signal

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name))


class Stopped(SystemExit):
    """The program was asked to stop, and did so in good order; its status is 128 + the signal."""

    def __init__(self, signum):
        super().__init__(128 + signum)


class Stopping:
    """Listens to SIGNALS until `end`, or until its block is left; calling it gives 0 until one came.  Main thread only."""

    def __init__(self):
        self.came, self.before = 0, {}

    def __call__(self):
        return self.came

    def __enter__(self):
        self.before = {signum: signal.signal(signum, self.heard) for signum in SIGNALS}
        return self

    def heard(self, signum, frame):
        if self.came:                                         # the second one: whoever sends it does not want to wait
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.came = signum

    def end(self):
        """Whoever listened before listens again."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}

    def __exit__(self, *error):
        self.end()
