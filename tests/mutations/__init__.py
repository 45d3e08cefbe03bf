"""One-line bugs that tests must catch."""

from typing import NamedTuple


class Mutation(NamedTuple):
    file: str                          # relative to the root
    what: str                          # the bug, in a few words
    old: str                           # occurs exactly once in the file
    new: str
    tests: str = ""                    # "": the test file that mirrors `file`
    survives: str = ""                 # why no test can catch it
