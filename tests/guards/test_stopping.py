"""Signals: guards/stopping.py, and what train.py does when it hears one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guards.stopping import SIGNALS, Stopped, Stopping

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_signal_asks_and_afterwards_all_is_as_before(signum):
    before = signal.getsignal(signum)
    with Stopping() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signum)
        assert asked() == signum
    assert signal.getsignal(signum) is before
    assert Stopped(signum).code == 128 + signum


def test_the_second_signal_ends_the_program_at_once():
    """A program that hears the first and would go on for a minute: killed by the second, so its status is minus the signal."""
    program = """
import time
from guards.stopping import Stopping
with Stopping():
    print(flush=True)
    time.sleep(30)
    time.sleep(30)
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    run.stdout.readline()
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(10) == -signal.SIGTERM and time.monotonic() - began < 10


def test_once_training_is_over_one_signal_ends_the_program():
    """Scores and pictures take minutes: who asks once then need not ask twice."""
    before = signal.getsignal(signal.SIGTERM)
    with Stopping() as asked:
        asked.end()
        assert signal.getsignal(signal.SIGTERM) is before
