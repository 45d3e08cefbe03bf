"""The short form of `python -m tests.faults.kill`."""

import subprocess

from tests.faults.kill import command, equal, killed_again_and_again


def test_a_run_that_is_killed_twice_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("san", 8, whole), check=True, capture_output=True)
    assert killed_again_and_again("san", 8, 2, killed)["kills"] == 2
    same, all_, logs = equal(whole, killed)
    assert same == all_ > 100 and logs
