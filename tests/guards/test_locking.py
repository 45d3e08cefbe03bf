"""One training per run directory: guards/locking.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from cli import InputError
from guards.locking import locked

ROOT = Path(__file__).parents[2]


def test_who_failed_may_try_again_in_the_same_process(tmp_path):
    """In a notebook the traceback of what failed still holds the first lock."""
    first = locked(tmp_path)
    second = locked(tmp_path)
    assert first.closed and not second.closed
    second.close()


def test_a_second_process_is_kept_out_and_a_killed_one_leaves_no_lock(tmp_path):
    program = f"import time; from pathlib import Path; from guards.locking import locked; f = locked(Path({str(tmp_path)!r})); print(flush=True); time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    run.stdout.readline()
    with pytest.raises(InputError, match="another training writes there; wait for it, or choose another --out"):
        locked(tmp_path)
    run.kill()
    run.wait()
    locked(tmp_path).close()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match="nowhere: cannot be written .No such file or directory."):
        locked(tmp_path / "nowhere")
