"""Signals: guards/stopping.py, and what train.py does when it hears one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guards.stopping import SIGNALS, Stopped, Stopping
from runs import changed, read_checkpoint
from tests.faults.kill import command
from train import load_training, parse, train

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


def test_two_processes_that_are_told_to_stop_save_once_and_one_process_goes_on(tmp_path):
    """torchrun hands SIGTERM on.  One line says how to go on; one process does, and its first losses are those of one alone."""
    words = command("san", 13, tmp_path / "run", ("--nproc_per_node=2",))
    words[words.index("--set=save_every=1")] = "--set=save_every=1000"
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as agent:
        log = tmp_path / "run" / "log.jsonl"
        while agent.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
            time.sleep(0.02)
        agent.send_signal(signal.SIGTERM)
        said, _ = agent.communicate(timeout=120)
    step = int(read_checkpoint(tmp_path / "run")[1]["step"])
    assert said.count("asked to stop") == 1 and f"asked to stop: {step} of 13 steps are saved" in said and 2 <= step < 12
    train(changed(load_training(tmp_path / "run"), stop_at=12), resume=True)              # here, and nothing is scored
    train(changed(parse(command("san", 13, tmp_path / "alone")[2:])[0], stop_at=12))
    (a, b) = ([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("run", "alone"))
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(12))
    for mine, other in zip(a, b):                             # sums in another order; steps let it grow
        assert mine["ce_2"] == pytest.approx(other["ce_2"], rel=1e-3)
