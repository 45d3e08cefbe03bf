"""Bugs that a contributor could make, one by one, and the promise that a test notices each.

A file of this package per room holds a list, MUTATIONS; `python -m tests.mutations` puts them in and runs the tests.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    file: str              # relative to the root
    what: str              # the bug, in a few words
    old: str               # occurs exactly once in the file; may span lines
    new: str
    tests: str = ""        # what pytest is given, words apart; "": the mirrored file, pat.py -> tests/test_pat.py
    survives: str = ""     # why no test can notice it; "": one must
