"""`python -m tests.faults.soak` notices what it is there for; and a short life of the answering program."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cli import InputError
from clip import KEPT
from tests.faults.soak import LEAK, answer, family, growth, sample, watched


def running(code):
    return subprocess.Popen([sys.executable, "-c", code])


def test_growth_is_the_last_fifth_less_the_second_by_hand():
    """Ten samples: 100, 300, 500, 501, ...: medians of 500, 501 and of 506, 507; files of 5, 5 and of 7, 8."""
    memory = [100, 300, 500, 501, 502, 503, 504, 505, 506, 507]
    files = [1, 1, 5, 5, 5, 5, 5, 5, 7, 8]
    assert growth([(k, *both) for k, both in enumerate(zip(memory, files))]) == (6.0, 2.5)


def test_a_process_is_measured_with_its_children():
    """80 MiB and four files more in the one, 60 MiB in its child."""
    code = ("import subprocess, sys, time; held = bytearray(80 * 2**20); files = [open(sys.executable) for _ in range(4)]; "
            "subprocess.Popen([sys.executable, '-c', 'import time; held = bytearray(60 * 2**20); time.sleep(60)']); time.sleep(60)")
    with running("import time; time.sleep(60)") as plain, running(code) as process:
        time.sleep(2)
        try:
            (a, few), (b, more) = sample(plain.pid), sample(process.pid)
            assert 140 < b - a < 170 and more >= 2 * few + 4 - 1
        finally:
            for pid in family(process.pid) + [plain.pid]:
                os.kill(pid, signal.SIGKILL)


def test_a_leak_and_a_file_that_stays_open_are_noticed():
    code = "import time\nkept = []\nwhile True: kept.append((bytearray(4 * 2**20), open('/dev/null'))); time.sleep(0.05)"
    with running(code) as process:
        memory, files = growth(watched(process, 3, every=0.1))
        process.kill()
    assert memory > LEAK and files > 3


def test_a_program_that_ends_by_itself_ends_the_soak_in_one_line():
    with running("raise SystemExit(3)") as process, pytest.raises(InputError, match="it ended after .* with status 3"):
        watched(process, 20, every=0.05)


def test_the_answering_program_answers_and_keeps_no_more_lists_of_words_than_it_may(capsys):
    assert 0 < answer(photos=KEPT + 2) <= KEPT
    assert capsys.readouterr().out.count("written") == 2 * (KEPT + 2)
