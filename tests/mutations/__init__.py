"""Bugs on purpose: what a file of ours would compute with one line wrong, and the tests that have to notice."""

from typing import NamedTuple


class Mutation(NamedTuple):
    file: str              # of the root, as "pat.py"
    what: str              # the bug, in words
    old: str               # occurs exactly once in the file
    new: str
    tests: str = ""        # the test file that has to fail; "" is tests/test_FILE
    survives: str = ""     # why no test can notice
