"""One training per run directory: a second one that is told to write there ends in one line.

    lock = locked(run)           holds RUN/.lock until lock.close(), or until the process ends, however it ends

The lock is the kernel's (flock) and belongs to the open file, so a killed process leaves none behind; the empty file
stays.  Only the first process of several takes it.  A process that asks again has it again: what it did there has ended.

# ours: all of it.

Tests: tests/guards/test_locking.py.  Read next: starting.py.
"""

import fcntl

from cli import InputError

HELD = {}                              # run -> lock file of this process: who failed here may try again here


def locked(run):
    """The open lock file of a run directory.  Raises InputError where another process holds it, or nothing can be written."""
    if run in HELD:
        HELD.pop(run).close()
    try:
        file = open(run / ".lock", "w")
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"{run}: another training writes there; wait for it, or choose another --out") from error
    except OSError:                                           # a file system without locks: nobody can be kept out
        pass
    HELD[run] = file
    return file
